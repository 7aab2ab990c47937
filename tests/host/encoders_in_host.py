"""Image encoders in one ComfyUI process, without a server: what our wrappers give, against transformers'.

    COMFY/.venv/bin/python encoders_in_host.py COMFY FOLDER

FOLDER is for the tiny files. Prints one JSON object per line: {"case", "difference"}, the largest difference relative to the
largest value, or {"case", "said"}, an error's words. tests/host/test_encoders.py judges.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

host_folder, folder = sys.argv[1], Path(sys.argv[2])
sys.argv = [sys.argv[0], "--cpu", "--fp32-text-enc"]
sys.path[:0] = [host_folder, str(Path(__file__).resolve().parents[1])]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import folder_paths  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch import Tensor  # noqa: E402

import tiny_towers  # noqa: E402

HERE = Path(__file__).resolve().parent
LAYERS = (1, 2)


def load_pack() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "ours", HERE.parents[1] / "__init__.py", submodule_search_locations=[str(HERE.parents[1])]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ours"] = module
    spec.loader.exec_module(module)
    return module


def core_model(config: dict[str, Any], state: dict[str, Tensor]) -> Any:
    """ComfyUI's own CLIP_VISION in a shape that its loader does not know."""
    import comfy.clip_vision

    file = folder / "config.json"
    file.write_text(json.dumps(config))  # 0.3.64 takes no dict
    vision = comfy.clip_vision.ClipVisionModel(str(file))
    missing, _ = vision.load_sd(dict(state))
    assert not missing, missing
    return vision


def say(case: str, ours: Tensor | None, theirs: Tensor) -> None:
    assert ours is not None
    assert ours.shape == theirs.shape, (case, ours.shape, theirs.shape)
    print(json.dumps({"case": case, "difference": float((ours - theirs).abs().max() / theirs.abs().max())}))


def said(case: str, work: Callable[[], object]) -> None:
    try:
        work()
    except ValueError as error:
        print(json.dumps({"case": case, "said": str(error)}))
    else:
        print(json.dumps({"case": case, "said": ""}))


def siglip_cases(host: Any, models: Path) -> None:
    model = tiny_towers.siglip(folder / "siglip", width=768, heads=12, layers=3)
    found = load_file(folder / "siglip" / "model.safetensors")
    state = {f"vision_model.{key.removeprefix('vision_model.')}": t for key, t in found.items()}
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(2))
    seen = model(pixels, output_hidden_states=True)
    config = {
        "model_type": "siglip_vision_model", "hidden_size": 768, "image_size": 56, "patch_size": 14, "num_channels": 3,
        "num_hidden_layers": 3, "num_attention_heads": 12, "intermediate_size": 48, "hidden_act": "gelu_pytorch_tanh",
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    }  # fmt: skip
    bare = {key: t for key, t in state.items() if ".head." not in key}
    save_file(bare, models / "bare.safetensors")
    without = host.clip_vision.encoder_of(core_model(config, state))
    assert "pooled" not in without.gives, "no file of its weights has the head"
    other = {key: t + 1 if key.endswith("post_layernorm.weight") else t for key, t in state.items()}
    save_file(other, models / "another.safetensors")
    assert "pooled" not in host.clip_vision.encoder_of(core_model(config, state)).gives, "another's head is not taken"
    save_file({**state, "text_model.x": torch.zeros(1)}, models / "whole.safetensors")
    folder_paths.filename_list_cache.clear()
    core = host.clip_vision.encoder_of(core_model(config, state))
    tower = host.clip_vision.encoder_of(host.clip_vision.load("whole.safetensors"))
    assert host.clip_vision.load("whole.safetensors") is host.clip_vision.load("whole.safetensors")
    for name, encoder in (("core", core), ("ours", tower)):
        given = encoder.encode(pixels)
        say(f"SigLIP {name} last", given.last, seen.last_hidden_state)
        say(f"SigLIP {name} penultimate", given.penultimate, seen.hidden_states[-2])
        say(f"SigLIP {name} pooled", given.pooled, seen.pooler_output)
        last, kept = encoder.states(pixels, LAYERS)
        say(f"SigLIP {name} last beside layers", last, seen.last_hidden_state)
        for number in LAYERS:
            say(f"SigLIP {name} layer {number}", kept[number], seen.hidden_states[number])
        say(f"SigLIP {name} last alone", encoder.states(pixels, ())[0], seen.last_hidden_state)
    assert "pooled" not in host.clip_vision.encoder_of(host.clip_vision.load("bare.safetensors")).gives
    assert host.clip_vision.widths("whole.safetensors") == (768, 0)
    picture = torch.rand(1, 56, 56, 3, generator=torch.Generator().manual_seed(3))
    theirs, ours = (
        loaded.encode_image(picture)
        for loaded in (core_model(config, state), host.clip_vision.load("whole.safetensors"))
    )
    for what in ("last_hidden_state", "penultimate_hidden_states", "image_embeds"):
        say(f"SigLIP encode_image {what}", ours[what], theirs[what])


