"""FaceID families: which file is which, their projectors against formulas in float64, and the LoRA inside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from ipadapter_core.bake import bake
from ipadapter_core.checkpoints import claimants, describe_adapter, kohya_lora, load_adapter, save_adapter
from ipadapter_core.checkpoints.containers import normalise
from ipadapter_core.compatibility import IPADAPTER_PLUS
from ipadapter_core.errors import (
    CorruptFileError,
    IncompatibleAdapterError,
    IncompatibleEncoderError,
    InvalidInputError,
)
from ipadapter_core.features import ImageFeatures, pack_face
from ipadapter_core.files.state_dict import TensorFile
from ipadapter_core.images.faces import Face, template
from ipadapter_core.models.sites import ModelLayout, Site
from ipadapter_core.models.unet import SDXL as SDXL_MODEL
from ipadapter_core.prompt.combine import combine_prompts
from ipadapter_core.prompt.encode import encode_image_prompt, prompt_from_features
from ipadapter_core.prompt.faces import encode_face_prompt
from ipadapter_core.prompt.model_projection import project_by_model
from ipadapter_core.prompt.options import EncodeOptions
from tiny import SD15_CHANNELS, SDXL_CHANNELS, adapter_shapes, fill, tiny_state

SD15 = {"token_dim": 768, "channels": SD15_CHANNELS, "face_dim": 512}
SDXL = {"token_dim": 2048, "channels": SDXL_CHANNELS, "face_dim": 512}
PLUS = {"feature_dim": 1280, "depth": 4}
RAW = {"hidden_dim": 1280, "inner_dim": 1280, "depth": 4, "num_tokens": 16, "feature_dim": 512}
KOLORS = {"text_dim": 4096, "feature_dim": 1024, "depth": 4}

# released name: shape of file, its sizes, parameters (catalogue A.6), family, base model, tokens, version
RELEASED: dict[str, tuple[str, dict[str, object], int, str, str, int, int | None]] = {
    "ip-adapter-faceid_sd15.bin": ("faceid", {**SD15, "lora_rank": 128}, 48_354_816, "faceid", "SD1.5", 4, None),
    "ip-adapter-faceid-plus_sd15.bin": ("faceid-plus", {**SD15, **PLUS, "lora_rank": 128}, 78_260_736, "faceid-plus", "SD1.5", 4, 1),
    "ip-adapter-faceid-plusv2_sd15.bin": ("faceid-plus", {**SD15, **PLUS, "lora_rank": 128}, 78_260_736, "faceid-plus", "SD1.5", 4, 2),
    "ip-adapter-faceid_sdxl.bin": ("faceid", {**SDXL, "lora_rank": 128}, 535_507_968, "faceid", "SDXL", 4, None),
    "ip-adapter-faceid-plusv2_sdxl.bin": ("faceid-plus", {**SDXL, **PLUS, "lora_rank": 128}, 743_707_648, "faceid-plus", "SDXL", 4, 2),
    "ip-adapter-faceid-portrait_sd15.bin": ("faceid", {**SD15, "num_tokens": 16}, 32_291_328, "faceid", "SD1.5", 16, None),
    "ip-adapter-faceid-portrait_sdxl.bin": ("faceid", {**SDXL, "num_tokens": 16}, 374_903_808, "faceid", "SDXL", 16, None),
    "ip-adapter-faceid-portrait_sdxl_unnorm.bin": ("plus", {**SDXL, **RAW}, 0, "faceid-unnorm", "SDXL", 16, None),
    "ipa-faceid-plus.bin": ("faceid-plus", {**SDXL, **KOLORS, "num_tokens": 6}, 1_192_903_680, "faceid-plus", "Kolors", 6, 2),
    "ip-adapter.bin": ("plus", {**SDXL, **RAW}, 0, "instantid", "SDXL", 16, None),
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_released_files_by_their_shapes(name: str) -> None:
    shape, sizes, parameters, family, base, tokens, version = RELEASED[name]
    shapes = adapter_shapes(shape, **sizes)  # pyright: ignore[reportArgumentType]
    state = {key: torch.empty(size, dtype=torch.float16, device="meta") for key, size in shapes.items()}
    assert len(claimants(TensorFile(normalise(state), name=name))) == 1
    spec = describe_adapter(state, name=name)
    assert (spec.family, spec.base_model, spec.num_tokens, spec.options.get("version")) == (
        family,
        base,
        tokens,
        version,
    )
    assert spec.feature == ("face_tokens" if family == "faceid-plus" else "face")
    plus = "ViT-L/14-336" if base == "Kolors" else "ViT-H/14"
    assert spec.encoder == (plus if family == "faceid-plus" else "InsightFace")
    assert spec.projected_by_model == (base == "Kolors")
    adapter = load_adapter(state, name=name)
    total = sum(p.numel() for p in adapter.module.parameters()) + sum(t.numel() for t in adapter.lora.values())
    assert total == (parameters or sum(t.numel() for t in state.values()))


def test_the_version_is_told_by_name_or_metadata_and_kept(tmp_path: Path) -> None:
    state = tiny_state("faceid-plus", feature_dim=24, lora_rank=2)
    for name, version in (
        ("my-PlusV2.bin", 2),
        ("plus_v2.bin", 2),
        ("faceid-plus.bin", 1),
        ("plusv2/faceid-plus.bin", 1),
    ):
        assert load_adapter(state, name=name).spec.options["version"] == version
    saved = save_adapter(load_adapter(state, name="plusv2.bin"), tmp_path / "renamed.safetensors")
    again = load_adapter(saved)
    assert again.spec.options["version"] == 2
    assert set(again.lora) == {key for key in state if "_lora" in key}


# --- projectors in float64 --------------------------------------------------------------------------------------------


def layer_norm(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def face_tokens(state: dict[str, Tensor], face: Tensor, dim: int) -> Tensor:
    x = F.gelu(face @ state["proj.0.weight"].T + state["proj.0.bias"]) @ state["proj.2.weight"].T + state["proj.2.bias"]
    return layer_norm(x.view(len(face), -1, dim), state, "norm")


def perceive(state: dict[str, Tensor], latents: Tensor, x: Tensor, heads: int) -> Tensor:
    p = "perceiver_resampler."
    x = x @ state[f"{p}proj_in.weight"].T + state[f"{p}proj_in.bias"]
    layer = 0
    while f"{p}layers.{layer}.0.to_q.weight" in state:
        a = f"{p}layers.{layer}.0."
        queries = layer_norm(latents, state, f"{a}norm2")
        context = torch.cat([layer_norm(x, state, f"{a}norm1"), queries], 1)
        q = queries @ state[f"{a}to_q.weight"].T
        k, v = (context @ state[f"{a}to_kv.weight"].T).chunk(2, -1)
        q, k, v = (t.view(*t.shape[:2], heads, -1).transpose(1, 2) for t in (q, k, v))
        weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, -1)
        latents = latents + (weights @ v).transpose(1, 2).flatten(2) @ state[f"{a}to_out.weight"].T
        f = f"{p}layers.{layer}.1."
        hidden = F.gelu(layer_norm(latents, state, f"{f}0") @ state[f"{f}1.weight"].T)
        latents = latents + hidden @ state[f"{f}3.weight"].T
        layer += 1
    out = latents @ state[f"{p}proj_out.weight"].T + state[f"{p}proj_out.bias"]
    return layer_norm(out, state, f"{p}norm_out")


def exact(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix("image_proj."): t.double() for k, t in state.items() if k.startswith("image_proj.")}


@pytest.mark.parametrize("tokens", [4, 16])
def test_faceid_tokens_equal_the_formula(tokens: int) -> None:
    state = fill(adapter_shapes("faceid", token_dim=64, num_tokens=tokens), seed=3)
    face = torch.randn(3, 12)
    got = load_adapter(state).tokens(face)
    assert_close(got.double(), face_tokens(exact(state), face.double(), 64), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "version"), [("plus.bin", 1), ("plusv2.bin", 2)])
def test_faceid_plus_tokens_equal_the_formula(name: str, version: int) -> None:
    state = fill(adapter_shapes("faceid-plus", token_dim=128, feature_dim=24), seed=4)
    adapter = load_adapter(state, name=name)
    face, picture = torch.randn(2, 12), torch.randn(2, 9, 24)
    weights = exact(state)
    own = face_tokens(weights, face.double(), 128)
    read = perceive(weights, own, picture.double(), heads=2)
    expected = own + 0.7 * read if version == 2 else read
    assert_close(adapter.tokens(pack_face(face, picture), 0.7).double(), expected, rtol=1e-4, atol=1e-5)


# --- a negative picture ---------------------------------------------------------------------------------------------------


class OneFace:
    """Finds one face, who it is depends on the picture; none in a black one."""

    name = "one face"

    def find(self, picture: Tensor, size: int) -> list[Face]:
        shade = float(picture.mean())
        embedding = torch.linspace(1, 2 + shade, 512) * 20
        return [Face(torch.tensor([4.0, 4, 20, 20]), template(112) / 4, 0.9, embedding)] if shade else []


class Sees:
    """An encoder whose tokens are the picture's mean colour."""

    name, hidden_size, projection_dim, image_size = "sees", 520, 24, 8
    mean, std = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)

    def encode(self, pixel_values: Tensor) -> ImageFeatures:
        shade = pixel_values.mean((1, 2, 3))[:, None]
        return ImageFeatures(shade.expand(-1, 24), shade[:, None].expand(-1, 5, 520))


