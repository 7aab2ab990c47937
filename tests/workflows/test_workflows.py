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
)
from host.tiny_adapters import build_adapter, build_prompt
from host.tiny_lora_files import build_lora
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
    }
)
TELLING = frozenset({
    "ImagePromptInspect", "ImagePromptSave", "ImagePromptLoRAInspect", "ImagePromptLoRASave", "ImagePromptLoRAExtract"
})  # fmt: skip
NEEDED = {
    "sd15_text_to_image", "sdxl_text_to_image", "plus_adapter", "several_references", "regional_masks_two_adapters",
    "style_only", "composition_only", "image_to_image", "inpainting", "scheduled_strength", "batch", "inspect_adapter",
    "lora_strength", "lora_stack", "inspect_lora", "convert_lora", "extract_lora", "lora_regions_and_image_prompt",
    "train_ip_adapter", "train_lora", "face_prompt", "image_in_one_node", "save_image_prompt", "load_image_prompt",
    "tiled_reference", "tiles_in_place", "noise_as_negative", "flux_xlabs", "flux_instantx", "flux_two_regions",
    "flux_image_to_image", "sd35_instantx", "anima_character",
}  # fmt: skip
FAMILIES = {
    "sd35": "sd3.5", "instantx": "instantx", "flux-ip-adapter": "xlabs", "anima_character": "anima-character"
}  # fmt: skip
"""Of adapters for transformers, by a part of the file's name."""
MISSING = {"flux": "this ComfyUI takes every Flux to be 3072 wide", "anima": "this ComfyUI has no Anima"}
TRAINING = ("train_ip_adapter", "train_lora")  # run by tests/host/test_training_node.py
IMAGES = {"batch": 3} | dict.fromkeys(
    ("inspect_adapter", "save_image_prompt", "inspect_lora", "convert_lora", "extract_lora"), 0
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
            for name in [name for name in inputs if kind.startswith("ImagePromptLoRA") and name.startswith("file")]:
                if name != "filename_prefix" and inputs[name] != "none":
                    seed = sum(inputs[name].encode())
                    inputs[name] = self.server.add_model("loras", build_lora(self.unet, self.adapters, seed=seed))
            for name in [name for name in inputs if kind in STEERING and name.startswith("strength")]:
                inputs[name] = inputs[name] if strength is None else strength
            for name in ("width", "height", "x", "y", "expand"):
                if isinstance(inputs.get(name), int):
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
            assert [p.shape for p in pictures] == [(SIDE, SIDE, 3)] * expected
            assert all(p.std() > 5 for p in pictures), "a flat picture"
    if server.host != HOSTS[0]:
        return  # strength 0 on every host is tests/host/test_nodes.py's; here it is three samplings for one
    _, _, at_zero = run(strength=0.0)
    _, _, without = run(bypass=True)
    for image, zero, plain in zip(steered, at_zero, without, strict=True):
        assert image.shape == (expected, SIDE, SIDE, 3)
        assert np.array_equal(zero, plain), "strength 0 is not the plain model"
        difference = np.abs(image - plain).reshape(expected, -1).mean(1)
        assert (difference > 0.002).all(), f"the image prompt changes next to nothing: {difference}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_workflow_is_tidy(file: Path) -> None:
    """What a person sees on opening it: named groups, a note, no nodes on top of each other."""
    workflow = load(file)
    nodes = workflow["nodes"]
    assert any(node["type"] in FRONTEND_ONLY for node in nodes), "no note says which files go where"
    assert all(group["title"] for group in workflow["groups"])
    assert all(node.get("mode", ALWAYS) == ALWAYS for node in nodes)
    title = 30
    boxes = {n["id"]: (n["pos"][0], n["pos"][1] - title, n["size"][0], n["size"][1] + title) for n in nodes}
    for a, (ax, ay, aw, ah) in boxes.items():
        for b, (bx, by, bw, bh) in boxes.items():
            apart = ax + aw <= bx or bx + bw <= ax or ay + ah <= by or by + bh <= ay
            assert a == b or apart, f"nodes {a} and {b} overlap"
    inside = {
        n["id"]
        for n in nodes
        for x, y, w, h in (g["bounding"] for g in workflow["groups"])
        if x <= n["pos"][0]
        and y <= n["pos"][1]
        and n["pos"][0] + n["size"][0] <= x + w
        and n["pos"][1] + n["size"][1] <= y + h
    }
    assert inside == set(boxes), "nodes outside every group"
    ids = [link[0] for link in workflow["links"]]
    assert len(ids) == len(set(ids))
    assert max(ids, default=0) == workflow["last_link_id"]


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
