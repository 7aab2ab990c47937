"""Every algorithm at every strength, merged and live, against float64 formulas written plainly here; and recorded oracles."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from ipadapter_core.errors import IncompatibleAdapterError
from ipadapter_core.lora import Layer, Update, load_lora

STRENGTHS = (-1.0, 0.0, 0.5, 1.0, 2.0)
OUT, IN, RANK, ALPHA = 8, 12, 3, 1.5
SCALE = ALPHA / RANK
KERNELS = {"linear": (), "conv 1×1": (1, 1), "conv 3×3": (3, 3)}
Weights = dict[str, Tensor]
Formula = Callable[[Tensor, Weights, float], Tensor]


def made(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) / 3


def matrix(t: Tensor) -> Tensor:
    return t.reshape(t.shape[0], -1)


# --- what a file holds and what it means -----------------------------------------------------------------------------


def lora_file(kernel: tuple[int, ...]) -> Weights:
    up = made(OUT, RANK, *[1] * len(kernel), seed=2)
    return {"lora_down.weight": made(RANK, IN, *kernel, seed=1), "lora_up.weight": up, "alpha": torch.tensor(ALPHA)}


def lora(w: Tensor, f: Weights, s: float) -> Tensor:
    return w + s * SCALE * (matrix(f["lora_up.weight"]) @ matrix(f["lora_down.weight"])).reshape(w.shape)


def tucker_file(kernel: tuple[int, ...]) -> Weights:
    return {
        "lora_down.weight": made(RANK, IN, 1, 1, seed=1),
        "lora_mid.weight": made(RANK, RANK, *kernel, seed=3),
        "lora_up.weight": made(OUT, RANK, 1, 1, seed=2),
        "alpha": torch.tensor(ALPHA),
    }


def tucker(w: Tensor, f: Weights, s: float) -> Tensor:
    change = torch.zeros_like(w)
    for y in range(w.shape[2]):
        for x in range(w.shape[3]):
            core = f["lora_mid.weight"][:, :, y, x]
            change[:, :, y, x] = matrix(f["lora_up.weight"]) @ core @ matrix(f["lora_down.weight"])
    return w + s * SCALE * change


def loha_file(kernel: tuple[int, ...]) -> Weights:
    columns = IN * torch.Size(kernel).numel()
    names = ("w1_a", "w1_b", "w2_a", "w2_b")
    shapes = ((OUT, RANK), (RANK, columns)) * 2
    file = {f"hada_{n}": made(*shape, seed=i) for i, (n, shape) in enumerate(zip(names, shapes, strict=True))}
    return file | {"alpha": torch.tensor(ALPHA)}


def loha(w: Tensor, f: Weights, s: float) -> Tensor:
    product = (f["hada_w1_a"] @ f["hada_w1_b"]) * (f["hada_w2_a"] @ f["hada_w2_b"])
    return w + s * SCALE * product.reshape(w.shape)


def loha_tucker_file(kernel: tuple[int, ...]) -> Weights:
    file: Weights = {"alpha": torch.tensor(ALPHA)}
    for i in (1, 2):
        file |= {
            f"hada_t{i}": made(RANK, RANK, *kernel, seed=i),
            f"hada_w{i}_a": made(RANK, OUT, seed=i + 2),
            f"hada_w{i}_b": made(RANK, IN, seed=i + 4),
        }
    return file


def loha_tucker(w: Tensor, f: Weights, s: float) -> Tensor:
    halves: list[Tensor] = []
    for i in (1, 2):
        half = torch.zeros_like(w)
        for y in range(w.shape[2]):
            for x in range(w.shape[3]):
                half[:, :, y, x] = f[f"hada_w{i}_a"].T @ f[f"hada_t{i}"][:, :, y, x] @ f[f"hada_w{i}_b"]
        halves.append(half)
    return w + s * SCALE * halves[0] * halves[1]


def kron(a: Tensor, b: Tensor) -> Tensor:
    """Out of four loops, not of torch.kron; a is 2-D."""
    out = torch.zeros(a.shape[0] * b.shape[0], a.shape[1] * b.shape[1], *b.shape[2:], dtype=a.dtype)
    for i in range(a.shape[0]):
        for j in range(a.shape[1]):
            rows, columns = (
                slice(i * b.shape[0], (i + 1) * b.shape[0]),
                slice(j * b.shape[1], (j + 1) * b.shape[1]),
            )
            out[rows, columns] = a[i, j] * b
    return out


def lokr_file(kernel: tuple[int, ...]) -> Weights:
    """w1 2 × 3 whole, w2 4 × 4 from factors."""
    return {
        "lokr_w1": made(2, 3, seed=1),
        "lokr_w2_a": made(4, RANK, seed=2),
        "lokr_w2_b": made(RANK, 4, *kernel, seed=3),
        "alpha": torch.tensor(ALPHA),
    }


def lokr(w: Tensor, f: Weights, s: float) -> Tensor:
    second = (f["lokr_w2_a"] @ matrix(f["lokr_w2_b"])).reshape(4, *f["lokr_w2_b"].shape[1:])
    return w + s * SCALE * kron(f["lokr_w1"], second).reshape(w.shape)


def lokr_both_file(kernel: tuple[int, ...]) -> Weights:
    file = lokr_file(kernel) | {"lokr_w1_a": made(2, RANK, seed=4), "lokr_w1_b": made(RANK, 3, seed=5)}
    del file["lokr_w1"]
    return file


def lokr_both(w: Tensor, f: Weights, s: float) -> Tensor:
    return lokr(w, f | {"lokr_w1": f["lokr_w1_a"] @ f["lokr_w1_b"]}, s)


def lokr_whole_file(kernel: tuple[int, ...]) -> Weights:
    """Alpha is there and must count for nothing."""
    return {"lokr_w1": made(2, 3, seed=1), "lokr_w2": made(4, 4, *kernel, seed=2), "alpha": torch.tensor(ALPHA)}


def lokr_whole(w: Tensor, f: Weights, s: float) -> Tensor:
    return w + s * kron(f["lokr_w1"], f["lokr_w2"]).reshape(w.shape)


def lokr_tucker_file(kernel: tuple[int, ...]) -> Weights:
    return {
        "lokr_w1": made(2, 3, seed=1),
        "lokr_t2": made(RANK, RANK, *kernel, seed=2),
        "lokr_w2_a": made(RANK, 4, seed=3),
        "lokr_w2_b": made(RANK, 4, seed=4),
        "alpha": torch.tensor(ALPHA),
    }


def lokr_tucker(w: Tensor, f: Weights, s: float) -> Tensor:
    second = torch.stack([
        torch.stack([f["lokr_w2_a"].T @ f["lokr_t2"][:, :, y, x] @ f["lokr_w2_b"] for x in range(w.shape[3])], -1)
        for y in range(w.shape[2])
    ], -2)  # fmt: skip
    return w + s * SCALE * kron(f["lokr_w1"], second)


def glora_file(kernel: tuple[int, ...]) -> Weights:
    ones = [1] * len(kernel)
    return {
        "a1.weight": made(IN, RANK, *ones, seed=1),
        "a2.weight": made(RANK, IN, *ones, seed=2),
        "b1.weight": made(OUT, RANK, *ones, seed=3),
        "b2.weight": made(RANK, IN, *kernel, seed=4),
        "alpha": torch.tensor(ALPHA),
    }


def glora(w: Tensor, f: Weights, s: float) -> Tensor:
    mixing = matrix(f["a1.weight"]) @ matrix(f["a2.weight"])
    wa = (w.movedim(1, -1) @ mixing).movedim(-1, 1)
    return w + s * SCALE * (wa + (matrix(f["b1.weight"]) @ matrix(f["b2.weight"])).reshape(w.shape))


def glora_old_file(kernel: tuple[int, ...]) -> Weights:
    new = glora_file(kernel)
    return {
        "a1.weight": new["a2.weight"], "a2.weight": new["a1.weight"],
        "b1.weight": new["b2.weight"], "b2.weight": new["b1.weight"], "alpha": new["alpha"],
    }  # fmt: skip


def glora_old(w: Tensor, f: Weights, s: float) -> Tensor:
    order = {"a1.weight": "a2.weight", "a2.weight": "a1.weight", "b1.weight": "b2.weight", "b2.weight": "b1.weight"}
    return glora(w, {name: f[other] for name, other in order.items()}, s)


def norms(w: Tensor, axis: int) -> Tensor:
    return w.movedim(axis, 0).reshape(w.shape[axis], -1).pow(2).sum(1).sqrt()


def dora_file(axis: int) -> Callable[[tuple[int, ...]], Weights]:
    def file(kernel: tuple[int, ...]) -> Weights:
        size = (OUT, IN)[axis]
        shape = [1] * (2 + len(kernel))
        shape[axis] = size
        return lora_file(kernel) | {"dora_scale": made(*shape, seed=9).abs() + 1}

    return file


def dora(axis: int) -> Formula:
    def formula(w: Tensor, f: Weights, s: float) -> Tensor:
        changed = lora(w, f, 1.0)
        shape = [1] * w.ndim
        shape[axis] = w.shape[axis]
        factor = f["dora_scale"].flatten() / norms(changed, axis)
        return w + s * (changed * factor.reshape(shape) - w)

    return formula


def peft_dora_file(kernel: tuple[int, ...]) -> Weights:
    f = lora_file(kernel)
    return {
        "lora_A.weight": f["lora_down.weight"],
        "lora_B.weight": f["lora_up.weight"],
        "lora_magnitude_vector.weight": made(OUT, seed=9).abs() + 1,
        "alpha": f["alpha"],
    }


def peft_dora(w: Tensor, f: Weights, s: float) -> Tensor:
    names = {"lora_down.weight": "lora_A.weight", "lora_up.weight": "lora_B.weight"}
    names["dora_scale"] = "lora_magnitude_vector.weight"
    return dora(0)(w, {name: f[other] for name, other in names.items()}, s)


def dora_loha_file(kernel: tuple[int, ...]) -> Weights:
    return loha_file(kernel) | {"dora_scale": made(OUT, 1, *[1] * len(kernel), seed=9).abs() + 1}


def dora_loha(w: Tensor, f: Weights, s: float) -> Tensor:
    changed = loha(w, f, 1.0)
    factor = f["dora_scale"].flatten() / norms(changed, 0)
    return w + s * (changed * factor.reshape(-1, *[1] * (w.ndim - 1)) - w)


def cayley(block: Tensor, limit: float, norm: Tensor) -> Tensor:
    q = block - block.T
    if limit and norm > limit:
        q = q * limit / norm
    eye = torch.eye(len(q), dtype=q.dtype)
    return (eye + q) @ torch.linalg.inv(eye - q)


def oft_file(constraint: float, rescale: bool = False) -> Callable[[tuple[int, ...]], Weights]:
    def file(kernel: tuple[int, ...]) -> Weights:
        file = {"oft_blocks": made(2, 4, 4, seed=1), "alpha": torch.tensor(constraint, dtype=torch.float64)}
        return file | ({"rescale": made(OUT, 1, *[1] * len(kernel), seed=2) + 1} if rescale else {})

    return file


def oft(w: Tensor, f: Weights, s: float) -> Tensor:
    blocks = f["oft_blocks"]
    norm = (blocks - blocks.mT).norm()
    parts = [
        cayley(b, float(f["alpha"]) * OUT, norm).T @ part for b, part in zip(blocks, matrix(w).split(4), strict=True)
    ]
    turned = torch.cat(parts).reshape(w.shape)
    if "rescale" in f:
        turned = turned * f["rescale"]
    return w + s * (turned - w)


def boft_file(kernel: tuple[int, ...]) -> Weights:
    return {"oft_blocks": made(2, 2, 4, 4, seed=1), "alpha": torch.tensor(0.0)}


def boft(w: Tensor, f: Weights, s: float) -> Tensor:
    """Stage i: channel c sits at (group, half, offset) of pairs 2^i·2 apart; written out as a permutation matrix."""
    rows = matrix(w)
    for i, stage in enumerate(f["oft_blocks"]):
        apart = 2**i * 2
        order = [
            g * 2 * apart + h * apart + k for g in range(OUT // (2 * apart)) for k in range(apart) for h in range(2)
        ]
        mixed = rows[order]
        eye = torch.eye(4, dtype=w.dtype)
        parts = [(eye + s * (cayley(b, 0.0, eye) - eye)) @ part for b, part in zip(stage, mixed.split(4), strict=True)]
        back = torch.empty_like(rows)
        back[order] = torch.cat(parts)
        rows = back
    return rows.reshape(w.shape)


def onetrainer_oft_file(kernel: tuple[int, ...]) -> Weights:
    """Vectors of 3 numbers for blocks of 3, and the mark of its scaled variant; no config says the rest."""
    blocks = IN * torch.Size(kernel).numel() // 3
    return {"oft_R.weight": made(blocks, 3, seed=1), "oft_R.scaled_oft": torch.tensor(True)}


def onetrainer_oft(w: Tensor, f: Weights, s: float) -> Tensor:
    """``W Rᵀ`` with the first five terms of R's series, the vectors divided by ``2 √(n-1)`` (modules/module/oft_utils.py)."""
    turns: list[Tensor] = []
    for a, b, c in f["oft_R.weight"] / (2 * 2**0.5):
        zero = torch.zeros_like(a)
        q = torch.stack([torch.stack([zero, a, b]), torch.stack([-a, zero, c]), torch.stack([-b, -c, zero])])
        turns.append(torch.eye(3, dtype=w.dtype) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q)
    return w + s * ((matrix(w) @ torch.block_diag(*turns).T).reshape(w.shape) - w)


