"""LoRAs in regions in a ComfyUI's own transformers, next to the same models whose layers are blended by hand.

    COMFY/.venv/bin/python regions_parity.py COMFY

Prints one JSON object per line and model: how far our prediction is from the one by hand, relative to its size, and what else the
tests ask. tests/host/test_regions_parity.py judges.
"""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false, reportUnknownLambdaType=false
# pyright: reportUnknownParameterType=false, reportMissingImports=false, reportUntypedBaseClass=false, reportAttributeAccessIssue=false

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

host_folder, *chosen = sys.argv[1:]
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, host_folder)

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
importlib.import_module("utils.extra_config")

import comfy.latent_formats  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.supported_models  # noqa: E402
import host_models  # noqa: E402
import torch  # noqa: E402
from in_host import Counting, load  # noqa: E402
from torch import Tensor  # noqa: E402

HERE = Path(__file__).resolve().parent


hand: Any = load("by_hand", HERE.parent / "by_hand.py")
load("ours", HERE.parents[1] / "__init__.py", package=True)
from ours.ipadapter_core.attention.masks import RegionMask  # type: ignore # noqa: E402
from ours.ipadapter_core.backends.comfy import lora as backend  # type: ignore # noqa: E402
from ours.ipadapter_core.lora import load_lora, targets_of  # type: ignore # noqa: E402
from ours.ipadapter_core.lora.patch import LoRAPatch  # type: ignore # noqa: E402

HEIGHT, WIDTH, TEXT, SIGMA = 11, 9, 7, 0.6
LEFT = torch.zeros(HEIGHT, WIDTH)
LEFT[:, :5] = 1
LEFT[3:5, 4:7] = 0.25
BESIDE_TEXT = partial(hand.text_apart, text=TEXT)


@dataclass(frozen=True)
class Case:
    """A model of ``host_models``: its latents in front of height and width, the width of its text, and its sequences."""

    model: str
    latents: tuple[int, ...] = (4,)
    text: int = 40
    sequences: Callable[..., Any] = BESIDE_TEXT
    more: dict[str, Any] = field(default_factory=dict[str, Any])
    """What its conditioning has besides the text."""
    config: dict[str, Any] = field(default_factory=dict[str, Any])
    """Where the table's model is built, but cannot be called."""
    cell: int = 2
    """Latents to a side of a token; latents are such that the picture has 6 rows of 5."""


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


POOLED: dict[str, Any] = {"pooled_output": numbers(1, 24, seed=4)}
REFERENCE = numbers(1, 4, 8, 6, seed=9)
BESIDE_REFERENCE = partial(hand.text_apart, text=TEXT, others=12)
VIDEO = partial(hand.of_a_video, moments=2)
# 30 tokens of the picture are filled up to 32 and 7 of the text to 8
ZIMAGE = partial(hand.text_apart, text=8, filled=2)
CASES = {
    "Flux": Case("Flux", more=POOLED | {"guidance": 3.5}),
    "Flux, Kontext": Case("Flux", sequences=BESIDE_REFERENCE, more=POOLED | {"reference_latents": [REFERENCE]}),
    # the host fills texts up to 512 tokens
    "Flux.2": Case("Flux2", latents=(8,), sequences=partial(hand.text_apart, text=512), cell=1),
    "Chroma": Case(
        "Chroma", latents=(16,), more=POOLED, config={"in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": 32}
    ),
    "SD3": Case("SD3", more=POOLED),
    "Qwen-Image": Case("QwenImage", latents=(4, 1)),
    "Qwen-Image-Edit": Case(
        "QwenImage", latents=(4, 1), sequences=BESIDE_REFERENCE,
        more={"reference_latents": [REFERENCE[:, :, None]], "reference_latents_method": "index_timestep_zero"},
    ),
    "Z-Image": Case("ZImage", sequences=ZIMAGE, config={"dim": 256, "axes_dims": [16, 24, 24]}),
    "Lumina 2": Case("Lumina2", more={"attention_mask": torch.ones(1, TEXT, dtype=torch.long)}),
    "Anima": Case("Anima", latents=(4, 2), text=1024, sequences=VIDEO),
    "Wan": Case("WAN21_T2V", latents=(4, 2), sequences=VIDEO),
}  # fmt: skip


class Format(comfy.latent_formats.LatentFormat):
    """Latents as they are, of any number of channels."""


