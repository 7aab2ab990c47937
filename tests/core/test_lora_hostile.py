"""LoRA files of any tensors: what comes out is a LoRA that every use of it can bear, or one sentence of ours."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from ipadapter_core.commands.cli import main
from ipadapter_core.errors import AdapterError, CorruptFileError, InvalidInputError
from ipadapter_core.lora import Layer, describe_lora, load_lora, match_lora, targets_of
from ipadapter_core.lora.convert import KEY_FORMATS, to_tensors
from ipadapter_core.lora.extract import extract
from ipadapter_core.lora.factors import Smaller, combine, compress, resize
from ipadapter_core.lora.inspection import describe_facts, draw_heat_map, facts_of, heat_map, verify
from ipadapter_core.lora.parts import LARGEST
from ipadapter_core.lora.saving import save_lora
from tiny_models import noise

Weights = dict[str, Tensor]


class Layers(nn.Module):
    """One layer of every kind, of sizes that random shapes hit."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)
        self.bare = nn.Linear(2, 4, bias=False)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = nn.LayerNorm(4)
        self.table = nn.Embedding(4, 2)


ROLES = (
    "lora_down.weight", "lora_up.weight", "lora_mid.weight", "lora_A.weight", "lora_B.weight", "lora_B.bias", "alpha",
    "dora_scale", "lora_magnitude_vector", "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1",
    "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t1", "lokr_t2", "a1.weight", "a2.weight", "b1.weight",
    "b2.weight", "bm.weight", "oft_blocks", "rescale", "oft_R.weight", "oft_R.scaled_oft", "boft_R", "boft_s", "ia3_l", "hra_u",
    "lora_E", "lora_embedding_A", "lora_embedding_B", "diff", "diff_b", "w_norm", "b_norm", "set_weight", "on_input", "weight",
    "scalar", "lora_A.0.weight", "x",
)  # fmt: skip
DTYPES = (
    torch.float32, torch.float32, torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn,
    torch.float8_e5m2, getattr(torch, "float8_e8m0fnu", torch.float8_e5m2), torch.int8, torch.int64, torch.bool,
    torch.complex64, torch.uint16,
)  # fmt: skip
VALUES = (1.0, 1.0, 0.5, 0.0, -1.0, 3e38, 1e20, 1e5, float("nan"), float("inf"))
shapes = st.one_of(
    st.sampled_from(
        [(), (1,), (4,), (2, 4), (4, 2), (4, 4), (2, 2), (4, 4, 3, 3), (2, 4, 1, 1), (4, 2, 1, 1), (2, 2, 3, 3), (1, 4)]
    ),
    st.lists(st.sampled_from([0, 1, 2, 3, 4, 4, 8]), max_size=5).map(tuple),
)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    shape, dtype, value = draw(shapes), draw(st.sampled_from(DTYPES)), draw(st.sampled_from(VALUES))
    size = torch.Size(shape).numel()
    if not dtype.is_floating_point and not dtype.is_complex:
        return torch.ones(shape).to(dtype)
    ramp = (torch.arange(1, size + 1, dtype=torch.float64) / max(size, 1)).reshape(shape)
    return (ramp * value).to(torch.float32 if dtype.itemsize == 1 else dtype).to(dtype)


SIZES = {"linear": (4, 4), "bare": (4, 2), "conv": (4, 4, 3, 3), "table": (4, 2), "norm": (4,), "other": (4, 4)}


