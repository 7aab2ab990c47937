"""ComfyUI_IPAdapter_plus and this pack in one ComfyUI process: the same nodes, models, adapters and pictures.

    COMFY/.venv/bin/python side_by_side.py COMFY CHECKPOINT_FOLDER sd15|sdxl [OLD_PACK] [-kPART_OF_NAME | -gGOLDEN.json]

Prints one JSON object per line: {"case", "numbers"} and, where the old pack is given, its {"difference", "effect"}:
the largest difference between the two relative to the largest value, and how far the image moved it. `numbers` is a
fingerprint of our output (see fingerprint()). tests/host/test_side_by_side.py judges.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

host_folder, checkpoints, kind, *old_folder = sys.argv[1:]
part, chosen = "", None
if old_folder and old_folder[-1].startswith("-k"):  # cases whose name has this in it
    part = old_folder.pop()[2:]
if old_folder and old_folder[-1].startswith("-g"):  # cases that are keys of this file
    chosen = set(json.loads(Path(old_folder.pop()[2:]).read_text()))
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, host_folder)

import torch  # noqa: E402

HERE = Path(__file__).resolve().parent
WIDTH, PROJECTION = 576, 64  # at least the 512 of a face embedding, and not 512 itself
VISION = {
    "model_type": "clip_vision_model", "hidden_size": WIDTH, "projection_dim": PROJECTION, "image_size": 224,
    "patch_size": 28, "num_channels": 3, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 64,
    "hidden_act": "gelu",
}  # fmt: skip


def load_module(name: str, file: Path, package: bool = False) -> ModuleType:
    where = [str(file.parent)] if package else None
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=where)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def picture(seed: int, height: int = 224, width: int = 224, count: int = 1) -> torch.Tensor:
    """Smooth random colours, different for every seed."""
    small = torch.rand(count, 3, 7, 7, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(small, (height, width), mode="bilinear").movedim(1, -1).contiguous()


def mask(*shape: int) -> torch.Tensor:
    return torch.nn.functional.interpolate(
        torch.rand(shape[0], 1, 5, 5, generator=torch.Generator().manual_seed(9)), shape[1:], mode="bilinear"
    )[:, 0]


def fake_insightface(faces: Any) -> Any:
    """A FaceAnalysis that finds two faces wherever it looks, the first in other places with another embedding each time.

    The old pack imports the package's alignment; it gets ours, so that what is compared is what follows.
    """
    import numpy as np

    def norm_crop(image: Any, landmark: Any, image_size: int) -> Any:
        rgb = torch.from_numpy(image[..., ::-1].copy()).float() / 255
        return (faces.align(rgb, torch.from_numpy(landmark), image_size) * 255).round().byte().numpy()[..., ::-1].copy()

    package, utils = ModuleType("insightface"), ModuleType("insightface.utils")
    utils.face_align = SimpleNamespace(norm_crop=norm_crop)  # pyright: ignore[reportAttributeAccessIssue]
    sys.modules |= {"insightface": package, "insightface.utils": utils}

    def get(image: Any) -> list[Any]:
        seed = int(image.astype(np.int64).sum()) % 1000
        found: list[Any] = []
        for i in range(2):
            embedding = random(512, seed=seed + i).numpy()
            points = (faces.template(112) + torch.tensor([20.0 + seed % 50, 30.0])).float().numpy()
            normed = embedding / np.linalg.norm(embedding)
            box = np.array([20.0, 30.0, 120.0, 140.0])
            found.append(
                SimpleNamespace(embedding=embedding, normed_embedding=normed, kps=points, bbox=box, det_score=0.9)
            )
        return found

    return SimpleNamespace(det_model=SimpleNamespace(input_size=(640, 640)), get=get)


@dataclass
class Case:
    """One apply node (by class type) with its inputs, and how the model is then asked."""

    name: str
    class_type: str
    inputs: dict[str, Any]
    adapter: str = "plus"
    percent: float = 0.5
    latents: int = 2
    size: tuple[int, int] = (8, 8)
    options: dict[str, Any] = field(default_factory=dict)
    guider: str = "cfg"
    before: tuple[Case, ...] = ()
    acts: bool = True

    @property
    def for_sdxl(self) -> bool:
        """Whether SDXL has tables or branches of its own for it; a model call takes long and the rest is the same code."""
        repeats = (
            "window",
            "mask (",
            "Tiled",
            "Enhancer",
            "Embeds",
            "images",
            "IPAdapterAdvanced: K",
            "IPAdapterAdvanced: V",
        )
        return not any(part in self.name for part in repeats) and not (
            self.class_type == "IPAdapterBatch" and self.inputs.get("weight_type") in WEIGHT_TYPES[:9]
        )


class World:
    """The shrunk model, the tiny encoder and adapters, and both packs' nodes."""

    def __init__(self) -> None:
        import comfy.clip_vision
        import comfy.sd

        shrunk = load_module("shrunk", HERE / "shrunk.py")
        tiny = load_module("tiny", HERE.parent / "tiny.py")
        path = shrunk.build_checkpoint(kind, Path(checkpoints))
        self.model = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False, output_clip=False)[0]
        unet = shrunk.UNETS[kind]
        self.text_width, self.xl = unet.text_width, kind == "sdxl"
        channels = shrunk.cross_attention_widths(unet)
        inner = 1280 if self.xl else 768
        sizes = {"token_dim": unet.text_width, "channels": channels}
        self.states = {
            "base": tiny.tiny_state("base", feature_dim=PROJECTION, seed=1, **sizes),
            "plus": tiny.tiny_state(
                "plus", num_tokens=16, feature_dim=WIDTH, hidden_dim=inner, inner_dim=inner, depth=4, seed=2, **sizes
            ),
        }
        face = {"face_dim": 512, "lora_rank": 4, **sizes}
        self.states["faceid"] = tiny.tiny_state("faceid", seed=4, **face)
        if self.xl:
            raw = {"num_tokens": 16, "feature_dim": 512, "hidden_dim": 1280, "inner_dim": 1280, "depth": 4}
            self.states["faceid-unnorm"] = tiny.tiny_state("plus", seed=5, **raw, **sizes)
        else:
            self.states["faceid-plus"] = tiny.tiny_state("faceid-plus", feature_dim=WIDTH, depth=4, seed=5, **face)
            self.states["faceid-plusv2"] = self.states["faceid-plus"]
            portrait = {"face_dim": 512, "num_tokens": 16, **sizes}
            self.states["faceid-portrait"] = tiny.tiny_state("faceid", seed=6, **portrait)
        if not self.xl:
            full_face = tiny.tiny_state("full-face", feature_dim=WIDTH, hidden_dim=WIDTH, seed=3, **sizes)
            self.states["full-face"] = full_face
        if Path(host_folder, "comfy/clip_vision.py").read_text().count("isinstance(json_config, dict)"):
            vision = comfy.clip_vision.ClipVisionModel(VISION)
        else:  # 0.3.64 takes a file
            config = Path(checkpoints) / "side_by_side_vision.json"
            config.write_text(json.dumps(VISION))
            vision = comfy.clip_vision.ClipVisionModel(str(config))
        state = {
            key: (random(*t.shape, seed=i) / max(t[0].numel(), 1) ** 0.5 if t.ndim > 1 else torch.ones_like(t) * key.endswith("weight"))
            for i, (key, t) in enumerate(sorted(vision.get_sd().items())) if t.is_floating_point()
        }  # fmt: skip
        vision.load_sd(state)
        self.vision = vision
        ours = load_module("ours", HERE.parents[1] / "__init__.py", package=True)
        self.ours = {name: node for name, (node, _) in ours.nodes.legacy.LEGACY_NODES.items()}
        self.our_adapters = {
            name: ours.nodes.legacy.pipeline.LegacyAdapter(ours.nodes.host.manage(state, name))
            for name, state in self.states.items()
        }
        self.old: dict[str, Any] = {}
        self.old_adapters = {name: tiny.nested(state) for name, state in self.states.items()}
        for name, flag in (("faceid-plusv2", "faceidplusv2"), ("faceid-unnorm", "portraitunnorm")):
            if name in self.old_adapters:  # which the old loader reads off the file's path
                self.old_adapters[name][flag] = True
        self.faces = fake_insightface(ours.ipadapter_core.faces)
        if old_folder:
            self.old = load_module("old", Path(old_folder[0]) / "__init__.py", package=True).NODE_CLASS_MAPPINGS

    def patched(self, case: Case, old: bool) -> Any:
        """The model with a case's node applied, through the pack's own class."""
        model = self.model
        for earlier in (*case.before, case):
            node = (self.old if old else self.ours)[earlier.class_type]()
            adapters = self.old_adapters if old else self.our_adapters
            inputs = {"model": model, **earlier.inputs}
            if earlier.adapter.startswith("faceid"):
                inputs["insightface"] = self.faces
            if "ipadapter_params" in inputs or "Embeds" not in earlier.class_type:
                inputs.setdefault("clip_vision", self.vision)
            if earlier.class_type == "IPAdapter":
                inputs.pop("clip_vision", None)
                inputs["ipadapter"] = {
                    "ipadapter": {"model": adapters[earlier.adapter]},
                    "clipvision": {"model": self.vision},
                }
            else:
                inputs["ipadapter"] = adapters[earlier.adapter]
            for name, value in list(inputs.items()):
                if callable(value) and not hasattr(value, "clone") and name not in ("clip_vision", "ipadapter"):
                    inputs[name] = value(self.old if old else self.ours, inputs["ipadapter"], self.vision)
            model = getattr(node, node.FUNCTION)(**inputs)[0]
        return model

    def sample(self, model: Any, case: Case) -> torch.Tensor:
        """One step from a given progress: the guided prediction, ``b c h w``."""
        import comfy.samplers
        from comfy_extras.nodes_custom_sampler import Guider_DualCFG

        model = model.clone()
        model.model_options["transformer_options"] = {**model.model_options["transformer_options"], **case.options}
        conds = [
            [[random(1, 77, self.text_width, seed=50 + i), {"pooled_output": random(1, 1280, seed=60 + i)}]]
            for i in range(3)
        ]
        if case.guider == "dual":
            guider = Guider_DualCFG(model)
            guider.set_conds(*conds)
            guider.set_cfg(3.0, 1.5)
        else:
            guider = comfy.samplers.CFGGuider(model)
            guider.set_conds(*conds[:2])
            guider.set_cfg(3.0)
        sigma = model.get_model_object("model_sampling").percent_to_sigma(case.percent)
        noise = random(case.latents, 4, *case.size, seed=7)
        sampler = comfy.samplers.sampler_object("euler")
        sigmas = torch.tensor([float(sigma), 0.0])
        return guider.sample(noise, torch.zeros_like(noise), sampler, sigmas, seed=0, disable_pbar=True)


