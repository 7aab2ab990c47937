"""SigLIP, DINOv2 and PE-Core against the models that they were published with, in the shapes of tiny random ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from ipadapter_core.errors import CorruptFileError, InvalidInputError
from ipadapter_core.images.encoder import TowerEncoder, TransformersImageEncoder, load_image_encoder
from ipadapter_core.images.towers import DINOV2, SIGLIP, TowerKind, VisionTower, kind_of
from tiny_towers import dinov2, pe_core, pe_reference, siglip

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
exact = {"rtol": 0.0, "atol": 0.0}


def pixels(count: int, side: int, wide: int = 0) -> Tensor:
    return torch.randn(count, 3, side, wide or side, generator=torch.Generator().manual_seed(3))


def loaded(path: Path) -> TowerEncoder:
    encoder = load_image_encoder(path)
    assert isinstance(encoder, TowerEncoder)
    return encoder


@pytest.mark.parametrize("version", [1, 2])
def test_siglip_is_transformers(tmp_path: Path, version: int) -> None:
    """With the patch of 14 that leaves a border of the picture out, and with the 16 of SigLIP 2."""
    model = siglip(tmp_path, patch=14 if version == 1 else 16, side=62 if version == 1 else 64)
    encoder = loaded(tmp_path)
    assert encoder.image_size == model.config.image_size
    seen = pixels(2, encoder.image_size)
    theirs = model(seen, output_hidden_states=True)
    ours = encoder.encode(seen)
    assert ours.pooled is not None
    assert_close(ours.last, theirs.last_hidden_state, **TOLERANCE)
    assert_close(ours.penultimate, theirs.hidden_states[-2], **TOLERANCE)
    assert_close(ours.pooled, theirs.pooler_output, **TOLERANCE)
    last, kept = encoder.states(seen, (1, 3))
    assert_close(last, ours.last, **exact)
    for number, state in kept.items():
        assert_close(state, theirs.hidden_states[number], **TOLERANCE)
    mean = theirs.last_hidden_state.mean(1)
    assert (mean - theirs.pooler_output).abs().max() > 0.05, "the head is no mean of the tokens"


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("shape", [(70, 70), (56, 56), (56, 84)])
def test_dinov2_is_transformers(tmp_path: Path, gated: bool, shape: tuple[int, int]) -> None:
    """Also at other sizes than the positions are for, and where the picture is no square."""
    model = dinov2(tmp_path, gated=gated)
    encoder = loaded(tmp_path)
    assert encoder.image_size == 70
    seen = pixels(2, *shape)
    theirs = model(seen, output_hidden_states=True)
    last, kept = encoder.states(seen, (1, 2, 3))
    assert_close(last, theirs.last_hidden_state, **TOLERANCE)
    assert sorted(kept) == [1, 2, 3]
    for number, state in kept.items():
        assert_close(state, theirs.hidden_states[number], **TOLERANCE)
    assert_close(encoder.encode(seen).penultimate, theirs.hidden_states[-2], **TOLERANCE)


@pytest.mark.parametrize("shape", [(70, 70), (42, 98), (84, 56)])
def test_pe_core_is_its_formula(tmp_path: Path, shape: tuple[int, int]) -> None:
    """In float64, written once more from the paper's code: patches and class token, positions, rotation by column and row."""
    state = pe_core(tmp_path / "pe.safetensors")
    encoder = load_image_encoder(tmp_path / "pe.safetensors", dtype=torch.float64)
    seen = pixels(2, *shape)
    expected = pe_reference({key: t.double() for key, t in state.items()}, seen.double(), heads=6)
    assert_close(encoder.encode(seen).last, expected, **TOLERANCE)


def test_a_pickle_of_pe_core_is_the_same(tmp_path: Path) -> None:
    """As it is published: of text and vision, in one pickle."""
    state = pe_core(tmp_path / "pe.safetensors")
    published = {
        **{f"visual.{key}": t for key, t in state.items()},
        "text_projection": torch.ones(2),
        "logit_scale": torch.ones(()),
    }
    torch.save(published, tmp_path / "pe.pt")
    seen = pixels(1, 70)
    one, other = (loaded(tmp_path / name).encode(seen).last for name in ("pe.safetensors", "pe.pt"))
    assert_close(one, other, **exact)