def whole(algorithm: str, shape: tuple[int, ...], rank: int) -> Weights:
    """A module that is right for a layer of this shape, with numbers from 0 to 1."""
    out, into, *kernel = (*shape, 1)[: max(len(shape), 2)]
    columns = into * torch.Size(kernel).numel()
    ones = [1] * len(kernel)
    forms: dict[str, dict[str, tuple[int, ...]]] = {
        "LoRA": {"lora_down.weight": (rank, into, *kernel), "lora_up.weight": (out, rank, *ones), "alpha": ()},
        "LoCon": {"lora_down.weight": (rank, into, *ones), "lora_mid.weight": (rank, rank, *kernel), "lora_up.weight": (out, rank, *ones)},
        "DoRA": {"lora_A.weight": (rank, columns), "lora_B.weight": (out, rank), "lora_magnitude_vector": (out,)},
        "columns": {"lora_A.weight": (rank, columns), "lora_B.weight": (out, rank), "dora_scale": (1, into), "lora_B.bias": (out,)},
        "LoHa": {"hada_w1_a": (out, rank), "hada_w1_b": (rank, columns), "hada_w2_a": (out, rank), "hada_w2_b": (rank, columns)},
        "cores": {
            **{f"hada_t{i}": (rank, rank, *kernel) for i in (1, 2)},
            **{f"hada_w{i}_a": (rank, out) for i in (1, 2)},
            **{f"hada_w{i}_b": (rank, into) for i in (1, 2)},
        },
        "LoKr": {"lokr_w1": (2, 2), "lokr_w2_a": (out // 2, rank), "lokr_w2_b": (rank, into // 2 * columns // into), "alpha": ()},
        "LoKr whole": {"lokr_w1": (2, 2), "lokr_w2": (out // 2, into // 2, *kernel)},
        "GLoRA": {"a1.weight": (into, rank), "a2.weight": (rank, into), "b1.weight": (out, rank), "b2.weight": (rank, columns)},
        "OFT": {"oft_blocks": (out // 2, 2, 2), "rescale": (out, 1), "alpha": ()},
        "BOFT": {"oft_blocks": (2, out // 2, 2, 2)},
        "PEFT OFT": {"oft_R.weight": (columns // 2, 1)},
        "PEFT BOFT": {"boft_R": (1, columns // 2, 2, 2), "boft_s": (out, 1)},
        "PEFT IA3": {"ia3_l": (out, 1)},
        "HRA": {"hra_u": (columns, rank)},
        "IA3": {"weight": (out,), "on_input": ()},
        "full": {"diff": shape, "diff_b": (out,)},
        "set": {"set_weight": shape},
        "norm": {"w_norm": (out,), "b_norm": (out,)},
        "embedding": {"lora_embedding_A": (rank, out), "lora_embedding_B": (into, rank)},
    }  # fmt: skip
    sizes = {key: torch.Size(size) for key, size in forms[algorithm].items()}
    return {key: (torch.arange(1, s.numel() + 1) / max(s.numel(), 1)).reshape(s) for key, s in sizes.items()}


FORMS = (
    "LoRA", "LoCon", "DoRA", "columns", "LoHa", "cores", "LoKr", "LoKr whole", "GLoRA", "OFT", "BOFT", "PEFT OFT", "PEFT BOFT",
    "PEFT IA3", "HRA", "IA3", "full", "set", "norm", "embedding",
)  # fmt: skip


@st.composite
def files(draw: st.DrawFn) -> Weights:
    """Some whole modules, and up to three of their tensors changed, taken away or joined by others."""
    found: Weights = {}
    for stem in draw(st.lists(st.sampled_from(list(SIZES)), min_size=1, max_size=3, unique=True)):
        module = whole(draw(st.sampled_from(FORMS)), SIZES[stem], draw(st.integers(1, 3)))
        found |= {f"{stem}.{role}": tensor for role, tensor in module.items()}
    for _ in range(draw(st.integers(0, 3))):
        key = draw(st.sampled_from(sorted(found)))
        match draw(st.sampled_from(["tensor", "dtype", "value", "drop", "add", "shape"])):
            case "tensor":
                found[key] = draw(tensors())
            case "dtype":
                dtype = draw(st.sampled_from(DTYPES))
                found[key] = found[key].real.to(dtype)
            case "value":
                found[key] = (found[key].real.double() * draw(st.sampled_from(VALUES))).float()
            case "drop" if len(found) > 1:
                del found[key]
            case "shape":
                found[key] = draw(
                    st.sampled_from(
                        [found[key].flatten(), found[key][None], found[key].T if found[key].ndim == 2 else found[key]]
                    )
                )
            case _:
                found[f"{key.split('.')[0]}.{draw(st.sampled_from(ROLES))}"] = draw(tensors())
    return found


def used(state: Weights) -> None:
    """Everything that is done with a file."""
    model = Layers()
    describe_facts(facts_of(describe_lora(state)))
    weights = load_lora(state)
    describe_facts(facts_of(weights))
    for use in (
        lambda: draw_heat_map(heat_map(weights), "x"),
        lambda: verify(state),
        lambda: resize(weights, Smaller(1)),
        lambda: combine([weights, weights], [1.0, -0.5], Smaller(2)),
        *(lambda key_format=key_format: to_tensors(weights, key_format, torch.float16) for key_format in KEY_FORMATS),
    ):
        try:
            use()
        except AdapterError:
            continue
    placed = match_lora(weights, {"denoiser": targets_of(model)}, partial="allow")
    for p in placed.matches:
        pristine = model.state_dict()[p.key]
        total = pristine.clone()
        p.change(pristine, total, 1.0)
        assert total.isfinite().all()
        module = model.get_submodule(p.target.path)
        x = {"conv": noise(1, 4, 5, 5), "table": torch.tensor([[0, 3]])}.get(p.target.path)
        x = noise(2, module.weight.shape[-1]) if x is None else x
        y = module(x)
        layer = Layer(module)
        change = (p.update.unfused if p.parameter == "weight" else p.update.unfused_bias)(layer, y)(x, y, 0.5)
        assert (y + change).shape == y.shape


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(files())
def test_any_tensors_are_a_lora_or_one_sentence(state: Weights) -> None:
    said = ""
    try:
        used(state)
    except AdapterError as error:
        said = str(error)
    assert len(said.splitlines()) <= 1
    assert len(said) < 1500


PAIR = {"x.lora_down.weight": noise(2, 4), "x.lora_up.weight": noise(4, 2)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x.lora_down.weight": torch.tensor(1.0)}, r"shape \[\]; at least 2 axes"),
        ({"x.lora_up.weight": noise(4)}, r"shape \[4\]; at least 2 axes"),
        ({"x.lora_mid.weight": noise(2, 3, 3, 3)}, "do not multiply"),
        ({"x.lora_mid.weight": torch.tensor(1.0)}, "do not multiply"),
        ({"x.lora_up.weight": noise(4, 2).to(torch.complex64)}, "stored as complex64"),
        ({"x.lora_up.weight": torch.ones(4, 2, dtype=torch.int8)}, "stored as int8"),
        ({"x.lora_up.weight": torch.full((4, 2), 3e38)}, r"numbers up to 3e\+38"),
        ({"x.lora_up.weight": torch.full((4, 2), float("inf")).to(torch.float8_e5m2)}, "NaN or infinite"),
        ({"x.alpha": torch.tensor(float("nan"))}, "NaN or infinite"),
        ({"x.alpha": torch.tensor(1e30)}, r"has the scale 5e\+29"),
        ({"x.dora_scale": torch.full((4, 1), float("nan"))}, "NaN or infinite"),
        ({"x.lora_A.a.weight": noise(2, 4)}, "several adapters at once"),
        ({"y.a1.weight": noise(2, 2)}, "no 'glora_a2'"),
        (
            {"y.hada_w1_a": noise(2), "y.hada_w1_b": noise(2), "y.hada_w2_a": noise(2), "y.hada_w2_b": noise(2)},
            "at least 2 axes",
        ),
        ({"y.oft_blocks": noise(2, 3, 3, 3)}, "cannot be mixed in 2 stages"),
        ({"y.boft_R": noise(2, 3, 4, 4), "y.boft_s": noise(4, 1)}, "cannot be mixed in 2 stages"),
        ({"y.oft_R.weight": noise(2, 5)}, r"\(blocks, n\(n-1\)/2\) was expected"),
        ({"y.hra_u": torch.zeros(4, 2)}, "no reflection"),
        ({"y.lokr_w1": noise(3000, 3000).expand(3000, 3000), "y.lokr_w2": noise(20, 3000)}, "larger than any"),
    ],
)
def test_what_is_seen_at_load(change: Weights, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        load_lora(PAIR | change)


def test_numbers_are_checked_whatever_they_are_stored_as() -> None:
    halves = {key: t.to(torch.float8_e4m3fn) for key, t in PAIR.items()}
    (module,) = load_lora(halves).modules
    assert module.weight is not None
    assert all(
        t.dtype == torch.bfloat16
        and torch.equal(t.to(torch.float8_e4m3fn).float(), halves[f"x.lora_{n}.weight"].float())
        for n, t in module.weight.tensors().items()
    )
    mixed = {"x.lora_down.weight": noise(2, 4).double(), "x.lora_up.weight": noise(4, 2)}
    small, _ = resize(load_lora(mixed), Smaller(1))
    assert small.modules[0].weight is not None
    constrained = load_lora({"x.oft_blocks": noise(2, 2, 4, 4), "x.alpha": torch.tensor(3e38)}).modules[0].weight
    free = load_lora({"x.oft_blocks": noise(2, 2, 4, 4)}).modules[0].weight
    assert constrained is not None
    assert free is not None
    assert torch.equal(constrained.delta(noise(8, 3)), free.delta(noise(8, 3)))


def test_tools_allocate_no_more_than_the_file_has() -> None:
    """Norms of products by algebra: the layer that these factors declare has 10⁹ numbers, and the map takes no time."""
    n = 32_000
    state = {"x.lokr_w1_a": noise(n, 1), "x.lokr_w1_b": noise(1, n), "x.lokr_w2": noise(1, 1)}
    state |= {"y.lora_down.weight": noise(40_000, 2), "y.lora_up.weight": noise(2, 40_000)}
    weights = load_lora(state)
    started = time.process_time()
    values = heat_map(weights).values
    expected = (noise(n, 1).double().norm() * noise(1, n).double().norm() * noise(1, 1).double().norm()) / n
    assert values.shape == (1, 1)
    assert float(values.max()) >= float(expected) * 0.01
    assert time.process_time() - started < 30


@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_lokr_factors_of_any_layout(layer: str) -> None:
    """A kernel flattened into the second factor, as LyCORIS and PEFT write it, and ones behind a linear layer's."""
    shape = SIZES[layer]
    module = Layers().get_submodule(layer)
    columns = torch.Size(shape[1:]).numel()
    for w2 in (noise(2, 2) @ noise(2, columns // 2), noise(2, columns // 2)[..., None, None]):
        state = {"x.lokr_w1": noise(2, 2), "x.lokr_w2": w2}
        if w2.ndim == 2:
            state = {"x.lokr_w1": noise(2, 2), "x.lokr_w2_a": noise(2, 2), "x.lokr_w2_b": noise(2, columns // 2)}
        update = load_lora(state).modules[0].weight
        assert update is not None
        expected = torch.kron(noise(2, 2), w2.flatten(1)).reshape(shape)
        if not update.fits(shape):
            assert layer == "conv"
            continue
        torch.testing.assert_close(update.delta(noise(*shape)), expected)
        x = noise(2, 4) if layer == "linear" else noise(1, 4, 5, 5)
        y = module(x)
        live = update.unfused(Layer(module), y)(x, y, 1.0)
        torch.testing.assert_close(live, Layer(module).apply(x, expected), rtol=1e-4, atol=1e-4)


def test_a_change_that_is_not_finite_is_not_written() -> None:
    """Four factors of the largest numbers that are let through, at a strength of millions."""
    big = torch.full((4, 4), LARGEST)
    state = {f"linear.hada_{name}": big for name in ("w1_a", "w1_b", "w2_a", "w2_b")}
    model = Layers()
    (match,) = match_lora(load_lora(state), {"denoiser": targets_of(model)}).matches
    weight = model.linear.weight.data
    with pytest.raises(AdapterError, match=r"linear\.weight at strength 1e\+20 is not finite, so it was not written"):
        match.change(weight, weight.clone(), 1e20)


def test_tools_refuse_what_would_be_written_wrongly(tmp_path: Path) -> None:
    weights = load_lora({"lora_unet_x.lora_down.weight": noise(2, 4) * 1e5, "lora_unet_x.lora_up.weight": noise(4, 2)})
    with pytest.raises(InvalidInputError, match="too large for float16; write bfloat16 or float32"):
        to_tensors(weights, "kohya", torch.float16)
    with pytest.raises(InvalidInputError, match="strength is inf"):
        combine([weights], [float("inf")])
    up, down, error = compress(torch.full((4, 2), 1e18), torch.full((2, 4), 1e18), Smaller(1))
    assert up.isfinite().all()
    assert down.isfinite().all()
    assert error < 1e-3
    base = {"model.diffusion_model.x.weight": noise(4, 4)}
    for broken in (
        torch.full((4, 4), float("nan")),
        noise(4, 4).to(torch.complex64),
        torch.ones(4, 4, dtype=torch.int8),
    ):
        with pytest.raises(CorruptFileError):
            extract({"model.diffusion_model.x.weight": broken}, base, Smaller(1))
    tuned = {"model.diffusion_model.x.weight": noise(4, 4, seed=1).to(torch.float8_e4m3fn)}
    assert extract(tuned, base, Smaller(1))[0].modules
    with pytest.raises(InvalidInputError, match="is no name of a file"):
        save_lora(weights, tmp_path / ("x" * 300 + ".safetensors"))


def test_a_whole_lokr_keeps_peft_s_scale_through_conversion(tmp_path: Path) -> None:
    save_file(
        {"base_model.model.x.lokr_w1": noise(2, 2), "base_model.model.x.lokr_w2": noise(2, 2)},
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LOKR", "r": 512, "alpha": 64}))
    weights = load_lora(tmp_path / "adapter_model.safetensors")
    again = load_lora(to_tensors(weights, "kohya")[0])
    for a, b in zip(weights.modules, again.modules, strict=True):
        assert a.weight is not None
        assert b.weight is not None
        torch.testing.assert_close(a.weight.delta(noise(4, 4)), b.weight.delta(noise(4, 4)))


def test_a_crowd_of_modules_and_strays() -> None:
    """2,000 of each: keys are looked at once each, the report names three."""
    state: Weights = {f"stray.{i}.thing": torch.ones(1) for i in range(2_000)}
    for i in range(2_000):
        state |= {
            f"lora_unet_x_{i}.lora_down.weight": torch.ones(1, 1),
            f"lora_unet_x_{i}.lora_up.weight": torch.ones(1, 1),
        }
    started = time.process_time()
    weights = load_lora(state)
    assert len(weights.modules) == len(weights.left_out) == 2_000
    with pytest.raises(AdapterError, match="2000 of 2000 modules have no place") as caught:
        match_lora(weights, {"denoiser": targets_of(Layers())})
    assert len(str(caught.value)) < 500
    text = describe_facts(facts_of(weights))
    assert len(text) < 10_000
    draw_heat_map(heat_map(weights), "x")
    assert time.process_time() - started < 60


def test_texts_of_strangers_stay_short(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metadata = {
        "ss_network_args": "a\n\x1b[31m" + "x" * 100_000,
        "ss_tag_frequency": "[" * 100_000,
        "modelspec.trigger_phrase": "word, " * 50_000,
        "lora_adapter_metadata": "{" * 100_000,
    }
    save_file(PAIR, tmp_path / "x.safetensors", metadata)
    assert main(["lora", "inspect", str(tmp_path / "x.safetensors")]) == 0
    text = capsys.readouterr().out
    assert len(text) < 5_000
    assert "\x1b" not in text
    assert "lora_adapter_metadata cannot be read, so no alpha is taken from it" in text
    tags: dict[str, Any] = {"1_x": {"tag\n" * 1000: 10**300}}
    save_file(PAIR, tmp_path / "y.safetensors", {"ss_tag_frequency": json.dumps(tags)})
    assert main(["lora", "inspect", str(tmp_path / "y.safetensors")]) == 0
