"""The command on transformers: a folder or a file, an adapter and pictures in; what is usual for the model; mistakes in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection, SiglipVisionConfig, SiglipVisionModel

from ipadapter_core.commands.cli import main
from ipadapter_core.errors import CorruptFileError, InvalidInputError
from ipadapter_core.generate import generate, usual_sampling
from ipadapter_core.model_folders import layout_in, load_pipeline
from ipadapter_core.models import layout_of
from tiny import tiny_state
from tiny_flux import TEXT_DIM, WIDTH
from tiny_pipelines import chroma_pipeline, flux_pipeline, sd3_pipeline, seeded

BUILDERS: dict[str, Any] = {
    "FLUX.1 dev": flux_pipeline,
    "FLUX.1 schnell": lambda: flux_pipeline(guidance_embeds=False),
    "Chroma": chroma_pipeline,
    "SD3.5": sd3_pipeline,
}


def save(pipeline: Any, folder: Path) -> Path:
    """A model folder with a picture, an adapter and its image encoder beside it: XLabs' with CLIP, or SD3.5's with SigLIP."""
    pipeline.save_pretrained(folder)
    sizes: dict[str, Any] = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    if isinstance(pipeline, StableDiffusion3Pipeline):
        encoder: Any = seeded(5, lambda: SiglipVisionModel(SiglipVisionConfig(hidden_size=24, **sizes)))
        state = tiny_state(
            "sd3.5", token_dim=WIDTH, channels=(WIDTH,) * 3, num_tokens=5, feature_dim=24, hidden_dim=64, inner_dim=64
        )
    else:
        encoder = seeded(
            5, lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(hidden_size=32, projection_dim=24, **sizes))
        )
        state = tiny_state("xlabs", token_dim=TEXT_DIM, channels=(WIDTH, WIDTH), feature_dim=24, num_tokens=9)
    encoder.save_pretrained(folder / "image_encoder")
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "adapter.safetensors")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(folder / "a.png")
    return folder


@pytest.fixture(scope="module", params=BUILDERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save(BUILDERS[request.param](), tmp_path_factory.mktemp(request.param.replace(" ", "-")))


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return save(flux_pipeline(), tmp_path_factory.mktemp("flux"))


def run(model: Path, out: Path, *more: str) -> int:
    size = ["--height", "12", "--width", "20", "--batch", "1", "--json"]
    return main(["generate", "--model", str(model), "--out", str(out), "--prompt", "a red circle", *size, *more])


def pixels(folder: Path) -> np.ndarray:
    return np.asarray(Image.open(folder / "grid.png"))


def test_generate_with_what_is_usual_for_the_model(folder: Path, tmp_path: Path, capsys: Any) -> None:
    image = ["--adapter", str(folder / "adapter.safetensors"), "--image", str(folder / "a.png")]
    assert run(folder, tmp_path / "none", "--steps", "3") == 0
    assert run(folder, tmp_path / "zero", *image, "--steps", "3", "--strength", "0") == 0
    assert run(folder, tmp_path / "half", *image, "--steps", "3", "--end", "0.5") == 0
    capsys.readouterr()
    assert run(folder, tmp_path / "usual", *image, *([] if "schnell" in folder.name else ["--steps", "4"])) == 0
    facts = json.loads(capsys.readouterr().out)
    expected = {"dev": (3.5, 0.7), "schnell": (0.0, 0.7), "Chroma": (5.0, 0.7), "SD3.5": (5.0, 0.6)}
    usual = next(usual for name, usual in expected.items() if name in folder.name)
    assert (facts["steps"], facts["guidance"], facts["strength"]) == (4, *usual)
    np.testing.assert_array_equal(pixels(tmp_path / "none"), pixels(tmp_path / "zero"))
    assert (pixels(tmp_path / "none") != pixels(tmp_path / "half")).any()
    assert pixels(tmp_path / "usual").shape == (12, 20, 3)


def test_one_file_is_read_with_the_configs_of_a_folder(folder: Path, tmp_path: Path, capsys: Any) -> None:
    """With or without the prefix of whole checkpoints; the folder lies beside it, or is named."""
    image = ["--adapter", str(folder / "adapter.safetensors"), "--image", str(folder / "a.png"), "--steps", "2"]
    assert run(folder, tmp_path / "folder", *image) == 0
    tensors = load_pipeline(folder).transformer.state_dict()
    whole = {f"model.diffusion_model.{key}": tensor for key, tensor in tensors.items()}
    save_file({**whole, "first_stage_model.x": torch.zeros(2)}, tmp_path / "whole.safetensors")
    save_file(tensors, tmp_path / "bare.safetensors")
    shutil.copytree(folder, tmp_path / "bare", ignore=shutil.ignore_patterns("diffusion_pytorch_model*", "adapter*"))
    shutil.copytree(folder / "vae", tmp_path / "bare" / "vae", dirs_exist_ok=True)
    assert run(tmp_path / "whole.safetensors", tmp_path / "named", "--config", str(folder), *image) == 0
    assert run(tmp_path / "bare.safetensors", tmp_path / "beside", *image) == 0
    for name in ("named", "beside"):
        np.testing.assert_array_equal(pixels(tmp_path / name), pixels(tmp_path / "folder"))


def test_inspect_says_whether_an_adapter_fits_a_model(folder: Path, tmp_path: Path, capsys: Any) -> None:
    name = next((name for name in ("Chroma", "SD3") if name in folder.name), "Flux")
    adapter = str(folder / "adapter.safetensors")
    assert main(["inspect", adapter, "--model", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"] == name
    assert main(["inspect", adapter, "--model", str(folder)]) == 0
    said = capsys.readouterr().out
    assert {"SD3": "SD3: 3 sites, this adapter fits all"}.get(
        name, f"{name}: 5 sites, this adapter fits 2 of them"
    ) in said
    assert {"SD3": "joint 2"}.get(name, "double 1") in said
    assert "prompt" not in said.splitlines()[-1]
    assert layout_in(folder) == layout_of(load_pipeline(folder).transformer)
    state = tiny_state("xlabs", token_dim=TEXT_DIM, channels=(WIDTH,) * 4, feature_dim=24)
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "other.safetensors")
    assert main(["inspect", str(tmp_path / "other.safetensors"), "--model", str(folder)]) == 1
    assert "4 attention layers" in capsys.readouterr().err


def test_inspect_says_where_image_prompts_act_in_a_model(folder: Path, capsys: Any) -> None:
    name = next((name for name in ("Chroma", "SD3") if name in folder.name), "Flux")
    assert main(["inspect", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    expected = {"joint": 3} if name == "SD3" else {"double": 2, "single": 3}
    assert (facts["base_model"], facts["sites"], facts["channels"], facts["token_dim"]) == (
        name,
        expected,
        [WIDTH],
        TEXT_DIM,
    )
    assert main(["inspect", str(folder)]) == 0
    said = capsys.readouterr().out
    assert f"base model     {name}" in said
    assert {"SD3": "at 3 attentions (3 joint)"}.get(name, "at 5 attentions (2 double, 3 single)") in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--negative", "ugly"], "unless true guidance is above 1"),
        (["--image", "{a}", "--adapter", "{adapter}", "--preset", "style transfer"], "style"),
        (["--image", "{a}", "--adapter", "{adapter}", "--sites", "input: 1"], "input"),
    ],
)
def test_mistakes_are_one_line(flux: Path, tmp_path: Path, capsys: Any, arguments: list[str], said: str) -> None:
    paths = {"a": flux / "a.png", "adapter": flux / "adapter.safetensors"}
    assert run(flux, tmp_path, "--steps", "1", *(argument.format(**paths) for argument in arguments)) == 2
    complaint = capsys.readouterr().err.strip()
    assert said in complaint
    assert "\n" not in complaint


def test_true_guidance_and_a_negative_prompt(flux: Path, tmp_path: Path) -> None:
    plain = ["--steps", "2", "--true-guidance", "3"]
    assert run(flux, tmp_path / "none", *plain) == 0
    assert run(flux, tmp_path / "ugly", *plain, "--negative", "ugly, blurry") == 0
    assert (pixels(tmp_path / "none") != pixels(tmp_path / "ugly")).any()
    with pytest.raises(InvalidInputError, match="ChromaPipeline has one guidance"):
        generate(chroma_pipeline(), [], ["a red circle"], true_guidance=3.0, seeds=[0])


def test_a_mask_of_ones_is_none_and_of_zeros_no_image(flux: Path, tmp_path: Path) -> None:
    image = ["--adapter", str(flux / "adapter.safetensors"), "--image", str(flux / "a.png"), "--steps", "2"]
    for name, grey in (("ones", 255), ("zeros", 0)):
        Image.new("L", (40, 24), grey).save(tmp_path / f"{name}.png")
        assert run(flux, tmp_path / name, *image, "--mask", str(tmp_path / f"{name}.png")) == 0
    assert run(flux, tmp_path / "unmasked", *image) == 0
    assert run(flux, tmp_path / "text", "--steps", "2") == 0
    ones, zeros, unmasked, text = (
        pixels(tmp_path / name).astype(int) for name in ("ones", "zeros", "unmasked", "text")
    )
    assert abs(ones - unmasked).max() <= 1
    assert abs(zeros - text).max() <= 1
    assert abs(unmasked - text).max() > 1


def test_pictures_of_one_prompt_are_drawn_together(flux: Path, tmp_path: Path) -> None:
    image = ["--adapter", str(flux / "adapter.safetensors"), "--image", str(flux / "a.png"), str(flux / "a.png")]
    assert run(flux, tmp_path, *image, "--steps", "2", "--batch", "2", "--seed", "4") == 0
    assert sorted(path.name for path in tmp_path.glob("seed*")) == ["seed-000004.png", "seed-000005.png"]


def test_of_several_encoders_the_adapters_own_is_used(flux: Path, tmp_path: Path, capsys: Any) -> None:
    wide = CLIPVisionConfig(hidden_size=32, projection_dim=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)  # fmt: skip
    seeded(6, lambda: CLIPVisionModelWithProjection(wide)).save_pretrained(tmp_path / "other")
    image = ["--adapter", str(flux / "adapter.safetensors"), "--image", str(flux / "a.png"), "--steps", "1"]
    encoders = [str(tmp_path / "other"), str(flux / "image_encoder")]
    assert run(flux, tmp_path / "one", *image) == 0
    assert run(flux, tmp_path / "two", *image, "--image-encoder", *encoders) == 0
    np.testing.assert_array_equal(pixels(tmp_path / "one"), pixels(tmp_path / "two"))
    state = tiny_state(
        "instantcharacter",
        token_dim=TEXT_DIM,
        channels=(WIDTH,) * 5,
        num_tokens=5,
        feature_dim=128,
        hidden_dim=64,
        inner_dim=64,
    )
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "character.safetensors")
    capsys.readouterr()
    image[1] = str(tmp_path / "character.safetensors")
    assert run(flux, tmp_path / "none", *image, "--image-encoder", *encoders) == 1
    assert "reads the hidden states of 2 image encoders at once" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["beside", "config"])
def test_a_file_without_configs_says_what_is_needed(flux: Path, tmp_path: Path, where: str) -> None:
    save_file({"x": torch.zeros(2)}, tmp_path / "alone.safetensors")
    config = {"config": tmp_path / "nowhere"} if where == "config" else {}
    with pytest.raises(InvalidInputError, match=r"holds no configs, tokenizers and text encoders.*--config"):
        load_pipeline(tmp_path / "alone.safetensors", **config)
    (tmp_path / "alone.ckpt").write_bytes(b"")
    with pytest.raises(InvalidInputError, match="run no code"):
        load_pipeline(tmp_path / "alone.ckpt", config=flux)


def test_a_file_of_another_model_is_refused(flux: Path, tmp_path: Path) -> None:
    tensors = load_pipeline(flux).transformer.state_dict()
    save_file({"unet.conv_in.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(InvalidInputError, match="cannot be loaded as the transformer"):
        load_pipeline(tmp_path / "other.safetensors", config=flux)
    tensors["x_embedder.weight"] = torch.zeros(32, 64)
    save_file(tensors, tmp_path / "wide.safetensors")
    with pytest.raises(InvalidInputError, match="cannot be loaded as the transformer"):
        load_pipeline(tmp_path / "wide.safetensors", config=flux)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_layers": 10**9}, "num_layers is '1000000000', more than any model has"),
        ({"axes_dims_rope": [4, 6, -6]}, "axes_dims_rope"),
        ({"num_attention_heads": "two"}, "describes no FluxTransformer2DModel"),
    ],
)
def test_a_config_of_no_model_is_refused(flux: Path, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    (tmp_path / "transformer").mkdir()
    shutil.copy(flux / "model_index.json", tmp_path)
    config = json.loads((flux / "transformer" / "config.json").read_text()) | change
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CorruptFileError, match=said):
        layout_in(tmp_path)


def test_what_is_usual_is_told_by_the_model() -> None:
    assert usual_sampling(flux_pipeline()) == (28, 3.5)
    assert usual_sampling(flux_pipeline(guidance_embeds=False)) == (4, 0.0)
    assert usual_sampling(chroma_pipeline()) == (35, 5.0)
    assert usual_sampling(sd3_pipeline()) == (28, 5.0)