def wanted(name: str) -> bool:
    return part in name and (chosen is None or f"{kind}: {name}" in chosen)


def fingerprint(x: torch.Tensor) -> list[float]:
    """Eight fixed random projections, scaled to the size of one value."""
    directions = random(8, x.numel(), seed=123) / x.numel() ** 0.5
    return [round(value, 6) for value in (directions @ x.flatten().float()).tolist()]


WEIGHT_TYPES = (
    "linear", "ease in", "ease out", "ease in-out", "reverse in-out", "weak input", "weak output", "weak middle",
    "strong middle", "style transfer", "composition", "strong style transfer", "style and composition",
    "style transfer precise", "composition precise",
)  # fmt: skip
SCALINGS = ("V only", "K+V", "K+V w/ C penalty", "K+mean(V) w/ C penalty")
COMBINE = ("concat", "add", "subtract", "average", "norm average")


def cases(xl: bool) -> Iterator[Case]:
    one, wide, two, three = picture(1), picture(2, 190, 260), picture(3, count=2), picture(4, count=3)
    every = {"weight": 0.8, "image": one}

    def batch(class_type: str, name: str, **inputs: Any) -> Case:
        inputs = {"image": two, "weight": 0.8, **inputs}
        return Case(f"{class_type}: {name}", class_type, inputs, latents=3)

    for kind in ("standard", "prompt is more important", "style transfer"):
        inputs = {**every, "start_at": 0.0, "end_at": 1.0, "weight_type": kind}
        yield Case(f"IPAdapter: {kind}", "IPAdapter", inputs)
    for adapter in ("base", "plus") if xl else ("base", "plus", "full-face"):
        yield Case(f"IPAdapterAdvanced: {adapter}", "IPAdapterAdvanced", {**every, "image": wide}, adapter)
    for kind in WEIGHT_TYPES:
        yield Case(f"IPAdapterAdvanced: {kind}", "IPAdapterAdvanced", {**every, "weight_type": kind}, "base")
        yield batch("IPAdapterBatch", kind, weight_type=kind, weight=[0.8, -0.3, 0.0, 1.4])
    for scaling in SCALINGS:
        for count, images in (("one image", one), ("two images", two)):
            inputs = {**every, "image": images, "embeds_scaling": scaling}
            yield Case(f"IPAdapterAdvanced: {scaling}, {count}", "IPAdapterAdvanced", inputs)
        inputs = {**every, "attn_mask": mask(1, 64, 64), "embeds_scaling": scaling, "weight": -0.6}
        yield Case(f"IPAdapterAdvanced: {scaling}, mask, negative weight", "IPAdapterAdvanced", inputs)
        yield batch("IPAdapterBatch", f"{scaling}, weights", weight=[0.3, 1.2], embeds_scaling=scaling)
    for method in COMBINE:
        for adapter in ("base", "plus"):
            inputs = {**every, "image": three, "combine_embeds": method}
            yield Case(f"IPAdapterAdvanced: {method}, {adapter}", "IPAdapterAdvanced", inputs, adapter)
    for adapter in ("base", "plus"):
        inputs = {**every, "image_negative": wide}
        yield Case(f"IPAdapterAdvanced: negative image, {adapter}", "IPAdapterAdvanced", inputs, adapter)
    inputs = {**every, "image": three, "image_negative": two}
    yield Case("IPAdapterAdvanced: two negative images", "IPAdapterAdvanced", inputs)
    for size in ((8, 8), (12, 16), (9, 8), (11, 13), (16, 7)):
        for shape in ((1, 96, 80), (2, 40, 64)):
            inputs = {**every, "attn_mask": mask(*shape)}
            yield Case(f"IPAdapterAdvanced: mask {shape} on {size}", "IPAdapterAdvanced", inputs, "base", size=size)
    for start, end in ((0.0, 0.5), (0.5, 1.0), (0.3, 0.7), (0.6, 0.4)):
        for percent in (0.01, 0.299, 0.45, 0.55, 0.701, 0.95):
            inside = start <= percent <= end
            inputs = {**every, "start_at": start, "end_at": end}
            name = f"IPAdapterAdvanced: window {start}-{end} at {percent}"
            yield Case(name, "IPAdapterAdvanced", inputs, "base", percent, acts=inside)
    first = Case("", "IPAdapterAdvanced", {**every, "weight_type": "style transfer"})
    second = {"image": two, "weight": 0.5, "attn_mask": mask(1, 32, 32)}
    yield Case("two adapters in a chain", "IPAdapterAdvanced", second, "base", before=(first,))
    yield Case("two positive prompts (DualCFG)", "IPAdapterAdvanced", every, guider="dual")

    for latents in (1, 2, 4):
        yield Case(
            f"IPAdapterBatch: 2 images, {latents} latents",
            "IPAdapterBatch",
            {"image": two, "weight": 0.7},
            latents=latents,
        )
    window = {"ad_params": {"sub_idxs": [3, 1], "full_length": 5}}
    for count, images in ((1, one), (2, two), (6, picture(5, count=6))):
        inputs = {"image": images, "weight": [0.2, 0.9, 0.4], "attn_mask": mask(3, 32, 32)}
        yield Case(f"IPAdapterBatch: window, {count} images", "IPAdapterBatch", inputs, options=window)
    inputs = {**every, "attn_mask": mask(6, 32, 32)}
    yield Case("IPAdapterAdvanced: window, masks", "IPAdapterAdvanced", inputs, options=window)
    yield Case("IPAdapterBatch: encode in parts", "IPAdapterBatch", {"image": two, "encode_batch_size": 1}, latents=3)

    for ratio, shape in (("square", (260, 250)), ("wide", (100, 330)), ("very wide", (60, 300)), ("tall", (300, 130))):
        for class_type in ("IPAdapterTiled", "IPAdapterTiledBatch"):
            inputs = {
                "image": picture(6, *shape),
                "weight": 0.8,
                "weight_type": "linear",
                "start_at": 0.0,
                "end_at": 1.0,
            }
            inputs["sharpening"] = 0.4 if ratio == "wide" else 0.0
            if ratio in ("square", "tall"):
                inputs["attn_mask"] = mask(1, 90, 70)
            yield Case(f"{class_type}: {ratio}", class_type, inputs, "base")

    for boost in (1.0, -0.5):
        for suffix, more in (("", {"image": one}), ("Batch", {"image": two})):
            style = {"weight": 0.8, "style_boost": boost, **more}
            yield Case(
                f"IPAdapterPreciseStyleTransfer{suffix}: {boost}", f"IPAdapterPreciseStyleTransfer{suffix}", style
            )
            composition = {"weight": 0.8, "composition_boost": boost, **more}
            name = f"IPAdapterPreciseComposition{suffix}"
            yield Case(f"{name}: {boost}", name, composition)
    if xl:
        for expand in (False, True):
            for class_type, images in (("IPAdapterStyleComposition", one), ("IPAdapterStyleCompositionBatch", two)):
                inputs = {"image_style": images, "image_composition": three[: len(images)], "weight_style": 0.9}
                inputs |= {"weight_composition": 0.6, "expand_style": expand}
                yield Case(f"{class_type}: expand {expand}", class_type, inputs, latents=3)
        inputs = {"image_style": two, "image_composition": three, "weight_style": 0.9, "weight_composition": 1.2}
        for method in COMBINE[1:]:
            name = f"IPAdapterStyleComposition: {method}"
            yield Case(name, "IPAdapterStyleComposition", {**inputs, "combine_embeds": method})
    for layers in ("3:0.5, 6:1.2", "0:1,4:-0.4,9:0.7,5:0.9"):
        for kind in ("linear", "ease in", "style transfer precise", "composition precise"):
            inputs = {**every, "weight_faceidv2": 1.0, "weight_type": kind, "layer_weights": layers}
            yield Case(f"IPAdapterMS: {kind}, {layers}", "IPAdapterMS", inputs)
    for adapter in ("base", "plus"):
        for tiles, count, images in ((1, 1, one), (2, 1, wide), (3, 2, two)):
            inputs = {"image": images, "weight": 0.8, "enhance_tiles": tiles, "enhance_ratio": 0.6}
            for class_type in ("IPAdapterClipVisionEnhancer", "IPAdapterClipVisionEnhancerBatch"):
                name = f"{class_type}: {adapter}, {tiles} tiles, {count} images"
                yield Case(name, class_type, inputs, adapter)

    def encoded(index: int, **options: Any) -> Callable[..., Any]:
        def make(nodes: Any, ipadapter: Any, vision: Any) -> torch.Tensor:
            return nodes["IPAdapterEncoder"]().encode(ipadapter, clip_vision=vision, **options)[index]

        return make

    def combined(method: str) -> Callable[..., Any]:
        def make(nodes: Any, ipadapter: Any, vision: Any) -> torch.Tensor:
            encode = nodes["IPAdapterEncoder"]().encode
            parts = [
                encode(ipadapter, image, w, clip_vision=vision)[0]
                for image, w in ((one, 1.0), (two, 0.6), (wide, -0.2))
            ]
            return nodes["IPAdapterCombineEmbeds"]().batch(parts[0], method, embed2=parts[1], embed4=parts[2])[0]

        return make

    timing = {"weight_type": "linear", "start_at": 0.0, "end_at": 1.0, "weight": 0.9}
    for adapter in ("base", "plus"):
        for name, options in (
            ("plain", {"image": one, "weight": 1.0}),
            ("weight 0.4", {"image": wide, "weight": 0.4}),
            ("mask", {"image": wide, "weight": 1.0, "mask": mask(1, 100, 160)}),
        ):
            inputs = {"pos_embed": encoded(0, **options), "neg_embed": encoded(1, **options), **timing}
            yield Case(f"IPAdapterEmbeds: {adapter}, {name}", "IPAdapterEmbeds", inputs, adapter)
        inputs = {
            "pos_embed": encoded(0, image=three, weight=0.7),
            "neg_embed": encoded(1, image=three, weight=1.0),
            **timing,
        }
        yield Case(f"IPAdapterEmbedsBatch: {adapter}", "IPAdapterEmbedsBatch", inputs, adapter, latents=4)
        for method in (*COMBINE, "max", "min"):
            inputs = {"pos_embed": combined(method), "neg_embed": encoded(1, image=one, weight=1.0), **timing}
            yield Case(f"IPAdapterCombineEmbeds: {adapter}, {method}", "IPAdapterEmbeds", inputs, adapter)

    def regions(nodes: Any, ipadapter: Any, vision: Any) -> Any:
        make = nodes["IPAdapterRegionalConditioning"]().conditioning
        a = make(one, 0.8, 1.0, "linear", 0.0, 1.0, mask=mask(1, 64, 64))[0]
        b = make(two, 0.5, 1.0, "ease out", 0.0, 0.9, mask=1 - mask(1, 64, 64))[0]
        c = make(wide, 0.4, 1.0, "weak input", 0.6, 1.0)[0]
        return nodes["IPAdapterCombineParams"]().combine(a, b, c)[0]

    yield Case("IPAdapterFromParams: three regions", "IPAdapterFromParams", {"ipadapter_params": regions})

    def frames(nodes: Any, ipadapter: Any, vision: Any) -> Any:
        return nodes["IPAdapterWeights"]().weights("1.0, 0.2", "ease_in_out", 3, image=two)[0]

    kinds = ("faceid", "faceid-unnorm") if xl else ("faceid", "faceid-plus", "faceid-plusv2", "faceid-portrait")
    for adapter in kinds:
        for method in ("concat", "average", "norm average"):
            inputs = {"image": two, "weight": 0.8, "weight_faceidv2": 0.6, "combine_embeds": method}
            yield Case(f"IPAdapterFaceID: {adapter}, {method}", "IPAdapterFaceID", inputs, adapter)
        inputs = {"image": two, "weight": [0.8, 0.2], "weight_faceidv2": 1.3, "image_negative": one}
        yield Case(f"IPAAdapterFaceIDBatch: {adapter}", "IPAAdapterFaceIDBatch", inputs, adapter, latents=3)
        inputs = {"image": one, "weight": 0.8, "weight_faceidv2": 1.3, "layer_weights": "4:1,5:0.5,7:0.3"}
        yield Case(f"IPAdapterMS: {adapter}", "IPAdapterMS", inputs, adapter)
    if not xl:
        yield Case(
            "IPAdapterAdvanced: faceid-plusv2, no weight of its own", "IPAdapterAdvanced", every, "faceid-plusv2"
        )

    yield Case("IPAdapterWeights into IPAdapterBatch", "IPAdapterBatch", {"image": two, "weight": frames}, latents=6)