def host(case: Case) -> Any:
    model = host_models.build(case.model, case.config)
    axes = model.latent_format.latent_dimensions if hasattr(model.latent_format, "latent_dimensions") else 2
    model.latent_format = Format()
    model.latent_format.latent_dimensions = axes
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def predict(case: Case, model: Any) -> dict[str, Tensor]:
    """The velocity of both branches in one step of the host's own sampler and guider."""
    model, seen = model.clone(), dict[str, Tensor]()
    x = numbers(2, *case.latents, *((HEIGHT, WIDTH) if case.cell == 2 else (6, 5)), seed=3)

    def look(args: Any) -> Any:
        for name, out in zip(("positive", "negative"), args["conds_out"], strict=True):
            seen[name] = (args["input"] - out) / SIGMA
        return args["conds_out"]

    model.set_model_sampler_pre_cfg_function(look)
    conds = [[[numbers(1, TEXT, case.text, seed=seed), dict(case.more)]] for seed in (6, 7)]
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(*conds)
    guider.set_cfg(3.0)
    sigmas, sampler = torch.tensor([SIGMA, 0.0]), comfy.samplers.sampler_object("euler")
    guider.sample(x / SIGMA, torch.zeros_like(x), sampler, sigmas, seed=0, disable_pbar=True)
    return seen


def lora_for(model: Any, seed: int, *, dora: bool = False) -> Any:
    """A LoRA on every matrix and kernel of the transformer."""
    generator, state = torch.Generator().manual_seed(seed), dict[str, Tensor]()
    for target in targets_of(model.model.diffusion_model).targets.values():
        if len(target.shape) < 2 or target.path.startswith("llm_adapter"):
            continue
        name, columns = f"diffusion_model.{target.path}", torch.Size(target.shape[1:]).numel()
        down = torch.randn(2, *target.shape[1:], generator=generator) / columns**0.5
        state[f"{name}.lora_down.weight"] = down
        state[f"{name}.lora_up.weight"] = torch.randn(target.shape[0], 2, *[1] * (len(target.shape) - 2), generator=generator) / 2  # fmt: skip
        if dora:
            state[f"{name}.dora_scale"] = torch.rand(target.shape[0], *[1] * (len(target.shape) - 1), generator=generator) + 0.5  # fmt: skip
    return LoRAPatch(backend.place(load_lora(state, name=f"lora {seed}"), model))


def inside(patch: Any, mask: Tensor, strength: float) -> Any:
    return replace(patch, mask=RegionMask.from_tensor(mask), strength=strength)


def with_loras(model: Any, *patches: Any) -> Any:
    for patch in patches:
        model = backend.apply_unfused(model, patch)
    return model


def apart(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(float((ours[n] - t).abs().max() / t.abs().max().clamp_min(1)) for n, t in expected.items())


def report(name: str, case: Case) -> None:
    if not hasattr(comfy.supported_models, case.model):
        print(json.dumps({"case": name, "absent": f"this ComfyUI has no {case.model}"}), flush=True)
        return
    model = host(case)
    denoiser = model.model.diffusion_model
    left = hand.of_tokens(LEFT, 2 // case.cell)
    one, other = lora_for(model, 1), lora_for(model, 2, dora=True)
    patches = [inside(one, left, 0.6), inside(other, 1 - left, -0.5)]
    passes: list[int] = []
    handle = denoiser.register_forward_pre_hook(lambda *_: passes.append(1))
    plain = predict(case, model)
    before = len(passes)
    steered = with_loras(model, *patches)
    ours = predict(case, steered)
    ran = len(passes) - before
    handle.remove()
    with Counting() as counted:
        predict(case, steered)
    with Counting() as without:
        predict(case, model)
    with hand.by_hand(denoiser, patches, case.sequences, latents=4, cell=case.cell):
        expected = predict(case, model)
    zeros = predict(case, with_loras(model, inside(one, torch.zeros(4, 4), 0.6)))
    whole = predict(case, with_loras(model, replace(one, strength=0.6)))
    halves = [inside(one, mask, 0.6) for mask in (left, 1 - left)]
    uncond = predict(case, with_loras(model, *(replace(p, uncond_strength=0.0) for p in patches)))
    row = {
        "case": name,
        "difference": apart(ours, expected),
        "effect": apart(ours, plain),
        "zeros": all(torch.equal(zeros[n], t) for n, t in plain.items()),
        "halves": apart(predict(case, with_loras(model, *halves)), whole),
        "negative": [apart({n: uncond[n]}, {n: t[n]}) for n, t in (("positive", ours), ("negative", plain))],
        "passes": ran / before,
        "synchronisations": counted.calls["_local_scalar_dense"] - without.calls["_local_scalar_dense"],
        "layers": len(one.matched.matches),
    }
    print(json.dumps(row), flush=True)


torch.set_num_threads(1)
with torch.no_grad():
    for name, case in CASES.items():
        if not chosen or name in chosen:
            report(name, case)
