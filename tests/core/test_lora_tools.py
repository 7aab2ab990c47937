"""The tools on files: exact where algebra allows, the best of its rank where not, refusals where a format cannot say it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

from host.shrunk import UNETS, unet_shapes
from ipadapter_core.commands.cli import main
from ipadapter_core.errors import IncompatibleAdapterError, InvalidInputError
from ipadapter_core.lora import LoRAWeights, load_lora, targets_of
from ipadapter_core.lora.base_names import by_name, dotted, unet_paths
from ipadapter_core.lora.convert import KEY_FORMATS, to_tensors
from ipadapter_core.lora.extract import extract
from ipadapter_core.lora.factors import Smaller, combine, resize
from ipadapter_core.lora.inspection import heat_map, lora_facts, verify
from ipadapter_core.lora.saving import save_lora
from tiny_loras import MAKERS, low_rank, state_for
from tiny_models import SD15, noise, tiny_unet

SHAPES = {
    "conv_in": (8, 4, 3, 3),
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (16, 32),
    "conv_out": (4, 8, 3, 3),
}


def state(seed: int = 0, rank: int = 3, prefix: str = "lora_unet_") -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for i, (path, shape) in enumerate(SHAPES.items()):
        found |= {
            f"{prefix}{path.replace('.', '_')}.{k}": t for k, t in low_rank(shape, rank, 100 * seed + 10 * i).items()
        }
    return found


def deltas(weights: LoRAWeights) -> dict[str, Tensor]:
    shapes = {path.replace(".", "_"): shape for path, shape in SHAPES.items()}
    return {m.name: m.weight.delta(torch.zeros(shapes[m.name])) for m in weights.modules if m.weight is not None}


def assert_same_change(a: LoRAWeights, b: LoRAWeights, **tolerance: float) -> None:
    first, second = deltas(a), deltas(b)
    assert first.keys() == second.keys()
    for name, delta in first.items():
        assert_close(second[name], delta, **({"rtol": 1e-4, "atol": 1e-5} | tolerance))


# --- names made by rule ----------------------------------------------------------------------------------------------


def test_tables_of_names_are_those_of_the_models() -> None:
    diffusers = {path for path, _ in unet_paths("SD1.5")}
    assert set(targets_of(tiny_unet(SD15)).targets) <= diffusers
    for kind, family in (("sd15", "SD1.5"), ("sdxl", "SDXL")):
        real = {k.removesuffix(".weight") for k, _ in unet_shapes(UNETS[kind]) if k.endswith(".weight")}
        assert real <= {ldm for _, ldm in unet_paths(family)}


def test_dots_of_names_in_no_table() -> None:
    for path in {path for pair in (*unet_paths("SD1.5"), *unet_paths("SDXL")) for path in pair}:
        assert dotted(path.replace(".", "_")) == path
    pruned = {f"lora_unet_input_blocks_2_0_op.{k}": t for k, t in low_rank((4, 4, 3, 3), 2, 0).items()}
    assert "diffusion_model.input_blocks.2.0.op.lora_up.weight" in to_tensors(load_lora(pruned), "generic")[0]
    assert "lora_unet_input_blocks_2_0_op.lora_up.weight" in to_tensors(load_lora(pruned), "kohya")[0]


# --- convert ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key_format", KEY_FORMATS)
def test_every_key_format_there_and_back(key_format: Any) -> None:
    """On names of a real family; the update is the same, alpha kept or multiplied in."""
    paths = ["mid_block.attentions.0.transformer_blocks.0.attn2.to_k", "up_blocks.1.resnets.2.conv1"]
    file: dict[str, Tensor] = {}
    for i, (path, shape) in enumerate(zip(paths, ((16, 768), (8, 8, 3, 3)), strict=True)):
        file |= {f"lora_unet_{path.replace('.', '_')}.{k}": t for k, t in low_rank(shape, 2, i).items()}
    te = "text_model.encoder.layers.3.self_attn.q_proj"
    file |= {f"lora_te_{te.replace('.', '_')}.{k}": t for k, t in low_rank((8, 8), 2, 9).items()}
    first = load_lora(file)
    assert first.base_model == "SD1.5"
    tensors, _ = to_tensors(first, key_format)
    again = load_lora(tensors)
    assert [m.component for m in again.modules] == ["denoiser", "denoiser", "te1"]
    known = by_name("SD1.5")
    for a, b, shape in zip(first.modules, again.modules, ((16, 768), (8, 8, 3, 3), (8, 8)), strict=True):
        assert known.get(a.name) == known.get(b.name)
        assert a.weight is not None
        assert b.weight is not None
        assert_close(a.weight.delta(torch.zeros(shape)), b.weight.delta(torch.zeros(shape)))
    expected = {
        "kohya": "lora_unet_up_blocks_1_resnets_2_conv1.lora_up.weight",
        "diffusers": "unet.up_blocks.1.resnets.2.conv1.lora_B.weight",
        "generic": "diffusion_model.output_blocks.5.0.in_layers.2.lora_up.weight",
    }
    assert expected[key_format] in tensors


@pytest.mark.parametrize("algorithm", MAKERS)
def test_kohya_carries_every_algorithm(algorithm: str) -> None:
    targets = [t for t in targets_of(tiny_unet("small")).targets.values() if t.shape[0] % 4 == 0 and len(t.shape) == 2]
    first = load_lora(state_for(targets[:6], algorithm))
    again = load_lora(to_tensors(first, "kohya")[0])
    for a, b, target in zip(first.modules, again.modules, targets, strict=False):
        assert a.weight is not None
        assert b.weight is not None
        assert a.weight.title == b.weight.title
        weight = noise(*target.shape)
        assert_close(a.weight.delta(weight), b.weight.delta(weight))


def test_what_a_key_format_cannot_say() -> None:
    loha = {f"lora_unet_conv_in.{k}": t for k, t in MAKERS["LoHa"]((8, 4, 3, 3), 2, 0).items()}
    weights = load_lora(loha | {"lora_unet_down_blocks_0_attentions_0_proj_in.diff": noise(4, 4)})
    with pytest.raises(InvalidInputError, match="PEFT's key format cannot say"):
        to_tensors(weights, "diffusers")
    with pytest.raises(InvalidInputError, match="in no table of full-size models"):
        to_tensors(load_lora({f"lora_unet_my_layer.{k}": t for k, t in low_rank((4, 4), 2, 0).items()}), "generic")


# --- resize, merge, extract ------------------------------------------------------------------------------------------


def test_a_smaller_rank_is_the_best_of_that_rank() -> None:
    """Eckart and Young: the error is the tail of the singular values, which the test takes from the dense matrix."""
    weights = load_lora(state(rank=4))
    small, errors = resize(weights, Smaller(rank=2))
    for module, delta in zip(weights.modules, deltas(weights).values(), strict=True):
        values = torch.linalg.svdvals(delta.flatten(1).double())
        assert errors[module.stem] == pytest.approx(float(values[2:].norm() / values.norm()), rel=1e-3)
    assert all(m.weight is not None and m.weight.rank == 2 for m in small.modules)
    for before, after, error in zip(deltas(weights).values(), deltas(small).values(), errors.values(), strict=True):
        assert float((before - after).norm() / before.norm()) == pytest.approx(error, rel=1e-3)


def test_nothing_is_lost_where_nothing_need_be() -> None:
    weights = load_lora(state())
    same, errors = resize(weights, Smaller())
    assert_same_change(weights, same)
    assert max(errors.values()) < 1e-3
    doubled, _ = combine([weights, weights], [1.0, 1.0], Smaller())
    assert all(m.weight is not None and m.weight.rank == 3 for m in doubled.modules), (
        "a sum with itself needs no more rank"
    )


def test_energy_chooses_a_rank_per_layer() -> None:
    weights = load_lora(state(rank=4))
    kept, errors = resize(weights, Smaller(energy=0.9))
    assert all(error**2 <= 0.1 + 1e-6 for error in errors.values())
    assert any(m.weight is not None and m.weight.rank != 4 for m in kept.modules)


def test_a_merge_is_the_weighted_sum() -> None:
    a, b = load_lora(state(1)), load_lora(state(2, rank=5))
    merged, _ = combine([a, b], [0.5, -2.0])
    for name, delta in deltas(merged).items():
        assert_close(delta, 0.5 * deltas(a)[name] - 2.0 * deltas(b)[name], rtol=1e-4, atol=1e-5)
    assert all(m.weight is not None and m.weight.rank == 8 for m in merged.modules)


def test_loha_is_a_product_of_factors_exactly() -> None:
    (module,) = load_lora({f"x.{k}": t for k, t in MAKERS["LoHa"]((12, 10), 2, 0).items()}).modules
    assert module.weight is not None
    factors = module.weight.factors()
    assert factors is not None
    assert_close(factors[0] @ factors[1], module.weight.delta(torch.zeros(12, 10)))


@pytest.mark.parametrize("algorithm", ["LoRA", "LoHa", "LoKr", "full"])
def test_norms_without_the_matrix(algorithm: str) -> None:
    (module,) = load_lora({f"x.{k}": t for k, t in MAKERS[algorithm]((12, 10), 2, 0).items()}).modules
    assert module.weight is not None
    norm = module.weight.norm()
    assert norm == pytest.approx(float(module.weight.delta(torch.zeros(12, 10)).norm()), rel=1e-4)


def test_merges_that_cannot_be() -> None:
    dora = load_lora({f"lora_unet_conv_in.{k}": t for k, t in MAKERS["DoRA out"](SHAPES["conv_in"], 2, 0).items()})
    with pytest.raises(InvalidInputError, match="is DoRA, not a product"):
        combine([dora], [1.0])
    other = load_lora({f"lora_unet_conv_in.{k}": t for k, t in low_rank((9, 4, 3, 3), 2, 0).items()})
    with pytest.raises(InvalidInputError, match="different base models"):
        combine([load_lora(state()), other], [1.0, 1.0])
    with pytest.raises(InvalidInputError, match="one strength each"):
        combine([other], [])
    for wrong in ({"rank": 0}, {"energy": 0.0}, {"energy": 1.5}):
        with pytest.raises(InvalidInputError):
            Smaller(**wrong)  # type: ignore[arg-type]


def test_extracting_what_was_put_in(tmp_path: Path) -> None:
    """Base + LoRA minus base is the LoRA, up to float32."""
    weights = load_lora(state(3))
    base = {
        f"model.diffusion_model.{path}.weight": noise(*shape, seed=i) for i, (path, shape) in enumerate(SHAPES.items())
    }
    tuned = dict(base)
    for path in SHAPES:
        tuned[f"model.diffusion_model.{path}.weight"] = (
            base[f"model.diffusion_model.{path}.weight"] + deltas(weights)[path.replace(".", "_")]
        )
    save_file(base, tmp_path / "base.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    found, errors = extract(tmp_path / "tuned.safetensors", tmp_path / "base.safetensors", Smaller(rank=3))
    assert_same_change(weights, found)
    assert max(errors.values()) < 1e-4
    with pytest.raises(IncompatibleAdapterError, match="do not differ"):
        extract(base, base, Smaller(rank=3))
    with pytest.raises(IncompatibleAdapterError, match="different base models"):
        extract(base | {"model.diffusion_model.conv_in.weight": noise(8, 9, 3, 3)}, base, Smaller(rank=3))
    with pytest.raises(IncompatibleAdapterError, match="no layer of a UNet in common"):
        extract({"a": noise(2)}, base, Smaller(rank=3))


def test_a_large_difference_by_randomised_svd() -> None:
    base = {"model.diffusion_model.big.weight": noise(160, 200, seed=1)}
    change = noise(160, 4, seed=2) @ noise(4, 200, seed=3)
    found, errors = extract(
        {"model.diffusion_model.big.weight": base["model.diffusion_model.big.weight"] + change}, base, Smaller(rank=4)
    )
    (module,) = found.modules
    assert module.weight is not None
    assert_close(module.weight.delta(torch.zeros(160, 200)), change, rtol=1e-3, atol=1e-3)
    assert max(errors.values()) < 1e-4


# --- inspect, heat map, verify ---------------------------------------------------------------------------------------

METADATA = {
    "ss_network_module": "networks.lora",
    "ss_tag_frequency": json.dumps({"10_sks cat": {"cat": 12, "grass": 3}, "5_dog": {"dog": 7, "cat": 1}}),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "style.safetensors"
    save_file(state(), path, metadata=METADATA)
    return path


def test_facts_from_the_header(file: Path) -> None:
    facts = lora_facts(file)
    assert facts["ranks"] == {"3": 3}
    assert facts["algorithms"] == {"LoRA": 3}
    assert facts["trigger_words"] == ["sks cat", "dog"]
    assert list(facts["tags"].items())[:2] == [("cat", 13), ("dog", 7)]  # type: ignore[attr-defined]
    assert facts["training"] == {"ss_network_module": "networks.lora"}


def test_the_heat_map_is_the_norm_per_block_and_layer(tmp_path: Path) -> None:
    shapes = {
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": (16, 768),
        "mid_block.resnets.0.conv1": (8, 8, 3, 3),
    }
    tensors: dict[str, Tensor] = {}
    for i, (path, shape) in enumerate(shapes.items()):
        tensors |= {f"lora_unet_{path.replace('.', '_')}.{k}": t for k, t in low_rank(shape, 2, i).items()}
    weights = load_lora(tensors)
    heat = heat_map(weights)
    assert heat.blocks == ("in4", "mid0")
    assert heat.columns == ("attn2 k", "resnet")
    rms = [
        float(m.weight.delta(torch.zeros(s)).square().mean().sqrt())
        for m, s in zip(weights.modules, shapes.values(), strict=True)
    ]  # type: ignore[union-attr]
    np.testing.assert_allclose(np.diag(heat.values), rms, rtol=1e-4)
    assert np.isnan(heat.values[0, 1])
    save_file(tensors, tmp_path / "x.safetensors")
    assert main(["lora", "heatmap", str(tmp_path / "x.safetensors")]) == 0
    with Image.open(tmp_path / "x.heatmap.png") as picture:
        assert picture.size[0] > 100
        assert len(picture.getcolors(100_000) or ()) > 5


def test_verify(tmp_path: Path) -> None:
    good = {
        f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k.{k}": t
        for k, t in low_rank((16, 768), 2, 0).items()
    }
    assert verify(good).problems == ()
    alien = {f"lora_unet_mid_block_attentions_7_proj_in.{k}": t for k, t in low_rank((16, 16), 2, 0).items()}
    assert "1 modules are no layers of SD1.5" in verify(good | alien).problems[0]
    dead = {key: torch.zeros_like(t) if "up" in key else t for key, t in good.items()}
    assert verify(dead).problems == ("all its updates are zero: it changes nothing",)
    wide = {f"lora_unet_conv_in.{k}": t for k, t in low_rank((4, 4), 9, 0).items()}
    assert any("more than its layer can use" in remark for remark in verify(wide | good).remarks)


def test_inspection_shows_what_decides_the_strength(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Alpha, scale and rank of every module, where the alpha comes from, and what is not applied."""
    tensors = {f"lora_unet_conv_in.{k}": t for k, t in low_rank(SHAPES["conv_in"], 4, 0).items()}
    tensors |= {
        f"unet.conv_out.{k}": noise(*s) for k, s in (("lora_A.weight", (2, 8, 3, 3)), ("lora_B.weight", (4, 2, 1, 1)))
    }
    tensors |= {f"text_encoder.x.{k}": noise(*s) for k, s in (("lora_A.weight", (2, 8)), ("lora_B.weight", (8, 2)))}
    tensors |= {
        "lora_unet_whole.lokr_w1": noise(2, 2),
        "lora_unet_whole.lokr_w2": noise(2, 2),
        "bundle_emb.a": noise(1),
    }
    header = {"lora_adapter_metadata": json.dumps({"text_encoder.lora_alpha": 6, "text_encoder.r": 2})}
    save_file(tensors, tmp_path / "x.safetensors", header)
    facts = json.loads(run(capsys, "inspect", tmp_path / "x.safetensors", "--json")[1])
    rows = {
        row["module"]: (row["rank"], row["alpha"], row["scale"], row["alpha_from"]) for row in facts["module_table"]
    }
    assert rows == {
        "lora_unet_conv_in": (4, 2.0, 0.5, "tensor"),
        "unet.conv_out": (2, 2.0, 1.0, "default"),
        "text_encoder.x": (2, 6.0, 3.0, "header"),
        "lora_unet_whole": (None, None, 1.0, ""),
    }
    assert facts["alpha_from"] == {"tensor": 1, "default": 1, "header": 1}
    assert [item["name"] for item in facts["left_out"]] == ["bundle_emb.a"]
    text = run(capsys, "inspect", tmp_path / "x.safetensors")[1]
    assert "not applied    1 × embeddings that OneTrainer put beside the LoRA" in text
    (line,) = (line for line in text.splitlines() if "text_encoder.x" in line)
    assert line.split() == ["te1", "LoRA", "2", "6", "3", "header", "text_encoder.x"]