@pytest.mark.parametrize("prefix", ["vision_model.", ""])
def test_one_file_of_siglip_with_and_without_its_head(tmp_path: Path, prefix: str) -> None:
    """As ComfyUI keeps it: 856 MB with the head, 826 without; the text part of a whole model is not read."""
    model = siglip(tmp_path, width=768, heads=12, layers=2)
    state = {
        prefix + key.removeprefix("vision_model."): t for key, t in load_file(tmp_path / "model.safetensors").items()
    }
    text = {"text_model.embeddings.token_embedding.weight": torch.zeros(3, 2), "logit_scale": torch.ones(1)}
    save_file({**state, **(text if prefix else {})}, tmp_path / "whole.safetensors")
    save_file({k: t for k, t in state.items() if not k.startswith(f"{prefix}head.")}, tmp_path / "bare.safetensors")
    whole, bare = (loaded(tmp_path / f"{name}.safetensors") for name in ("whole", "bare"))
    seen = pixels(1, 56)
    assert_close(whole.encode(seen).pooled, model(seen).pooler_output, **TOLERANCE)
    assert_close(whole.encode(seen).last, bare.encode(seen).last, **exact)
    assert ("pooled" in whole.gives, "pooled" in bare.gives) == (True, False)
    assert bare.encode(seen).pooled is None


def test_mean_and_std_are_the_folders_or_the_kinds(tmp_path: Path) -> None:
    siglip(tmp_path)
    assert loaded(tmp_path).mean == (0.5, 0.5, 0.5)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.4, 0.3, 0.2]}))
    assert loaded(tmp_path).mean == (0.4, 0.3, 0.2)
    dinov2(tmp_path / "dino")
    assert loaded(tmp_path / "dino").std == (0.229, 0.224, 0.225)


def test_clip_is_still_read_by_transformers(tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=768, intermediate_size=32, num_hidden_layers=2, num_attention_heads=12, image_size=28, patch_size=14
    )
    CLIPVisionModelWithProjection(config).save_pretrained(tmp_path)
    for place in (tmp_path, tmp_path / "model.safetensors"):
        encoder = load_image_encoder(place)
        assert isinstance(encoder, TransformersImageEncoder)
        last = encoder.encode(pixels(1, 28)).last
        assert last is not None
        assert last.shape == (1, 5, 768)


def test_dtype_is_asked_for(tmp_path: Path) -> None:
    pe_core(tmp_path / "pe.safetensors")
    encoder = load_image_encoder(tmp_path / "pe.safetensors", dtype=torch.bfloat16)
    seen = encoder.encode(pixels(1, 70)).last
    assert seen is not None
    assert seen.dtype == torch.bfloat16
    assert not seen.requires_grad


# --- files that are none, or damaged ------------------------------------------------------------------------------------


def change(tensors: dict[str, Tensor], case: str) -> None:
    layer = "transformer.resblocks.1."
    match case:
        case "a layer is missing":
            for key in [
                key for key in tensors if key.startswith("transformer.resblocks.0.") and "in_proj_weight" not in key
            ]:
                del tensors[key]
        case "a tensor is missing":
            del tensors[f"{layer}ln_1.bias"]
        case "a tensor is too short":
            tensors[f"{layer}ln_1.bias"] = torch.zeros(3)
        case "a tensor has no axes":
            tensors["positional_embedding"] = torch.zeros(())
        case "positions are no square":
            tensors["positional_embedding"] = torch.zeros(20, 384)
        case "whole numbers":
            tensors[f"{layer}ln_1.bias"] = torch.zeros(384, dtype=torch.int32)
        case "a width of nobody's":
            tensors["conv1.weight"] = torch.zeros(100, 3, 14, 14)
        case _:
            raise AssertionError(case)


@pytest.mark.parametrize(
    "case",
    ["a layer is missing", "a tensor is missing", "a tensor is too short", "a tensor has no axes", "positions are no square",
     "whole numbers", "a width of nobody's"],
)  # fmt: skip
def test_damaged_towers_are_told(tmp_path: Path, case: str) -> None:
    state = pe_core(tmp_path / "a.safetensors")
    change(state, case)
    save_file(state, tmp_path / "a.safetensors")
    with pytest.raises(CorruptFileError, match=r"PE-Core|not found") as caught:
        load_image_encoder(tmp_path / "a.safetensors")
    assert "a.safetensors" in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "lie", [{"num_attention_heads": "many"}, {"num_attention_heads": 7}, {"num_attention_heads": -1}]
)
def test_heads_that_no_tower_has(tmp_path: Path, lie: dict[str, Any]) -> None:
    siglip(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **lie}))
    with pytest.raises(CorruptFileError, match="heads"):
        load_image_encoder(tmp_path)