def grey(value: float) -> Tensor:
    return torch.full((1, 24, 24, 3), value)


def test_a_face_to_steer_away_from() -> None:
    adapter = load_adapter(tiny_state("faceid", face_dim=512))
    plain, _ = encode_face_prompt(adapter, OneFace(), None, grey(0.2))
    other, _ = encode_face_prompt(adapter, OneFace(), None, grey(0.8))
    away, found = encode_face_prompt(adapter, OneFace(), None, grey(0.2), negative=grey(0.8))
    assert len(found.crops) == 1
    assert_close((away.cond, away.uncond), (plain.cond, other.cond))
    assert_close(away.neutral_features, plain.uncond_features)
    weak = combine_prompts(adapter, [away], combine="add", strengths=[0])
    assert_close(weak.cond, plain.uncond)  # it fades to nobody, not to the other one
    old, _ = encode_face_prompt(adapter, OneFace(), None, grey(0.2), negative=grey(0.8), rules=IPADAPTER_PLUS)
    assert_close(old.uncond, plain.uncond, rtol=0, atol=0)
    with pytest.raises(InvalidInputError, match="also in the negative picture: one face found 0 faces"):
        encode_face_prompt(adapter, OneFace(), None, grey(0.2), negative=grey(0.0))


def test_options_of_faces_have_their_former_names_too() -> None:
    adapter = load_adapter(tiny_state("faceid-plus", face_dim=512, feature_dim=520), name="plusv2.bin")
    options = EncodeOptions(face_scale=0.3, face_side=112, which="all")
    prompt, found = encode_face_prompt(adapter, OneFace(), Sees(), grey(0.2), options)
    former, _ = encode_face_prompt(adapter, OneFace(), Sees(), grey(0.2), crop=112, picture_scale=0.3, which="all")
    assert_close((prompt.cond, prompt.uncond), (former.cond, former.uncond), rtol=0, atol=0)
    assert (found.crops.shape, prompt.face_scale) == ((1, 112, 112, 3), 0.3)