def full_file(kernel: tuple[int, ...]) -> Weights:
    return {"diff": made(OUT, IN, *kernel, seed=1)}


def full(w: Tensor, f: Weights, s: float) -> Tensor:
    return w + s * f["diff"]


def set_file(kernel: tuple[int, ...]) -> Weights:
    return {"set_weight": made(OUT, IN, *kernel, seed=1)}


def set_weight(w: Tensor, f: Weights, s: float) -> Tensor:
    return w + s * (f["set_weight"] - w)


def ia3_file(on_input: bool) -> Callable[[tuple[int, ...]], Weights]:
    def file(kernel: tuple[int, ...]) -> Weights:
        size = IN if on_input else OUT
        shape = (1, size, *[1] * len(kernel)) if kernel else (size,)
        return {"weight": made(*shape, seed=1), "on_input": torch.tensor(int(on_input))}

    return file


def ia3(w: Tensor, f: Weights, s: float) -> Tensor:
    factor = f["weight"].flatten()
    if f["on_input"]:
        return w * (1 + s * factor.reshape(1, -1, *[1] * (w.ndim - 2)))
    return w * (1 + s * factor.reshape(-1, *[1] * (w.ndim - 1)))


CASES: dict[str, tuple[Callable[[tuple[int, ...]], Weights], Formula, tuple[str, ...]]] = {
    "LoRA": (lora_file, lora, tuple(KERNELS)),
    "LoCon tucker": (tucker_file, tucker, ("conv 3×3",)),
    "LoHa": (loha_file, loha, tuple(KERNELS)),
    "LoHa tucker": (loha_tucker_file, loha_tucker, ("conv 3×3",)),
    "LoKr": (lokr_file, lokr, tuple(KERNELS)),
    "LoKr both low-rank": (lokr_both_file, lokr_both, ("linear",)),
    "LoKr whole": (lokr_whole_file, lokr_whole, tuple(KERNELS)),
    "LoKr tucker": (lokr_tucker_file, lokr_tucker, ("conv 3×3",)),
    "GLoRA": (glora_file, glora, tuple(KERNELS)),
    "GLoRA old": (glora_old_file, glora_old, ("linear",)),
    "DoRA out": (dora_file(0), dora(0), tuple(KERNELS)),
    "DoRA in": (dora_file(1), dora(1), tuple(KERNELS)),
    "DoRA of PEFT": (peft_dora_file, peft_dora, ("linear", "conv 3×3")),
    "DoRA on LoHa": (dora_loha_file, dora_loha, ("linear", "conv 3×3")),
    "OFT": (oft_file(0.0), oft, tuple(KERNELS)),
    "OFT constrained": (oft_file(0.01), oft, ("linear",)),
    "OFT rescaled": (oft_file(0.0, True), oft, ("linear", "conv 3×3")),
    "BOFT": (boft_file, boft, tuple(KERNELS)),
    "OFT of OneTrainer": (onetrainer_oft_file, onetrainer_oft, tuple(KERNELS)),
    "full": (full_file, full, tuple(KERNELS)),
    "set": (set_file, set_weight, tuple(KERNELS)),
    "IA3 out": (ia3_file(False), ia3, tuple(KERNELS)),
    "IA3 in": (ia3_file(True), ia3, tuple(KERNELS)),
}
GRID = [(name, kind) for name, (_, _, kinds) in CASES.items() for kind in kinds]


