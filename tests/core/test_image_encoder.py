from __future__ import annotations

import inspect
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from ipadapter_core.checkpoints import AdapterSpec
from ipadapter_core.checkpoints.base import Base
from ipadapter_core.checkpoints.plus import Plus
from ipadapter_core.errors import AdapterError, CorruptFileError, IncompatibleEncoderError, InvalidInputError
from ipadapter_core.features import (
    CLIP_MEAN,
    CLIP_STD,
    ENCODERS,
    HALF,
    LAST,
    POOLED,
    Encoded,
    EncoderSpec,
    ImageFeatures,
    find_encoder,
)
from ipadapter_core.images.encoder import TransformersImageEncoder
from ipadapter_core.images.preprocess import nearest_shape, preprocess, preprocess_as_host
from ipadapter_core.images.tiles import masked_tiles, prepare_square, region_tiles
from ipadapter_core.prompt.needs import check_encoder

SIZE = 28
PHOTO = Path(__file__).parents[1] / "host" / "photo.jpg"


def fake_encoder(size: int = SIZE, **changes: object):
    """An encoder's facts without a network."""
    facts = {"name": "fake", "hidden_size": 32, "projection_dim": 16, "image_size": size, "mean": CLIP_MEAN}
    return SimpleNamespace(**{**facts, "std": CLIP_STD, **changes})


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def unnormalise(pixels: Tensor) -> Tensor:
    return pixels * torch.tensor(CLIP_STD).view(3, 1, 1) + torch.tensor(CLIP_MEAN).view(3, 1, 1)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=20,
        image_size=SIZE,
        patch_size=14,
    )
    folder = tmp_path_factory.mktemp("clip")
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    return folder


# --- preprocess -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(60, 40), (40, 61), (300, 200), (224, 224), (30, 30), (500, 70)])
@pytest.mark.parametrize("kind", ["photo", "noise"])
def test_centre_crop_is_clips_own_processor(shape: tuple[int, int], kind: str) -> None:
    """Within 2 of 255 levels: the processor rounds to 8 bits after each pass, preprocess() does not."""
    from transformers import CLIPImageProcessor

    if kind == "photo":
        picture = Image.open(PHOTO).convert("RGB").resize(shape[::-1])
    else:
        picture = Image.fromarray((noise(*shape, 3) * 255).byte().numpy())
    bytes_ = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(*shape, 3)
    theirs = torch.as_tensor(CLIPImageProcessor()(picture, return_tensors="pt")["pixel_values"])
    ours = preprocess(bytes_[None] / 255, fake_encoder(224))
    assert ours.shape == theirs.shape
    assert_close(unnormalise(ours) * 255, unnormalise(theirs) * 255, atol=2, rtol=0)
    assert unnormalise(ours).std() > 0.05  # a picture, not a plain colour


def test_size_and_normalisation_are_the_encoders() -> None:
    siglip = ENCODERS["SigLIP so400m/14-384"]
    encoder = fake_encoder(siglip.image_size, mean=siglip.mean, std=siglip.std)
    pixels = preprocess(torch.ones(1, 10, 20, 3), encoder)
    assert_close(pixels, torch.ones(1, 3, 384, 384))


def stripes(h: int, w: int) -> Tensor:
    """Brightness rises along the long side, so a crop tells by its mean where it was taken."""
    long = torch.linspace(0, 1, max(h, w))
    grid = long[:, None].expand(h, w) if h > w else long[None, :].expand(h, w)
    return grid[None, :, :, None].expand(1, h, w, 3)


