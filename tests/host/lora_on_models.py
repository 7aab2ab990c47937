"""LoRAs on every kind of model that a ComfyUI builds, in every spelling that its key map offers, next to its own loader.

    COMFY/.venv/bin/python lora_on_models.py COMFY [MODEL ...]

Prints one JSON object per line and model: what was built, how many names in how many spellings, the largest difference of our
merged weights to the host's (relative to the weight), of our side paths to the merge, and what was dropped or refused.
tests/host/test_lora_on_models.py judges.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

host_folder, *chosen = sys.argv[1:]
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, host_folder)

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
importlib.import_module("utils.extra_config")

import comfy.lora  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.supported_models  # noqa: E402
import host_models  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

HERE = Path(__file__).resolve().parent


def load_pack() -> ModuleType:
    file = HERE.parents[1] / "__init__.py"
    spec = importlib.util.spec_from_file_location("ours", file, submodule_search_locations=[str(file.parent)])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["ours"] = module
    spec.loader.exec_module(module)
    return module


load_pack()
from ours.ipadapter_core.lora import load_lora  # type: ignore # noqa: E402
from ours.ipadapter_core.lora.layer import Layer  # type: ignore # noqa: E402
from ours.ipadapter_core.lora.patch import LoRAPatch  # type: ignore # noqa: E402
from ours.ipadapter_core.lora.running import Running  # type: ignore # noqa: E402
from ours.ipadapter_core.lora.unfused import UnfusedStack  # type: ignore # noqa: E402
from ours.nodes.host import lora as host_lora  # type: ignore # noqa: E402

Weights = dict[str, Tensor]
CPU = torch.device("cpu")
PREFIXES = (
    "lora_prior_unet_", "lora_transformer_", "lora_unet_", "lycoris_", "unet.base_model.model.", "base_model.model.", "diffusion_model.",
    "transformer.", "unet.",
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


def row_of(name: str) -> dict[str, Any]:
    start = time.perf_counter()
    base = host_models.build(name)
    patcher = comfy.model_patcher.ModelPatcher(base, load_device=CPU, offload_device=CPU)
    plain = {k: t for k, t in base.state_dict().items() if t.is_floating_point()}
    names = comfy.lora.model_lora_keys_unet(base, {})
    row: dict[str, Any] = {
        "model": name, "base": type(base).__name__, "unet": type(base.diffusion_model).__name__, "names": len(names), "spellings": {},
        "merged": 0.0, "live": 0.0, "beside": 0, "merge alone": 0, "zero": True, "dropped": [], "refused": [], "not there": [],
    }  # fmt: skip
    wrong = {to[0] for to in names.values() if isinstance(to, tuple) and to[0] in plain and not is_there(to, plain)}
    for spelling, rounds in spellings(names).items():
        for entries in rounds:
            there = {
                n: to
                for n, to in entries.items()
                if is_there(to, plain) and not (isinstance(to, tuple) and to[0] in wrong)
            }
            row["not there"] += sorted(set(entries) - set(there))
            lora = lora_for(there, plain)
            if not lora:
                continue
            theirs = merged(comfy.sd.load_lora_for_models(patcher, None, dict(lora), 0.7, 0)[0], plain)
            try:
                loaded = host_lora.LoadedLoRA(load_lora(lora, name=f"{name} {spelling}"))
                model, _, _, _ = host_lora.apply(patcher, None, loaded, "merged", strength=0.7)
            except Exception as error:
                row["refused"].append(f"{spelling}: {type(error).__name__}: {error}"[:600])
                continue
            ours = merged(model, plain)
            matched = host_lora.backend.place(loaded.weights, patcher, names=names)
            row["dropped"] += [f"{spelling}: {left.name}: {left.why}" for left in matched.left_out]
            if set(ours) != set(theirs):
                row["dropped"] += [
                    f"{spelling}: {key} is changed by one of the two" for key in sorted(set(ours) ^ set(theirs))
                ]
                ours = {k: t for k, t in ours.items() if k in theirs}
            row["merged"] = max(row["merged"], largest(ours, theirs))
            patch = LoRAPatch(matched, strength=0.7)
            layers, live, zero = beside(base.diffusion_model, patch.beside_layers(), ours)
            row["beside"] += layers
            row["merge alone"] += sum(match.needs_merged is not None for match in matched.matches)
            row["live"] = max(row["live"], live)
            off, _, _, _ = host_lora.apply(patcher, None, loaded, "merged", strength=0.0)
            row["zero"] = row["zero"] and zero and not off.patches
            row["spellings"][spelling] = row["spellings"].get(spelling, 0) + len(there)
    row["seconds"] = round(time.perf_counter() - start, 2)
    return row


def kinds() -> Iterator[str]:
    known = {kind.__name__ for kind in comfy.supported_models.models}
    yield from (name for name in host_models.MODELS if name in known and (not chosen or name in chosen))


torch.set_num_threads(1)
logging.getLogger().setLevel(logging.ERROR)
with torch.inference_mode():
    for kind in kinds():
        print(json.dumps(row_of(kind)), flush=True)
known = [kind.__name__ for kind in comfy.supported_models.models]
left_out = {kind: why for kind, why in host_models.LEFT_OUT.items() if kind in known}
print(json.dumps({"known": known, "left out": left_out}), flush=True)
