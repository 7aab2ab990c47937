"""ComfyUI_IPAdapter_plus and this pack in one ComfyUI process: the same nodes, models, adapters and pictures.

    COMFY/.venv/bin/python side_by_side.py COMFY CHECKPOINT_FOLDER sd15|sdxl [OLD_PACK FIRST_VERSION] [-kPART_OF_NAME | -gGOLDEN.json]

Prints one JSON object per line: {"case", "numbers"} and, where the old pack is given, its {"difference", "effect"}:
the largest difference between the two relative to the largest value, and how far the image moved it. `numbers` is a
fingerprint of our output (see fingerprint()). tests/host/test_side_by_side.py judges.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
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
    first: bool = False
    """Of the pack before its rewrite of 2024-03-23."""
    acts: bool = True
    recorded: bool = True
    """Whether its numbers are kept for runs without the old pack: a sample of the rows, as CI has a minute for it."""

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


def tiny_vision(size: int, width: int = WIDTH) -> Any:
    """A CLIP vision model of random weights that sees 8 x 8 patches of a picture of ``size`` pixels."""
    import comfy.clip_vision

    config = VISION | {"image_size": size, "patch_size": size // 8, "hidden_size": width}
    if Path(host_folder, "comfy/clip_vision.py").read_text().count("isinstance(json_config, dict)"):
        vision = comfy.clip_vision.ClipVisionModel(config)
    else:  # 0.3.64 takes a file
        file = Path(checkpoints) / f"side_by_side_vision_{size}_{width}.json"
        file.write_text(json.dumps(config))
        vision = comfy.clip_vision.ClipVisionModel(str(file))
    state = {
        key: (random(*t.shape, seed=i) / max(t[0].numel(), 1) ** 0.5 if t.ndim > 1 else torch.ones_like(t) * key.endswith("weight"))
        for i, (key, t) in enumerate(sorted(vision.get_sd().items())) if t.is_floating_point()
    }  # fmt: skip
    vision.load_sd(state)
    return vision


class World:
    """The shrunk model, the tiny encoder and adapters, and both packs' nodes."""

    def __init__(self) -> None:
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
            # the first version has the encoder's width in its code
            self.states["faceid-plus-1280"] = tiny.tiny_state("faceid-plus", feature_dim=1280, depth=4, seed=9, **face)
            portrait = {"face_dim": 512, "num_tokens": 16, **sizes}
            self.states["faceid-portrait"] = tiny.tiny_state("faceid", seed=6, **portrait)
        if self.xl and any("kolors" in case.adapter and wanted(case.name) for case in cases(True)):
            shapes = {"num_tokens": 16, "feature_dim": WIDTH, "hidden_dim": 2048, "inner_dim": 768, "depth": 4}
            self.states["kolors"] = tiny.tiny_state("plus", seed=7, **shapes, **sizes)
            wide = {"text_dim": 4096, "num_tokens": 6, "feature_dim": WIDTH, "depth": 4, "face_dim": 512}
            self.states["faceid-kolors"] = tiny.tiny_state("faceid-plus", seed=8, **wide, **sizes)
            projection = torch.nn.Linear(4096, 2048)
            projection.load_state_dict({"weight": random(2048, 4096, seed=9) / 64, "bias": random(2048, seed=10) / 10})
            self.model.model.diffusion_model.encoder_hid_proj = projection
        if not self.xl:
            full_face = tiny.tiny_state("full-face", feature_dim=WIDTH, hidden_dim=WIDTH, seed=3, **sizes)
            self.states["full-face"] = full_face
        self.vision = {"": tiny_vision(224)}
        if "kolors" in self.states:
            self.vision["kolors"] = tiny_vision(336)
        if "faceid-plus-1280" in self.states:
            self.vision["wide"] = tiny_vision(224, 1280)
        ours = load_module("ours", HERE.parents[1] / "__init__.py", package=True)
        self.ours = {name: node for name, (node, _) in ours.nodes.legacy.LEGACY_NODES.items()}
        self.our_adapters = {
            name: ours.nodes.legacy.pipeline.LegacyAdapter(ours.nodes.host.adapters.manage(state, name))
            for name, state in self.states.items()
        }
        self.old: dict[str, Any] = {}
        self.old_adapters = {name: tiny.nested(state) for name, state in self.states.items()}
        for name, flag in (("faceid-plusv2", "faceidplusv2"), ("faceid-unnorm", "portraitunnorm")):
            if name in self.old_adapters:  # which the old loader reads off the file's path
                self.old_adapters[name][flag] = True
        self.faces = fake_insightface(ours.ipadapter_core.images.faces)
        self.first: dict[str, Any] = {}
        if old_folder:
            self.old = load_module("old", Path(old_folder[0]) / "__init__.py", package=True).NODE_CLASS_MAPPINGS
        if len(old_folder) > 1:
            self.first = load_module("first", Path(old_folder[1]) / "__init__.py", package=True).NODE_CLASS_MAPPINGS
            # what its loader of the face model would set
            sys.modules["first.IPAdapterPlus"].insightface_face_align = sys.modules["insightface.utils"].face_align  # pyright: ignore

    def patched(self, case: Case, old: bool) -> Any:
        """The model with a case's node applied, through the pack's own class."""
        model = self.model
        for earlier in (*case.before, case):
            theirs = self.first if case.first else self.old
            node = (theirs if old else self.ours)[earlier.class_type]()
            vision = self.vision[
                "kolors" if "kolors" in earlier.adapter else "wide" if "1280" in earlier.adapter else ""
            ]
            adapters = self.old_adapters if old else self.our_adapters
            inputs = {"model": model, **earlier.inputs}
            if earlier.adapter.startswith("faceid"):
                inputs["insightface"] = self.faces
            if "ipadapter_params" in inputs or "Embeds" not in earlier.class_type:
                inputs.setdefault("clip_vision", vision)
            if "Encoded" in earlier.class_type:
                inputs.pop("clip_vision")
            if earlier.class_type == "IPAdapter":
                inputs.pop("clip_vision", None)
                inputs["ipadapter"] = {
                    "ipadapter": {"model": adapters[earlier.adapter]},
                    "clipvision": {"model": vision},
                }
            else:
                inputs["ipadapter"] = adapters[earlier.adapter]
            for name, value in list(inputs.items()):
                if callable(value) and not hasattr(value, "clone") and name not in ("clip_vision", "ipadapter"):
                    inputs[name] = value(theirs if old else self.ours, inputs["ipadapter"], vision)
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
    """Whether the command line asks for a case, by part of its name or by a file of recorded ones."""
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
    if xl:
        yield Case("IPAdapterAdvanced: kolors", "IPAdapterAdvanced", {**every, "image": wide}, "kolors", recorded=False)
        inputs = {"image": two, "weight": 0.8, "weight_faceidv2": 0.6, "weight_kolors": 1.3, "image_negative": one}
        yield Case("IPAdapterFaceIDKolors: a pair", "IPAdapterFaceIDKolors", inputs, "faceid-kolors", recorded=False)
    else:
        yield Case(
            "IPAdapterAdvanced: faceid-plusv2, no weight of its own", "IPAdapterAdvanced", every, "faceid-plusv2"
        )

    yield Case("IPAdapterWeights into IPAdapterBatch", "IPAdapterBatch", {"image": two, "weight": frames}, latents=6)


