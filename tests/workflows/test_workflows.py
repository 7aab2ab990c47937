"""Every file in workflows/ runs in a real ComfyUI, on shrunk models and a real photograph.

What a user would load is queued over HTTP with model files, text encoder and image encoder replaced by small ones and
sizes and steps reduced; the nodes of this pack and their settings stay as they are in the file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from host.comfy_server import REPOSITORY, ComfyServer, Graph, Result
from host.servers import HOSTS
from host.shrunk import UNETS, build_checkpoint
from host.shrunk_transformers import (
    ANIMA_TEXT,
    POOLED,
    TEXT,
    build_siglip,
    build_transformer,
    build_transformer_adapter,
    build_transformer_loras,
)
from host.tiny_adapters import build_adapter, build_encoder, build_prompt
from host.tiny_lora_files import build_lora
from workflows import thumbnails, tidy
from workflows.graph import ALWAYS, FRONTEND_ONLY, Workflow, WorkflowError, to_prompt

# SDXL last: the server keeps a checkpoint only as long as the next prompt uses it
FILES = sorted(
    (REPOSITORY / "workflows").glob("*.json"), key=lambda file: ("sd_xl" in file.read_text("utf-8"), file.stem)
)
PHOTO = Path(__file__).parents[1] / "host" / "photo.jpg"
SIDE = 64
STEPS = 2
APPLY = "ImagePromptApply"
STEERING = frozenset(
    {
        APPLY,
        "ImagePromptApplyImage",
        "ImagePromptApplyTiled",
        "ImagePromptApplyFaceLoRA",
        "ImagePromptLoRAStrength",
        "ImagePromptLoRAStack",
        "ImagePromptLoRARows",
    }
)
TELLING = frozenset({
    "ImagePromptInspect", "ImagePromptSave", "ImagePromptLoRAInspect", "ImagePromptLoRASave", "ImagePromptLoRAExtract"
})  # fmt: skip
NEEDED = {
    "1 Try it, no download",
    "2 Try a style LoRA, no download",
    "3 Train an adapter, no download",
    "4 Where did the image act, no download",
    "9 The right files by need",
    "10 Image prompt, SD1.5",
    "11 Image prompt, SDXL",
    "12 Closer to the reference",
    "13 Style only",
    "14 Composition only",
    "15 Faces, FaceID",
    "16 Several references",
    "17 Two regions, two references",
    "18 Strength over the steps",
    "19 Image to image",
    "20 Inpainting",
    "21 A reference for each picture",
    "22 Cleaner with noise as negative",
    "23 Wide reference, one look",
    "24 Wide reference, in its place",
    "25 All in one node",
    "26 Save an image prompt",
    "27 Use a saved image prompt",
    "28 What an adapter is",
    "29 Where did the image act",
    "30 FLUX.1, XLabs",
    "31 FLUX.1, InstantX",
    "32 FLUX.1, two regions",
    "33 FLUX.1, image to image",
    "34 SD3.5 Large, InstantX",
    "35 Anima, a character",
    "40 LoRA by block and step",
    "41 Several LoRAs",
    "42 LoRAs by region",
    "43 What a LoRA is",
    "44 Convert or shrink a LoRA",
    "45 LoRA out of two checkpoints",
    "46 FLUX.1, LoRAs by region",
    "47 LoRA rows",
    "50 Train an IP-Adapter",
    "51 Train a LoRA",
}
FAMILIES = {
    "sd35": "sd3.5", "instantx": "instantx", "flux-ip-adapter": "xlabs", "Character_Reference": "anima-character"
}  # fmt: skip
"""Of adapters for transformers, by a part of the file's name."""
MISSING = {"flux": "this ComfyUI takes every Flux to be 3072 wide", "anima": "this ComfyUI has no Anima"}
TRAINING = (
    "3 Train an adapter, no download",
    "50 Train an IP-Adapter",
    "51 Train a LoRA",
)  # run by tests/host/test_training_node.py
IMAGES = {"21 A reference for each picture": 3} | dict.fromkeys(
    (
        "28 What an adapter is",
        "26 Save an image prompt",
        "43 What a LoRA is",
        "44 Convert or shrink a LoRA",
        "45 LoRA out of two checkpoints",
    ),
    0,
)  # others make one


def load(file: Path) -> Workflow:
    return json.loads(file.read_text(encoding="utf-8"))