def update_of(tensors: Weights) -> Update:
    (module,) = load_lora({f"lora_unet_conv_in.{key}": t for key, t in tensors.items()}).modules
    assert module.weight is not None
    return module.weight


def layer_of(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """With a bias, and where it is a convolution with stride and padding, so that a side path has to follow both."""
    torch.manual_seed(0)
    kernel = KERNELS[kind]
    if not kernel:
        return nn.Linear(IN, OUT, dtype=torch.float64).requires_grad_(False).to(dtype)
    padding = kernel[0] // 2
    return nn.Conv2d(IN, OUT, kernel, stride=2, padding=padding, dtype=torch.float64).requires_grad_(False).to(dtype)


def input_of(kind: str, dtype: torch.dtype = torch.float64) -> Tensor:
    return made(*((2, 5, IN) if not KERNELS[kind] else (2, IN, 6, 7)), seed=77).to(dtype)


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize(("name", "kind"), GRID)
def test_merged_and_live_are_the_formula(name: str, kind: str, strength: float) -> None:
    file, formula, _ = CASES[name]
    tensors = file(KERNELS[kind])
    layer = layer_of(kind)
    weight: Tensor = layer.weight.data
    expected = formula(weight, tensors, strength)
    update = update_of(tensors)
    assert update.fits(tuple(weight.shape))
    assert_close(update.merged(weight, strength), expected, rtol=1e-8, atol=1e-8)

    x = input_of(kind)
    y = layer(x)
    change = update.unfused(Layer(layer), y)
    live = y + change(x, y, strength)
    layer.weight.data = expected
    assert_close(live, layer(x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("name", "kind"), GRID)
def test_strength_0_is_the_very_same_weight(name: str, kind: str) -> None:
    weight = layer_of(kind).weight.data
    assert update_of(CASES[name][0](KERNELS[kind])).merged(weight, 0.0) is weight


@pytest.mark.parametrize(("name", "kind"), GRID)
def test_the_shape_it_was_made_for_is_the_layer_s(name: str, kind: str) -> None:
    """Sizes that the file leaves open are None; a kernel counts as columns where the file has none."""
    rows, *columns = layer_of(kind).weight.shape
    own_rows, *own = update_of(CASES[name][0](KERNELS[kind])).weight_shape
    assert own_rows in (rows, None)
    assert own in ([*columns], [torch.Size(columns).numel()], [columns[0]], [None])
    assert (own_rows is None) == (name in ("IA3 in", "OFT of OneTrainer"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("name", "kind"), [("LoRA", "linear"), ("LoKr", "conv 3×3"), ("DoRA in", "linear"), ("OFT", "linear")]
)
def test_half_precision_files_and_layers_stay_close(name: str, kind: str, dtype: torch.dtype) -> None:
    """Within a few units of the type's last place; factors and norms are made in float32."""
    file, formula, _ = CASES[name]
    tensors = {key: t.to(dtype) for key, t in file(KERNELS[kind]).items()}
    layer = layer_of(kind, dtype)
    expected = formula(layer.weight.data.double(), {k: t.double() for k, t in tensors.items()}, 1.0)
    update = update_of(tensors)
    tolerance = 8 * torch.finfo(dtype).eps
    merged = update.merged(layer.weight.data.float(), 1.0).to(dtype)
    assert_close(merged.double(), expected, rtol=tolerance, atol=tolerance)
    x = input_of(kind, dtype)
    y = layer(x)
    live = (y + update.unfused(Layer(layer), y)(x, y, 1.0)).double()
    reference = layer_of(kind)
    reference.weight.data, reference.bias.data = expected, layer.bias.data.double()
    assert_close(live, reference(x.double()), rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("norm", ["layer", "group"])
@pytest.mark.parametrize("strength", STRENGTHS)
def test_norms_and_biases(norm: str, strength: float) -> None:
    """w_norm and b_norm add to a norm's two vectors; as a side path on what the norm gives before them."""
    made_norm = nn.LayerNorm(OUT) if norm == "layer" else nn.GroupNorm(2, OUT)
    module = made_norm.double().requires_grad_(False)
    module.weight.data, module.bias.data = made(OUT, seed=1), made(OUT, seed=2)
    tensors = {"lora_unet_norm.w_norm": made(OUT, seed=3), "lora_unet_norm.b_norm": made(OUT, seed=4)}
    (found,) = load_lora(tensors).modules
    assert found.weight is not None
    assert found.bias is not None
    x = made(2, 5, OUT, seed=5) if norm == "layer" else made(2, OUT, 3, 4, seed=5)
    y = module(x)
    layer = Layer(module)
    live = y + found.weight.unfused(layer, y)(x, y, strength) + found.bias.unfused_bias(layer, y)(x, y, strength)
    module.weight.data += strength * tensors["lora_unet_norm.w_norm"]
    module.bias.data += strength * tensors["lora_unet_norm.b_norm"]
    assert_close(live, module(x), rtol=1e-9, atol=1e-9)


def test_two_orders_of_additive_updates_are_one_sum() -> None:
    weight = layer_of("linear").weight.data
    a, b = update_of(lora_file(())), update_of(loha_file(()))
    assert_close(b.merged(a.merged(weight, 0.7), -2.0), a.merged(b.merged(weight, -2.0), 0.7), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["LoRA", "LoHa", "LoKr", "full", "DoRA out", "IA3 out"])
def test_rows_of_a_fused_layer(name: str) -> None:
    """Rows 2..6 of the update are rows 2..6 of the formula."""
    file, formula, _ = CASES[name]
    tensors = file(())
    weight = layer_of("linear").weight.data
    part = update_of(tensors).rows(2, 4)
    if part.reads_weight or name not in ("LoHa", "LoKr"):
        assert_close(part.merged(weight[2:6], 0.5), formula(weight, tensors, 0.5)[2:6], rtol=1e-9, atol=1e-9)
    else:
        assert_close(part.merged(weight[2:6], 0.5), formula(weight, tensors, 0.5)[2:6], rtol=1e-9, atol=1e-9)


# --- oracles: recorded by tests/benchmarks/lora_oracles.py -----------------------------------------------------------

GOLDEN = json.loads((Path(__file__).parent / "lora_oracles.json").read_text())


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: f"{case['oracle']} {case['name']} {case['kind']}")
def test_what_lycoris_and_peft_make_of_the_same_tensors(case: dict[str, object]) -> None:
    """Their merged weights, recorded. ``right`` says whether they are; where not, ours must differ, for the reason given."""
    kind, name, strength = str(case["kind"]), str(case["name"]), float(str(case["strength"]))
    file, _, _ = CASES[name]
    weight = layer_of(kind).weight.data
    ours = update_of(file(KERNELS[kind])).merged(weight, strength).flatten()[:: int(str(case["every"]))]
    theirs = torch.tensor(case["weights"], dtype=torch.float64)
    same = torch.allclose(ours, theirs, rtol=0, atol=2e-5)  # the oracles compute in float32
    assert same == case["right"], case["why"]


class Packed(Tensor):
    """A quantiser's tensor: bytes inside, numbers by a method of its own."""

    def dequantize(self) -> Tensor:
        return self.as_subclass(Tensor).float() / 16


class Opaque(Tensor):
    """One that only its own kernels can read."""


def test_algorithms_that_read_the_weight_read_what_its_bytes_stand_for() -> None:
    layer = nn.Linear(3, 2)
    stored = torch.tensor([[16, 32, -16], [0, 8, 4]], dtype=torch.int8)
    layer.weight = nn.Parameter(stored.as_subclass(Packed), requires_grad=False)
    expected = torch.tensor([[1.0, 2.0, -1.0], [0.0, 0.5, 0.25]], dtype=torch.float64)
    assert torch.equal(Layer(layer).weight(torch.device("cpu"), torch.float64), expected)
    layer.weight = nn.Parameter(stored.as_subclass(Opaque), requires_grad=False)
    with pytest.raises(
        IncompatibleAdapterError, match=r"quantised \(Opaque, torch.int8\); use the base model in 16 bits"
    ):
        Layer(layer).weight(torch.device("cpu"), torch.float64)
