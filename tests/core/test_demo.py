"""The shipped world: an ordinary model folder, small enough, and its figures on pictures it never saw."""

# pyright: basic, reportPrivateImportUsage=false

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from ipadapter_core.attention.schedule import WeightSchedule
from ipadapter_core.checkpoints import describe_adapter
from ipadapter_core.demo import judge
from ipadapter_core.demo.halves import Half, half_similarity
from ipadapter_core.demo.measure import Figures, measure
from ipadapter_core.demo.poster import INK, PAPER, off_the_inks, posters
from ipadapter_core.demo.sheet import LABELS, ROWS, compose, draw_sheet
from ipadapter_core.demo.world import FOLDER, REFERENCES, World, load_world
from ipadapter_core.files.state_dict import describe_state_dict


@pytest.fixture(scope="module")
def world() -> World:
    return load_world()


@pytest.fixture(scope="module")
def figures(world: World) -> Figures:
    return measure(world, "plus", steps=8)


def test_it_is_small_and_safe() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 60e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md"}


def test_diffusers_alone_can_load_it() -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(FOLDER, local_files_only=True, safety_checker=None)
    assert pipeline.vae_scale_factor == 4
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.scheduler.config.rescale_betas_zero_snr is True


def test_diffusers_alone_can_draw_with_it() -> None:
    """Without a word on dtypes all parts have one, and one that is asked for is everybody's."""
    from diffusers import DiffusionPipeline

    pipeline: Any = DiffusionPipeline.from_pretrained(FOLDER, local_files_only=True)
    assert {part.dtype for part in pipeline.components.values() if isinstance(part, torch.nn.Module)} == {torch.float32}
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline("emoji", num_inference_steps=1).images[0].size == (64, 64)
    half = DiffusionPipeline.from_pretrained(FOLDER, torch_dtype=torch.bfloat16, local_files_only=True)
    assert {part.dtype for part in half.components.values() if isinstance(part, torch.nn.Module)} == {torch.bfloat16}


@pytest.mark.parametrize(("family", "tokens"), [("base", 4), ("plus", 16)])
def test_its_adapters_describe_themselves(family: str, tokens: int) -> None:
    spec = describe_adapter(FOLDER / "adapters" / f"ip-adapter-{family}.safetensors")
    assert (spec.family, spec.num_tokens, spec.token_dim) == (family, tokens, 192)


def test_references_are_listed_and_on_the_named_background(world: World) -> None:
    index = json.loads((REFERENCES / "index.json").read_text())
    assert len(index) == 24
    assert judge.background_names(world.references.images) == [entry["background"] for entry in index]


def test_the_judge_tells_references_apart_even_when_moved(world: World) -> None:
    images = world.references.images
    moved = torch.roll(images, shifts=(2, -2), dims=(2, 3))
    table = judge.similarity(moved, images)
    assert (table.argmax(1) == torch.arange(len(images))).float().mean() > 0.9
    shuffled = judge.similarity(images.roll(1, 0), images)
    assert (shuffled.argmax(1) == torch.arange(len(images))).float().mean() < 0.1


def test_decoys_show_the_same_in_another_hue(world: World) -> None:
    images = world.references.images
    candidates = judge.with_decoys(images)
    assert torch.equal(candidates[:24], images)
    assert len(candidates) == 72
    table = judge.similarity(torch.roll(images, shifts=(2, -2), dims=(2, 3)), candidates)
    assert (table.argmax(1) == torch.arange(24)).float().mean() > 0.8, "the hue is told, but of what has none"


def test_posters_are_their_own_inks(world: World) -> None:
    images = world.references.images
    assert off_the_inks(posters(images)).max() < 0.01
    assert off_the_inks(images).min() > 0.1
    x = torch.tensor([INK, PAPER]).float().mean(0)[None, :, None, None].expand(1, 3, 4, 4) / 255
    assert off_the_inks(x + torch.tensor([0.0, 0.1, 0.0])[:, None, None]).item() == pytest.approx(0.1, abs=0.05)


