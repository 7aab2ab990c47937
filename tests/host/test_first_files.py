"""A ComfyUI with no model on disk: what it offers, what it says is missing, and what it picks once files are there."""

from __future__ import annotations

import json
import urllib.error
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from host.comfy_server import ComfyServer, ExecutionFailed, Graph, GraphRejected, Host
from host.servers import HOSTS
from host.shrunk import UNETS, build_checkpoint, cross_attention_widths
from host.shrunk_transformers import SIGLIP_WIDTH, build_siglip
from ipadapter_core.downloads import DOWNLOADS
from tiny import tiny_state

EMPTY = {
    "ImagePromptLoadAdapter": ("file", "ipadapter"),
    "ImagePromptLoadEncoder": ("file", "clip_vision"),
    "ImagePromptLoad": ("file", "image_prompts"),
    "ImagePromptLoRAExtract": ("tuned", "checkpoints"),
}
"""Nodes with a list of files, and the folder that the list is of; lists of LoRAs and of what trains have the demo world then."""


@pytest.fixture(scope="module", params=HOSTS or [None], ids=lambda host: host.name if host else "no-comfyui")
def bare(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    host: Host | None = request.param
    if host is None:
        pytest.skip("no ComfyUI at $COMFYUI_PATH or ~/comfy/ComfyUI")
    with ComfyServer(host, tmp_path_factory.mktemp("bare")) as running:
        yield running


def nodes_of_the_host(server: ComfyServer) -> list[str]:
    """What ComfyUI's own loader of LoRAs lists."""
    kind, *more = server.object_info()["LoraLoader"]["input"]["required"]["lora_name"]
    return more[0]["options"] if kind == "COMBO" else kind


def told(server: ComfyServer, kind: str, **inputs: Any) -> str:
    """The sentence with which a node fails."""
    graph = Graph()
    node = graph.add(kind, **inputs)
    graph.add("PreviewAny", source=node)
    with pytest.raises(ExecutionFailed) as failed:
        server.run(graph)
    assert failed.value.exception_type == "InvalidInputError", "without the path of this folder"
    return failed.value.message


def test_an_empty_folder_says_so_in_the_list_and_when_run(bare: ComfyServer) -> None:
    nodes = bare.pack_nodes()
    for kind, (name, folder) in EMPTY.items():
        options = nodes[kind]["input"]["required"][name][1]["options"]
        assert options == [f"no file in models/{folder} yet"], kind
    sentence = told(bare, "ImagePromptLoadAdapter", file="no file in models/ipadapter yet")
    for part in (str(bare.models("ipadapter")), DOWNLOADS["ip-adapter_sd15.safetensors"].where, "press R"):
        assert part in sentence
    sentence = told(bare, "ImagePromptLoadEncoder", file="no file in models/clip_vision yet")
    assert DOWNLOADS["CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"].where in sentence
    (demo,) = nodes["ImagePromptLoRAInspect"]["input"]["required"]["file"][1]["options"]
    assert demo == "demo-world-style.safetensors", "the demo world's LoRA needs no download"
    assert nodes_of_the_host(bare) == [], "it is on nobody else's list"
    bare.models("loras").mkdir(parents=True, exist_ok=True)
    own = bare.models("loras") / "zebra.safetensors"
    own.write_bytes(b"")
    try:
        (_, info) = bare.pack_nodes()["ImagePromptLoRAInspect"]["input"]["required"]["file"]
        assert info["options"] == ["zebra.safetensors", demo], "behind people's own"
        assert nodes_of_the_host(bare) == ["zebra.safetensors"]
    finally:
        own.unlink()
    # before it runs, or on a host that looks at no such lists, when it does
    with pytest.raises((GraphRejected, ExecutionFailed), match="no file in models/ipadapter yet"):
        bare.run({"1": {"class_type": "ImagePromptInspect", "inputs": {"adapter": ["2", 0]}}} | {
            "2": {"class_type": "ImagePromptLoadAdapter", "inputs": {"file": "ip-adapter_sd15.safetensors"}}
        })  # fmt: skip


def need(server: ComfyServer, checkpoint: str, wish: str, **more: Any) -> tuple[Graph, Any]:
    graph = Graph()
    model = graph.add("CheckpointLoaderSimple", ckpt_name=checkpoint)
    found = graph.add("ImagePromptLoadModels", model=model, need=wish, lora_strength=0.6, provider="CPU")
    return graph, found


def fails(server: ComfyServer, checkpoint: str, wish: str) -> str:
    graph, found = need(server, checkpoint, wish)
    graph.add("PreviewAny", source=found[5])
    with pytest.raises(ExecutionFailed) as failed:
        server.run(graph)
    return failed.value.message


def needs(server: ComfyServer, **query: str) -> list[dict[str, Any]]:
    return server.get("/image_prompt/needs?" + urllib.parse.urlencode(query))["files"]


def test_files_of_a_need_are_told_before_anything_is_there(bare: ComfyServer) -> None:
    """A model that is missing is known by its name."""
    found = needs(bare, need="faceid", kind="checkpoints", file="sd_xl_base_1.0.safetensors")
    assert [one["part"] for one in found] == ["adapter", "image encoder ViT-H/14", "LoRA", "face model"]
    assert [one["folder"] for one in found] == ["ipadapter", "clip_vision", "loras", "insightface/models"]
    for one in found:
        public = DOWNLOADS[one["public"]["name"]]
        assert (one["file"], one["public"]["url"], one["comes_as"]) == ("", public.url, public.comes_as)
    for query, word in (
        ({"need": "grand", "kind": "checkpoints", "file": "sd_xl_base_1.0.safetensors"}, "'grand' is none of"),
        ({"need": "face", "kind": "loras", "file": "a"}, "kind="),
        ({"need": "face", "kind": "checkpoints", "file": "../../secret.safetensors"}, "does not tell"),
        ({"need": "face", "kind": "diffusion_models", "file": "flux1-dev.safetensors"}, "for this model there is"),
        ({"need": "face", "kind": "demo"}, "Demo World has its own"),
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            needs(bare, **query)
        assert word in json.loads(refused.value.read())["error"]


def test_models_are_picked_by_need_or_named_with_their_place(
    bare: ComfyServer, model_cache: Path, adapters: Path, tmp_path: Path
) -> None:
    sd15 = bare.add_model("checkpoints", build_checkpoint("sd15", model_cache))
    sentence = fails(bare, sd15, "face")
    for part in (str(bare.models("ipadapter")), DOWNLOADS["ip-adapter-plus-face_sd15.safetensors"].where):
        assert part in sentence

    shape = UNETS["sd15"]
    sizes: dict[str, Any] = {"token_dim": shape.text_width, "channels": (*cross_attention_widths(shape),)}
    for family, name in (("base", "b.safetensors"), ("plus", "a.safetensors"), ("faceid", "face.safetensors")):
        feature = {} if family == "faceid" else {"feature_dim": SIGLIP_WIDTH}
        save_file(tiny_state(family, **sizes, **feature), tmp_path / name)
        bare.add_model("ipadapter", tmp_path / name)
    adapter, encoder = needs(bare, need="general", kind="checkpoints", file=sd15)
    assert (adapter["file"], encoder["file"], encoder["part"]) == ("a.safetensors", "", "image encoder custom")
    sentence = fails(bare, sd15, "general")
    assert "'a.safetensors' reads the image encoder custom" in sentence
    assert str(bare.models("clip_vision")) in sentence
    assert "onnxruntime" in fails(bare, sd15, "faceid"), "what finds faces is missing"

    bare.add_model("clip_vision", build_siglip(adapters), "siglip.safetensors")
    graph, found = need(bare, sd15, "general")
    report = graph.add("PreviewAny", source=found[5])
    prompt = graph.add(
        "ImagePromptEncode", adapter=found[1], clip_vision=found[2],
        image=graph.add("EmptyImage", width=64, height=64, batch_size=1, color=90000),
        crop="center", combine="concat", strengths="", unconditional="auto", per_latent=False,
    )  # fmt: skip
    applied = graph.add(
        "ImagePromptApply", model=found[0], adapter=found[1], image_prompt=prompt, strength=1.0, preset="linear",
        scaling="V only", start=0.0, end=1.0,
    )  # fmt: skip
    shown = graph.add("ImagePromptInspect", adapter=found[1], model=applied)
    result = bare.run(graph)
    (text,) = result.text(report)
    assert text.splitlines()[0].split()[:2] == ["adapter", "a.safetensors"]
    assert text.splitlines()[1].split()[-1] == "siglip.safetensors"
    assert "16 sites, this adapter fits all of them" in result.text(shown)[0]


# --- said before anything runs ----------------------------------------------------------------------------------------

TYPOS = {
    ("ImagePromptSchedule", "curve"): {"0: 1, half: 0.3": "cannot read 'half: 0.3' in the curve"},
    ("ImagePromptSchedule", "sites"): {
        "output 1": "cannot read 'output 1' in the site table",
        "all: 0, ouput 3: 1": "'ouput 3' in the site table is a place of no model (did you mean output?)",
    },
    ("ImagePromptLoRAStrength", "selector"): {"atn2: 0.5": "'atn2'"},
    ("ImagePromptEncode", "strengths"): {"1, a half": "cannot read 'a half'"},
    ("ImagePromptTrainLoRA", "targets"): {"atn2: 1": "'atn2'"},
}
READABLE = {
    ("ImagePromptSchedule", "curve"): ["", "0: 1, 0.5: 2"],
    ("ImagePromptSchedule", "sites"): ["", "double 0-9: 0.5, t3: 0", "joint: 1, block 2: 0, style: 2"],
    ("ImagePromptLoRAStrength", "selector"): [
        "",
        "SD-OUTALL",
        "FLUX-DBL-FRONT",
        "DBL-FRONT",
        ",".join(["1"] * 17),
        "all: 0, out3-5: 0.8",
    ],
    ("ImagePromptEncode", "strengths"): ["", "1, -0.5"],
    ("ImagePromptTrainLoRA", "targets"): ["", "all: 0, attn2: 1"],
}


def refused(server: ComfyServer, kind: str, **inputs: Any) -> list[str]:
    """What the node's own check refuses before the graph runs; what else is missing does not count here."""
    graph = Graph()
    graph.add("PreviewAny", source=graph.add(kind, **inputs))
    try:
        prompt = server.submit(graph)
    except GraphRejected as rejected:
        found = [error for node in rejected.errors["node_errors"].values() for error in node["errors"]]
        return [error["details"] for error in found if error["type"] == "custom_validation_failed"]
    server.post("/queue", {"delete": [prompt]})
    return []


@pytest.mark.parametrize("entry", TYPOS, ids=lambda entry: " ".join(entry))
def test_typos_are_told_before_anything_runs(bare: ComfyServer, entry: tuple[str, str]) -> None:
    kind, name = entry
    inputs = {
        key: more[0]["default"]
        for key, (_, *more) in bare.object_info(kind)["input"]["required"].items()
        if more and "default" in more[0]
    }
    for text, sentence in TYPOS[entry].items():
        told = refused(bare, kind, **{**inputs, name: text})
        assert told, f"{name} of {kind} is not read before the run: {text}"
        assert all(sentence in one for one in told)
        assert any(one.startswith(f"{name} - ") for one in told)
    for good in READABLE[entry]:
        assert refused(bare, kind, **{**inputs, name: good}) == [], good
