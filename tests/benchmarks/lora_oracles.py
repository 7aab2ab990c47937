"""What LyCORIS and PEFT make of the tensors of tests/core/test_lora_algorithms.py, written to lora_oracles.json there.

    pip install lycoris-lora==4.1.3 peft==0.21.2   # in an environment of their own
    python tests/benchmarks/lora_oracles.py

Run again only to record other versions; the tests read the file. Where an oracle is known to be wrong, or means another
thing by strength, ``right`` is false and ``why`` says so: the test then asserts that ours differs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CORE = Path(__file__).parents[1] / "core"
FILE = CORE / "lora_oracles.json"
STRENGTHS = (-1.0, 0.5, 1.0, 2.0)
EVERY = 7  # one number in so many is enough to tell a formula

LYCORIS = (
    "LoRA", "LoCon tucker", "LoHa", "LoHa tucker", "LoKr", "LoKr both low-rank", "LoKr whole", "LoKr tucker", "GLoRA",
    "DoRA out", "DoRA in", "DoRA on LoHa", "OFT", "OFT constrained", "OFT rescaled", "BOFT", "full", "IA3 out",
)  # fmt: skip
FORMULAS = (
    "LoHa",
    "LoHa tucker",
    "LoKr",
    "LoKr both low-rank",
    "LoKr tucker",
    "OFT",
    "OFT constrained",
    "OFT rescaled",
)


def main() -> None:
    sys.path[:0] = [str(CORE), str(CORE.parent)]
    # the test module reads the file that this script writes
    if not FILE.exists():
        FILE.write_text('{"cases": []}')
    import test_lora_algorithms as algorithms

    cases = [*lycoris(algorithms), *peft(algorithms)]
    header = {"lycoris-lora": version("lycoris-lora"), "peft": version("peft"), "torch": torch.__version__}
    lines = ",\n".join("  " + json.dumps(case) for case in cases)
    FILE.write_text(json.dumps({"made by": header})[:-1] + ', "cases": [\n' + lines + "\n]}\n")
    print(f"{len(cases)} cases in {FILE}")


def record(oracle: str, name: str, kind: str, strength: float, weight: Tensor, right: bool, why: str) -> dict[str, Any]:
    numbers = [round(float(n), 7) for n in weight.flatten()[::EVERY]]
    return {
        "oracle": oracle, "name": name, "kind": kind, "strength": strength, "right": right, "why": why,
        "every": EVERY, "weights": numbers,
    }  # fmt: skip


def lycoris(algorithms: Any) -> Iterator[dict[str, Any]]:
    for name in LYCORIS:
        file, _, kinds = algorithms.CASES[name]
        for kind in kinds:
            layer = algorithms.layer_of(kind).float()
            tensors = {key: t.float() for key, t in file(algorithms.KERNELS[kind]).items()}
            if name in FORMULAS:
                merged = by_formula(name, tensors, layer.weight.data, algorithms)
                right = name != "LoKr tucker"
                why = (
                    "the same formula"
                    if right
                    else "with a core it takes w2_a's second size, the outputs, for the rank"
                )
                yield record("lycoris.functional", name, kind, 1.0, merged, right, why)
            for strength in STRENGTHS:
                try:
                    merged = by_module(name, tensors, layer, strength)
                except (RuntimeError, IndexError, TypeError, AttributeError):
                    continue  # its loader guesses the factors' sizes anew and fails on ours
                right, why = lycoris_is_right(name, strength)
                yield record("lycoris", name, kind, strength, merged.reshape(layer.weight.shape), right, why)


def by_module(name: str, tensors: dict[str, Tensor], layer: nn.Module, strength: float) -> Tensor:
    from lycoris.modules import get_module, make_module

    named = {f"m.{key}": t for key, t in tensors.items()}
    if name == "full":
        named["m.diff_b"] = torch.zeros(len(layer.weight))
    algorithm, parts = get_module(named, "m")
    merged = make_module(algorithm, parts, "m", layer).get_merged_weight(multiplier=strength)[0].detach()
    return merged.reshape(layer.weight.shape)


def by_formula(name: str, f: dict[str, Tensor], weight: Tensor, algorithms: Any) -> Tensor:
    from lycoris.functional import diag_oft, loha, lokr

    get = f.get
    if name.startswith("LoHa"):
        roles = ("w1_b", "w1_a", "w2_b", "w2_a", "t1", "t2")
        return weight + loha.diff_weight(*(get(f"hada_{role}") for role in roles), gamma=algorithms.SCALE).reshape(
            weight.shape
        )
    if name.startswith("LoKr"):
        roles = ["w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"]
        parts = (f.get(f"lokr_{role}") for role in roles)
        # it divides by the rank itself
        return weight + lokr.diff_weight(*parts, gamma=algorithms.ALPHA).reshape(weight.shape)
    constraint = float(f["alpha"]) * len(weight)
    return weight + diag_oft.diff_weight(weight, f["oft_blocks"], get("rescale"), constraint=constraint)


def lycoris_is_right(name: str, strength: float) -> tuple[bool, str]:
    if "LoHa" in name:
        return False, "LyCORIS 4.1.3 multiplies a LoHa by alpha/rank twice when it merges; its forward does so once"
    if "DoRA" in name and strength != 1:
        return False, "LyCORIS scales the magnitude's factor instead of the whole change"
    if name == "OFT rescaled" and strength != 1:
        return False, "LyCORIS rescales fully at any strength, so its strength 0 is not off"
    return True, "the same formula"


def peft(algorithms: Any) -> Iterator[dict[str, Any]]:
    from peft import LoraConfig, get_peft_model

    class Model(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.m = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.m(x)

    for name, use_dora in (("LoRA", False), ("DoRA of PEFT", True)):
        for kind in ("linear", "conv 3×3"):
            for strength in (0.0, *STRENGTHS):
                file = algorithms.CASES[name][0](algorithms.KERNELS[kind])
                layer = algorithms.layer_of(kind).float()
                config = LoraConfig(
                    r=algorithms.RANK, lora_alpha=algorithms.ALPHA, target_modules=["m"], use_dora=use_dora
                )
                found = get_peft_model(Model(layer), config).base_model.model.m
                up, down = ("lora_B.weight", "lora_A.weight") if use_dora else ("lora_up.weight", "lora_down.weight")
                found.lora_A["default"].weight.data = file[down].float()
                found.lora_B["default"].weight.data = file[up].float()
                if use_dora:
                    magnitude = found.lora_magnitude_vector["default"]
                    given = file["lora_magnitude_vector.weight"].float()
                    magnitude.weight.data = given.reshape(magnitude.weight.shape)
                found.set_scale("default", strength)
                found.merge()
                right = not use_dora or strength == 1
                why = "the same formula" if right else "PEFT scales only ΔW, so its strength 0 is not off"
                yield record("peft", name, kind, strength, found.base_layer.weight.detach(), right, why)


if __name__ == "__main__":
    main()
