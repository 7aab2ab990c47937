"""What serves a wish on a model, among files that are there, and what is said where none does."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
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
from ipadapter_core.wishes import WISHES, Needed, needed, pick, pick_encoders, public_files


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


There = Mapping[str, Mapping[str, AdapterSpec | None]]

VIT_H = "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"


def listed(
    wish: str, model: ModelLayout | None = None, base_model: str = SD15.name, there: There | None = None
) -> list[tuple[str, str, str, str]]:
    """The needed files by part, folder, the one that is there, and the public one."""
    empty: There = {"ipadapter": {}, "clip_vision": {}, "loras": {}, "insightface/models": {}}
    folders = {**empty, **(there or {})}
    found: list[Needed] = needed(
        wish, model.name if model else base_model, model, {folder: list(names) for folder, names in folders.items()},
        folders["ipadapter"].get, widths(folders["clip_vision"]).get,
    )  # fmt: skip
    return [(one.part, one.folder, one.file, one.public.name if one.public else "") for one in found]


def test_of_what_is_missing_all_is_listed_at_once() -> None:
    """Whether the model is there, and told by its header, or not, and told by its name."""
    plus = "ip-adapter-plus_sd15.safetensors"
    missing = [("adapter", "ipadapter", "", plus), ("image encoder ViT-H/14", "clip_vision", "", VIT_H)]
    assert listed("general") == listed("general", layout()) == missing
    assert listed("general", there={"ipadapter": {f"mine/{plus}": None}})[0][2] == f"mine/{plus}", "by its name"
    assert listed("general", layout(), there={"ipadapter": {plus: None}})[0][2] == "", "it is no adapter"
    there: There = {"ipadapter": {"mine.bin": spec("plus")}, "clip_vision": {VIT_H: None}}
    assert [row[2] for row in listed("general", layout(), there=there)] == ["mine.bin", VIT_H]
    assert listed("face", layout(), there=there)[0] == (
        "adapter",
        "ipadapter",
        "",
        "ip-adapter-plus-face_sd15.safetensors",
    )
    assert listed("style", base_model=FLUX.name) == [("adapter", "ipadapter", "", "flux-ip-adapter-v2.safetensors")]
    with pytest.raises(InvalidInputError, match=r"for this model there is general"):
        listed("faceid", base_model=FLUX.name)
    with pytest.raises(InvalidInputError, match="'grand' is none of"):
        listed("grand")


def test_faces_need_more() -> None:
    adapter, lora = "ip-adapter-faceid-plusv2_sd15.bin", "ip-adapter-faceid-plusv2_sd15_lora.safetensors"
    rows = [
        ("adapter", "ipadapter", "", adapter),
        ("image encoder ViT-H/14", "clip_vision", "", VIT_H),
        ("LoRA", "loras", "", lora),
        ("face model", "insightface/models", "", "buffalo_l.zip"),
    ]
    assert listed("faceid") == rows
    there = {
        "ipadapter": {adapter: spec("faceid-plus")},
        "loras": {lora: None},
        "insightface/models": {"buffalo_l": None},
    }
    assert [row[2] for row in listed("faceid", layout(), there=there)] == [adapter, "", lora, "buffalo_l"]
    there = {**there, "ipadapter": {adapter: replace(spec("faceid-plus"), lora_layers=3)}}
    assert "LoRA" not in [row[0] for row in listed("faceid", layout(), there=there)], "it carries its own"


def test_every_wish_can_be_listed_before_anything_is_there() -> None:
    for model in (SD15, SDXL, FLUX):
        for wish in WISHES:
            if public_files(wish, model.name):
                rows = listed(wish, base_model=model.name)
                assert rows[0][:3] == ("adapter", "ipadapter", "")
                public = {part: DOWNLOADS[name].folder == folder for part, folder, _, name in rows if name}
                assert all(public.values())
                assert {part for part, *_ in rows} - set(public) <= {"image encoder DINOv2 giant/14"}, "has no address"
