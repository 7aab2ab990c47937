"""An image prompt in one call: the same pictures as in five, whatever form the picture has and wherever the encoder lies."""

# pyright: basic, reportPrivateImportUsage=false, reportOptionalMemberAccess=false

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from ipadapter_core import WeightSchedule, bake, encode_image_prompt, image_prompt, layout_of, load_adapter, preprocess
from ipadapter_core.attention.masks import RegionMask
from ipadapter_core.attention.presets import parse_site_factors
from ipadapter_core.backends.diffusers import apply_to_pipeline
from ipadapter_core.errors import AdapterError, CorruptFileError, InvalidInputError
from ipadapter_core.images.encoder import load_image_encoder
from ipadapter_core.images.pictures import as_mask, as_picture
from ipadapter_core.model_folders import load_pipeline
from ipadapter_core.steering import find_encoders
from tiny import tiny_state
from tiny_folder import sd15_folder
from tiny_models import checkpoint_channels


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sd15_folder(tmp_path_factory)


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Any:
    pipeline = load_pipeline(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline(loaded: Any) -> Iterator[Any]:
    yield loaded
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in loaded.unet.modules())
    assert hooks == 0, "a test left something on the model"


def drawn(pipeline: Any) -> Tensor:
    made = pipeline("a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt")
    return made.images


def five_calls(pipeline: Any, folder: Path, image: Tensor, schedule: WeightSchedule, mask: Any = None) -> Any:
    adapter = load_adapter(folder / "adapter.safetensors")
    encoder = load_image_encoder(folder, subfolder="image_encoder")
    return bake(adapter, encode_image_prompt(adapter, encoder, image), layout_of(pipeline.unet), schedule, mask)


def test_one_call_does_what_five_do(folder: Path, pipeline: Any) -> None:
    plain = drawn(pipeline)
    image = as_picture(folder / "a.png")
    schedule = WeightSchedule(
        0.7,
        "style transfer",
        end_percent=0.8,
        site_factors=parse_site_factors("output: 0.5"),
        curve=((0.0, 1.0), (1.0, 0.5)),
    )
    region = torch.zeros(16, 16)
    region[:, 8:] = 1
    with apply_to_pipeline(pipeline, five_calls(pipeline, folder, image, schedule, region)):
        expected = drawn(pipeline)
    with image_prompt(
        pipeline, folder / "adapter.safetensors", image, strength=0.7, preset="style transfer", end=0.8, mask=region,
        sites="output: 0.5", curve="0: 1, 1: 0.5",
    ):  # fmt: skip
        torch.testing.assert_close(drawn(pipeline), expected, rtol=0, atol=0)
    assert (expected != plain).any()
    torch.testing.assert_close(drawn(pipeline), plain, rtol=0, atol=0)


def test_strength_can_change_and_zero_is_no_image(folder: Path, pipeline: Any) -> None:
    plain = drawn(pipeline)
    file = folder / "adapter.safetensors"
    with image_prompt(pipeline, file, folder / "a.png", strength=0.4):
        weak = drawn(pipeline)
    steered = image_prompt(pipeline, str(file), folder / "a.png")
    usual = drawn(pipeline)
    steered.set_strength(0.4)
    torch.testing.assert_close(drawn(pipeline), weak, rtol=0, atol=0)
    steered.set_strength(0.0)
    torch.testing.assert_close(drawn(pipeline), plain, rtol=0, atol=0)
    steered.set_strength(load_adapter(file).spec.format.strength)
    torch.testing.assert_close(drawn(pipeline), usual, rtol=0, atol=0)
    steered.remove()


def test_several_adapters_act_at_once_in_any_order(folder: Path, pipeline: Any, tmp_path: Path) -> None:
    other = tmp_path / "plus.safetensors"
    channels = tuple(checkpoint_channels(layout_of(pipeline.unet)))
    save_file(tiny_state("plus", token_dim=32, channels=channels, feature_dim=32, seed=3), other)
    first: dict[str, Any] = {"adapter": folder / "adapter.safetensors", "image": folder / "a.png", "strength": 0.6}
    second: dict[str, Any] = {"adapter": other, "image": folder / "grey.png", "strength": 0.3}
    alone = []
    for one in (first, second):
        with image_prompt(pipeline, **one):
            alone.append(drawn(pipeline))
    with image_prompt(pipeline, **first), image_prompt(pipeline, **second) as inner:
        both = drawn(pipeline)
        inner.remove()
        torch.testing.assert_close(drawn(pipeline), alone[0], rtol=0, atol=0)
    assert all((both != one).any() for one in alone)
    with image_prompt(pipeline, **second), image_prompt(pipeline, **first):
        torch.testing.assert_close(drawn(pipeline), both, rtol=0, atol=1e-5)


# --- pictures in every form -------------------------------------------------------------------------------------------


def forms(path: Path) -> dict[str, Any]:
    picture = Image.open(path)
    pixels = np.asarray(picture.convert("RGB"))
    tensor = torch.from_numpy(pixels.astype(np.float32)) / 255
    return {
        "path": path, "text": str(path), "Pillow": picture, "bytes": pixels, "floats": pixels.astype(np.float64) / 255,
        "16 bits": pixels.astype(np.uint16) * 257, "tensor": tensor, "batch": tensor[None], "batch of bytes": pixels[None],
    }  # fmt: skip