@pytest.mark.parametrize("ratio", [2, 30])  # 30: past LONGEST_STRIP
def test_crop_moves_along_the_long_side_only(ratio: int) -> None:
    short, long = 40, 40 * ratio
    for shape, first, last, across in [
        ((long, short), "top", "bottom", "left"),
        ((short, long), "left", "right", "top"),
    ]:
        image = stripes(*shape)
        level = {
            crop: unnormalise(preprocess(image, fake_encoder(), crop=crop)).mean().item()
            for crop in ("center", first, last, across)
        }
        half = 0.5 / ratio
        assert level["center"] == pytest.approx(0.5, abs=0.01)
        assert level[first] == pytest.approx(half, abs=0.01)
        assert level[last] == pytest.approx(1 - half, abs=0.01)
        assert level[across] == level["center"]


def test_pad_keeps_all_and_fills_with_exactly_nothing() -> None:
    pixels = preprocess(torch.ones(1, 20, 40, 3), fake_encoder(), crop="pad")
    assert (pixels[:, :, :7] == 0).all()
    assert (pixels[:, :, 21:] == 0).all()
    assert_close(unnormalise(pixels[:, :, 7:21]), torch.ones(1, 3, 14, SIZE))


def test_stretch_keeps_all() -> None:
    image = stripes(20, 80)
    pixels = unnormalise(preprocess(image, fake_encoder(), crop="stretch"))
    assert_close(pixels[0, 0, 0], torch.linspace(0, 1, SIZE), atol=0.03, rtol=0)


@pytest.mark.parametrize("crop", ["center", "top", "bottom", "left", "right", "pad", "stretch", "fit", "subject"])
@pytest.mark.parametrize("shape", [(20000, 10), (10, 20000), (1, 1), (1, 5000), (2, 3), (SIZE, SIZE)])
def test_any_shape_becomes_a_finite_square(crop: str, shape: tuple[int, int]) -> None:
    pixels = preprocess(noise(1, *shape, 3), fake_encoder(), crop=crop)  # pyright: ignore[reportArgumentType]
    assert pixels.shape == (1, 3, SIZE, SIZE)
    low, high = unnormalise(pixels).aminmax()
    assert low > -1e-5
    assert high < 1 + 1e-5


def test_huge_strip_never_becomes_a_huge_image(monkeypatch: pytest.MonkeyPatch) -> None:
    import ipadapter_core.images.preprocess as module

    sizes: list[int] = []
    resize = module._resize

    def counted(pixels: Tensor, h: int, w: int, *mode: str) -> Tensor:
        sizes.append(h * w)
        return resize(pixels, h, w, *mode)

    monkeypatch.setattr(module, "_resize", counted)
    for crop in ("center", "bottom", "pad", "stretch", "fit", "subject"):
        preprocess(noise(1, 20000, 10, 3), fake_encoder(), crop=crop)  # pyright: ignore[reportArgumentType]
    assert len(sizes) == 6
    assert max(sizes) <= 2 * SIZE * SIZE


def as_pillow(picture: Tensor) -> Image.Image:
    return Image.fromarray((picture * 255).byte().numpy())


def photo(h: int, w: int) -> Tensor:
    """``h w 3`` in levels of 8 bits."""
    picture = Image.open(PHOTO).convert("RGB").resize((w, h))
    return torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(h, w, 3) / 255


def levels(picture: Image.Image) -> Tensor:
    """``3 h w`` in 0..255."""
    raw = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return raw.view(picture.height, picture.width, 3).permute(2, 0, 1).float()


