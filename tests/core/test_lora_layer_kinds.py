"""Layers beyond matrices and 3×3 kernels: sound and video convolutions, channels in groups, norms without a mean. Live is merged."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ipadapter_core.backends.comfy.lora import merge_parts
from ipadapter_core.lora import load_lora, targets_of
from ipadapter_core.lora.matching import match_lora
from ipadapter_core.lora.patch import LoRAPatch
from ipadapter_core.lora.running import Running
from ipadapter_core.lora.targets import target_of
from ipadapter_core.lora.unfused import UnfusedStack
from tiny_models import noise

Weights = dict[str, Tensor]
Shape = tuple[int, ...]


class Holder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer


LAYERS: dict[str, tuple[Callable[[], nn.Module], Shape]] = {
    "sound": (lambda: nn.Conv1d(4, 8, 3, padding=1), (2, 4, 7)),
    "video": (lambda: nn.Conv3d(4, 8, 3, padding=1), (1, 4, 3, 5, 5)),
    "time alone": (lambda: nn.Conv3d(4, 8, (3, 1, 1), padding=(1, 0, 0)), (1, 4, 4, 3, 3)),
    "video patches": (lambda: nn.Conv3d(4, 8, (1, 2, 2), stride=(1, 2, 2)), (1, 4, 2, 4, 4)),
    "groups": (lambda: nn.Conv2d(8, 8, 3, groups=2, padding=1), (1, 8, 5, 5)),
    "depthwise": (lambda: nn.Conv3d(4, 4, 3, groups=4, padding=1), (1, 4, 3, 4, 4)),
}


def lora(shape: Shape) -> Weights:
    return {
        "lora_down.weight": noise(2, *shape[1:], seed=1),
        "lora_up.weight": noise(shape[0], 2, *[1] * (len(shape) - 2), seed=2),
    }


def tucker(shape: Shape) -> Weights:
    ones = [1] * (len(shape) - 2)
    return {
        "lora_down.weight": noise(2, shape[1], *ones, seed=1),
        "lora_mid.weight": noise(2, 2, *shape[2:], seed=3),
        "lora_up.weight": noise(shape[0], 2, *ones, seed=2),
    }


def loha(shape: Shape) -> Weights:
    columns = math.prod(shape[1:])
    return {
        f"hada_w{n}_{side}": noise(*size, seed=n)
        for n in (1, 2)
        for side, size in (("a", (shape[0], 2)), ("b", (2, columns)))
    }


def lokr(shape: Shape) -> Weights:
    return {"lokr_w1": noise(2, 1, seed=1), "lokr_w2": noise(shape[0] // 2, *shape[1:], seed=2)}


def full(shape: Shape) -> Weights:
    return {"diff": noise(*shape, seed=1), "diff_b": noise(shape[0], seed=2)}


def dora(shape: Shape) -> Weights:
    return lora(shape) | {"dora_scale": noise(shape[0], *[1] * (len(shape) - 1), seed=4).abs() + 0.5}


def placed(holder: nn.Module, tensors: Weights) -> LoRAPatch:
    weights = load_lora({f"layer.{name}": t for name, t in tensors.items()})
    return LoRAPatch(match_lora(weights, {"denoiser": targets_of(holder)}), strength=0.7)


def assert_live_is_merged(holder: Holder, patch: LoRAPatch, x: Tensor) -> None:
    stack, changed = UnfusedStack((patch,)), dict[str, Tensor]()
    for match, factor in patch.acting("denoiser"):
        weight = holder.get_parameter(match.key)
        changed[match.parameter] = weight + merge_parts(weight, [(match, 0.7 * factor)])
    y = holder.layer(x)
    expected = torch.func.functional_call(holder.layer, changed, (x,))
    live = stack.layers["layer"].add(holder.layer, x, y, Running(stack.patches))
    assert not torch.equal(live, y)
    assert_close(live, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("make", [lora, tucker, loha, lokr, full, dora], ids=lambda make: make.__name__)
@pytest.mark.parametrize("name", LAYERS)
def test_convolutions(name: str, make: Callable[[Shape], Weights]) -> None:
    torch.manual_seed(0)
    build, size = LAYERS[name]
    holder = Holder(build()).requires_grad_(False)
    assert_live_is_merged(
        holder, placed(holder, make(tuple(holder.get_parameter("layer.weight").shape))), noise(*size, seed=9)
    )


def test_a_core_of_a_video_kernel_is_its_formula() -> None:
    shape = (8, 4, 3, 2, 2)
    tensors = {name: t.double() for name, t in tucker(shape).items()}
    holder = Holder(nn.Conv3d(4, 8, (3, 2, 2))).requires_grad_(False)
    (match,) = placed(holder, tensors).matched.matches
    up, down = tensors["lora_up.weight"].flatten(1), tensors["lora_down.weight"].flatten(1)
    expected = torch.stack([up @ core @ down for core in tensors["lora_mid.weight"].flatten(2).unbind(2)], 2).reshape(
        shape
    )
    assert_close(match.update.delta(torch.zeros(shape, dtype=torch.float64)), expected)


@pytest.mark.parametrize("tensors", [{"w_norm": noise(6)}, {"set_weight": noise(6)}], ids=["w_norm", "set_weight"])
@pytest.mark.parametrize("kind", [nn.RMSNorm, nn.LayerNorm])
def test_norms(kind: Callable[[int], nn.Module], tensors: Weights) -> None:
    holder = Holder(kind(6)).requires_grad_(False)
    assert_live_is_merged(holder, placed(holder, tensors), noise(2, 3, 6) + 1)


def oft(shape: Shape) -> Weights:
    return {"oft_blocks": noise(shape[0] // 4, 4, 4, seed=1) / 2}


def dora_in(shape: Shape) -> Weights:
    return lora(shape) | {"dora_scale": noise(1, shape[1], *[1] * (len(shape) - 2), seed=4).abs() + 0.5}


@pytest.mark.parametrize("make", [oft, dora_in], ids=lambda make: make.__name__)
def test_changes_that_read_the_weight_of_groups(make: Callable[[Shape], Weights]) -> None:
    build, size = LAYERS["groups"]
    holder = Holder(build()).requires_grad_(False)
    assert_live_is_merged(
        holder, placed(holder, make(tuple(holder.get_parameter("layer.weight").shape))), noise(*size, seed=9)
    )


def test_transposed_convolutions_have_no_side_path() -> None:
    assert not target_of("up", nn.ConvTranspose2d(4, 8, 2), "denoiser", "up", "base").beside
    assert target_of("down", nn.Conv2d(4, 8, 2), "denoiser", "down", "base").beside