@pytest.mark.parametrize("form", forms(Path(__file__).parents[2] / "ipadapter_core/demo/references/owl.png"))
def test_a_picture_is_the_same_in_every_form(folder: Path, form: str) -> None:
    adapter, encoder = (
        load_adapter(folder / "adapter.safetensors"),
        load_image_encoder(folder, subfolder="image_encoder"),
    )
    given = forms(folder / "a.png")
    expected = encode_image_prompt(adapter, encoder, given["tensor"][None])
    for images in (given[form], [given[form]], (given[form],)):
        torch.testing.assert_close(encode_image_prompt(adapter, encoder, images).cond, expected.cond, rtol=0, atol=1e-6)
    away = encode_image_prompt(adapter, encoder, given["tensor"], negative=given[form])
    torch.testing.assert_close(away.uncond, expected.cond, rtol=0, atol=1e-6)
    if form != "tensor":  # which has no batch, and says so
        torch.testing.assert_close(
            preprocess(given[form], encoder), preprocess(given["batch"], encoder), rtol=0, atol=1e-6
        )


def test_masks_come_in_every_form(folder: Path) -> None:
    picture = Image.open(folder / "mask.png")
    expected = torch.from_numpy(np.array(picture)).float() / 255
    colours = picture.convert("RGB")
    given: list[Any] = [folder / "mask.png", picture, colours, np.asarray(picture), np.asarray(picture) > 127, expected]
    for mask in given:
        torch.testing.assert_close(RegionMask.of(mask).values, expected[None], rtol=0, atol=0)
        torch.testing.assert_close(as_mask(mask), expected, rtol=0, atol=0)
    region = RegionMask.from_tensor(expected)
    assert RegionMask.of(region) is region
    assert RegionMask.of(None) is None


def test_a_picture_in_memory_is_turned_upright_as_a_file_is(tmp_path: Path) -> None:
    pixels = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    torch.testing.assert_close(
        as_picture(Image.open(tmp_path / "a.png")), as_picture(tmp_path / "a.png"), rtol=0, atol=0
    )
    assert as_picture(Image.open(tmp_path / "a.png")).shape == (3, 2, 3)
    assert as_picture(Image.new("LA", (3, 2))).shape == (2, 3, 4)


@pytest.mark.parametrize(
    ("picture", "said"),
    [
        (3, "a picture is a tensor, an array"),
        (np.zeros((2, 2, 3), np.int64), "int64 says not what is white"),
        ("nowhere.png", "does not exist"),
        (np.zeros((2, 2, 7)), "1, 3 or 4 channels"),
    ],
)
def test_what_is_no_picture_is_one_sentence(folder: Path, pipeline: Any, picture: Any, said: str) -> None:
    with pytest.raises((AdapterError, FileNotFoundError), match=said) as caught:
        image_prompt(pipeline, folder / "adapter.safetensors", picture)
    assert "\n" not in str(caught.value)


def test_a_picture_that_pillow_cannot_finish_is_one_sentence(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "cut.png").write_bytes((folder / "a.png").read_bytes()[:200])
    with pytest.raises(CorruptFileError, match=r"cut\.png' cannot be read as a picture"):
        as_picture(Image.open(tmp_path / "cut.png"))


# --- encoders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["beside", "above", "clip_vision"])
def test_the_encoder_is_found_near_the_adapter(
    folder: Path, pipeline: Any, tmp_path: Path, place: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(pipeline, "image_encoder", None)
    file = tmp_path / "ipadapter" / "adapter.safetensors"
    file.parent.mkdir()
    shutil.copy(folder / "adapter.safetensors", file)
    with pytest.raises(InvalidInputError, match="needs its image encoder"):
        image_prompt(pipeline, file, folder / "a.png")
    if place == "clip_vision":
        monkeypatch.setattr(
            "ipadapter_core.images.encoder._HEADS", {32: 2}
        )  # of published widths alone are the heads known
        (tmp_path / place).mkdir()
        shutil.copy(folder / "image_encoder" / "model.safetensors", tmp_path / place / "some tower.safetensors")
    else:
        target = {"beside": file.parent, "above": tmp_path}[place] / "image_encoder"
        shutil.copytree(folder / "image_encoder", target)
    (encoder,) = find_encoders(load_adapter(file), pipeline=pipeline, source=file)
    given = load_image_encoder(folder, subfolder="image_encoder")
    assert (encoder.hidden_size, encoder.projection_dim) == (given.hidden_size, given.projection_dim)


def test_an_encoder_that_is_given_wins(folder: Path, pipeline: Any, tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, projection_dim=24, image_size=28, patch_size=14)  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path)
    with image_prompt(pipeline, folder / "adapter.safetensors", folder / "a.png"):
        own = drawn(pipeline)
    for encoder in (tmp_path, load_image_encoder(tmp_path)):
        with image_prompt(pipeline, folder / "adapter.safetensors", folder / "a.png", encoder=encoder):
            assert (drawn(pipeline) != own).any()


def test_an_adapter_of_another_model_leaves_the_pipeline_alone(folder: Path, pipeline: Any, tmp_path: Path) -> None:
    save_file(tiny_state("base", token_dim=64, channels=(8, 8), feature_dim=24), tmp_path / "other.safetensors")
    with pytest.raises(AdapterError, match="is an adapter for"):
        image_prompt(pipeline, tmp_path / "other.safetensors", folder / "a.png")


def test_face_adapters_ask_for_face_models(pipeline: Any, folder: Path, tmp_path: Path) -> None:
    channels = tuple(checkpoint_channels(layout_of(pipeline.unet)))
    save_file(tiny_state("faceid", token_dim=32, channels=channels), tmp_path / "face.safetensors")
    with pytest.raises(InvalidInputError, match="where the face models are"):
        image_prompt(pipeline, tmp_path / "face.safetensors", folder / "a.png")
    with pytest.raises(InvalidInputError, match=r"buffalo_l|onnxruntime"):
        image_prompt(pipeline, tmp_path / "face.safetensors", folder / "a.png", faces=tmp_path / "models" / "buffalo_l")
