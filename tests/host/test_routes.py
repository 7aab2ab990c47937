"""``GET /image_prompt/…`` over HTTP: facts of files that the lists offer, a sentence for every other name."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

import io
import json
import os
import re
import runpy
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import save_file

from host.comfy_server import ComfyServer
from host.shrunk import build_checkpoint
from host.shrunk_transformers import build_transformer
from host.tiny_adapters import build_adapter
from host.tiny_lora_files import lora_tensors


def get(server: ComfyServer, path: str, **query: str) -> tuple[int, str, bytes]:
    """Status, content type and body of a route."""
    url = f"{server.url}/image_prompt/{path}?{urllib.parse.urlencode(query)}"
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.status, answer.headers.get_content_type(), answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers.get_content_type(), error.read()


def table(server: ComfyServer, path: str, status: int = 200, **query: str) -> dict[str, Any]:
    found, kind, body = get(server, path, **query)
    assert (found, kind) == (status, "application/json"), body
    return json.loads(body)


WORDS = {"modelspec.trigger_phrase": "<img src=x onerror=alert(1)>, sks style"}


@pytest.fixture(scope="module")
def lora(server: ComfyServer) -> str:
    """A LoRA below a folder, with a name that no address may hold as it is."""
    name = "styles/a & b=ü#?.safetensors"
    path = server.models("loras") / name
    path.parent.mkdir(exist_ok=True)
    save_file(lora_tensors("sd15_small"), path, metadata=WORDS)
    return name.replace("/", os.sep)


def test_facts_of_a_lora(server: ComfyServer, lora: str) -> None:
    facts = table(server, "lora/facts", file=lora)
    assert facts["base_model"] == "SD1.5"
    assert facts["ranks"] == {"4": sum(facts["modules"].values())}
    assert list(facts["algorithms"]) == ["LoRA"]
    assert facts["trigger_words"] == ["<img src=x onerror=alert(1)>", "sks style"]
    assert facts["not_applied"] == []


def test_blocks_of_a_lora_and_what_a_selector_gives_them(server: ComfyServer, lora: str) -> None:
    found = table(server, "lora/blocks", file=lora, selector="in*: 0, in1 attn2: 0.5")
    shares = {block["block"]: (block["low"], block["high"]) for block in found["blocks"]}
    assert shares["in1"] == (0.0, 0.5)
    assert shares["in2"] == (0.0, 0.0)
    assert shares["mid1"] == (1.0, 1.0)
    assert found["rules"] == [{"where": "in*", "factor": 0.0}, {"where": "in1 attn2", "factor": 0.5}]
    assert "nonsense" in table(server, "lora/blocks", 400, file=lora, selector="nonsense: 1")["error"]


def test_presets_are_ours_and_the_users(server: ComfyServer) -> None:
    assert "SD-OUTALL" in table(server, "lora/presets", base_model="SD1.5")["presets"]
    file = server.base / "user/image_prompt/lora_presets.txt"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("FACE: in*: 0\n")
    assert table(server, "lora/presets", base_model="SDXL")["own"] == {"FACE": "in*: 0"}
    file.write_text("FACE\n")
    assert "line 1" in table(server, "lora/presets", 400, base_model="SDXL")["error"]
    file.unlink()


def test_a_changed_file_is_read_again(server: ComfyServer, lora: str) -> None:
    path = server.models("loras") / "changes.safetensors"
    for rank in (2, 3):
        save_file(lora_tensors("sd15_small", rank=rank), path)
        assert list(table(server, "lora/facts", file=path.name)["ranks"]) == [str(rank)]


def test_the_heat_map_is_a_picture(server: ComfyServer, lora: str) -> None:
    status, kind, body = get(server, "lora/heatmap", file=lora)
    assert (status, kind) == (200, "image/png")
    with Image.open(io.BytesIO(body)) as picture:
        assert picture.width > 200
        assert picture.height > 100


# --- adapters and presets ---------------------------------------------------------------------------------------------


def test_facts_of_an_adapter(server: ComfyServer, tmp_path: Path) -> None:
    file = build_adapter("plus", "sd15_small", tmp_path)
    name = "faces/a & b=ü#?.safetensors"
    path = server.models("ipadapter") / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(file.read_bytes())
    facts = table(server, "inspect", file=name.replace("/", os.sep))
    assert (facts["family"], facts["feature"]) == ("plus", "penultimate")
    assert facts["feature_dim"] == 32
    assert "family" in facts["text"]
    path.write_bytes(build_adapter("base", "sd15_small", tmp_path).read_bytes())
    assert table(server, "inspect", file=name.replace("/", os.sep))["family"] == "base", "a changed file is read again"


def test_a_pickle_of_an_adapter_runs_nothing(server: ComfyServer, tmp_path: Path) -> None:
    import pickle

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    (server.models("ipadapter") / "evil.bin").write_bytes(pickle.dumps({"image_proj": Evil()}))
    assert table(server, "inspect", 400, file="evil.bin")["error"]
    assert not (tmp_path / "ran").exists()


def test_the_presets(server: ComfyServer) -> None:
    found = table(server, "presets")
    names = [preset["name"] for preset in found["presets"]]
    node = server.object_info("ImagePromptApply")["input"]["required"]
    offered = node["preset"][0] if isinstance(node["preset"][0], list) else node["preset"][1]["options"]
    assert names == list(offered)
    assert len(names) == 16
    assert all(len(preset["meaning"]) > 10 for preset in found["presets"])
    needs = {preset["name"]: preset["needs"] for preset in found["presets"]}
    assert needs["linear"] == ""
    assert needs["weak middle"] == "middle blocks"
    assert "style and composition" in needs["style transfer"]
    assert "V only" in found["scalings"]
    assert "IPAdapter_plus" in found["compatibilities"]


HOSTILE = ("", "../../secret.safetensors", "/etc/passwd", "..\\secret", "a\0b", "x" * 1001, "no.safetensors", "\ud800")


@pytest.mark.parametrize(
    ("path", "kind"),
    [("lora/facts", "loras"), ("lora/heatmap", "loras"), ("lora/blocks", "loras"), ("inspect", "ipadapter")],
)
def test_other_names_are_refused_in_a_sentence(server: ComfyServer, path: str, kind: str) -> None:
    (server.models(kind).parent / "secret.safetensors").write_bytes(b"secret")
    broken = server.models(kind) / "broken.safetensors"
    broken.write_bytes(b"no tensors")
    for name in (*HOSTILE, "broken.safetensors"):
        error = table(server, path, 400, file=name.encode("utf-8", "surrogatepass").decode("latin-1"))["error"]
        assert len(error) < 500
        assert "secret" not in error.replace(name, "")
        assert str(server.base) not in error
    assert "file=" in table(server, path, 400)["error"]


# --- old graphs -------------------------------------------------------------------------------------------------------


def post(server: ComfyServer, path: str, body: bytes, status: int = 200) -> dict[str, Any]:
    request = urllib.request.Request(f"{server.url}/image_prompt/{path}", body, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            found, text = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        found, text = error.code, error.read()
    assert found == status, text
    return json.loads(text)


def old_graph() -> dict[str, Any]:
    """A noise node of the old pack: the smallest thing that can be converted."""
    nodes = [
        {
            "id": i,
            "type": "IPAdapterNoise",
            "pos": [0, 0],
            "widgets_values": ["fade", 1, 2],
            "inputs": [],
            "outputs": [],
        }
        for i in (1, 2)
    ]
    return {"nodes": nodes, "links": [], "version": 0.4}


def test_a_posted_graph_is_converted(server: ComfyServer) -> None:
    assert "IPAdapterNoise" in table(server, "migrate")["types"]
    for nodes, expected in ((None, 2), ([2], 1), ([], 0)):
        body = {"workflow": old_graph()} | ({} if nodes is None else {"nodes": nodes})
        made = post(server, "migrate", json.dumps(body).encode())
        assert (made["found"], made["rewritten"]) == (2, expected)
        assert sum(node["type"] == "ImagePromptNoise" for node in made["workflow"]["nodes"]) == expected
        assert made["report"]


def test_what_is_posted_has_limits(server: ComfyServer) -> None:
    many = {"nodes": [{"id": i, "type": "A"} for i in range(20_001)], "links": []}
    for body, told in (
        (b"", "JSON"),
        (b"{}", "no workflow"),
        (b"\xff\xfe{", "encoding"),
        (b"[" * 5000, "nested"),
        (b'{"workflow": 3}', "no workflow"),
        (json.dumps({"workflow": many}).encode(), "20,001 nodes"),
        (b'{"workflow": "' + b"x" * (33 * 2**20) + b'"}', "more than 32 MiB"),
    ):
        assert told in post(server, "migrate", body, 400)["error"]


@pytest.mark.parametrize(
    ("kind", "base_model", "groups"),
    [
        ("sd15", "SD1.5", {"input": 6, "middle": 1, "output": 9}),
        ("flux", "Flux", {"double": 2, "single": 2}),
        ("sd3", "SD3", {"joint": 2}),
    ],
)
def test_layers_of_a_model_are_told_from_its_header(
    server: ComfyServer, model_cache: Path, kind: str, base_model: str, groups: dict[str, int]
) -> None:
    """As ComfyUI builds it: UNets in checkpoints, transformers in files of their own."""
    folder = "checkpoints" if kind == "sd15" else "diffusion_models"
    built = build_checkpoint(kind, model_cache) if kind == "sd15" else build_transformer(kind, model_cache)
    file = server.add_model(folder, built)
    first = next(iter(groups))
    found = table(server, "sites", kind=folder, file=file, sites=f"all: 0.5, {first}: 2, t1: 0")
    assert found["base_model"] == base_model
    layers = found["layers"]
    assert {name: sum(layer["group"] == name for layer in layers) for name in groups} == groups
    assert [layer["low"] for layer in layers[:2]] == [2.0, 0.0]
    assert ("style transfer" in found["presets"]) == (kind == "sd15")
    assert set(found["presets"]["linear"].values()) == {1.0}
    assert "matches no site" in table(server, "sites", 400, kind=folder, file=file, sites="nowhere: 1")["error"]


def test_layers_of_the_demo_world_are_told_without_a_file(server: ComfyServer) -> None:
    found = table(server, "sites", kind="demo", sites="all: 0.5, middle: 2")
    groups = [layer["group"] for layer in found["layers"]]
    assert {group: groups.count(group) for group in groups} == {"input": 2, "middle": 1, "output": 4}
    assert [layer["low"] for layer in found["layers"]] == [2.0 if group == "middle" else 0.5 for group in groups]


def test_models_that_are_none_are_refused(server: ComfyServer) -> None:
    lora_file = server.models("checkpoints") / "lora.safetensors"
    save_file(lora_tensors("sd15_small"), lora_file)
    for query, word in (
        ({"kind": "loras", "file": "a"}, "kind="),
        ({"kind": "checkpoints", "file": "../secret"}, "none of the files"),
        ({"kind": "checkpoints", "file": lora_file.name}, "ComfyUI"),
    ):
        assert word in table(server, "sites", 400, **query)["error"]


PAGE = Path(__file__).resolve().parents[2] / "nodes/web/docs/guides/http.md"
ADDRESS = "http://127.0.0.1:8188"


def test_what_the_guide_shows_runs_as_written(
    server: ComfyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = PAGE.read_text(encoding="utf-8").replace(ADDRESS, server.url)
    (script,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "guide.py").write_text(script, encoding="utf-8")
    runpy.run_path("guide.py")
    with Image.open("sunflower.png") as picture:
        assert picture.size == (64, 64)
    addresses = re.findall(r"^curl [^']*'(http.*)'$", text, re.MULTILINE)
    assert len(addresses) == 4
    for address in addresses:
        with urllib.request.urlopen(address, timeout=60) as answer:
            assert answer.status == 200