def test_halves_are_told_by_their_subject_alone(world: World) -> None:
    images = world.references.images
    swapped = torch.cat([images.roll(1, 0)[..., :32], images[..., 32:]], -1)
    background = judge.border_colour(images)[:, :, None, None]
    subject = judge.subject(images)
    elsewhere = images * subject + background.roll(3, 0) * (1 - subject)
    assert half_similarity(world, Half.RIGHT, images, images, images) == pytest.approx(1)
    assert half_similarity(world, Half.RIGHT, elsewhere, images, images) > 0.85, "the background does not count"
    assert abs(half_similarity(world, Half.LEFT, swapped, images, images)) < 0.2


def test_the_image_steers_more_with_strength(figures: Figures) -> None:
    similarity, right = figures.similarity, figures.retrieval
    assert similarity[0.0] + 0.25 < similarity[0.5] < similarity[1.0]
    assert similarity[1.0] >= 0.8
    assert right[0.0] <= 0.1, "without the image, the right reference is found by chance only"
    assert min(right[0.5], right[1.0]) >= 0.7, "of 72, while the text names another subject"


def test_the_text_keeps_the_background(figures: Figures) -> None:
    assert min(figures.text_background.values()) >= 0.9


def test_a_mask_confines_the_image(figures: Figures) -> None:
    mask = figures.mask
    assert mask.inside >= 0.65
    assert mask.inside > mask.inside_without + 0.5
    assert mask.inside > mask.inside_unmasked - 0.15
    assert mask.outside >= 0.4
    assert mask.outside > mask.outside_unmasked + 0.3


def test_a_style_lora_and_the_image_show_at_once(figures: Figures) -> None:
    assert figures.style is not None
    assert figures.style.poster >= 0.8
    assert figures.style.right >= 0.6, "of 24"


def test_the_base_adapter_follows_the_image_too(world: World) -> None:
    references = world.references
    drawn = world.draw("base", references.images, WeightSchedule(), ["emoji"] * 24, seeds=range(24), steps=8)
    found = judge.similarity(drawn, judge.with_decoys(references.images)).argmax(1) == torch.arange(24)
    assert found.float().mean() >= 0.7


def test_the_sheet_has_a_row_per_reference(world: World) -> None:
    sheet = draw_sheet(world, "plus", 2)
    assert sheet.size == (LABELS + 8 * 136, 74 + ROWS * 136)
    column = ("x", torch.zeros(2, 3, 64, 64))
    assert compose([column], ["a", "b"]).size == (LABELS + 136, 346)


def test_every_artist_is_named() -> None:
    text = (Path(FOLDER).parent / "ATTRIBUTION.md").read_text()
    for name in ("Noto", "Twemoji", "Fluent", "CC BY 4.0", "Apache", "MIT"):
        assert name in text


def test_the_tokenizer_is_the_same_in_every_transformers() -> None:
    """Version 4 reads vocab.json and merges.txt, version 5 tokenizer.json."""
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(FOLDER / "tokenizer")
    ids = tokenizer(["a Fluent emoji of a tropical fish, on blue's", "ZEBRA 42!  naïve"]).input_ids
    assert ids == [
        [0, 275, 301, 70, 300, 392, 275, 585, 398, 1, 282, 339, 8, 261, 1],
        [0, 1073, 1, 273, 1, 496, 129, 109, 523, 1],
    ]
    assert tokenizer.model_max_length == 16


def test_the_text_weights_have_the_names_that_every_transformers_reads() -> None:
    """Version 4 looks for `text_model.…` and, finding other names, draws random weights without an error."""
    keys = describe_state_dict(FOLDER / "text_encoder" / "model.safetensors").tensors
    assert keys
    assert all(key.startswith("text_model.") for key in keys)
