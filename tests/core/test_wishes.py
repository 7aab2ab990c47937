"""What serves a wish on a model, among files that are there, and what is said where none does."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

import pytest

from ipadapter_core.checkpoints import FORMATS, AdapterSpec, format_named
from ipadapter_core.downloads import DOWNLOADS
from ipadapter_core.errors import InvalidInputError
from ipadapter_core.features import ENCODERS
from ipadapter_core.known_files import KNOWN_FILES, SERVES
from ipadapter_core.models.flux import FLUX
from ipadapter_core.models.sites import BaseModel, ModelLayout, Site
from ipadapter_core.models.unet import SD15, SDXL
from ipadapter_core.wishes import WISHES, pick, pick_encoders, public_files


def layout(model: BaseModel = SD15, width: int = 768) -> ModelLayout:
    """One attention; names of files and of base models are what counts here."""
    group = "double" if model is FLUX else "middle"
    return ModelLayout(model, width, (Site("a", group, 0, 0, 0, 320, 8),))


def spec(family: str, width: int = 768, encoder: str = "ViT-H/14") -> AdapterSpec:
    return AdapterSpec(format_named(family), "SD1.5", 4, width, 1280, "zero_pixels", encoder, (320,))


def picked(wish: str, files: dict[str, AdapterSpec | None], model: ModelLayout | None = None) -> str:
    return pick(wish, model or layout(), files, files.get, "models/ipadapter").file


RELEASED = {
    entry.release: spec(entry.family, 2048 if entry.base == "sdxl" else 768, entry.encoder) for entry in KNOWN_FILES
}


@pytest.mark.parametrize(
    ("wish", "sd15", "sdxl"),
    [
        ("general", "ip-adapter-plus_sd15.safetensors", "ip-adapter-plus_sdxl_vit-h.safetensors"),
        ("light", "ip-adapter_sd15_light_v11.bin", "ip-adapter_sdxl_vit-h.safetensors"),
        ("plus", "ip-adapter-plus_sd15.safetensors", "ip-adapter-plus_sdxl_vit-h.safetensors"),
        ("style", "ip-adapter-plus_sd15.safetensors", "ip-adapter-plus_sdxl_vit-h.safetensors"),
        ("composition", "ip_plus_composition_sd15.safetensors", "ip_plus_composition_sdxl.safetensors"),
        ("face", "ip-adapter-plus-face_sd15.safetensors", "ip-adapter-plus-face_sdxl_vit-h.safetensors"),
        ("faceid", "ip-adapter-faceid-plusv2_sd15.bin", "ip-adapter-faceid-plusv2_sdxl.bin"),
        ("portrait", "ip-adapter-faceid-portrait-v11_sd15.bin", "ip-adapter-faceid-portrait_sdxl_unnorm.bin"),
    ],
)
def test_of_all_released_files_the_strongest_is_taken(wish: str, sd15: str, sdxl: str) -> None:
    assert picked(wish, RELEASED) == sd15
    assert picked(wish, RELEASED, layout(SDXL, 2048)) == sdxl
    assert public_files(wish, SD15.name)[0] == sd15
    assert public_files(wish, SDXL.name)[0] == sdxl


def test_contents_decide_and_names_between_look_alikes() -> None:
    mine, face = "mine.safetensors", "ip-adapter-plus-face_sd15.safetensors"
    assert picked("general", {mine: spec("plus"), face: spec("plus")}) == mine, "a face adapter is for faces"
    assert picked("face", {mine: spec("plus"), face: spec("plus")}) == face
    assert picked("general", {"a.bin": spec("base"), mine: spec("plus")}) == mine
    assert picked("general", {"a.bin": spec("plus"), "ip-adapter-plus_sd15.bin": spec("plus")}).startswith("ip-"), (
        "the known one"
    )
    other = {mine: spec("plus", width=2048), "broken.bin": None, "a.bin": spec("base")}
    assert picked("general", other) == "a.bin", "what does not fit the model is not there"


def test_what_is_missing_is_named_with_its_place_and_address() -> None:
    with pytest.raises(InvalidInputError) as told:
        picked("face", {"a.bin": spec("base")})
    best = DOWNLOADS["ip-adapter-plus-face_sd15.safetensors"]
    for part in ("'face'", "SD1.5", "models/ipadapter", best.name, best.url):
        assert part in str(told.value)
    with pytest.raises(InvalidInputError, match=r"flux-ip-adapter-v2.*XLabs-AI"):
        picked("style", {}, layout(FLUX, 4096))
    with pytest.raises(
        InvalidInputError, match="none is known that one could download; for this model there is general"
    ):
        picked("faceid", {}, layout(FLUX, 4096))
    with pytest.raises(InvalidInputError, match="'grand' is none of general, light"):
        picked("grand", RELEASED)


def widths(names: Iterable[str]) -> dict[str, tuple[int, int] | None]:
    known = {encoder.public: (encoder.hidden_size, encoder.projection_dim) for encoder in ENCODERS.values()}
    return {name: known.get(name) for name in names}


def test_encoders_are_found_in_the_order_in_which_they_are_read() -> None:
    vit_h, siglip = "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors", "siglip-so400m-patch14-384.safetensors"
    there = widths([siglip, vit_h]) | {"dino.safetensors": (1536, 0)}
    assert pick_encoders(spec("plus"), "a", list(there), there.get, "here") == [vit_h]
    assert pick_encoders(spec("faceid", encoder="InsightFace"), "a", list(there), there.get, "here") == []
    both = replace(spec("instantcharacter"), encoder="SigLIP so400m/14-384")
    assert pick_encoders(both, "a", list(there), there.get, "here") == [siglip, "dino.safetensors"]
    with pytest.raises(InvalidInputError) as told:
        pick_encoders(spec("plus"), "mine.bin", [siglip], there.get, "models/clip_vision")
    for part in ("'mine.bin'", "ViT-H/14", "models/clip_vision", DOWNLOADS[vit_h].where):
        assert part in str(told.value)
    with pytest.raises(
        InvalidInputError, match=re.escape("DINOv2 giant/14, which here does not hold: put model.safetensors of")
    ):
        pick_encoders(both, "a", [siglip], there.get, "here")


def test_every_wish_has_a_file_and_every_promise_is_a_wish() -> None:
    models = [SD15.name, SDXL.name, FLUX.name]
    assert all(any(public_files(wish, model) for model in models) for wish in WISHES)
    promised = [*SERVES.values(), *(form.serves for form in FORMATS)]
    assert {wish for serves in promised for wish, _ in serves} == set(WISHES)
    assert {form.public[1] for form in FORMATS if form.public} <= set(DOWNLOADS)
    assert {encoder.public for encoder in ENCODERS.values() if encoder.public} <= set(DOWNLOADS)
    assert set(SERVES) <= {entry.preset for entry in KNOWN_FILES}