def values(nodes: Any) -> Iterator[tuple[str, Any]]:
    """Nodes that make values: pictures, weights, texts."""
    sources = {"square": picture(11, 224, 224), "wide": picture(12, 130, 201), "batch": picture(13, 90, 61, count=2)}
    for kind in ("fade", "dissolve", "gaussian", "shuffle"):
        for strength in (0.3, 1.0):
            for name, image in (("none", None), *sources.items()):
                for blur in (0, 4):
                    yield (
                        f"IPAdapterNoise: {kind}, {strength}, {name}, blur {blur}",
                        nodes["IPAdapterNoise"]().make_noise(kind, strength, blur, image)[0],
                    )
    for interpolation in ("LANCZOS", "BICUBIC", "HAMMING", "BILINEAR", "BOX", "NEAREST"):
        yield (
            f"PrepImage: {interpolation}",
            nodes["PrepImageForClipVision"]().prep_image(sources["wide"], interpolation)[0],
        )
    for position in ("top", "bottom", "left", "right", "center", "pad"):
        for name, image in sources.items():
            yield (
                f"PrepImage: {position}, {name}",
                nodes["PrepImageForClipVision"]().prep_image(image, "LANCZOS", position, 0.5)[0],
            )
    three = picture(14, 8, 8, count=3)
    for method in ("full batch", "shift batches", "alternate batches"):
        for timing in ("custom", "linear", "ease_in_out", "ease_in", "ease_out"):
            for count in (2, 3):
                made = nodes["IPAdapterWeights"]().weights(
                    "0.9, 0.5\n0.1", timing, 5, 1, 4, 2, 3, method, image=three[:count]
                )
                again = nodes["IPAdapterWeightsFromStrategy"]().weights(weights_strategy=made[5], image=three[:count])
                text = nodes["IPAdapterPromptScheduleFromWeightsStrategy"]().prompt_schedule(made[5], "a\nb\n\nc\nd")[0]
                name = f"IPAdapterWeights: {method}, {timing}, {count}"
                for i in (0, 1, 3, 4):
                    for which, value in (("", made[i]), (" again", again[i])):
                        if value is not None:
                            yield f"{name}, output {i}{which}", torch.as_tensor(value)
                yield f"{name}, count", torch.tensor([made[2], again[2]])
                yield f"{name}, prompts", torch.tensor(list(text.encode()), dtype=torch.float32)
    yield "IPAdapterWeights: no image", torch.tensor(nodes["IPAdapterWeights"]().weights("1, 0", "linear", 6)[0])
    yield "IPAdapterCombineWeights", torch.tensor(nodes["IPAdapterCombineWeights"]().combine([0.1, 0.2], 0.3)[0])


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    return float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-6))