def test_faceid_plus_steers_away_from_a_look() -> None:
    adapter = load_adapter(tiny_state("faceid-plus", face_dim=512, feature_dim=520), name="plusv2.bin")
    plain, _ = encode_face_prompt(adapter, OneFace(), Sees(), grey(0.2))
    away, _ = encode_face_prompt(adapter, OneFace(), Sees(), grey(0.2), negative=grey(0.0))  # needs no face
    assert_close(away.cond, plain.cond)
    assert_close(away.uncond_features[0, 0], pack_face(torch.zeros(1, 512), -torch.ones(1, 5, 520))[0])
    assert_close(away.neutral_features, plain.uncond_features)


# --- Kolors: tokens through the model's own text projection --------------------------------------------------------------


def kolors_state(channels: tuple[int, ...] = (8, 16)) -> dict[str, Tensor]:
    sizes = {"token_dim": 2048, "text_dim": 4096, "num_tokens": 2, "feature_dim": 24, "depth": 1, "inner_dim": 64}
    return fill(adapter_shapes("faceid-plus", channels=channels, ff_dim=8, **sizes), seed=5)


def test_kolors_tokens_pass_the_models_projection() -> None:
    state = kolors_state()
    adapter = load_adapter(state, name="renamed.bin")
    assert adapter.spec.options["version"] == 2
    features = pack_face(torch.randn(1, 12), torch.randn(1, 5, 24))
    prompt = prompt_from_features(adapter, features, torch.zeros_like(features), face_scale=0.4)
    assert prompt.cond.shape == (1, 2, 4096)
    unet = torch.nn.Module()
    unet.encoder_hid_proj = torch.nn.Linear(4096, 2048).half()
    projected = project_by_model(prompt, unet, 0.7)
    weights = exact(state)
    own = face_tokens(weights, features[:, 0, :12].double(), 4096)
    wide = own + 0.4 * perceive(weights, own, features[:, 1:].double(), heads=1)
    layer = unet.encoder_hid_proj
    expected = (wide @ layer.weight.double().T + layer.bias.double()) * 0.7
    assert_close(projected.cond.double(), expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(projected.uncond, projected.cond)
    key, _ = adapter.key_value(1, projected.cond)
    assert_close(key.double(), expected @ state["ip_adapter.3.to_k_ip.weight"].double().T, rtol=1e-4, atol=1e-4)


def test_kolors_on_a_model_without_the_projection_is_refused() -> None:
    adapter = load_adapter(kolors_state(), name="kolors.bin")
    features = torch.zeros(1, 6, 24)
    prompt = prompt_from_features(adapter, features, features)
    unet = torch.nn.Module()
    with pytest.raises(
        IncompatibleAdapterError, match=r"'kolors\.bin' makes tokens 4096 wide.*the model has none: load a"
    ):
        project_by_model(prompt, unet)
    unet.encoder_hid_proj = torch.nn.Linear(32, 16)
    with pytest.raises(IncompatibleAdapterError, match=r"has a Linear of shape \[16, 32\]"):
        project_by_model(prompt, unet)
    wide = ModelLayout(SDXL_MODEL, 2048, tuple(tiny_site(i, c) for i, c in enumerate((8, 16))))
    with pytest.raises(IncompatibleAdapterError, match="call project_by_model"):
        bake(adapter, prompt, wide)


def tiny_site(index: int, channels: int) -> Site:
    return Site(f"site{index}", "input", index + 1, 0, index, channels, 2)


# --- prompts ----------------------------------------------------------------------------------------------------------


def test_faces_become_prompts_and_whole_pictures_are_refused() -> None:
    adapter = load_adapter(tiny_state("faceid"), name="faceid.bin")
    faces = torch.randn(2, 12)
    prompt = prompt_from_features(adapter, faces, torch.zeros_like(faces[:1]))
    assert prompt.cond.shape == (1, 8, 32)
    with pytest.raises(IncompatibleEncoderError, match=r"faceid\.bin is a faceid adapter, which reads faces"):
        encode_image_prompt(adapter, None, torch.zeros(1, 8, 8, 3))  # pyright: ignore[reportArgumentType]


# --- the LoRA inside --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layers", "first", "last"), [
    (16, "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q", "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0"),
    (70, "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", "lora_unet_mid_block_attentions_0_transformer_blocks_9_attn2_to_out_0"),
])  # fmt: skip
def test_the_lora_is_named_as_loaders_know_it(layers: int, first: str, last: str) -> None:
    state = tiny_state("faceid", channels=(8,) * layers, lora_rank=2)
    adapter = load_adapter(state)
    named = kohya_lora(adapter.lora, layers)
    assert len(named) == len(adapter.lora) == layers * 2 * 4 * 2
    assert_close(named[f"{first}.lora_down.weight"], state["ip_adapter.0.to_q_lora.down.weight"], rtol=0, atol=0)
    assert_close(
        named[f"{last}.lora_up.weight"], state[f"ip_adapter.{2 * layers - 1}.to_out_lora.up.weight"], rtol=0, atol=0
    )


