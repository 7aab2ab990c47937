"""What scripts inside a host's Python need for LoRAs on its models: our pack, tiny LoRAs, the host's own loader, and comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.lora
import comfy.model_patcher
import comfy.sd
import host_models
import torch
from in_host import load
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent


load("ours", HERE.parents[1] / "__init__.py", package=True)
from ours.ipadapter_core.attention.schedule import Window  # type: ignore # noqa: E402, F401
from ours.ipadapter_core.lora import load_lora  # type: ignore # noqa: E402, F401
from ours.ipadapter_core.lora.layer import Layer  # type: ignore # noqa: E402
from ours.ipadapter_core.lora.patch import LoRAPatch  # type: ignore # noqa: E402
from ours.ipadapter_core.lora.running import Running  # type: ignore # noqa: E402
from ours.ipadapter_core.lora.unfused import UnfusedStack  # type: ignore # noqa: E402
from ours.nodes.host import lora as host_lora  # type: ignore # noqa: E402, F401

Weights = dict[str, Tensor]
CPU = torch.device("cpu")
PREFIXES = (
    "lora_prior_unet_", "lora_prior_te_", "lora_transformer_", "lora_unet_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_te_", "lycoris_",
    "unet.base_model.model.", "base_model.model.", "diffusion_model.", "text_encoders.", "text_encoder_2.", "text_encoder.", "transformer.",
    "unet.",
)  # fmt: skip


def spellings(names: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The host's names by prefix, in rounds in which no two lead to the same place: of such two the host keeps the last."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, to in names.items():
        rounds = found.setdefault(next((p for p in PREFIXES if name.startswith(p)), ""), [])
        for entries in rounds:
            if to not in entries.values():
                entries[name] = to
                break
        else:
            rounds.append({name: to})
    return found


def is_there(to: Any, state: Weights) -> bool:
    """Whether the host's loader can change anything there: its maps name layers that some models lack, and rows beyond the last."""
    key, offset, *_ = (*to, None) if isinstance(to, tuple) else (to, None)
    return key in state and (offset is None or offset[1] + offset[2] <= state[key].shape[offset[0]])


def low_rank(shape: tuple[int, ...], generator: torch.Generator, rank: int = 2) -> Weights:
    down = torch.randn(rank, *shape[1:], generator=generator) / torch.Size(shape[1:]).numel() ** 0.5
    up = torch.randn(shape[0], rank, *[1] * (len(shape) - 2), generator=generator) / rank**0.5
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(1.5)}


def lora_for(names: dict[str, Any], state: Weights) -> Weights:
    """One LoRA over all these names: products on matrices and kernels, differences of the rest."""
    generator, found = torch.Generator().manual_seed(1), Weights()
    for name, to in names.items():
        key, offset, *_ = (*to, None) if isinstance(to, tuple) else (to, None)
        shape = tuple(state[key].shape)
        if offset is not None:
            shape = (offset[2], *shape[1:])
        if len(shape) > 1 and key.endswith(".weight"):
            found |= {f"{name}.{part}": t for part, t in low_rank(shape, generator).items()}
        else:
            found[f"{name}.diff"] = torch.randn(shape, generator=generator) / 4
    return found


def merged(model: Any, plain: Weights) -> Weights:
    """Every weight that a MODEL's patches change, as the host computes it."""
    return {k: comfy.lora.calculate_weight(p, plain[k].clone(), k) for k, p in model.patches.items()}


def largest(ours: Weights, theirs: Weights) -> float:
    """Difference relative to the weight's size."""
    return max(
        (float((a - theirs[k]).abs().max() / theirs[k].abs().max().clamp_min(1e-3)) for k, a in ours.items()),
        default=0.0,
    )


def inputs_of(layer: Layer, module: Any, generator: torch.Generator) -> Tensor:
    if layer.kind == "embedding":
        return torch.randint(0, layer.shape[0], (2, 3), generator=generator)
    if layer.kind == "conv":
        size = [2 + int(k) * int(d) for k, d in zip(module.kernel_size, module.dilation, strict=True)]
        return torch.randn(1, int(module.in_channels), *size, generator=generator)
    if layer.kind == "norm":
        wide = getattr(module, "normalized_shape", None)
        return (
            torch.randn(2, 3, *wide, generator=generator)
            if wide
            else torch.randn(2, int(module.num_channels), 3, 3, generator=generator)
        )
    return torch.randn(2, 3, layer.shape[1], generator=generator)


def beside(unet: nn.Module, patch: LoRAPatch, weights: Weights) -> tuple[int, float, bool]:
    """Layers with side paths, the largest difference of their outputs to the merge's, and whether strength 0 leaves them alone."""
    stack, generator, worst, zero = UnfusedStack((patch,)), torch.Generator().manual_seed(2), 0.0, True
    running, off = Running(stack.patches), Running((patch.with_strength(0.0),))
    for path, layer in stack.layers.items():
        module = unet.get_submodule(path)
        x = inputs_of(Layer(module), module, generator)
        changed = {n: w for n in ("weight", "bias") if (w := weights.get(f"diffusion_model.{path}.{n}")) is not None}
        y = module(x)
        expected = torch.func.functional_call(module, changed, (x,))
        live = layer.add(module, x, y, running)
        worst = max(worst, float((live - expected).abs().max() / expected.abs().max().clamp_min(1e-3)))
        zero = zero and layer.add(module, x, y, off) is y
    return len(stack.layers), worst, zero


def patcher_of(name: str, sizes: dict[str, Any] | None = None) -> Any:
    """A MODEL of the host around one of its classes at a small size."""
    base = host_models.build(name, sizes or {})
    return comfy.model_patcher.ModelPatcher(base, load_device=CPU, offload_device=CPU)


def weights_of(patcher: Any) -> Weights:
    """Its weights by key."""
    return {k: t for k, t in patcher.model.state_dict().items() if t.is_floating_point()}


def by_host(patcher: Any, lora: Weights, strength: float) -> Any:
    """The MODEL with a LoRA by the host's own loader."""
    return comfy.sd.load_lora_for_models(patcher, None, dict(lora), strength, 0)[0]
