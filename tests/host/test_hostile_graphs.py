"""Graphs of strangers: every input of every node, ours and the old pack's, with values that no good graph has.

Each is refused by ComfyUI, or in one sentence of ours, or harmless; nothing is read, written, fetched or run that a graph
may not, and the server goes on answering.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
import time
import urllib.error
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from host.comfy_server import PACK_NAME, ComfyServer, Graph, Link
from host.servers import HOSTS
from host.shrunk import UNETS, build_checkpoint
from host.tiny_adapters import build_adapter, build_prompt
from host.tiny_lora_files import build_lora
from tiny_towers import pe_core

CPU = 2.0
"""Seconds of the server's CPU that one value may take; what hangs takes minutes."""
MEBIBYTES = 10

# What the trainer's Python is here: the checks of a graph come before it, and a real one takes seconds to say no. A shell's
# script, as it is started some hundred times and any Python takes half a second.
TRAINER = f"""#!/bin/sh
if [ -e "${{0%/*}}/real" ]; then exec {shlex.quote(sys.executable)} "$@"; fi
echo '{{"error": "this Python trains nothing"}}'
exit 1
"""


@dataclass
class Trap:
    """A server, and everything around it that a graph must not touch."""

    server: ComfyServer
    outside: Path
    port: int
    listener: socket.socket
    checkpoint: str
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def mark(self) -> Path:
        return self.outside / "ran"

    def touched(self) -> bool:
        try:
            self.listener.accept()[0].close()
        except BlockingIOError:
            return False
        return True

    def tree(self) -> dict[str, tuple[int, int]]:
        """Files that no graph may change: those outside of the server's folder, and inside all but what servers write."""
        written = [self.server.base / name for name in ("output", "temp", "user", "server.log")]
        found: dict[str, tuple[int, int]] = {}
        for root in (self.outside, self.server.base):
            for folder, folders, names in os.walk(root):
                folders[:] = [name for name in folders if Path(folder, name) not in written and name != "__pycache__"]
                for path in (Path(folder, name) for name in names):
                    if path not in written:
                        stat = path.lstat()
                        found[str(path)] = (stat.st_size, stat.st_mtime_ns)
        return found

    def cpu(self) -> float:
        """Seconds that the server has computed."""
        assert self.server.process is not None
        parts = Path(f"/proc/{self.server.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(parts[11]) + int(parts[12])) / os.sysconf("SC_CLK_TCK")


@pytest.fixture(scope="module", params=HOSTS or [None], ids=lambda host: host.name if host else "no-comfyui")
def trap(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, model_cache: Path, adapters: Path
) -> Iterator[Trap]:
    host = request.param
    if host is None:
        pytest.skip("no ComfyUI at $COMFYUI_PATH or ~/comfy/ComfyUI")
    root = tmp_path_factory.mktemp("hostile")
    outside = root / "outside"
    outside.mkdir()
    for name in ("secret.png", "secret.txt", "secret.safetensors", "secret.ipadpt"):
        (outside / name).write_bytes(b"secret")
    (root / "owned/pictures").mkdir(parents=True)
    (root / "owned/leads out").symlink_to(outside)
    python = root / "python"
    python.write_text(TRAINER)
    python.chmod(0o755)
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    server = ComfyServer(host, root / "base")
    checkpoint = server.add_model("checkpoints", build_checkpoint("sd15_small", model_cache))
    server.add_model("ipadapter", build_adapter("base", "sd15_small", adapters), "a.safetensors")
    server.add_model("ipadapter", build_adapter("plus", "sd15_small", adapters), "plus.safetensors")
    pe_core(root / "pe.safetensors")
    server.add_model("clip_vision", root / "pe.safetensors")
    server.add_model("loras", build_lora("sd15_small", adapters), "a.safetensors")
    (server.models("diffusers") / "tiny").mkdir()
    (server.models("diffusers") / "tiny/model_index.json").write_text("{}")
    for folder in ("input", "output/image_prompts"):
        (server.base / folder).mkdir(parents=True, exist_ok=True)
        (server.base / folder / "a.ipadpt.safetensors").write_bytes(build_prompt(adapters).read_bytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPADAPTER_TRAIN_PYTHON", str(python))
        patch.setenv("IMAGE_PROMPT_FOLDERS", os.pathsep.join(["not/whole", str(root / "owned")]))
        with server, listener:
            everything = server.object_info()
            mine = {
                name: node for name, node in everything.items() if node["python_module"] == f"custom_nodes.{PACK_NAME}"
            }
            yield Trap(server, outside, listener.getsockname()[1], listener, checkpoint, mine)


# --- graphs that would run -------------------------------------------------------------------------------------------

FIRST_VERSION = {f"image_{number}" for number in range(1, 5)}
"""Of IPAdapterEncoder, which with them does what it did before March 2024."""
FILES = {"base_model": "tiny", "image_encoder": "inside the base model's folder", "start_from": "nothing"}


def link_of(kind: str, trap: Trap, graph: Graph) -> Link | None:
    """A good value for a socket; None where the tests have none."""
    made = graph.__dict__.setdefault("made", {})
    if kind not in made:
        made[kind] = _make(kind, trap, graph)
    return made[kind]


def _make(kind: str, trap: Trap, graph: Graph) -> Link | None:
    def of(wanted: str) -> Any:
        return link_of(wanted, trap, graph)

    match kind:
        case "MODEL":
            return graph.add("CheckpointLoaderSimple", ckpt_name=trap.checkpoint)[0]
        case "CLIP_VISION":
            return graph.add("TestClipVision", seed=0)[0]
        case "IMAGE":
            return graph.add("EmptyImage", width=64, height=64, batch_size=2, color=255)[0]
        case "MASK":
            return graph.add("SolidMask", value=1.0, width=64, height=64)[0]
        case "LATENT":
            return graph.add("EmptyLatentImage", width=64, height=64, batch_size=1)[0]
        case "CONDITIONING":
            return graph.add("TestConditioning", seed=0, width=UNETS["sd15_small"].text_width)[0]
        case "IMAGE_PROMPT_ADAPTER":
            return graph.add("ImagePromptLoadAdapter", file="plus.safetensors")[0]
        case "IPADAPTER":
            return graph.add("IPAdapterModelLoader", ipadapter_file="a.safetensors")[0]
        case "IMAGE_PROMPT":
            return node_of("ImagePromptEncode", trap, graph)[0]
        case "IMAGE_PROMPT_SCHEDULE":
            return node_of("ImagePromptSchedule", trap, graph)[0]
        case "IMAGE_PROMPT_RECORDING":
            return node_of("ImagePromptRecord", trap, graph)[1]
        case "IMAGE_PROMPT_FACE_MODEL" | "INSIGHTFACE":
            return graph.add("TestFaceModel")[int(kind == "INSIGHTFACE")]
        case "EMBEDS":
            encoder = graph.add(
                "IPAdapterEncoder",
                ipadapter=of("IPADAPTER"),
                image=of("IMAGE"),
                clip_vision=of("CLIP_VISION"),
                weight=1.0,
            )
            return encoder[0]
        case "IPADAPTER_PARAMS":
            return node_of("IPAdapterRegionalConditioning", trap, graph)[0]
        case "IP_ADAPTER_FLUX":
            return node_of("LoadFluxIPAdapter", trap, graph)[0]
        case "IP_ADAPTER_FLUX_INSTANTX":
            return node_of("IPAdapterFluxLoader", trap, graph)[0]
        case "IP_ADAPTER_SD3_INSTANTX":
            return node_of("IPAdapterSD3Loader", trap, graph)[0]
        case "CLIP_VISION_OUTPUT":
            return graph.add("CLIPVisionEncode", clip_vision=of("CLIP_VISION"), image=of("IMAGE"), crop="center")[0]
        case "WEIGHTS_STRATEGY":
            return node_of("IPAdapterWeights", trap, graph)[5]
        case _:
            return None


def inputs_of(info: dict[str, Any], *sections: str) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    for section in sections or ("required", "optional"):
        for name, (kind, *more) in info["input"].get(section, {}).items():
            yield name, kind, more[0] if more else {}


def is_choice(kind: Any) -> bool:
    return isinstance(kind, list) or kind == "COMBO"


def options_of(kind: Any, limits: dict[str, Any]) -> list[str]:
    return kind if isinstance(kind, list) else limits["options"]


def node_of(name: str, trap: Trap, graph: Graph) -> Any:
    """A node of a class with good values for all that it needs, and all sockets that there is a value for."""
    values: dict[str, Any] = {}
    for key, kind, limits in inputs_of(trap.info[name]):
        if is_choice(kind):
            values[key] = FILES.get(key, (options_of(kind, limits) or ["none"])[0])
        elif kind in ("INT", "FLOAT", "STRING", "BOOLEAN"):
            if "default" in limits:
                values[key] = limits["default"]
        elif key not in FIRST_VERSION and (link := link_of(kind, trap, graph)) is not None:
            values[key] = link
    return graph.add(name, **values)


def graph_of(name: str, trap: Trap) -> tuple[Graph, str]:
    """A whole graph around one node; its id."""
    graph = Graph()
    node = node_of(name, trap, graph)
    if trap.info[name]["output"]:
        graph.add("PreviewAny", source=node[0])
    return graph, node.id


# --- what happens to it ----------------------------------------------------------------------------------------------


def ask(trap: Trap, graph: Graph) -> str:
    """Queue it; "" if ComfyUI refused it, else what came of it: "done", or "type: message" of the exception."""
    body = json.dumps({"prompt": graph}).encode()
    try:
        prompt = json.loads(trap.server._http("/prompt", body))["prompt_id"]
    except urllib.error.HTTPError as error:
        error.read()
        return f"refused {error.code}"
    while not (history := trap.server.get(f"/history/{prompt}")):
        assert trap.server.process is not None
        assert trap.server.process.poll() is None, trap.server.log[-3000:]
        time.sleep(0.005)
    trap.server.post("/history", {"delete": [prompt]})
    for kind, details in history[prompt]["status"]["messages"]:
        if kind == "execution_error":
            return f"{details['exception_type']}: {details['exception_message']}"
    return "done"


OURS = ("AdapterError", "UnknownFormatError", "UnsafeFileError", "CorruptFileError", "IncompatibleAdapterError", "IncompatibleEncoderError",
        "InvalidInputError", "NotUnicodeError", "TrainingFailed")  # fmt: skip


def complaint(outcome: str) -> str:
    """What is wrong with an outcome; "" for one that may be."""
    if outcome in ("done", "refused 400"):
        return ""
    kind, _, message = outcome.partition(": ")
    message = message.strip()
    if kind not in OURS:  # by its name alone, which no other class of ComfyUI's or Python's has
        return "a foreign exception"
    if len(message) > 1500 or not all(line.isprintable() for line in message.split("\n")) or message.count("\n") > 1:
        return "not one sentence"
    return "it tells a secret" if "secret-content" in message else ""


def test_every_node_runs_with_good_values(trap: Trap) -> None:
    """Else the test below would test nothing. Those that need files which are not here say so."""
    outcomes = {name: ask(trap, graph_of(name, trap)[0]) for name in trap.info}
    bad = {name: outcome for name, outcome in outcomes.items() if complaint(outcome) or outcome.startswith("refused")}
    assert bad == {}
    done = [name for name, outcome in outcomes.items() if outcome == "done"]
    assert len(done) >= 45, outcomes


# --- what was once possible ------------------------------------------------------------------------------------------


def upload(trap: Trap, path: str, content: bytes, kind: str = "output") -> None:
    """What any client may do: POST /upload/image."""
    folder, _, name = path.rpartition("/")
    fields = {"type": kind, "subfolder": folder, "overwrite": "true"}
    parts = [f'Content-Disposition: form-data; name="{key}"\r\n\r\n{value}'.encode() for key, value in fields.items()]
    head = f'Content-Disposition: form-data; name="image"; filename="{name}"\r\nContent-Type: application/octet-stream\r\n\r\n'
    body = b"".join(b"--x\r\n" + part + b"\r\n" for part in [*parts, head.encode() + content]) + b"--x--\r\n"
    trap.server._http("/upload/image", body, "multipart/form-data; boundary=x")
    assert (trap.server.base / kind / path).read_bytes() == content


def train(trap: Trap, kind: str = "ImagePromptTrain", **changes: Any) -> str:
    graph, node = graph_of(kind, trap)
    graph[node]["inputs"] |= changes
    return ask(trap, graph)


TRAINERS = ("ImagePromptTrain", "ImagePromptTrainLoRA")


@pytest.mark.parametrize("kind", TRAINERS)
def test_no_command_and_no_address_is_a_place_of_pictures(trap: Trap, kind: str) -> None:
    commands = (
        f"pipe:touch {trap.mark}; true .tar",
        f" PIPE:touch {trap.mark} .tar",
        f"http://127.0.0.1:{trap.port}/x.tar",
    )
    for text in commands:
        assert "no addresses and no commands" in train(trap, kind, pictures=text)
        assert "cannot be set from a graph" in train(trap, kind, settings=f"data.path={text}")
    assert not trap.mark.exists()
    assert not trap.touched()


@pytest.mark.parametrize("kind", TRAINERS)
def test_settings_and_names_lead_nowhere(trap: Trap, kind: str) -> None:
    before = trap.tree()
    for key in (
        "output.folder",
        "output.name",
        "data.path",
        "data.cache",
        "model.base",
        "model.config",
        "adapter.start_from",
        "lora.start_from",
    ):
        assert "cannot be set from a graph" in train(trap, kind, settings=f"{key}={trap.outside}/secret")
    for name in ("../../outside/x", str(trap.outside), "a\nb", " ", "-rf", "[x]*", "x" * 300, "a\0b", "con", ".x"):
        outcome = train(trap, kind, name=name)
        assert "must be a plain file name" in outcome or "no character of a text" in outcome, outcome
    for place in (
        str(trap.outside),
        "/etc",
        "../outside",
        "..",
        f"{trap.outside}/secret.txt",
        "a/../../outside [output]",
    ):
        assert "lies outside of the folders that may be used" in train(trap, kind, pictures=place)
    for setting in (
        "output.keep=1000000",
        "watch.sample_count=1000000",
        "train.batch=100000",
        "data.resolution=100000",
    ):
        assert "Error: " in train(trap, kind, settings=setting)
    assert trap.tree() == before


def test_uploads_are_neither_run_nor_read_as_settings(trap: Trap) -> None:
    """Who can upload can fill the folder of a run that is then started, or gone on with."""
    planted = f"open({str(trap.mark)!r}, 'a').write(__name__)".encode()
    for name in (
        "torch",
        "ipadapter_core",
        "sitecustomize",
        "accelerate",
        "diffusers",
        "datasets",
        "json",
        "numpy",
        "PIL",
    ):
        upload(trap, f"ipadapter_training/planted/{name}.py", planted)
    for name in (
        "job.toml",
        "result.json",
        "train.log",
        "pyvenv.cfg",
        "matplotlibrc",
        "stop",
        "model configs/unet/config.json",
        "cache/x.json",
    ):
        upload(
            trap, f"ipadapter_training/planted/{name}", b'{"auto_map": {"AutoConfig": "torch.X"}, "file": "../../x"}'
        )
    real = Path(os.environ["IPADAPTER_TRAIN_PYTHON"]).with_name("real")
    real.touch()
    try:
        outcome = train(trap, name="planted")
    finally:
        real.unlink()
    assert "TrainingFailed" in outcome
    assert "Traceback" not in outcome
    assert not trap.mark.exists()


def test_files_of_others_stay(trap: Trap) -> None:
    """A name with a path, an existing file, a folder of another program."""
    upload(trap, "loras/converted_00001_.safetensors", b"somebody's")
    upload(trap, "loras/converted_00001.safetensors", b"somebody's")
    graph, node = graph_of("ImagePromptLoRASave", trap)
    for prefix in ("converted", "a/converted", "a\\converted", "%year%/converted"):
        graph[node]["inputs"]["filename_prefix"] = prefix
        assert ask(trap, graph) == "done", prefix
    output = trap.server.base / "output/loras"
    for name in ("converted_00001_", "converted_00001"):
        assert (output / f"{name}.safetensors").read_bytes() == b"somebody's"
    assert sorted(path.name for path in (output / "a").iterdir()) == [
        "converted_00001.safetensors",
        "converted_00002.safetensors",
    ]
    for prefix in (
        "../x",
        "/tmp/x",
        "a/../../x",
        "..",
        "x\n",
        "\ud800",
        "x" * 300,
        "",
        "a//b",
        "%date:yyyy%",
        "con",
        "C:\\x",
    ):
        graph[node]["inputs"]["filename_prefix"] = prefix
        assert complaint(outcome := ask(trap, graph)) == "", outcome
        assert outcome != "done", prefix


def test_marks_lead_only_into_their_folders(trap: Trap) -> None:
    """Where ComfyUI checks nothing: through a link, and in the old pack's loader."""
    for kind, key in (("ImagePromptLoad", "file"), ("IPAdapterLoadEmbeds", "embeds")):
        graph, node = graph_of(kind, trap)
        anything = graph.add("TestAnything", text="")
        graph[node]["inputs"][key] = anything[0]
        for name in ("a.ipadpt.safetensors [input]", "image_prompts/a.ipadpt.safetensors [output]"):
            graph[anything.id]["inputs"]["text"] = json.dumps(name)
            offered = kind == "IPAdapterLoadEmbeds" or name.endswith("[input]")
            assert (ask(trap, graph) == "done") == offered, name
        for name in (
            "../../outside/secret.ipadpt [input]",
            f"{trap.outside}/secret.ipadpt",
            "../base/input/../../outside/secret.ipadpt [temp]",
        ):
            graph[anything.id]["inputs"]["text"] = json.dumps(name)
            outcome = ask(trap, graph)
            assert "outside of the folders" in outcome or "the list offers" in outcome, outcome


def test_the_owners_folders_are_read(trap: Trap) -> None:
    folder = Path(os.environ["IMAGE_PROMPT_FOLDERS"].split(os.pathsep)[1])
    assert "this Python trains nothing" in train(trap, pictures=str(folder / "pictures"))
    assert "this Python trains nothing" in train(trap, pictures="")
    assert "leads by a link out" in train(trap, pictures=str(folder / "leads out"))


def test_the_pack_answers_http_in_one_place(trap: Trap) -> None:
    """Its table of routes, which ``test_routes.py`` tries as hard as this file tries graphs."""
    graph = Graph()
    node = graph.add("TestRoutes")
    modules = trap.server.run(graph).text(node)
    assert any("server" in module for module in modules)
    ours = {module for module in modules if PACK_NAME in module or "ipadapter_core" in module}
    assert {module.partition(f"{PACK_NAME}.")[2] for module in ours} == {"nodes.host.routes"}


# --- hostile values --------------------------------------------------------------------------------------------------

HUGE = "x" * MEBIBYTES * 2**20
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN")


def texts(trap: Trap) -> list[Any]:
    outside, mark = trap.outside, trap.mark
    return [
        "../../outside/secret.png", f"{outside}/secret.png", str(outside), "/etc/passwd", f"file://{outside}/secret.png",
        f"http://127.0.0.1:{trap.port}/x.tar", f"pipe:touch {mark}; true .tar", f"$(touch {mark})", f"`touch {mark}`", "a\0b", "a\nb", "\ud800",
        "", " ", "-rf", "[x]*", "con", "a/../../b", "x" * 300, HUGE, "re:(\\w+\\.?)+!", "all" + " " * 9000 + "x", "all: " + "1" * 9000 + "x",
        "[" * 9000, "9" * 9000, f"data.path=pipe:touch {mark}; true .tar", f"output.folder={outside}", "output.name=../../../outside/victim",
        "0:1," * 2400, "0: nan, 1: inf", "1e308,-1e308", True, {"__value__": ["a", "b"]}, {"a": 1},
    ]  # fmt: skip


def values_for(trap: Trap, kind: Any) -> list[Any]:
    """Values in the graph itself, which ComfyUI looks at for widgets, and not for sockets."""
    if is_choice(kind):
        names = [
            "../../outside/secret.ipadpt [input]",
            f"{trap.outside}/secret.ipadpt",
            "../outside/secret.ipadpt [output]",
            "a\0b",
            "",
        ]
        return [*names, None, 3, {"__value__": ["a"]}, {"a": 1}]
    numbers = [10**30, -(10**30), float("nan"), float("inf"), "nan", "x", {"__value__": [1, 2]}, {"a": 1}]
    return {
        "STRING": texts(trap),
        "INT": numbers,
        "FLOAT": [*numbers, 1e308],
        "BOOLEAN": ["x", float("nan"), {"__value__": []}],
    }.get(
        kind if isinstance(kind, str) else "",
        [
            "text",
            3,
            True,
            {"a": 1},
            {"__value__": [1]},
            {"__value__": {"ipadapter": {"model": {"image_proj": {"a": 1}, "ip_adapter": {"b": 2}}}}},
        ],
    )


def linked_for(trap: Trap, kind: Any) -> list[Any]:
    """Values through a link, which ComfyUI never looks at."""
    if is_choice(kind):
        return [
            "../../outside/secret.ipadpt [input]",
            "../outside/secret.ipadpt [temp]",
            f"{trap.outside}/secret.ipadpt",
            "a\0b",
            "x" * 300,
            3,
            ["a"],
        ]
    if kind == "STRING":
        return [f"{trap.outside}/secret.png", f"pipe:touch {trap.mark}", "a\0b", 3, ["a"], {"a": 1}]
    if kind in ("INT", "FLOAT"):
        return [10**30, -(10**9), 10**9, float("nan"), 1e308, "3", [1e308], {"a": 1}]
    return ["text", 3, [1], {"a": 1}]


class Turns:
    """Hostile values for inputs of one name and kind: beside the newest host the first node gets all of them, each later one,
    and each beside older hosts, the next few.

    The old pack's nodes share most of their inputs and the code behind them; all values for all would take minutes.
    """

    FEW = 3

    def __init__(self) -> None:
        self.rest: list[tuple[Any, bool]] = []

    def next_ones(self, trap: Trap, kind: Any) -> list[tuple[Any, bool]]:
        if not self.rest:
            values, links = values_for(trap, kind), linked_for(trap, kind)
            self.rest = [(value, False) for value in values] + [(value, True) for value in links]
            if trap.server.host == HOSTS[0]:
                return self.rest
        chosen, self.rest = self.rest[: self.FEW], self.rest[self.FEW :] + self.rest[: self.FEW]
        return chosen


def test_every_input_withstands_hostile_values(trap: Trap) -> None:
    before, problems, slow, count, most = trap.tree(), [], [], 0, 0.0
    turns: defaultdict[tuple[str, str], Turns] = defaultdict(Turns)
    for name, info in trap.info.items():
        good, node = graph_of(name, trap)
        anything = good.add("TestAnything", text="0")
        for key, kind, _ in inputs_of(info):
            for value, linked in turns[key, str(kind)].next_ones(trap, kind):
                inputs, text = good[node]["inputs"], good[anything.id]["inputs"]
                kept = inputs.get(key)
                if linked:
                    inputs[key], text["text"] = anything[0], json.dumps(value)
                else:
                    inputs[key] = value
                began, outcome = trap.cpu(), ask(trap, good)
                used, count = trap.cpu() - began, count + 1
                most = max(most, used)
                inputs[key] = kept
                if kept is None:
                    del inputs[key]
                problem = complaint(outcome)
                case = f"{name}.{key} {'<-' if linked else '='} {str(value)[:60]!r}"
                if problem:
                    problems.append(f"{case}: {problem}: {outcome[:200]}")
                if used > CPU:
                    slow.append(f"{case}: {used:.1f} s")
                if trap.touched():
                    problems.append(f"{case}: fetched an address")
                if trap.mark.exists():
                    problems.append(f"{case}: ran a command")
                    trap.mark.unlink()
    print(count, "values", trap.cpu(), "s of the server, at most", most, "for one,", time.process_time(), "s here")
    after = trap.tree()
    changed = sorted(path for path in before.keys() | after.keys() if before.get(path) != after.get(path))
    assert problems == []
    assert slow == []
    assert changed == []
    assert trap.server.get("/system_stats")