@pytest.mark.parametrize("shape", [(120, 90), (90, 121), (64, 64), (40, 300)])
def test_fit_is_what_the_character_reference_was_trained_with(shape: tuple[int, int]) -> None:
    """Within 2 of 255 levels, as Pillow rounds: the long side becomes the encoder's, black is around it."""
    encoder = fake_encoder(64, mean=HALF, std=HALF)
    picture = photo(*shape)
    ratio = 64 / max(shape)
    h, w = (max(1, round(side * ratio)) for side in shape)
    square = Image.new("RGB", (64, 64), (0, 0, 0))
    square.paste(as_pillow(picture).resize((w, h), Image.Resampling.BILINEAR), ((64 - w) // 2, (64 - h) // 2))
    ours = (preprocess(picture[None], encoder, crop="fit")[0] * 0.5 + 0.5) * 255
    assert_close(ours, levels(square), atol=2, rtol=0)
    hidden = preprocess(picture[None], encoder, crop="fit", mask=torch.zeros(1, *shape))
    assert_close(hidden, torch.full_like(hidden, -1.0))


@pytest.mark.parametrize("shape", [(96, 96), (120, 90), (90, 130)])
@pytest.mark.parametrize("size", [28, 56])
def test_subject_is_what_instant_character_was_trained_with(shape: tuple[int, int], size: int) -> None:
    """Within 3 of 255 levels: first a square of the long side, then the encoder's, rounded twice by Pillow."""
    picture, side = photo(*shape), max(shape)
    theirs = as_pillow(picture)
    if shape[0] != shape[1]:
        theirs = theirs.resize((side, side))
    theirs = theirs.resize((size, size))
    ours = unnormalise(preprocess(picture[None], fake_encoder(size), crop="subject"))[0] * 255
    assert_close(ours, levels(theirs), atol=3, rtol=0)


def test_a_mask_cuts_the_subject_out_and_puts_it_on_white() -> None:
    picture, mask = photo(100, 140), torch.zeros(1, 100, 140)
    mask[:, 20:80, 50:90] = 1
    square = Image.new("RGB", (60, 60), (255, 255, 255))
    square.paste(as_pillow(picture).crop((50, 20, 90, 80)), (10, 0))
    ours = unnormalise(preprocess(picture[None], fake_encoder(), crop="subject", mask=mask))[0] * 255
    assert_close(ours, levels(square.resize((SIZE, SIZE))), atol=2, rtol=0)
    rgba = torch.cat([picture, mask[0, ..., None]], -1)
    assert_close(unnormalise(preprocess(rgba[None], fake_encoder(), crop="subject"))[0] * 255, ours)
    nothing = preprocess(picture[None], fake_encoder(), crop="subject", mask=torch.zeros(1, 100, 140))
    assert_close(unnormalise(nothing), torch.ones(1, 3, SIZE, SIZE))
    both = torch.stack([picture, picture.flip(0)])
    masks = torch.cat([mask, torch.ones(1, 100, 140)])
    batch = preprocess(both, fake_encoder(), crop="subject", mask=masks)
    for i in range(2):
        one = preprocess(both[i : i + 1], fake_encoder(), crop="subject", mask=masks[i : i + 1])
        assert_close(batch[i : i + 1], one, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("shape", "pixels"),
    [((336, 336), (336, 336)), ((100, 50), (476, 238)), ((50, 100), (238, 476)), ((400, 300), (392, 294)), ((300, 440), (280, 406)),
     ((5, 5000), (238, 476)), ((591, 1000), (280, 406)), ((1000, 591), (406, 280))],
)  # fmt: skip
def test_shapes_are_the_nearest_of_pe_cores(shape: tuple[int, int], pixels: tuple[int, int]) -> None:
    encoder = fake_encoder(336, mean=HALF, std=HALF)
    picture = noise(1, *shape, 3)
    ours = preprocess(picture, encoder, crop="shapes")
    plain = torch.nn.functional.interpolate(picture.permute(0, 3, 1, 2) * 2 - 1, pixels, mode="bilinear")
    assert_close(ours, plain)
    assert preprocess(picture, encoder, crop="shapes", shape=(28, 42)).shape == (1, 3, 28, 42)


def test_several_pictures_share_the_shape_nearest_to_all() -> None:
    assert nearest_shape([(100, 50), (100, 100), (100, 90)]) == (336, 336)
    assert nearest_shape([(100, 50), (100, 55)]) == (476, 238)


def test_mask_of_ones_changes_no_bit_and_of_zeros_leaves_nothing() -> None:
    image = noise(2, 40, 50, 3)
    plain = preprocess(image, fake_encoder())
    assert_close(preprocess(image, fake_encoder(), mask=torch.ones(2, 40, 50)), plain, rtol=0, atol=0)
    assert_close(preprocess(image, fake_encoder(), mask=torch.ones(1, 40, 50)), plain, rtol=0, atol=0)
    empty = preprocess(image, fake_encoder(), mask=torch.zeros(2, 40, 50))
    assert_close(empty, torch.zeros_like(plain), rtol=0, atol=1e-5)


def test_mask_hides_where_it_is_zero() -> None:
    mask = torch.zeros(1, SIZE, SIZE)
    mask[:, :, : SIZE // 2] = 1
    image = torch.ones(1, SIZE, SIZE, 3)
    pixels = preprocess(image, fake_encoder(), mask=mask)
    assert_close(pixels[..., SIZE // 2 :], torch.zeros(1, 3, SIZE, SIZE // 2), rtol=0, atol=1e-5)
    assert_close(pixels[..., : SIZE // 2], preprocess(image, fake_encoder())[..., : SIZE // 2])


def test_alpha_is_a_mask_and_joins_one() -> None:
    rgb, alpha, mask = noise(1, 30, 30, 3), noise(1, 30, 30, seed=1), noise(1, 30, 30, seed=2)
    rgba = torch.cat([rgb, alpha[..., None]], -1)
    assert_close(preprocess(rgba, fake_encoder()), preprocess(rgb, fake_encoder(), mask=alpha))
    assert_close(preprocess(rgba, fake_encoder(), mask=mask), preprocess(rgb, fake_encoder(), mask=alpha * mask))


def test_grey_is_three_equal_channels() -> None:
    grey = noise(1, 33, 30, 1)
    assert_close(
        preprocess(grey, fake_encoder()), preprocess(grey.expand(-1, -1, -1, 3), fake_encoder()), rtol=0, atol=0
    )


def test_half_precision_and_noncontiguous_images() -> None:
    image = noise(1, 3, 40, 30)
    viewed = image.permute(0, 2, 3, 1)
    plain = preprocess(viewed.contiguous(), fake_encoder())
    assert_close(preprocess(viewed, fake_encoder()), plain)
    halved = preprocess(viewed.half(), fake_encoder())
    assert halved.dtype == torch.float32
    assert_close(halved, plain, atol=5e-3, rtol=0)


def test_batch_is_its_images() -> None:
    images = noise(3, 50, 40, 3)
    batch = preprocess(images, fake_encoder())
    assert_close(batch, torch.cat([preprocess(image[None], fake_encoder()) for image in images]))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (torch.zeros(30, 30, 3), ["(b, h, w, c)", "image[None]"]),
        (torch.zeros(0, 30, 30, 3), ["empty"]),
        (torch.zeros(1, 0, 30, 3), ["no pixels", "(1, 0, 30, 3)"]),
        (torch.zeros(1, 30, 0, 3), ["no pixels"]),
        (torch.zeros(1, 3, 30, 30), ["permute(0, 2, 3, 1)"]),
        (torch.zeros(1, 30, 30, 2), ["1, 3 or 4 channels"]),
        (torch.zeros(1, 30, 30, 3, dtype=torch.uint8), ["torch.uint8", "255"]),
        (torch.full((1, 30, 30, 3), float("nan")), ["NaN"]),
        (torch.full((1, 30, 30, 3), float("inf")), ["NaN or infinite"]),
        (torch.full((1, 30, 30, 3), 255.0), ["0..1", "255"]),
        (torch.full((1, 30, 30, 3), -1.0), ["0..1", "-1"]),
    ],
)
def test_bad_images_are_told_what_is_wrong(image: Tensor, words: list[str]) -> None:
    with pytest.raises(InvalidInputError) as caught:
        preprocess(image, fake_encoder())
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.ones(1, 64, 64), ["64x64", "40x30"]),
        (torch.ones(3, 30, 40), ["(2, h, w)", "(3, 30, 40)"]),
        (torch.ones(30, 40), ["(1, h, w)"]),
        (torch.full((1, 30, 40), 2.0), ["0..1"]),
        (torch.full((1, 30, 40), float("nan")), ["0..1", "nan"]),
    ],
)
def test_bad_masks_are_told_what_is_wrong(mask: Tensor, words: list[str]) -> None:
    with pytest.raises(InvalidInputError) as caught:
        preprocess(torch.zeros(2, 30, 40, 3), fake_encoder(), mask=mask)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_unknown_crop_is_named() -> None:
    with pytest.raises(InvalidInputError, match=r"'middle'.*center, top"):
        preprocess(torch.zeros(1, 30, 30, 3), fake_encoder(), crop="middle")  # pyright: ignore[reportArgumentType]


# --- the transformers encoder ---------------------------------------------------------------------------------------


def test_facts_come_from_the_config(clip_folder: Path) -> None:
    encoder = TransformersImageEncoder.from_pretrained(clip_folder)
    assert (encoder.hidden_size, encoder.projection_dim, encoder.image_size) == (32, 20, SIZE)
    assert (encoder.mean, encoder.std) == (CLIP_MEAN, CLIP_STD)
    assert encoder.name == "custom image encoder"


@pytest.mark.parametrize("beside", [True, False])
def test_mean_and_std_come_from_the_preprocessor(clip_folder: Path, tmp_path: Path, beside: bool) -> None:
    shutil.copytree(clip_folder, tmp_path / "image_encoder")
    place = tmp_path / ("image_encoder" if beside else "feature_extractor")
    place.mkdir(exist_ok=True)
    config = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4], "crop_size": 999}
    (place / "preprocessor_config.json").write_text(json.dumps(config))
    encoder = TransformersImageEncoder.from_pretrained(tmp_path, subfolder="image_encoder")
    assert (encoder.mean, encoder.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert encoder.image_size == SIZE  # the position embedding decides
    (place / "preprocessor_config.json").write_text('{"image_mean": [0.5]}')
    with pytest.raises(CorruptFileError, match="image_mean"):
        TransformersImageEncoder.from_pretrained(tmp_path, subfolder="image_encoder")


def test_published_sizes_are_recognised() -> None:
    config = SimpleNamespace(hidden_size=1280, projection_dim=1024, image_size=224)
    model = torch.nn.Linear(1, 1)
    model.config = config  # pyright: ignore[reportAttributeAccessIssue]
    assert TransformersImageEncoder(model).name == "ViT-H/14"
    assert TransformersImageEncoder(model, name="mine").name == "mine"


def test_penultimate_enters_the_last_layer_without_a_norm(clip_folder: Path) -> None:
    encoder = TransformersImageEncoder.from_pretrained(clip_folder)
    pixels = preprocess(noise(2, 40, 40, 3), encoder)
    features = encoder.encode(pixels)
    assert features.penultimate.shape == (2, 5, 32)
    assert features.image_embeds.shape == (2, 20)
    vision = encoder.model.vision_model

    def through(layer: Any, x: Tensor) -> Tensor:
        masks = {name: None for name in inspect.signature(layer.forward).parameters if name.endswith("mask")}
        out = layer(x, **masks)  # transformers 4 has a second mask, and gives a tuple
        return out[0] if isinstance(out, tuple) else out

    x = vision.pre_layrnorm(vision.embeddings(pixels))
    for layer in vision.encoder.layers[:-1]:
        x = through(layer, x)
    assert_close(features.penultimate, x)
    last = through(vision.encoder.layers[-1], x)
    assert_close(features.image_embeds, encoder.model.visual_projection(vision.post_layernorm(last[:, 0])))
    assert (features.image_embeds[0] - features.image_embeds[1]).abs().max() > 1e-2
    assert features.get("penultimate") is features.penultimate
    assert features.get("image_embeds") is features.image_embeds


def test_encode_neither_trains_nor_keeps_a_graph(clip_folder: Path) -> None:
    encoder = TransformersImageEncoder.from_pretrained(clip_folder)
    features = encoder.encode(preprocess(noise(1, 40, 40, 3), encoder).requires_grad_())
    assert not features.image_embeds.requires_grad
    assert not any(p.requires_grad for p in encoder.model.parameters())
    assert not encoder.model.training


def test_dtype_is_asked_for_and_input_is_moved(clip_folder: Path) -> None:
    encoder = TransformersImageEncoder.from_pretrained(clip_folder, dtype=torch.bfloat16)
    assert encoder.encode(torch.zeros(1, 3, SIZE, SIZE)).image_embeds.dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (3, SIZE, SIZE), (1, SIZE, SIZE, 3), (1, 1, SIZE, SIZE)])
