"""What the old nodes are translated into: settings, files, frames and pictures. Numbers of the old pack itself are in tests/host."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.testing import assert_close

from ipadapter_core.checkpoints import AdapterSpec
from ipadapter_core.embeds import SavedEmbeds, combine_embeds, load_embeds, save_embeds
from ipadapter_core.errors import CorruptFileError, InvalidInputError, UnsafeFileError
from ipadapter_core.frame_weights import WeightsStrategy
from ipadapter_core.known_files import KNOWN_FILES, choose_encoder, choose_file, known_file
from ipadapter_core.legacy import WEIGHT_TYPES, LegacySettings
from ipadapter_core.picture_prep import masked_tiles, noise_picture, placed_tiles, prepare_square, region_tiles, sharpen
from ipadapter_core.schedule import PRESETS

# --- settings ---------------------------------------------------------------------------------------------------------


def test_every_weight_type_is_a_preset() -> None:
    assert set(WEIGHT_TYPES) <= set(PRESETS)
    assert len(WEIGHT_TYPES) == 15


def test_settings_become_a_schedule() -> None:
    plain = LegacySettings(0.7, "style and composition", start_at=0.1, end_at=0.9, weight_composition=0.3).schedule()
    assert (plain.strength, plain.preset, plain.composition_strength) == (0.7, "style and composition", 0.3)
    assert (plain.start_percent, plain.end_percent, plain.latent_strengths) == (0.1, 0.9, ())
    assert LegacySettings([0.2, 0.4]).schedule().strength == 0.2, (
        "a list counts frame by frame only where a batch is unfolded"
    )
    assert LegacySettings([0.2, 0.4], unfold_batch=True).schedule().latent_strengths == (0.2, 0.4)
    assert LegacySettings(style_boost=0.5).schedule().preset == "style transfer precise"
    boosted = LegacySettings(composition_boost=0.5).schedule()
    assert (boosted.preset, boosted.boost) == ("composition precise", 0.5)
    layers = LegacySettings(weight_type="ease in", layer_weights="3:1").schedule()
    assert (layers.preset, layers.layers) == ("linear", ((3, 1.0),))
    assert (
        LegacySettings(weight_type="composition precise", layer_weights="3:1").schedule().preset
        == "composition precise"
    )


# --- files ------------------------------------------------------------------------------------------------------------


def spec(family: str = "plus", base: str = "sd15", encoder: str = "ViT-H/14") -> AdapterSpec:
    width = 2048 if base == "sdxl" else 768
    return AdapterSpec(family, base, 4, width, "penultimate", 1280, "zero_pixels", encoder, (320,))


def test_a_preset_finds_released_names() -> None:
    for entry in KNOWN_FILES:
        name = entry.release.split(" from ")[0]
        files = [other.release.split(" from ")[0] for other in KNOWN_FILES]
        kinds = {o.release.split(" from ")[0]: spec(o.family, o.base, o.encoder) for o in KNOWN_FILES}
        assert choose_file(entry, files, kinds.get) == name


def test_content_decides_before_the_name() -> None:
    plus = known_file("PLUS (high strength)", "sd15")
    assert choose_file(plus, ["ip-adapter-plus_sd15.bin"], lambda _: spec("base")) is None, (
        "named plus, but base inside"
    )
    assert choose_file(plus, ["mine.bin"], lambda _: spec()) == "mine.bin"
    assert choose_file(plus, ["mine.bin", "other.bin"], lambda _: spec()) is None, "which of the two is not known"
    face = "ip-adapter-plus-face_sd15.bin"
    assert choose_file(plus, ["mine.bin", face], lambda _: spec()) == "mine.bin"
    assert choose_file(plus, ["mine.bin"], lambda _: spec(base="sdxl")) is None
    assert choose_file(plus, ["model.txt"], lambda _: None) is None
    with pytest.raises(
        InvalidInputError, match=r"no 'LIGHT - SD1.5 only \(low strength\)' adapter for SDXL.*only for SD1.5"
    ):
        known_file("LIGHT - SD1.5 only (low strength)", "sdxl")


def test_the_encoder_is_found_by_name_or_by_its_widths() -> None:
    widths = {"a.safetensors": (1664, 1280), "b.safetensors": (1280, 1024), "model.txt": None}
    assert choose_encoder(spec(), list(widths), widths.get) == "b.safetensors"
    named = {**widths, "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors": (1280, 1024)}
    assert choose_encoder(spec(), list(named), named.get) == "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"
    assert choose_encoder(spec(encoder="ViT-L/14"), list(widths), widths.get) is None


# --- embeds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 24), (3, 17, 8)])
def test_embeds_are_written_as_safetensors_that_say_what_they_are(tmp_path: Path, shape: tuple[int, ...]) -> None:
    embeds = torch.rand(shape)
    path = save_embeds(tmp_path / "a.ipadpt.safetensors", SavedEmbeds(embeds))
    assert_close(load_embeds(path).embeds, embeds, rtol=0, atol=0)
    with safe_open(str(path), "pt") as file:
        assert file.metadata()["kind"] == "image embeds"


def test_files_of_other_tools_load(tmp_path: Path) -> None:
    path = tmp_path / "old.ipadpt"
    torch.save(torch.arange(6.0).view(2, 3), path)
    assert load_embeds(path).embeds.tolist() == [[0, 1, 2], [3, 4, 5]]
    pair = torch.rand(2, 1, 17, 8)
    torch.save(pair, path)  # the first version: positive, negative
    loaded = load_embeds(path)
    assert loaded.negative is not None
    assert_close((loaded.embeds, loaded.negative), (pair[0], pair[1]))
    torch.save([torch.cat([torch.zeros(1, 3, 24), torch.ones(1, 3, 24)])], path)  # diffusers: negative first
    loaded = load_embeds(path)
    assert loaded.negative is not None
    assert (loaded.embeds.shape, float(loaded.embeds.min()), float(loaded.negative.max())) == ((3, 24), 1.0, 0.0)


class Trap:
    def __reduce__(self) -> tuple[object, ...]:
        import os

        return os.mkdir, ("/tmp/never-made-by-a-test",)


def test_a_pickle_that_carries_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trap.ipadpt"
    torch.save(Trap(), path)
    with pytest.raises(UnsafeFileError, match="mkdir"):
        load_embeds(path)
    assert not Path("/tmp/never-made-by-a-test").exists()
    torch.save({"a": 1}, path)
    with pytest.raises(CorruptFileError, match="holds a dict; a tensor"):
        load_embeds(path)


def test_embeds_of_two_encoders_cannot_be_joined() -> None:
    with pytest.raises(InvalidInputError, match=r"\(1, 4\), \(1, 6\)"):
        combine_embeds([torch.zeros(1, 4), torch.zeros(1, 6)])


# --- frames -----------------------------------------------------------------------------------------------------------


def test_weights_that_stopped_the_old_pack() -> None:
    assert WeightsStrategy("1, 0", frames=4, start_frame=2, end_frame=3).curve() == [1, 1, 0, 0]  # division by zero
    assert WeightsStrategy("1, 0", frames=4, start_frame=0, end_frame=0).curve() == [0, 0, 0, 0]  # index error
    assert WeightsStrategy("0, 1", "random", frames=5).curve() == WeightsStrategy("0, 1", "random", frames=5).curve()
    with pytest.raises(InvalidInputError, match="at least two"):
        WeightsStrategy("1", method="shift batches").frames_of(torch.zeros(1, 4, 4, 3))
    with pytest.raises(InvalidInputError, match="cannot read"):
        WeightsStrategy("one").curve()


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_noise_comes_from_the_picture_and_leaves_everybodys_random_numbers_alone() -> None:
    image = torch.rand(1, 60, 40, 3, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    a, b = noise_picture("shuffle", 0.5, 3, image), noise_picture("shuffle", 0.5, 3, image)
    assert_close(torch.rand(3), expected, rtol=0, atol=0)
    assert_close(a, b, rtol=0, atol=0)
    assert a.shape == (1, 224, 224, 3)
    assert not torch.equal(a, noise_picture("shuffle", 0.5, 3, image * 0.9))


def test_squares_keep_the_part_that_was_asked_for() -> None:
    image = torch.zeros(1, 30, 90, 3)
    image[:, :, :30, 0], image[:, :, 60:, 2] = 1, 1
    assert prepare_square(image, 16, position="left")[..., 0].mean() == 1
    assert prepare_square(image, 16, position="right")[..., 2].mean() == 1
    assert prepare_square(image, 16, position="center").max() == 0
    assert prepare_square(image, 18, position="pad").shape == (1, 18, 18, 3)
    flat = torch.full((1, 3, 8, 8), 0.5)
    assert_close(sharpen(flat, 1.0)[..., 1:-1, 1:-1], flat[..., 1:-1, 1:-1])


@pytest.mark.parametrize("shape", [(100, 100), (100, 130), (60, 200), (300, 50), (64, 900)])
def test_tiles_cover_the_region(shape: tuple[int, int]) -> None:
    tiles, masks = region_tiles(torch.rand(2, *shape, 3))
    assert all(tile.shape == (2, 256, 256, 3) for tile in tiles)
    assert len(tiles) == len(masks) <= 4
    covered = torch.stack(masks).amax(0)
    assert_close(covered, torch.ones_like(covered), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(40, 40), (40, 90), (200, 40), (60, 80), (41, 47)])
def test_placed_tiles_share_the_picture(shape: tuple[int, int]) -> None:
    """Each shows its own place, all together everything, and nothing counts twice."""
    y, x = torch.meshgrid(torch.arange(shape[0]), torch.arange(shape[1]), indexing="ij")
    places = torch.stack([y, x, x * 0], -1)[None] / 255
    tiles, regions = placed_tiles(places)
    side = {(40, 40): 20, (41, 47): 20}.get(shape, min(shape))
    assert {tuple(tile.shape) for tile in tiles} == {(1, side, side, 3)}
    assert_close(torch.cat(regions).sum(0), torch.ones(shape))
    for tile, region in zip(tiles, regions, strict=True):
        top, left = (round(float(tile[0, 0, 0, i]) * 255) for i in range(2))
        margin = max(shape) // 10 + 1  # what is cut off counts as the last square's
        inside = region[0, max(top - margin, 0) : top + side + margin, max(left - margin, 0) : left + side + margin]
        assert_close(inside.sum(), region.sum())
        assert region.max() <= 1
    half = torch.zeros(1, 10, 10)
    half[:, :5] = 0.5
    masked = torch.cat(placed_tiles(places, half)[1]).sum(0)
    assert masked[0].mean() == pytest.approx(0.5, abs=1e-3)
    assert masked[-1].max() == 0
    with pytest.raises(InvalidInputError, match="1000x10 cannot be cut"):
        placed_tiles(torch.zeros(1, 10, 1000, 3))


def test_tiles_of_the_first_version_begin_with_the_whole_picture() -> None:
    parts, regions = masked_tiles(torch.rand(1, 224, 224, 3), 2, 0.6)
    assert len(parts) == len(regions) == 5
    assert float(regions[0].min()) > 0.99
    assert [float(region.max()) for region in regions[1:]] == pytest.approx([0.6] * 4)