class Shrunk:
    """A workflow made small enough for a test; `prompt()` gives it with other strengths or without the adapters."""

    def __init__(self, workflow: Workflow, server: ComfyServer, models: Path, adapters: Path) -> None:
        self.workflow, self.server, self.models, self.adapters = workflow, server, models, adapters
        self.object_info = server.object_info()
        checkpoints = [n["widgets_values"][0] for n in workflow["nodes"] if n["type"] == "CheckpointLoaderSimple"]
        loaded = [*checkpoints, *(n["widgets_values"][0] for n in workflow["nodes"] if n["type"] == "UNETLoader")]
        self.unet = "sdxl" if checkpoints and checkpoints[0].startswith("sd_xl") else "sd15"
        self.transformer = next(
            (kind for kind in ("flux", "sd3", "anima") if loaded and loaded[0].startswith(kind)), ""
        )
        self.demo = any(n["type"] == "ImagePromptDemoWorld" for n in workflow["nodes"])
        self.side = 384 if self.demo else SIDE
        """Of the saved pictures; those of the demo world are small enough as they are, and enlarged by the graph."""
        self.scale = (1024 if self.unet == "sdxl" or self.transformer else 512) // SIDE

    def prompt(self, *, strength: float | None = None, bypass: bool = False) -> tuple[Graph, list[str]]:
        """The prompt and the ids of nodes that save the exact pixels of each SaveImage."""
        graph = to_prompt(self.workflow, self.object_info, bypass=STEERING if bypass else frozenset())
        for node_id in [i for i, n in graph.items() if n["class_type"] == "PreviewAny" and "source" not in n["inputs"]]:
            del graph[node_id]  # it showed the report of a node that is bypassed
        pictures = 0
        vaes: list[tuple[str, int]] = []
        for node_id, node in [*graph.items()]:
            kind, inputs = node["class_type"], node["inputs"]
            match kind:
                case _ if self.demo:
                    inputs |= {"steps": STEPS} if kind == "KSampler" else {}
                case "UNETLoader" if self.transformer == "anima":
                    node["class_type"], node["inputs"] = "TestAnima", {}
                case "CheckpointLoaderSimple" | "UNETLoader" if self.transformer:
                    file = build_transformer(self.transformer, self.adapters)
                    node["class_type"] = "UNETLoader"
                    node["inputs"] = {
                        "unet_name": self.server.add_model("diffusion_models", file),
                        "weight_dtype": "default",
                    }
                    vaes += [(node_id, 2)]
                case "VAELoader":
                    node["class_type"], node["inputs"] = "TestVAE", {}
                case "CLIPTextEncode" if self.transformer:
                    seed = sum(inputs["text"].encode())
                    node["class_type"] = "TestConditioning"
                    width = ANIMA_TEXT if self.transformer == "anima" else TEXT
                    node["inputs"] = {"seed": seed, "width": width, "pooled": POOLED}
                case "ImagePromptLoadAdapter" if self.transformer:
                    family = next(name for part, name in FAMILIES.items() if part in inputs["file"])
                    inputs["file"] = self.server.add_model(
                        "ipadapter", build_transformer_adapter(family, self.adapters)
                    )
                case "ImagePromptLoadEncoder":
                    side = 512 if self.transformer == "anima" else 56  # Anima's family asks for its encoder's
                    encoder = build_siglip(self.adapters, side=side)
                    inputs["file"] = self.server.add_model("clip_vision", encoder, f"siglip_{side}.safetensors")
                case "CheckpointLoaderSimple":
                    inputs["ckpt_name"] = self.server.add_model("checkpoints", build_checkpoint(self.unet, self.models))
                case "ImagePromptLoadAdapter":
                    assert (inputs["file"].find("sdxl") >= 0) == (self.unet == "sdxl"), "adapter of another base model"
                    family = next((name for name in ("faceid", "plus") if name in inputs["file"]), "base")
                    file = build_adapter(family, self.unet, self.adapters)
                    inputs["file"] = self.server.add_model("ipadapter", file)
                case "CLIPTextEncode":
                    seed = sum(inputs["text"].encode())
                    node["class_type"] = "TestConditioning"
                    node["inputs"] = {"seed": seed, "width": UNETS[self.unet].text_width}
                case "ImagePromptLoadModels":
                    family, name = ("plus", "ip-adapter-plus_sd15.safetensors")
                    self.server.add_model("ipadapter", build_adapter(family, self.unet, self.adapters), name)
                    self.server.add_model("clip_vision", build_encoder(self.adapters))
                case "ImagePromptLoRARows":
                    rows = json.loads(inputs["rows"])
                    for row in rows:
                        row["file"] = self.lora(row["file"])
                        row |= {} if strength is None else {"strength": strength, "text_strength": strength}
                    inputs["rows"] = json.dumps(rows)
                case "CLIPVisionLoader":
                    node["class_type"], node["inputs"] = "TestClipVision", {"seed": 0}
                case "ImagePromptLoadFaceModel":
                    node["class_type"], node["inputs"] = "TestFaceModel", {}
                case "LoadImage":
                    pictures += 1
                    masked = any([node_id, 1] in list(other["inputs"].values()) for other in graph.values())
                    pixels, name = picture(pictures, masked)
                    if "panorama" in inputs["image"]:
                        pixels, name = np.concatenate([pixels, pixels[:, ::-1]], 1), f"wide_{name}"
                    inputs["image"] = self.server.upload_image(pixels, name)
                case "ImagePromptLoad":
                    inputs["file"] = self.server.add_model("image_prompts", build_prompt(self.adapters))
                case "KSampler":
                    inputs["steps"] = STEPS
                case "ImagePromptLoRAExtract":
                    for seed, name in enumerate(("base", "tuned")):
                        file = build_checkpoint("sd15_small", self.models, seed=seed)
                        inputs[name] = self.server.add_model("checkpoints", file)
                    inputs["rank"] = 2
            for name in [
                name
                for name in inputs
                if not self.demo and kind.startswith("ImagePromptLoRA") and name.startswith("file")
            ]:
                if name != "filename_prefix" and inputs[name] != "none":
                    inputs[name] = self.lora(inputs[name])
            for name in [name for name in inputs if kind in STEERING and name.startswith("strength")]:
                inputs[name] = inputs[name] if strength is None else strength
            for name in ("width", "height", "x", "y", "expand"):
                if isinstance(inputs.get(name), int) and not self.demo:
                    inputs[name] = inputs[name] // self.scale
        for source in vaes:  # of a whole checkpoint
            stand_in = graph.add("TestVAE")
            for node in graph.values():
                for name in [name for name, value in node["inputs"].items() if value == [*source]]:
                    node["inputs"][name] = [stand_in.id, 0]
        saved: list[str] = []
        for node in [n for n in graph.values() if n["class_type"] == "SaveImage"]:
            saved.append(graph.add("TestSaveTensor", value=node["inputs"]["images"]).id)
        return graph, saved

    def lora(self, name: str) -> str:
        """A small LoRA in place of one of this name; others for other names."""
        seed = sum(name.encode())
        if self.transformer:
            file = [*build_transformer_loras(self.transformer, self.adapters).values()][seed % 3]
        else:
            file = build_lora(self.unet, self.adapters, seed=seed)
        return self.server.add_model("loras", file)