FAINT = {("IPAdapterBatch", 10), ("IPAdapterTiled", 10), ("IPAdapterMS", 10), ("IPAdapterFaceID", 8)}
"""Rows of the grid in which SD1.5's image acts in few layers or little of the picture: they get three times the weight, to
move the output by 1%."""


def grid(xl: bool) -> Iterator[Case]:
    """Every class type with every value of each setting that it has.

    Row i of class type n takes the i-th weight type, while its other settings step at other speeds and from other
    places, so that the pairs of values differ from class type to class type.
    """
    one, two, three, wide = picture(21), picture(22, count=2), picture(23, count=3), picture(24, 190, 260)
    masks = (None, mask(1, 64, 64), mask(3, 40, 56))
    windows = ((0.0, 1.0), (0.3, 1.0), (0.0, 0.6))
    layers = ("3:0.5, 6:1.2", "0:1,4:-0.4,9:0.7,5:0.9")

    def row(n: int, i: int) -> dict[str, Any]:
        start, end = windows[(i // 2 + n) % 3]
        kind, region = WEIGHT_TYPES[i], masks[(i + i // 5 + n) % 3]
        return {
            "weight": 0.9, "weight_type": kind, "combine_embeds": COMBINE[(i + i // 5 + n) % 5], "start_at": start,
            "end_at": end, "embeds_scaling": SCALINGS[(i + n) % 4], **({} if region is None else {"attn_mask": region}),
        }  # fmt: skip

    def embeds(nodes: Any, ipadapter: Any, vision: Any) -> torch.Tensor:
        return nodes["IPAdapterEncoder"]().encode(ipadapter, three, 0.9, clip_vision=vision)[0]

    def no_embeds(nodes: Any, ipadapter: Any, vision: Any) -> torch.Tensor:
        return nodes["IPAdapterEncoder"]().encode(ipadapter, three, 1.0, clip_vision=vision)[1]

    def params(settings: dict[str, Any]) -> Callable[..., Any]:
        def make(nodes: Any, ipadapter: Any, vision: Any) -> Any:
            region = nodes["IPAdapterRegionalConditioning"]().conditioning
            window, other = (settings["start_at"], settings["end_at"]), WEIGHT_TYPES[:9]
            first = region(one, 0.8, 1.0, settings["weight_type"], *window, mask=mask(1, 64, 64))[0]
            second = region(wide, 0.5, 1.0, other[len(settings["weight_type"]) % 9], *window)[0]
            return nodes["IPAdapterCombineParams"]().combine(first, second)[0]

        return make

    faces = ("faceid", "faceid-unnorm") if xl else ("faceid", "faceid-plus", "faceid-plusv2", "faceid-portrait")
    tiles = {"enhance_tiles": 2, "enhance_ratio": 0.6}
    pairs = {"image_style": two, "image_composition": three[:2], "weight_style": 0.9, "weight_composition": 0.7}
    coded: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
        # class type: adapters, its own inputs; those of row() that it has not are taken out below
        "IPAdapterAdvanced": (("base", "plus"), {"image": three, "image_negative": wide}),
        "IPAdapterBatch": (("plus", "base"), {"image": two, "weight": [0.9, 0.4], "encode_batch_size": 1}),
        "IPAdapterFaceID": (faces, {"image": two, "weight_faceidv2": 0.7}),
        "IPAAdapterFaceIDBatch": (faces, {"image": two, "weight": [0.9, 0.4], "weight_faceidv2": 1.2}),
        "IPAdapterTiled": (("base", "plus"), {"image": picture(25, 120, 200), "sharpening": 0.2}),
        "IPAdapterTiledBatch": (
            ("plus", "base"),
            {"image": picture(26, 200, 120), "sharpening": 0.0, "encode_batch_size": 2},
        ),
        "IPAdapterEmbeds": (("base", "plus"), {"pos_embed": embeds, "neg_embed": no_embeds}),
        "IPAdapterEmbedsBatch": (("plus", "base"), {"pos_embed": embeds, "neg_embed": no_embeds}),
        "IPAdapterMS": (("plus", "base"), {"image": two, "weight_faceidv2": 1.0}),
        "IPAdapterClipVisionEnhancer": (("plus", "base"), {"image": wide, **tiles}),
        "IPAdapterClipVisionEnhancerBatch": (("base", "plus"), {"image": two, **tiles}),
        "IPAdapterFromParams": (("base", "plus"), {}),
        "IPAdapterPreciseStyleTransfer": (("base", "plus"), {"image": three, "style_boost": 0.8}),
        "IPAdapterPreciseStyleTransferBatch": (("plus",), {"image": two, "style_boost": -0.6}),
        "IPAdapterPreciseComposition": (("plus", "base"), {"image": three, "composition_boost": 0.8}),
        "IPAdapterPreciseCompositionBatch": (("base",), {"image": two, "composition_boost": -0.6}),
    }
    if xl:
        coded["IPAdapterStyleComposition"] = (("plus", "base"), pairs)
        coded["IPAdapterStyleCompositionBatch"] = (("base", "plus"), pairs | {"expand_style": True})
    for n, (class_type, (adapters, own)) in enumerate(coded.items()):
        one_type = "Precise" in class_type or "StyleComposition" in class_type
        dropped = {"weight_type"} if one_type else set[str]()
        dropped |= {"combine_embeds"} if "Batch" in class_type or "Embeds" in class_type else set()
        dropped |= {"weight"} if "StyleComposition" in class_type else set()
        for i in range(5 if one_type else len(WEIGHT_TYPES)):
            settings = row(n, i)
            inputs = {key: value for key, value in settings.items() if key not in dropped} | own
            if not xl and (class_type, i) in FAINT:
                weight = inputs["weight"]
                inputs["weight"] = [3 * w for w in weight] if isinstance(weight, list) else 3 * weight
            if class_type == "IPAdapterMS" and i % 2:
                inputs["layer_weights"] = layers[i // 2 % 2]
            if class_type == "IPAdapterFromParams":
                kept = ("combine_embeds", "embeds_scaling")
                inputs = {key: settings[key] for key in kept} | {"ipadapter_params": params(settings)}
            name = f"grid, {class_type}: {i}"
            recorded = i == n % (5 if one_type else 15) and (n % 4 == 0 if xl else n % 3 == 1)
            yield Case(name, class_type, inputs, adapters[i % len(adapters)], latents=3, recorded=recorded)


def first_version() -> Iterator[Case]:
    """The class types of before 2024-03-23."""
    one, two, wide, types = (
        picture(31),
        picture(32, count=2),
        picture(33, 150, 230),
        ("original", "linear", "channel penalty"),
    )
    region = {"attn_mask": mask(1, 64, 48)}
    late = {"start_at": 0.3, "end_at": 0.9}

    def case(class_type: str, name: str, adapter: str, latents: int = 2, **inputs: Any) -> Case:
        given = {"weight": 0.8, "weight_type": "original", **inputs}
        if class_type not in ("IPAdapterApplyEncoded", "Values"):
            given = {"noise": 0.0, **given}
        return Case(f"first version, {class_type}: {name}", class_type, given, adapter, latents=latents, first=True)

    for kind in types:
        for adapter in ("base", "plus", "full-face"):
            more = region if adapter == "plus" else late if adapter == "base" else {}
            yield case("IPAdapterApply", f"{kind}, {adapter}", adapter, image=wide, weight_type=kind, **more)
        yield case("IPAdapterApply", f"{kind}, two images", "plus", image=two, weight_type=kind, weight=-0.5)
        yield case("IPAdapterApply", f"{kind}, unfold", "base", 3, image=two, weight_type=kind, unfold_batch=True)
    for noise in (0.2, 1.0):
        for adapter in ("base", "plus"):
            yield case("IPAdapterApply", f"noise {noise}, {adapter}", adapter, image=wide, noise=noise)
    for adapter in ("faceid", "faceid-portrait", "faceid-plus-1280"):
        for kind, v2 in (("original", False), ("linear", True), ("channel penalty", False)):
            face = {"faceid_v2": v2, "weight_v2": 0.6, "weight_type": kind, "noise": 0.3 if v2 else 0.0}
            yield case("IPAdapterApplyFaceID", f"{kind}, {adapter}", adapter, image=two, **face)
    for tiles in (0, 1, 2):
        for shape in ("square", "wide"):
            image = picture(34, 250, 240 if shape == "square" else 520)
            inputs = {
                "image": image,
                "short_side_tiles": tiles,
                "tile_weight": 0.6,
                "weight_type": types[tiles],
                **late,
            }
            yield case("IPAdapterTilesMasked", f"{tiles} tiles, {shape}", "base" if tiles else "plus", **inputs)

    def encoded(plus: bool, noise: float = 0.0) -> Callable[..., Any]:
        def make(nodes: Any, ipadapter: Any, vision: Any) -> torch.Tensor:
            node = nodes["IPAdapterEncoder"]()
            images = {"image_1": one, "image_2": wide, "image_3": two}
            weights = {"weight_1": 0.7, "weight_2": 1.0, "weight_3": 0.5}
            if hasattr(node, "preprocess"):
                return node.preprocess(vision, ipadapter_plus=plus, noise=noise, **images, **weights)[0]
            return node.encode(clip_vision=vision, weight=plus, noise=noise, **images, **weights)[0]

        return make

    def batched(nodes: Any, ipadapter: Any, vision: Any) -> torch.Tensor:
        pair = encoded(True)(nodes, ipadapter, vision), encoded(True, 0.4)(nodes, ipadapter, vision)
        return nodes["IPAdapterBatchEmbeds"]().batch(*pair)[0]

    for plus, adapter in ((False, "base"), (True, "plus")):
        for noise in (0.0, 0.5):
            name = f"{adapter}, noise {noise}"
            yield case("IPAdapterApplyEncoded", name, adapter, embeds=encoded(plus, noise), **region)
    yield case("IPAdapterApplyEncoded", "two batches", "plus", 3, embeds=batched, weight_type="linear")
    yield case("IPAdapterApplyEncoded", "unfold", "plus", 5, embeds=encoded(True), unfold_batch=True)


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


def first_values(nodes: Any) -> Iterator[tuple[str, Any]]:
    for position in ("center", "top", "left"):
        for around in (True, False):
            image = picture(15, 200, 300) if position == "left" else picture(15, 300, 200)
            made = nodes["PrepImageForInsightFace"]().prep_image(image, position, 0.4 if around else 0.0, around)[0]
            yield f"first version, PrepImageForInsightFace: {position}, {around}", made


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.shape != b.shape:
        return float("inf")
    return float((a.float() - b.float()).abs().max() / b.float().abs().max().clamp(min=1e-6))


@torch.inference_mode()
def main() -> None:
    import comfy.options

    comfy.options.enable_args_parsing()
    # as main.py does: 0.3.64's nodes.py puts a folder with another utils before it
    importlib.import_module("utils.extra_config")
    import nodes as host_nodes  # noqa: F401  (the packs import it)

    torch.set_num_threads(1)
    for layer in (
        torch.nn.Linear,
        torch.nn.LayerNorm,
    ):  # the old pack fills a network with random numbers at every apply
        layer.reset_parameters = lambda self: None
    out, sys.stdout = sys.stdout, sys.stderr  # other custom code talks on stdout
    world = World()
    plain: dict[Any, torch.Tensor] = {}

    def report(
        name: str, ours: torch.Tensor, old: torch.Tensor | None, effect: float | None, recorded: bool = True
    ) -> None:
        line: dict[str, Any] = {"case": f"{kind}: {name}", "numbers": fingerprint(ours), "effect": effect}
        line["recorded"] = recorded
        if old is not None:
            line["difference"] = difference(ours, old)
        print(json.dumps(line), file=out, flush=True)

    if not world.xl:
        theirs = dict(values(world.old)) if world.old else {}
        theirs |= dict(first_values(world.first)) if world.first else {}
        for name, value in (*values(world.ours), *first_values(world.ours)):
            if wanted(name):
                report(name, value, theirs.get(name), None)
    singly = [case for case in cases(world.xl) if case.for_sdxl or not world.xl]
    if world.xl:  # of these the grid has all that SDXL's golden numbers need
        singly = [replace(case, recorded=False) for case in singly]
    else:
        singly = [replace(case, recorded=case.recorded and i % 21 == 0) for i, case in enumerate(singly)]
    # the first version's code for SDXL is the same but for the layers' numbers
    firsts = [] if world.xl else [replace(case, recorded=i % 9 == 0) for i, case in enumerate(first_version())]
    for case in (*singly, *grid(world.xl), *firsts):
        if not wanted(case.name):
            continue
        key = (case.percent, case.latents, case.size, case.guider)
        if key not in plain:
            plain[key] = world.sample(world.model, case)
        ours = world.sample(world.patched(case, False), case)
        old = world.sample(world.patched(case, True), case) if (world.first if case.first else world.old) else None
        report(case.name, ours, old, difference(ours, plain[key]) if case.acts else None, case.recorded)


if __name__ == "__main__":
    main()