def test_half_a_lora_is_refused() -> None:
    state = tiny_state("faceid", lora_rank=2)
    del state["ip_adapter.3.to_k_lora.up.weight"]
    with pytest.raises(CorruptFileError, match=r"3\.to_k_lora\.down\.weight.* without"):
        load_adapter(state)
    with pytest.raises(CorruptFileError, match="3 cross-attentions; 16 and 70 are known"):
        kohya_lora(load_adapter(tiny_state("faceid", lora_rank=2)).lora, 3)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("1.to_q_lora.up", lambda t: t * float("nan"), "NaN or infinite numbers"),
        ("0.to_k_lora.down", lambda t: t + float("inf"), "NaN or infinite numbers"),
        ("1.to_q_lora.up", lambda t: torch.cat([t, t]), "for a layer of"),
        ("1.to_k_lora.down", lambda t: torch.cat([t, t], 1), "for a layer of"),
        ("0.to_out_lora.down", lambda t: t[:, :-1], "for a layer of"),
        ("0.to_v_lora.up", lambda t: t.to(torch.complex64), "stored as"),
        ("0.to_v_lora.up", lambda t: t.to(torch.int8), "stored as"),
    ],
)
def test_a_lora_inside_that_would_fail_later_is_refused(key: str, change: Any, message: str) -> None:
    state = tiny_state("faceid", lora_rank=2)
    name = f"ip_adapter.{key}.weight"
    with pytest.raises(CorruptFileError, match=message):
        load_adapter(state | {name: change(state[name])})