def dino_cases(host: Any, models: Path) -> None:
    model = tiny_towers.dinov2(folder / "dino", width=128, layers=3, side=518, ratio=4)
    state = load_file(folder / "dino" / "model.safetensors")
    config = {
        "model_type": "dinov2", "hidden_size": 128, "image_size": 518, "num_hidden_layers": 3, "num_attention_heads": 2,
        "layer_norm_eps": 1e-6, "use_swiglu_ffn": True, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225],
    }  # fmt: skip
    save_file(state, models / "dino.safetensors")
    folder_paths.filename_list_cache.clear()
    core = host.clip_vision.encoder_of(core_model(config, state))
    tower = host.clip_vision.encoder_of(host.clip_vision.load("dino.safetensors"))
    for shape in ((56, 56), (70, 42)):
        pixels = torch.randn(1, 3, *shape, generator=torch.Generator().manual_seed(4))
        seen = model(pixels, output_hidden_states=True)
        for name, encoder in (("core", core), ("ours", tower)):
            last, kept = encoder.states(pixels, LAYERS)
            say(f"DINOv2 {name} last {shape}", last, seen.last_hidden_state)
            for number in LAYERS:
                say(f"DINOv2 {name} layer {number} {shape}", kept[number], seen.hidden_states[number])
            say(f"DINOv2 {name} penultimate {shape}", encoder.encode(pixels).penultimate, seen.hidden_states[-2])


def clip_cases(host: Any) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    sizes = {
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "projection_dim": 20,
    }
    torch.manual_seed(0)
    model: Any = CLIPVisionModelWithProjection(
        CLIPVisionConfig(image_size=28, patch_size=14, hidden_act="gelu", **sizes)
    ).eval()
    model.save_pretrained(folder / "clip")
    state = load_file(folder / "clip" / "model.safetensors")
    config = {
        "model_type": "clip_vision_model",
        "image_size": 28,
        "patch_size": 14,
        "num_channels": 3,
        "hidden_act": "gelu",
        **sizes,
    }
    pixels = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        seen = model(pixels, output_hidden_states=True)
    given = host.clip_vision.encoder_of(core_model(config, state)).encode(pixels)
    say("CLIP image_embeds", given.image_embeds, seen.image_embeds)
    say("CLIP penultimate", given.penultimate, seen.hidden_states[-2])
    say("CLIP last", given.last, seen.last_hidden_state)


def pe_cases(host: Any, models: Path) -> None:
    state = tiny_towers.pe_core(models / "pe.safetensors")
    torch.save({f"visual.{key}": t for key, t in state.items()}, models / "pe.pt")
    save_file({"a": torch.zeros(1)}, models / "nothing.safetensors")
    folder_paths.filename_list_cache.clear()
    pixels = torch.randn(1, 3, 42, 70, generator=torch.Generator().manual_seed(6))
    expected = tiny_towers.pe_reference({k: t.double() for k, t in state.items()}, pixels.double(), heads=6).float()
    for file in ("pe.safetensors", "pe.pt"):
        say(f"PE-Core {file}", host.clip_vision.encoder_of(host.clip_vision.load(file)).encode(pixels).last, expected)
    said("no encoder", lambda: host.clip_vision.load("nothing.safetensors"))
    said("nothing connected", lambda: host.clip_vision.encoder_of(None))


def packed_cases(host: Any) -> None:
    """The second input of the nodes, in either order, and not asked where there is no need."""
    from dataclasses import replace

    from ours.ipadapter_core import EncodeOptions  # pyright: ignore[reportMissingImports]
    from ours.ipadapter_core.features import CHARACTER, ENCODERS, Look  # pyright: ignore[reportMissingImports]

    names = ("whole.safetensors", "dino.safetensors")
    siglip, dino = (host.clip_vision.load(name) for name in names)
    looks = (Look("SigLIP so400m/14-384", (1, 2), 56), Look("DINOv2 giant/14", (1, 2), 56, skip=1))
    for look, (width, size) in zip(looks, ((768, 56), (128, 518)), strict=True):
        ENCODERS[look.encoder] = replace(ENCODERS[look.encoder], hidden_size=width, image_size=size)

    import tiny

    def managed(width: int, packed: bool) -> Any:
        found = host.adapters.manage(tiny.tiny_state("plus", feature_dim=width), "tiny")
        if packed:
            family = type(found.weights.spec.format)()
            family.feature, family.framing = replace(CHARACTER, looks=looks), "subject"
            found.weights = replace(
                found.weights, spec=replace(found.weights.spec, format=family, unconditional="same")
            )
        return found

    picture = torch.rand(1, 80, 60, 3, generator=torch.Generator().manual_seed(7))
    options, adapter = EncodeOptions(), managed(768 + 128, True)
    one = host.adapters.encode(adapter, siglip, picture, options, second=dino)
    other = host.adapters.encode(adapter, dino, picture, options, second=siglip)
    say("two encoders in either order", one.cond, other.cond)
    assert one.negative_branch == "same"
    alone = managed(128, False)
    say(
        "the one that fits",
        *(host.adapters.encode(alone, a, picture, options, second=b).cond for a, b in ((siglip, dino), (dino, None))),
    )
    said("one is missing", lambda: host.adapters.encode(adapter, siglip, picture, options))
    said("the wrong one", lambda: host.adapters.encode(alone, siglip, picture, options))


def main() -> None:
    # as main.py does: 0.3.64's nodes.py puts a folder with another utils before it
    importlib.import_module("utils.extra_config")
    import nodes as host_nodes  # noqa: F401  (the pack imports it)

    torch.set_num_threads(1)
    models = folder / "clip_vision"
    models.mkdir()
    folder_paths.add_model_folder_path("clip_vision", str(models))
    load_pack()
    host: Any = sys.modules["ours.nodes.host"]
    with torch.inference_mode():
        siglip_cases(host, models)
        dino_cases(host, models)
        clip_cases(host)
        pe_cases(host, models)
        packed_cases(host)


main()
