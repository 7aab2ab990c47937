"""Example workflows of the old pack made small enough to run: models, pictures and other packs' nodes are stood in for.

Nodes of the old pack's class types stay as they are in the file, with their settings. What stands in for the rest:
shrunk checkpoints, tiny adapters of the same family under the same file name, tiny image encoders, random text
conditioning, a face model that finds three faces, one sampling step at 64 pixels.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file

from host.comfy_server import ComfyServer, Graph
from host.shrunk import UNETS, build_checkpoint, cross_attention_widths
from tiny import tiny_state
from workflows.graph import BYPASSED, FRONTEND_ONLY, Workflow, to_prompt, widget_names

SIDE = 64
HIDDEN, FACE = 32, 512
# nodes of other packs and of models that have no small version, which hand their input on here
PASSED = ("ImageCASharpening+", "ImageRandomTransform+", "ControlNetApply", "LoraLoaderModelOnly")
NUMBERS = {"SimpleMath+": 2}  # how many tiles; sizes are set below


class Example:
    """One workflow file; ``prompt()`` is what to queue, ``stand_ins`` what it has instead of the file's own nodes."""

    def __init__(self, workflow: Workflow, server: ComfyServer, models: Path, adapters: Path) -> None:
        self.workflow, self.server, self.models, self.adapters = workflow, server, models, adapters
        self.info = server.object_info()
        loaders = [node for node in workflow["nodes"] if node["type"] == "CheckpointLoaderSimple"]
        texts = str([node.get("widgets_values") for node in loaders]).lower()
        kinds = {node["type"] for node in workflow["nodes"]}
        self.kolors = any(kind.startswith("MZ_Kolors") for kind in kinds)
        self.unet = "sdxl" if self.kolors or "xl" in texts else "sd15"
        # FaceID Plus wants an encoder at least as wide as a face's embedding
        self.hidden = FACE if any("FaceID" in kind for kind in kinds) else HIDDEN
        self.stand_ins: set[str] = set()
        self.saved: dict[str, str] = {}
        """Nodes of the file that show pictures, each with the node that saves these exactly."""

    def prompt(self) -> Graph:
        workflow = copy.deepcopy(dict(self.workflow))
        unknown: dict[str, Any] = {}
        for node in workflow["nodes"]:
            kind = node["type"]
            if kind in NUMBERS:
                node |= {"type": "PrimitiveNode", "widgets_values": [NUMBERS[kind]]}
                self.stand_ins.add(kind)
            elif kind in PASSED:
                self.stand_ins.add(kind)
                node |= {"mode": BYPASSED}
            elif kind in FRONTEND_ONLY | {"PrimitiveNode", "Reroute"}:
                continue
            elif kind not in self.info:
                node["widgets_values"] = []
                unknown[kind] = {"input": {}}
            elif isinstance(node.get("widgets_values"), list):
                node["widgets_values"] = self.completed(kind, node["widgets_values"])
        graph = to_prompt(workflow, {**self.info, **unknown})
        for node_id in list(graph):
            self.stand_in(graph, node_id)
        for number, node in [
            (i, node) for i, node in graph.items() if node["class_type"] in ("SaveImage", "PreviewImage")
        ]:
            self.saved[number] = graph.add("TestSaveTensor", value=node["inputs"]["images"]).id
        return graph

    def completed(self, kind: str, values: list[Any]) -> list[Any]:
        """Widget values as the frontend has them after loading: those that the file lacks at their defaults."""
        names = list(widget_names(self.info[kind]))
        given = {**self.info[kind]["input"].get("required", {}), **self.info[kind]["input"].get("optional", {})}
        filled = list(values[: len(names)])
        for name in names[len(filled) :]:
            type_, *rest = given.get(name, ("", {}))
            options = rest[0] if rest else {}
            listed = type_ if isinstance(type_, list) else options.get("options")
            filled.append(options.get("default", listed[0] if listed else None))
        return filled

    def stand_in(self, graph: Graph, node_id: str) -> None:
        node = graph[node_id]
        kind, inputs = node["class_type"], node["inputs"]
        width = UNETS[self.unet].text_width

        def become(class_type: str, **new: Any) -> None:
            node.update({"class_type": class_type, "inputs": new})
            self.stand_ins.add(kind)

        match kind:
            case "CheckpointLoaderSimple":
                inputs["ckpt_name"] = self.checkpoint()
            case "MZ_KolorsUNETLoader" | "MZ_KolorsUNETLoaderV2":
                loaded = graph.add("CheckpointLoaderSimple", ckpt_name=self.checkpoint())
                become("TestKolors", model=loaded[0])
            case "VAELoader":
                loaded = graph.add("CheckpointLoaderSimple", ckpt_name=self.checkpoint())
                self.redirect(graph, node_id, {0: loaded[2]})
            case "CLIPTextEncode" | "MZ_ChatGLM3" | "MZ_ChatGLM3_V2":
                become("TestConditioning", seed=int(node_id), width=width)
            case "MZ_ChatGLM3Loader":
                del graph[node_id]
            case "CLIPVisionLoader":
                become("TestClipVision", seed=0, hidden_size=self.hidden)
            case "IPAdapterInsightFaceLoader" | "InsightFaceLoader":
                faces = graph.add("TestFaceModel")
                self.redirect(graph, node_id, {0: faces[1]})
            case "LoadImage":
                inputs["image"] = self.picture(int(node_id))
            case "IPAdapterModelLoader":
                inputs["ipadapter_file"] = self.adapter(inputs["ipadapter_file"])
            case "IPAdapterUnifiedLoader" | "IPAdapterUnifiedLoaderFaceID" | "IPAdapterUnifiedLoaderCommunity":
                name = self.adapter(inputs["preset"])
                adapter = graph.add("IPAdapterModelLoader", ipadapter_file=name)
                vision = graph.add("TestClipVision", seed=0, hidden_size=self.hidden)
                faces = graph.add("TestFaceModel")
                more = {"clip_vision": vision[0], "insightface": faces[1]}
                become("TestUnifiedLoader", model=inputs["model"], adapter=adapter[0], **more)
            case "ImagePromptLoadAdapter":
                inputs["file"] = self.adapter(inputs["file"])
            case "ImagePromptLoadFaceModel":
                become("TestFaceModel")
            case "ImagePromptApplyFaceLoRA":  # a unified loader's is not applied either
                self.redirect(graph, node_id, {0: inputs["model"]})
            case "MaskFromRGBCMYBW+":
                masks = {i: graph.add("SolidMask", value=0.3 + i / 10, width=SIDE, height=SIDE)[0] for i in range(8)}
                self.redirect(graph, node_id, masks)
            case "ConditioningCombineMultiple+":
                joined = inputs["conditioning_1"]
                for name in [f"conditioning_{i}" for i in range(2, 6) if f"conditioning_{i}" in inputs]:
                    joined = graph.add("ConditioningCombine", conditioning_1=joined, conditioning_2=inputs[name])[0]
                self.redirect(graph, node_id, {0: joined})
            case "KSampler":
                inputs["steps"] = 1
            case "BasicScheduler":
                inputs["steps"] = 1
            case _:
                pass
        for name in ("width", "height"):
            if isinstance(inputs.get(name), int):
                inputs[name] = SIDE
        for name in ("x", "y"):
            if isinstance(inputs.get(name), int):
                inputs[name] = inputs[name] * SIDE // 1024
        if isinstance(inputs.get("batch_size"), int):
            inputs["batch_size"] = min(inputs["batch_size"], 2)

    def redirect(self, graph: Graph, node_id: str, outputs: Mapping[int, Any]) -> None:
        """Take a node out, with other outputs in the place of its own."""
        self.stand_ins.add(graph[node_id]["class_type"])
        del graph[node_id]
        for node in graph.values():
            for name, value in node["inputs"].items():
                if isinstance(value, list) and value[:1] == [node_id]:
                    node["inputs"][name] = outputs[value[1]]

    def checkpoint(self) -> str:
        return self.server.add_model("checkpoints", build_checkpoint(self.unet, self.models))

    def picture(self, seed: int) -> str:
        pixels = np.random.default_rng(seed).integers(0, 255, (7, 5, 3), np.uint8)
        return self.server.upload_image(np.kron(pixels, np.ones((20, 20, 1), np.uint8)), f"example_{seed}.png")

    def adapter(self, wanted: str) -> str:
        """A tiny adapter of the family that a file name or a preset means."""
        text = wanted.lower().replace("-", " ").replace("_", " ")
        family = "base"
        for name, parts in FAMILIES.items():
            if all(part in text for part in parts):
                family = name
        name = (
            f"example_{family}_{self.unet}_{self.hidden}{'v2' if 'plusv2' in text.replace(' ', '') else ''}.safetensors"
        )
        sizes = dict(SIZES[family.removesuffix("_kolors")])
        if family in ("plus", "full_face", "faceid_plus", "faceid_plus_kolors"):
            sizes["feature_dim"] = self.hidden
        elif family == "base":
            sizes["feature_dim"] = self.hidden * 3 // 4
        if family == "faceid_plus_kolors":
            sizes |= {"text_dim": 4096, "num_tokens": 6, "inner_dim": 64, "ff_dim": 64}
        file = self.adapters / name
        if not file.exists():
            channels = cross_attention_widths(UNETS[self.unet])
            kind = family.removesuffix("_kolors").replace("_", "-").removesuffix("-portrait")
            state = tiny_state(kind, token_dim=UNETS[self.unet].text_width, channels=channels, seed=7, **sizes)
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({key: value.half().contiguous() for key, value in state.items()}, file)
        return self.server.add_model("ipadapter", file)


# family: words that its file names and presets have; the last that fits wins
FAMILIES: dict[str, tuple[str, ...]] = {
    "plus": ("plus",),
    "full_face": ("full", "face"),
    "faceid": ("faceid",),
    "faceid_plus": ("faceid", "plus"),
    "faceid_portrait": ("faceid", "portrait"),
    "faceid_plus_kolors": ("kolors", "faceid"),
}
FACE_SIZES = {"face_dim": FACE, "lora_rank": 2}
SIZES: dict[str, dict[str, Any]] = {
    "base": {},
    "plus": {"num_tokens": 16},
    "full_face": {"hidden_dim": 32},
    "faceid": FACE_SIZES,
    "faceid_plus": {"depth": 1, **FACE_SIZES},
    "faceid_portrait": {"face_dim": FACE, "num_tokens": 16},
}