@torch.inference_mode()
def main() -> None:
    import comfy.options

    comfy.options.enable_args_parsing()
    import nodes as host_nodes  # noqa: F401  (the packs import it)

    torch.set_num_threads(1)
    out, sys.stdout = sys.stdout, sys.stderr  # other custom code talks on stdout
    world = World()
    plain: dict[Any, torch.Tensor] = {}

    def report(name: str, ours: torch.Tensor, old: torch.Tensor | None, effect: float | None) -> None:
        line: dict[str, Any] = {"case": f"{kind}: {name}", "numbers": fingerprint(ours), "effect": effect}
        if old is not None:
            line["difference"] = difference(ours, old)
        print(json.dumps(line), file=out, flush=True)

    if not world.xl:
        theirs = dict(values(world.old)) if world.old else {}
        for name, value in values(world.ours):
            if wanted(name):
                report(name, value, theirs.get(name), None)
    for case in cases(world.xl):
        if not wanted(case.name) or (world.xl and not case.for_sdxl):
            continue
        key = (case.percent, case.latents, case.size, case.guider)
        if key not in plain:
            plain[key] = world.sample(world.model, case)
        ours = world.sample(world.patched(case, False), case)
        old = world.sample(world.patched(case, True), case) if world.old else None
        report(case.name, ours, old, difference(ours, plain[key]) if case.acts else None)


if __name__ == "__main__":
    main()