def test_wrong_pixels_are_refused(clip_folder: Path, shape: tuple[int, ...]) -> None:
    encoder = TransformersImageEncoder.from_pretrained(clip_folder)
    with pytest.raises(InvalidInputError, match=r"\(b, 3, 28, 28\)"):
        encoder.encode(torch.zeros(shape))


def test_folders_that_hold_no_encoder(clip_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"config\.json"):
        TransformersImageEncoder.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InvalidInputError, match=r"config\.json"):
        TransformersImageEncoder.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "siglip_vision_model"}')
    with pytest.raises(InvalidInputError, match="siglip_vision_model"):
        TransformersImageEncoder.from_pretrained(tmp_path)
    shutil.copy(clip_folder / "config.json", tmp_path)
    with pytest.raises(CorruptFileError, match="could not be read"):
        TransformersImageEncoder.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((clip_folder / "model.safetensors").read_bytes()[:2000])
    with pytest.raises(CorruptFileError, match="could not be read"):
        TransformersImageEncoder.from_pretrained(tmp_path)


def test_missing_weights_are_not_made_up(clip_folder: Path, tmp_path: Path) -> None:
    shutil.copy(clip_folder / "config.json", tmp_path)
    tensors = load_file(clip_folder / "model.safetensors")
    del tensors["visual_projection.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CorruptFileError, match=r"visual_projection\.weight"):
        TransformersImageEncoder.from_pretrained(tmp_path)


SAID = {
    "a tower of a million layers": {"num_hidden_layers": 10**6},
    "another width": {"hidden_size": 10**9},
    "no heads": {"num_attention_heads": 0},
    "heads of text": {"num_attention_heads": "many"},
    "another picture size": {"image_size": 10**7},
    "an activation that is none": {"hidden_act": "os.system\n"},
}


@pytest.mark.parametrize("lie", SAID)
def test_configs_that_the_weights_do_not_bear_out(clip_folder: Path, tmp_path: Path, lie: str) -> None:
    config = json.loads((clip_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **SAID[lie]}))
    shutil.copy(clip_folder / "model.safetensors", tmp_path)
    with pytest.raises(CorruptFileError) as caught:
        TransformersImageEncoder.from_pretrained(tmp_path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("container", ["bin", "shards", "utf-16"])
def test_folders_in_other_spellings(clip_folder: Path, tmp_path: Path, container: str) -> None:
    state = load_file(clip_folder / "model.safetensors")
    text = (clip_folder / "config.json").read_text()
    (tmp_path / "config.json").write_text(text, encoding="utf-16" if container == "utf-16" else "utf-8")
    if container == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    elif container == "shards":
        keys = sorted(state)
        for number, part in enumerate((keys[:5], keys[5:])):
            save_file({key: state[key] for key in part}, tmp_path / f"{number}.safetensors")
        places = {key: f"{int(key in keys[5:])}.safetensors" for key in keys}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    else:
        shutil.copy(clip_folder / "model.safetensors", tmp_path)
    one, other = (TransformersImageEncoder.from_pretrained(folder) for folder in (clip_folder, tmp_path))
    pixels = torch.rand(1, 3, one.image_size, one.image_size)
    assert torch.equal(one.encode(pixels).penultimate, other.encode(pixels).penultimate)


def test_shards_lie_beside_their_index(clip_folder: Path, tmp_path: Path) -> None:
    shutil.copy(clip_folder / "config.json", tmp_path)
    for places in ({"a": "../a.safetensors"}, {"a": "/etc/passwd"}, {"a": 1}, {}, [1]):
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        with pytest.raises(CorruptFileError, match="does not name files beside it"):
            TransformersImageEncoder.from_pretrained(tmp_path)


def test_an_encoder_cut_off_while_in_use(clip_folder: Path, tmp_path: Path) -> None:
    """Of a mapped file, looking at the numbers then would end the process (SIGBUS)."""
    for file in ("config.json", "model.safetensors"):
        shutil.copy(clip_folder / file, tmp_path)
    encoder = TransformersImageEncoder.from_pretrained(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 0)
    assert encoder.encode(torch.rand(1, 3, encoder.image_size, encoder.image_size)).image_embeds.isfinite().all()


def test_pipes_are_no_part_of_an_encoder(clip_folder: Path, tmp_path: Path) -> None:
    for pipe in ("config.json", "model.safetensors", "preprocessor_config.json"):
        folder = tmp_path / pipe
        shutil.copytree(clip_folder, folder)
        (folder / pipe).unlink(missing_ok=True)
        os.mkfifo(folder / pipe)
        with pytest.raises(AdapterError, match="pipe"):
            TransformersImageEncoder.from_pretrained(folder)


# --- which encoder for which adapter --------------------------------------------------------------------------------


def adapter_spec(feature: Encoded, width: int) -> AdapterSpec:
    found = find_encoder(feature, width)
    family = Plus() if feature == "penultimate" else Base()
    family.feature = {"pooled": POOLED, "last": LAST}.get(feature, family.feature)  # pyright: ignore[reportAttributeAccessIssue]
    family.trains = feature in ("image_embeds", "penultimate")  # pyright: ignore[reportAttributeAccessIssue]
    return AdapterSpec(
        format=family,
        base_model="SD1.5",
        num_tokens=4,
        token_dim=8,
        feature_dim=width,
        unconditional="zero_pixels",
        encoder=found.name if found else "custom",
        layer_channels=(8,),
    )


@pytest.mark.parametrize(
    ("feature", "width", "name"),
    [
        ("image_embeds", 1024, "ViT-H/14"),
        ("image_embeds", 1280, "ViT-bigG/14"),
        ("image_embeds", 768, "ViT-L/14"),
        ("penultimate", 1280, "ViT-H/14"),
        ("penultimate", 1664, "ViT-bigG/14"),
        ("penultimate", 1024, "ViT-L/14"),
        ("penultimate", 1152, "SigLIP so400m/14-384"),
        ("pooled", 1152, "SigLIP so400m/14-384"),
        ("last", 768, "SigLIP2 base/16-512"),
        ("last", 1024, "PE-Core L/14-336"),
    ],
)
def test_a_width_points_to_an_encoder(feature: Encoded, width: int, name: str) -> None:
    assert find_encoder(feature, width) is ENCODERS[name]
    assert find_encoder(feature, width + 1) is None


def test_a_width_that_no_adapter_reads_points_nowhere() -> None:
    """A ViT-B of CLIP is as wide as SigLIP 2's base, and no adapter reads SigLIP 2's last layer but one."""
    assert find_encoder("penultimate", 768) is None
    assert find_encoder("penultimate", 1536) is None


@pytest.mark.parametrize("spec", ENCODERS.values(), ids=lambda spec: spec.name)
def test_the_right_encoder_passes(spec: EncoderSpec) -> None:
    facts = SimpleNamespace(
        name="any name",
        hidden_size=spec.hidden_size,
        projection_dim=spec.projection_dim,
        gives=spec.gives,
        image_size=spec.image_size,
    )
    for encoded in spec.serves:
        check_encoder(adapter_spec(encoded, spec.width(encoded)), facts)


def test_a_siglip_of_another_size_is_another_encoder() -> None:
    small = SimpleNamespace(
        name="SigLIP 2 base 256", hidden_size=768, projection_dim=0, gives=("last",), image_size=256
    )
    with pytest.raises(IncompatibleEncoderError, match=r"512 pixels.*siglip2-base-patch16-512.*sees 256"):
        check_encoder(adapter_spec("last", 768), small)
    trained = SimpleNamespace(name="SigLIP 224", hidden_size=1152, projection_dim=0, image_size=224)
    check_encoder(adapter_spec("penultimate", 1152), trained)


def test_siglip_without_its_head_is_told_apart() -> None:
    bare = SimpleNamespace(
        name="my SigLIP", hidden_size=1152, projection_dim=0, gives=("penultimate", "last"), image_size=384
    )
    check_encoder(adapter_spec("penultimate", 1152), bare)
    with pytest.raises(
        IncompatibleEncoderError, match=r"my SigLIP.*vision_model\.head\.probe.*sigclip_vision_patch14_384"
    ):
        check_encoder(adapter_spec("pooled", 1152), bare)
    big = SimpleNamespace(name="ViT-bigG", hidden_size=1664, projection_dim=1280)
    with pytest.raises(IncompatibleEncoderError, match=r"the pooled vector of width 1152.*google/siglip.*ViT-bigG"):
        check_encoder(adapter_spec("pooled", 1152), big)


def test_the_wrong_encoder_is_named_with_the_right_one() -> None:
    big = SimpleNamespace(name="my-encoder", hidden_size=1664, projection_dim=1280)
    with pytest.raises(IncompatibleEncoderError) as caught:
        check_encoder(adapter_spec("penultimate", 1280), big)
    for word in ("SD1.5 plus", "1280", "ViT-H", "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors", "my-encoder", "1664"):
        assert word in str(caught.value)
    assert "ViT-bigG" in str(caught.value)  # what was given, told by its widths


def test_the_two_widths_are_not_confused() -> None:
    """1280 is both ViT-H's hidden width and bigG's projection: the same number, the wrong feature."""
    vit_h = SimpleNamespace(name="ViT-H", hidden_size=1280, projection_dim=1024)
    with pytest.raises(IncompatibleEncoderError, match=r"ViT-bigG.*1024"):
        check_encoder(adapter_spec("image_embeds", 1280), vit_h)
    check_encoder(adapter_spec("penultimate", 1280), vit_h)


def test_a_custom_training_asks_for_its_own_encoder() -> None:
    vit_h = SimpleNamespace(name="ViT-H", hidden_size=1280, projection_dim=1024)
    with pytest.raises(IncompatibleEncoderError, match=r"width 77.*an encoder of its own.*ViT-H"):
        check_encoder(adapter_spec("image_embeds", 77), vit_h)


def test_features_are_values() -> None:
    features = ImageFeatures(torch.zeros(1, 2), torch.zeros(1, 3, 4))
    with pytest.raises(AttributeError):
        features.image_embeds = torch.ones(1, 2)  # pyright: ignore[reportAttributeAccessIssue]


def test_lines_are_no_pictures() -> None:
    """A PNG of 16,384 x 1 pixels has some bytes; resized before it is cut, it would take 10 GB."""
    line = torch.zeros(1, 1, 16_384, 3)
    for work in (
        lambda: preprocess_as_host(line, fake_encoder()),
        lambda: prepare_square(line, position="pad"),
        lambda: region_tiles(line),
        lambda: masked_tiles(line, 12, 0.5),
        lambda: masked_tiles(torch.zeros(1, 8, 1200, 3), 12, 0.5),
    ):
        with pytest.raises(InvalidInputError, match=r"is a line|use fewer tiles"):
            work()