def test_commands_say_what_they_do_not_take(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    save_file(state() | {"stray.key": noise(1)}, tmp_path / "x.safetensors")
    assert run(capsys, "convert", tmp_path / "x.safetensors", "--out", tmp_path / "y.safetensors")[0] == 0
    assert [record.message for record in caplog.records] == [
        "'x.safetensors': not taken: 1 × keys of nothing known: 'stray.key'"
    ]


# --- the command -----------------------------------------------------------------------------------------------------


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main(["lora", *map(str, argv)])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_commands_read_and_write_files(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "inspect", file)
    assert (code, "sks cat" in out, "LoRA × 3" in out) == (0, True, True)
    assert json.loads(run(capsys, "inspect", file, "--json")[1])["ranks"] == {"3": 3}
    target = tmp_path / "new" / "small.safetensors"
    code, out, _ = run(capsys, "resize", file, "--rank", 2, "--out", target, "--json")
    assert json.loads(out)["largest_relative_error"] > 0
    assert all(m.weight is not None and m.weight.rank == 2 for m in load_lora(target).modules)
    code, _, err = run(capsys, "resize", file, "--out", target)
    assert (code, "exists already" in err) == (2, True)
    assert run(capsys, "merge", file, target, "--strengths", "1,0.5", "--out", tmp_path / "sum.safetensors")[0] == 0
    assert all(m.weight is not None and m.weight.rank == 5 for m in load_lora(tmp_path / "sum.safetensors").modules)
    half = tmp_path / "half.safetensors"
    assert run(capsys, "convert", file, "--out", half, "--dtype", "float16")[0] == 0
    assert next(iter(load_lora(half).modules)).weight.down.dtype == torch.float16  # type: ignore[union-attr]
    assert load_lora(half).metadata["ss_network_module"] == "networks.lora"
    assert not list(tmp_path.rglob("*.part"))


def test_a_key_format_by_its_older_name(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``spelling``: on the command line, in its JSON and of what is read."""
    for option in ("--key-format", "--spelling"):
        target = tmp_path / f"{option}.safetensors"
        out = run(capsys, "convert", file, "--out", target, option, "diffusers", "--json")[1]
        assert json.loads(out)["key_format"] == json.loads(out)["spelling"] == "diffusers"
        assert load_lora(target).spelling == load_lora(target).key_format == "diffusers (PEFT)"
    facts = json.loads(run(capsys, "inspect", file, "--json")[1])
    assert facts["key_format"] == facts["spelling"] == "kohya"
    save_lora(load_lora(file), tmp_path / "x.safetensors", spelling="diffusers")
    assert load_lora(tmp_path / "x.safetensors").key_format == "diffusers (PEFT)"


def test_mistakes_are_one_line(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, message, expected in (
        (("inspect", tmp_path / "no.safetensors"), "does not exist", 2),
        (("convert", file, "--out", tmp_path / "x.bin"), "only kind of file", 2),
        (("merge", file, "--strengths", "1,2", "--out", tmp_path / "x.safetensors"), "1 LoRAs and 2 strengths", 1),
        (("resize", file, "--energy", 0, "--out", tmp_path / "x.safetensors"), "must be above 0", 2),
        (("verify", Path(__file__)), "does not begin like", 1),
    ):
        code, _, err = run(capsys, *argv)
        assert code == expected
        assert message in err
        assert len(err.strip().splitlines()) == 1