def test_a_picture_size_that_the_positions_do_not_bear_out(tmp_path: Path) -> None:
    siglip(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for lie in (10**9, 20, "many", None):
        (tmp_path / "config.json").write_text(json.dumps({**config, "image_size": lie}))
        assert loaded(tmp_path).image_size == 56


def test_a_config_of_another_tower(tmp_path: Path) -> None:
    siglip(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    with pytest.raises(CorruptFileError, match="DINOv2"):
        load_image_encoder(tmp_path)


LOOK_ALIKES = {
    "SigLIP 2 for any number of patches": {"patch": torch.zeros(32, 588)},
    "DINOv2 with registers": {"embeddings.register_tokens": torch.zeros(1, 4, 64)},
    "a PE with scaled layers": {"transformer.resblocks.0.ls_1.gamma": torch.zeros(384)},
    "OpenCLIP": {},
}


@pytest.mark.parametrize("case", LOOK_ALIKES)
def test_look_alikes_are_not_read_as_what_they_are_not(tmp_path: Path, case: str) -> None:
    if case.startswith("SigLIP"):
        siglip(tmp_path)
    elif case.startswith("DINOv2"):
        dinov2(tmp_path)
    else:
        pe_core(tmp_path / "model.safetensors")
    state = load_file(tmp_path / "model.safetensors") | LOOK_ALIKES[case]
    if "patch" in state:
        key = next(key for key in state if key.endswith("patch_embedding.weight"))
        state[key] = state.pop("patch")
    if case == "OpenCLIP":
        state = {f"visual.{key}": t for key, t in state.items() if "attn_pool" not in key}
    assert kind_of(state) is None
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(InvalidInputError, match="not one of"):
        load_image_encoder(tmp_path / "other.safetensors")


def empty(kind: TowerKind, shapes: dict[str, tuple[int, ...]], layers: int) -> VisionTower:
    """A published tower without its numbers."""
    with torch.device("meta"):
        state = {key: torch.empty(shape) for key, shape in shapes.items()}
        state |= {f"blocks.{i}.fc1.weight": state["blocks.0.fc1.weight"] for i in range(layers)}
        width = shapes["patches.weight"][0]
        return VisionTower(kind, state, kind.heads.get(width) or width // kind.per_head)


PUBLISHED = {
    "SigLIP so400m/14-384": (SIGLIP, 27, 428_225_600, {
        "patches.weight": (1152, 3, 14, 14), "patches.bias": (1152,), "positions": (729, 1152), "blocks.0.fc1.weight": (4304, 1152),
        "blocks.0.fc2.weight": (1152, 4304), "head.probe": (1, 1, 1152), "head.fc1.weight": (4304, 1152),
    }),
    "SigLIP so400m/14-384 without its head": (SIGLIP, 27, 412_987_248, {
        "patches.weight": (1152, 3, 14, 14), "patches.bias": (1152,), "positions": (729, 1152), "blocks.0.fc1.weight": (4304, 1152),
        "blocks.0.fc2.weight": (1152, 4304),
    }),
    "DINOv2 giant/14": (DINOV2, 40, 1_136_480_768 - 1536, {  # of which the mask token has 1536
        "patches.weight": (1536, 3, 14, 14), "patches.bias": (1536,), "positions": (1370, 1536), "blocks.0.scale1": (1536,),
        "blocks.0.fc1.weight": (8192, 1536), "blocks.0.fc2.weight": (1536, 4096),
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_towers_have_as_many_numbers(name: str) -> None:
    kind, layers, count, shapes = PUBLISHED[name]
    tower = empty(kind, shapes, layers)
    assert sum(weight.numel() for weight in tower.parameters()) == count
    assert TowerEncoder(tower).name == name.removesuffix(" without its head")


def test_what_is_no_encoder(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(InvalidInputError, match="not one of"):
        load_image_encoder(tmp_path / "a.safetensors")
    with pytest.raises(InvalidInputError, match=r"config\.json"):
        load_image_encoder(tmp_path / "nowhere")


@pytest.mark.parametrize("shape", [(1, 3, 60, 60), (3, 56, 56), (1, 56, 56, 3)])
def test_wrong_pixels_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    siglip(tmp_path)
    with pytest.raises(InvalidInputError, match=r"\(b, 3, 56, 56\)"):
        loaded(tmp_path).encode(torch.zeros(shape))