def picture(number: int, masked: bool) -> tuple[np.ndarray, str]:
    """The photograph, another part of it for every number; with a transparent rectangle where a mask is painted."""
    photo = Image.open(PHOTO).convert("RGB")
    side = min(photo.size) // 2
    left, top = ((photo.width - side) * (number % 2), (photo.height - side) * (number // 2 % 2))
    part = photo.crop((left, top, left + side, top + side)).resize((SIDE, SIDE))
    if not masked:
        return np.asarray(part), f"part_{number}.png"
    alpha = np.full((SIDE, SIDE, 1), 255, np.uint8)
    alpha[16:48, 24:56] = 0
    return np.concatenate([np.asarray(part), alpha], 2), f"part_{number}_masked.png"


def test_every_promised_workflow_is_there() -> None:
    assert {file.stem for file in FILES} >= NEEDED


@pytest.mark.parametrize("file", [file for file in FILES if file.stem not in TRAINING], ids=lambda file: file.stem)
def test_workflow_runs_and_follows_its_image(
    server: ComfyServer, model_cache: Path, adapters: Path, file: Path
) -> None:
    shrunk = Shrunk(load(file), server, model_cache, adapters)
    if shrunk.transformer in MISSING and server.host.version.startswith("0.3."):
        pytest.skip(MISSING[shrunk.transformer])
    expected = IMAGES.get(file.stem, 1)

    def run(**variant: Any) -> tuple[Result, Graph, list[np.ndarray]]:
        graph, saved = shrunk.prompt(**variant)
        result = server.run(graph)
        return result, graph, [result.tensor(node) for node in saved]

    result, graph, steered = run()
    if expected == 0:
        assert any(result.text(i) for i, n in graph.items() if n["class_type"] in TELLING)
        return
    for node_id, node in graph.items():
        if node["class_type"] == "SaveImage":
            pictures = result.images(node_id)
            assert [p.shape for p in pictures] == [(shrunk.side, shrunk.side, 3)] * expected
            assert all(p.std() > 5 for p in pictures), "a flat picture"
    if server.host != HOSTS[0]:
        return  # strength 0 on every host is tests/host/test_nodes.py's; here it is three samplings for one
    _, _, at_zero = run(strength=0.0)
    _, _, without = run(bypass=True)
    for image, zero, plain in zip(steered, at_zero, without, strict=True):
        assert image.shape == (expected, shrunk.side, shrunk.side, 3)
        assert np.array_equal(zero, plain), "strength 0 is not the plain model"
        difference = np.abs(image - plain).reshape(expected, -1).mean(1)
        assert (difference > 0.002).all(), f"the image prompt changes next to nothing: {difference}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_workflow_is_tidy(file: Path) -> None:
    """What a person sees on opening it: named groups, a note, no nodes on top of each other in either renderer."""
    workflow = load(file)
    nodes = workflow["nodes"]
    notes = [str(node["widgets_values"][0]) for node in nodes if node["type"] in FRONTEND_ONLY]
    assert notes, "no note says what it is for"
    assert not any("`" in text for text in notes), "the newer renderer draws code in notes blue on blue"
    assert all(group["title"] for group in workflow["groups"])
    assert all(node.get("mode", ALWAYS) == ALWAYS for node in nodes)
    for node in nodes:
        assert node["size"][1] >= tidy.height(node), f"{node['type']} {node['id']} is taller in the newer renderer"
    boxes = {n["id"]: tidy.room(n) for n in nodes}
    for a, (ax, ay, aw, ah) in boxes.items():
        for b, (bx, by, bw, bh) in boxes.items():
            apart = ax + aw <= bx or bx + bw <= ax or ay + ah <= by or by + bh <= ay
            assert a == b or apart, f"nodes {a} and {b} overlap"
    groups = [tuple(group["bounding"]) for group in workflow["groups"]]
    inside = {
        number
        for number, (x, y, w, h) in boxes.items()
        if any(gx <= x and gy <= y and x + w <= gx + gw and y + h <= gy + gh for gx, gy, gw, gh in groups)
    }
    assert inside == set(boxes), "nodes outside every group"
    for one, (ax, ay, aw, ah) in enumerate(groups):
        for bx, by, bw, bh in groups[one + 1 :]:
            assert ax + aw <= bx or bx + bw <= ax or ay + ah <= by or by + bh <= ay, "groups overlap"
    ids = [link[0] for link in workflow["links"]]
    assert len(ids) == len(set(ids))
    assert max(ids, default=0) == workflow["last_link_id"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_workflow_says_where_its_files_are(file: Path) -> None:
    """Models, packs, links and room are those that ``python tests/workflows/tidy.py`` writes."""
    assert file.read_text("utf-8") == tidy.text_of(tidy.tidied(load(file))), (
        f"run python tests/workflows/tidy.py: {file.name} holds something else"
    )


def test_every_workflow_has_the_picture_that_the_demo_world_drew() -> None:
    """512 pixels, a few kilobytes, where both hosts' template browsers look; no picture is left of a workflow that is gone."""
    wanted = thumbnails.drawn()
    assert set(wanted) == set((REPOSITORY / "workflows").glob("*.jpg")), "run python tests/workflows/thumbnails.py"
    for file, picture in wanted.items():
        with Image.open(file) as found:
            difference = np.abs(np.asarray(found, np.float32) - np.asarray(picture, np.float32)).mean()
        assert difference < 6, f"{file.name} is not what the sheet shows: run python tests/workflows/thumbnails.py"
        assert file.stat().st_size < 50_000


def test_models_are_those_that_the_widgets_name() -> None:
    """What ComfyUI offers to download, by the name that it looks for in the node; every public file has a link."""
    seen: set[str] = set()
    for file in FILES:
        nodes = load(file)["nodes"]
        text = "\n".join(str(node["widgets_values"][0]) for node in nodes if node["type"] in FRONTEND_ONLY)
        for node in nodes:
            packs = {"comfy-core", "ipadapter-studio"} if node["type"] not in FRONTEND_ONLY else {None}
            assert node["properties"].get("cnr_id") in packs
            for model in node["properties"].get("models", ()):
                assert model["name"] in node["widgets_values"]
                assert f"[{model['name']}]({model['url']}) in models/{model['directory']}" in text
                seen.add(model["name"])
            for value in node.get("widgets_values") or ():
                if (
                    isinstance(value, str)
                    and value.endswith((".safetensors", ".bin"))
                    and not value.startswith(("my_", "demo-world"))
                ):
                    assert f"[{value}](https://" in text, f"{file.name} has no link for {value}"
    assert len(seen) > 15, "next to nothing can be downloaded"


# --- the converter itself, on rules that the files above do not all use -----------------------------------------------

INFO = {
    "Make": {"input": {"required": {}}, "output": ["MODEL"]},
    "Change": {
        "input": {
            "required": {"model": ["MODEL"], "seed": ["INT", {}], "factor": ["FLOAT", {"default": 1.0}]},
            "optional": {"mask": ["MASK"], "kind": [["a", "b"]]},
        },
        "input_order": {"required": ["model", "seed", "factor"], "optional": ["mask", "kind"]},
        "output": ["MODEL"],
    },
    "Show": {"input": {"required": {"model": ["MODEL"]}}, "output": []},
}


def node(node_id: int, kind: str, links: tuple[int | None, ...] = (), **more: Any) -> dict[str, Any]:
    inputs = [{"name": "model", "type": "MODEL", "link": link} for link in links]
    return {"id": node_id, "type": kind, "inputs": inputs, "outputs": [{"type": "MODEL"}], "mode": 0} | more


def chain(**change: Any) -> dict[str, Any]:
    changer = node(2, "Change", (1,), widgets_values=[7, "randomize", 0.5, "b"]) | change
    nodes = [node(1, "Make"), changer, node(3, "Reroute", (2,)), node(4, "Show", (3,)), node(5, "Note")]
    return {"nodes": nodes, "links": [[1, 1, 0, 2, 0, "MODEL"], [2, 2, 0, 3, 0, "*"], [3, 3, 0, 4, 0, "MODEL"]]}


def test_converter_names_widgets_and_drops_seed_control_notes_and_reroutes() -> None:
    assert to_prompt(chain(), INFO) == {
        "1": {"class_type": "Make", "inputs": {}},
        "2": {"class_type": "Change", "inputs": {"seed": 7, "factor": 0.5, "kind": "b", "model": ["1", 0]}},
        "4": {"class_type": "Show", "inputs": {"model": ["2", 0]}},
    }


def test_converter_takes_widgets_that_became_inputs() -> None:
    workflow = chain()
    workflow["nodes"][1]["inputs"].append({"name": "factor", "type": "FLOAT", "link": 4, "widget": {"name": "factor"}})
    workflow["nodes"].append({"id": 6, "type": "PrimitiveNode", "widgets_values": [0.25, "fixed"]})
    workflow["links"].append([4, 6, 0, 2, 1, "FLOAT"])
    assert to_prompt(workflow, INFO)["2"]["inputs"]["factor"] == 0.25


@pytest.mark.parametrize("how", [{"mode": 4}, {}], ids=["in the file", "by type"])
def test_converter_bypasses(how: dict[str, Any]) -> None:
    prompt = to_prompt(chain(**how), INFO, bypass=frozenset() if how else frozenset({"Change"}))
    assert prompt == {
        "1": {"class_type": "Make", "inputs": {}},
        "4": {"class_type": "Show", "inputs": {"model": ["1", 0]}},
    }


def test_converter_drops_muted_nodes_and_what_they_gave() -> None:
    assert to_prompt(chain(mode=2), INFO)["4"] == {"class_type": "Show", "inputs": {}}


def test_converter_refuses_what_the_frontend_could_not_load() -> None:
    with pytest.raises(WorkflowError, match="widget values"):
        to_prompt(chain(widgets_values=[7, 0.5]), INFO)
    with pytest.raises(WorkflowError, match="Change, which this server does not have"):
        to_prompt(chain(), {k: v for k, v in INFO.items() if k != "Change"})
