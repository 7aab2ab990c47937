"""Adapter files: told apart by keys, sized by shapes, filled without a copy, refused with a reason, written whole."""

from __future__ import annotations

import ast
import os
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ipadapter_core import checkpoints, training
from ipadapter_core.checkpoints import (
    FORMATS,
    AdapterWeights,
    claimants,
    describe_adapter,
    format_named,
    load_adapter,
    save_adapter,
    trainable_families,
)
from ipadapter_core.checkpoints import format as formats_of_checkpoints
from ipadapter_core.checkpoints.containers import normalise
from ipadapter_core.checkpoints.format import (
    LAYER_KEY,
    AdapterSpec,
    EncoderSizes,
    Format,
    linear_layers,
    shape_of,
)
from ipadapter_core.checkpoints.keys import UNET, numbered
from ipadapter_core.checkpoints.projectors import Operations
from ipadapter_core.errors import (
    AdapterError,
    CorruptFileError,
    IncompatibleEncoderError,
    InvalidInputError,
    UnknownFormatError,
)
from ipadapter_core.features import IMAGE_EMBEDS
from ipadapter_core.files.state_dict import TensorFile
from ipadapter_core.prompt.encode import prompt_from_features
from ipadapter_core.report import describe_spec, spec_facts
from ipadapter_core.training.config import AdapterConfig
from tiny import SD15_CHANNELS, SDXL_CHANNELS, TRANSFORMERS, adapter_shapes, nested, tiny_state

FAMILIES = trainable_families()


def meta(family: str, **sizes: object) -> dict[str, Tensor]:
    shapes = adapter_shapes(family, **sizes)  # pyright: ignore
    return {key: torch.empty(shape, dtype=torch.float16, device="meta") for key, shape in shapes.items()}


SD15 = {"token_dim": 768, "channels": SD15_CHANNELS}
SDXL = {"token_dim": 2048, "channels": SDXL_CHANNELS}
PLUS_SD15 = {"hidden_dim": 768, "inner_dim": 768, "depth": 4, "num_tokens": 16, "feature_dim": 1280}
PLUS_SDXL = {"hidden_dim": 1280, "inner_dim": 1280, "depth": 4, "num_tokens": 16, "feature_dim": 1280}
PLUS_KOLORS = {"hidden_dim": 2048, "inner_dim": 768, "depth": 4, "num_tokens": 16, "feature_dim": 1024}

# name: family, sizes, parameters (published sizes; see the catalogue A.6), base model, tokens, encoder
RELEASED: dict[str, tuple[str, dict[str, object], int, str, int, str]] = {
    "ip-adapter_sd15": ("base", {**SD15, "feature_dim": 1024}, 22_319_616, "SD1.5", 4, "ViT-H/14"),
    "ip-adapter_sd15_vit-G": ("base", {**SD15, "feature_dim": 1280}, 23_106_048, "SD1.5", 4, "ViT-bigG/14"),
    "ip-adapter-plus_sd15": ("plus", {**SD15, **PLUS_SD15}, 49_087_488, "SD1.5", 16, "ViT-H/14"),
    "ip-adapter-full-face_sd15": (
        "full-face",
        {**SD15, "feature_dim": 1280, "hidden_dim": 1280},
        21_794_304,
        "SD1.5",
        257,
        "ViT-H/14",
    ),
    "ip-adapter_sdxl": ("base", {**SDXL, "feature_dim": 1280}, 351_285_248, "SDXL", 4, "ViT-bigG/14"),
    "ip-adapter_sdxl_vit-h": ("base", {**SDXL, "feature_dim": 1024}, 349_188_096, "SDXL", 4, "ViT-H/14"),
    "ip-adapter-plus_sdxl_vit-h": ("plus", {**SDXL, **PLUS_SDXL}, 423_748_864, "SDXL", 16, "ViT-H/14"),
    "ip_adapter_plus_general (Kolors)": ("plus", {**SDXL, **PLUS_KOLORS}, 506_552_320, "Kolors", 16, "ViT-L/14-336"),
}
# the same shapes under other names: light and light_v11 as sd15, plus-face and composition as plus, NOOB and MIP as sdxl


@pytest.mark.parametrize("name", RELEASED)
def test_released_files_by_their_shapes(name: str) -> None:
    family, sizes, parameters, base_model, tokens, encoder = RELEASED[name]
    state = meta(family, **sizes)
    spec = describe_adapter(state)
    assert (spec.family, spec.base_model, spec.num_tokens, spec.encoder) == (family, base_model, tokens, encoder)
    assert spec.token_dim == sizes["token_dim"]
    assert spec.feature_dim == sizes["feature_dim"]
    assert spec.layer_channels == sizes["channels"]
    assert spec.feature == ("image_embeds" if family == "base" else "penultimate")
    assert spec.unconditional == ("zero_embeds" if family == "base" else "zero_pixels")
    adapter = load_adapter(state)
    assert sum(p.numel() for p in adapter.module.parameters()) == parameters
    assert all(p.is_meta and not p.requires_grad for p in adapter.module.parameters())


def test_the_numbers_of_heads_of_released_resamplers() -> None:
    for sizes, heads in (({**SD15, **PLUS_SD15}, 12), ({**SDXL, **PLUS_SDXL}, 20)):
        module = load_adapter(meta("plus", **sizes)).module
        found = [m.heads for m in module.modules() if hasattr(m, "heads")]
        assert found == [heads] * 4


def test_sd2() -> None:
    assert describe_adapter(meta("base", token_dim=1024, channels=SD15_CHANNELS)).base_model == "SD2"


def test_custom_trainings_load() -> None:
    base = load_adapter(tiny_state("base", num_tokens=7, token_dim=192, channels=(8, 8, 16, 16, 8)))
    assert (base.spec.num_tokens, base.spec.base_model, base.spec.encoder) == (7, "custom 192", "custom")
    assert base.tokens(torch.zeros(2, 24)).shape == (2, 7, 192)
    plus = load_adapter(tiny_state("plus", depth=2, num_tokens=9, hidden_dim=40, inner_dim=128, ff_dim=56))
    assert plus.spec.options == {"queries": 9, "depth": 2, "hidden_dim": 40, "inner_dim": 128, "ff_dim": 56}
    assert plus.tokens(torch.zeros(2, 5, 24)).shape == (2, 9, 32)
    face = load_adapter(tiny_state("full-face", hidden_dim=20))
    assert face.spec.num_tokens == 0  # as many as the unknown encoder has
    assert face.tokens(torch.zeros(2, 5, 24)).shape == (2, 5, 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_claimed_once_and_keeps_every_number(family: str) -> None:
    state = tiny_state(family)
    assert [format.name for format in claimants(TensorFile(state))] == [family]
    loaded = load_adapter(state).module.checkpoint_state()
    assert loaded.keys() == state.keys()
    for key in state:
        assert torch.equal(loaded[key], state[key])
        assert loaded[key].data_ptr() == state[key].data_ptr()  # the very tensors: no copy


def test_keys_and_values_are_in_checkpoint_order() -> None:
    channels = tuple(range(1, 14))  # more than ten: text order would put 11 before 3
    state = tiny_state("base", channels=channels)
    adapter = load_adapter(dict(sorted(state.items())))
    assert adapter.spec.layer_channels == channels
    tokens = torch.randn(2, 4, 32, generator=torch.Generator().manual_seed(0))
    for i in range(13):
        key, value = adapter.key_value(i, tokens)
        torch.testing.assert_close(key, tokens @ state[f"ip_adapter.{2 * i + 1}.to_k_ip.weight"].T)
        torch.testing.assert_close(value, tokens @ state[f"ip_adapter.{2 * i + 1}.to_v_ip.weight"].T)


def test_key_names_map_both_ways() -> None:
    for key in tiny_state("plus"):
        assert UNET.in_file(UNET.in_module(key) or "") == key
    assert UNET.in_module("ip_adapter.2.to_k_ip.weight") is None
    every = numbered("to_k_ip", "to_v_ip")
    assert every.in_module("ip_adapter.12.to_v_ip.bias") == "to_v_ip.12.bias"
    assert every.in_file("to_v_ip.12.bias") == "ip_adapter.12.to_v_ip.bias"
    assert every.in_module("ip_adapter.012.to_v_ip.bias") is every.in_module("elsewhere") is None


# --- construction ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_initialised_at_random(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in [n for n in dir(nn.init) if n.endswith("_") and not n.startswith("_")]:
        monkeypatch.setattr(nn.init, name, lambda *_, name=name, **__: calls.append(name))
    nn.Linear(2, 2)
    assert calls  # the trap works
    calls.clear()
    before = torch.get_rng_state()
    load_adapter(tiny_state(family))
    assert calls == []
    assert torch.equal(torch.get_rng_state(), before)


def test_loading_allocates_no_second_copy(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file(tiny_state("base", token_dim=256, channels=(512,) * 8, dtype=torch.float16), path)
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        load_adapter(path)
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in trace.key_averages())
    assert allocated < 0.02 * path.stat().st_size


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_are_kept_unless_asked(dtype: torch.dtype) -> None:
    state = tiny_state("base", dtype=dtype)
    adapter = load_adapter(state)
    assert {p.dtype for p in adapter.module.parameters()} == {dtype}
    assert adapter.dtype == dtype
    assert {p.dtype for p in load_adapter(state, dtype=torch.float64).module.parameters()} == {torch.float64}
    chosen = load_adapter(state, dtype=lambda own: torch.float64 if own == dtype else torch.float16)
    assert {p.dtype for p in chosen.module.parameters()} == {torch.float64}
    assert adapter.tokens(torch.ones(1, 24)).dtype == dtype  # float32 features of an encoder are brought to it


def test_mixed_dtypes_become_the_widest() -> None:
    state = tiny_state("base", dtype=torch.float16)
    state["image_proj.norm.weight"] = state["image_proj.norm.weight"].float()
    assert load_adapter(state).dtype == torch.float32
    state = {k: t.to(torch.float8_e4m3fn) if k.startswith("ip_") else t for k, t in tiny_state("base").items()}
    assert load_adapter(state).dtype == torch.float32
    state = {k: t.to(torch.float8_e4m3fn) for k, t in tiny_state("base").items()}
    assert load_adapter(state).dtype == torch.float8_e4m3fn


class CastingLinear(nn.Linear):
    """Like comfy.ops.manual_cast: the weight follows the input."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(input)
        return nn.functional.linear(input, self.weight.to(input), bias)


class CastingLayerNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.layer_norm(
            input, self.normalized_shape, self.weight.to(input), self.bias.to(input), self.eps
        )


class Casting:
    Linear = CastingLinear
    LayerNorm = CastingLayerNorm


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_come_from_the_operations_given(family: str) -> None:
    state = tiny_state(family, dtype=torch.float16)
    adapter = load_adapter(state, operations=Casting)
    linears = [m for m in adapter.module.modules() if isinstance(m, nn.Linear)]
    assert linears
    assert all(type(m) is CastingLinear for m in linears)
    assert adapter.dtype == torch.float16
    features = torch.ones(1, 24) if family == "base" else torch.ones(1, 5, 24)
    tokens = adapter.tokens(features)
    assert tokens.dtype == torch.float32
    assert adapter.key_value(0, tokens)[0].dtype == torch.float32
    expected = load_adapter(state, dtype=torch.float32).tokens(features)
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["base", "plus", "full-face", "faceid", "faceid-plus", *TRANSFORMERS])
def test_layers_that_cast_compute_where_they_are_told(family: str) -> None:
    """Their weights stay on the CPU, all of them; a layer that read one without bringing it would raise."""
    channels = {"channels": (8, 8, 8)} if family in TRANSFORMERS else {}
    adapter = load_adapter(tiny_state(family, **channels), operations=Casting)
    adapter.module.computes_on = device = torch.device("meta")
    assert adapter.device == device
    spec, feature = adapter.spec, adapter.spec.format.feature
    shape = (2, spec.feature_dim) if feature.rank == 2 else (2, 8 if feature.looks else 5, spec.feature_dim)
    tokens = adapter.tokens(torch.zeros(shape, device=device))
    timed = spec.format.reach.timed
    if timed:
        tokens = adapter.tokens_at(tokens, 500.0)
    k, v = adapter.key_value(0, tokens[..., : spec.token_dim], 500.0 if timed else None)
    assert (tokens.device, k.device, v.device) == (device,) * 3
    assert {p.device.type for p in adapter.module.parameters()} == {"cpu"}
    gate = adapter.gate(0)
    if gate is not None:
        assert gate(torch.zeros(1, 1, spec.options["embedding_dim"], device=device)).device == device
    assert load_adapter(tiny_state(family, **channels)).device == torch.device("cpu")


def test_features_of_another_encoder_are_refused() -> None:
    with pytest.raises(IncompatibleEncoderError, match=r"needs image_embeds of shape \[batch, 24\].*got \[2, 25\]"):
        load_adapter(tiny_state("base")).tokens(torch.zeros(2, 25))
    with pytest.raises(IncompatibleEncoderError, match=r"penultimate of shape \[batch, tokens, 24\].*got \[2, 24\]"):
        load_adapter(tiny_state("plus")).tokens(torch.zeros(2, 24))


# --- containers --------------------------------------------------------------------------------------------------


def trainer_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renames = {"image_proj": "image_proj_model", "ip_adapter": "adapter_modules"}
    return {renames[key.split(".", 1)[0]] + "." + key.split(".", 1)[1]: t for key, t in state.items()}


def containers(state: dict[str, Tensor]) -> dict[str, dict[str, object]]:
    unet = {"unet.conv_in.weight": torch.full((2, 2), float("nan"))}
    renamed = trainer_names(state)
    zeros = {key: torch.zeros_like(t) for key, t in renamed.items()}
    both = nested(state)
    return {
        "flat": {**state},
        "nested": {**both},
        "trainer names": {**renamed},
        "raw dump with UNet": {**unet, **renamed},
        "nested adapter_modules": {"image_proj": both["image_proj"], "adapter_modules": both["ip_adapter"]},
        "twice, trainer names first": {**zeros, **state},
        "twice, trainer names last": {**state, **zeros},
        "image encoder": {**state, "image_encoder.visual.proj": torch.ones(2)},
        "DDP": {f"module.{key}": t for key, t in renamed.items()},
        "DDP and compiled": {f"module._orig_mod.{key}": t for key, t in renamed.items()},
        "training state": {
            "state_dict": {**renamed},
            "epoch": 3,
            "optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}},
        },
        "with scalars": {**both, "global_step": 100, "note": "hello"},
    }


def test_groups_that_are_left_out_are_told() -> None:
    """An adapter that was trained with its own image encoder gives other pictures with a plain one."""
    state = {**tiny_state("base"), "image_encoder.visual.proj": torch.ones(2), "unet.x": torch.ones(1)}
    spec = describe_adapter(state)
    assert spec.left_out == {"unet": 1, "image_encoder": 1}
    assert "left out       image_encoder (1 tensors): an image encoder trained along" in describe_spec(spec, "a")
    assert spec_facts(spec)["left_out"] == spec.left_out
    assert "left out" not in describe_spec(describe_adapter(tiny_state("base")), "a")


@pytest.mark.parametrize("kind", containers({"image_proj.x": torch.ones(1), "ip_adapter.x": torch.ones(1)}))
@pytest.mark.parametrize("family", FAMILIES)
def test_every_container_gives_the_same_adapter(family: str, kind: str, tmp_path: Path) -> None:
    state = tiny_state(family)
    container = containers(state)[kind]
    path = tmp_path / "a.bin"
    torch.save(container, path)
    for source in (container, path):
        loaded = load_adapter(source)
        assert loaded.spec == describe_adapter(state) == describe_adapter(source)
        found = loaded.module.checkpoint_state()
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], state[key]) for key in state)


def test_normalising_keeps_foreign_groups_for_the_error() -> None:
    assert set(normalise({"unet.x": torch.ones(1)})) == {"unet.x"}
    assert set(normalise({"unet.x": torch.ones(1), "image_proj.y": torch.ones(1)})) == {"image_proj.y"}


# --- what is not one of the families -----------------------------------------------------------------------------


def named(*keys: str, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    return {key: torch.empty(shapes.get(key, (2, 2)), device="meta") for key in keys}


def without_projector(**sizes: object) -> dict[str, Tensor]:
    return {key: t for key, t in meta("base", **sizes).items() if key.startswith("ip_adapter.")}


def face_projector(norm: int = 32) -> dict[str, Tensor]:
    state = named("image_proj.proj.0.weight", "image_proj.proj.0.bias", "image_proj.proj.2.weight")
    return {**state, "image_proj.norm.weight": torch.empty(norm, device="meta")}


LORA_INSIDE = named("ip_adapter.0.to_q_lora.down.weight", "ip_adapter.0.to_q_lora.up.weight")
PERCEIVER = {**face_projector(), **named("image_proj.perceiver_resampler.proj_in.weight")}
OTHERS: dict[str, tuple[dict[str, Tensor], str]] = {
    "FaceID LoRA on base": ({**meta("base"), **LORA_INSIDE}, "the family base but has keys"),
    "Instruct": ({**meta("plus"), **named("image_proj.proj_new_input.weight")}, "Instruct"),
    "XLabs' LoRA": (named("double_blocks.0.processor.qkv_lora1.down.weight"), "a LoRA"),
    "Flux": (named("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"), "diffusion model"),
    "Anima SigLIP2": (named("resampler.latents", "ip_cross_attns.0.to_k_ip.weight"), "Anima"),
    "Style Components": ({**face_projector(), **named("ip_adapter.1.to_v_ip.weight")}, "Style Components"),
    "IP-Adapter-Art": (named("encoder_hid_proj.image_projection_layers.0.norm.weight"), "IP-Adapter-Art"),
    "PuLID": (named("pulid_ca.0.to_q.weight", "pulid_encoder.x"), "PuLID"),
    "kohya LoRA": (named("lora_unet_mid_block_attn.lora_down.weight", "lora_unet_x.alpha"), "a LoRA"),
    "diffusers LoRA": (named("unet.mid_block.to_q.lora_A.weight", "unet.mid_block.to_q.lora_B.weight"), "a LoRA"),
    "old diffusers LoRA": (named("down_blocks.0.attn1.processor.to_q_lora.down.weight"), "a LoRA"),
    "ControlNet": (named("controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.x"), "a ControlNet"),
    "full checkpoint": (
        named("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.x"),
        "full checkpoint",
    ),
    "CLIP vision": (named("vision_model.embeddings.patch_embedding.weight"), "an image encoder"),
    "open_clip": (named("visual.conv1.weight", "logit_scale"), "an image encoder"),
    "text encoder": (named("text_model.embeddings.token_embedding.weight"), "a text encoder"),
    "UNet": (named("down_blocks.0.resnets.0.conv1.weight"), "diffusion model"),
    "VAE": (named("decoder.conv_in.weight", "encoder.conv_in.weight"), "VAE"),
    "dump without adapter": (named("unet.conv_in.weight"), "diffusion model"),
    "optimiser": (named("state.0.exp_avg"), "optimiser"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_are_refused_by_name(kind: str) -> None:
    state, word = OTHERS[kind]
    assert not any(format.detect(TensorFile(state)) for format in FORMATS)
    for read in (load_adapter, describe_adapter):
        with pytest.raises(UnknownFormatError) as caught:
            read(state, name="thing.bin")
        message = str(caught.value)
        assert message.startswith("thing.bin: ")
        assert word in message
        assert (
            any(f"{key[:60]} {list(state[key].shape)}" in message for key in state)
            or "has not: ip_adapter.0" in message
        )


def test_a_state_without_anything_known_shows_what_it_holds() -> None:
    with pytest.raises(UnknownFormatError, match=r"not an IP-Adapter.*foo\.bar \[2, 2\]"):
        load_adapter(named("foo.bar"))
    with pytest.raises(UnknownFormatError, match="holds no tensors"):
        load_adapter({"epoch": 3})
    with pytest.raises(UnknownFormatError, match="image_proj group is missing"):
        load_adapter(without_projector())
    with pytest.raises(UnknownFormatError, match=r"image_proj half of a base adapter and no ip_adapter layers"):
        load_adapter({k: t for k, t in meta("base").items() if k.startswith("image_proj.")})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("extra", ["image_proj.surprise.weight", "novelty.x", "image_proj.layers.0.2.1.weight"])
def test_unexpected_groups_and_projector_keys_are_named(family: str, extra: str) -> None:
    with pytest.raises(
        UnknownFormatError, match=f"resembles the family {family} but has keys that such a file has not: {extra}"
    ):
        load_adapter({**tiny_state(family), extra: torch.ones(1)})


def derived(format: Format, **changes: object) -> Format:
    """A family that differs from another in these members."""
    return type("Derived", (type(format),), changes)()


def test_two_claims_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "FORMATS", (*FORMATS, derived(FORMATS[0], name="twin")))
    with pytest.raises(UnknownFormatError, match=r"base and twin at once.*image_proj\.norm\.bias"):
        load_adapter(tiny_state("base"))


class Toy(Format):
    """A family of its own: one linear layer as projector, and image layers with biases."""

    name, label, feature, unconditional = "toy", "toy (one matrix)", IMAGE_EMBEDS, "zero_embeds"
    anchor, allowed = "matrix.weight", re.compile(r"matrix\.weight")
    layer_keys = re.compile(LAYER_KEY.pattern.replace("weight", "(weight|bias)"))

    def parse(self, file: TensorFile) -> AdapterSpec:
        width, feature_dim = shape_of(file.tensors, key := "image_proj.matrix.weight", rank=2)
        return self.spec(file.tensors, key, num_tokens=1, feature_dim=feature_dim, options={"width": width})

    def projector(self, spec: AdapterSpec, operations: Operations) -> nn.Module:
        return nn.ModuleDict({"matrix": operations.Linear(spec.feature_dim, spec.token_dim, bias=False)})

    def layers(self, spec: AdapterSpec, operations: Operations) -> dict[str, nn.Module]:
        return linear_layers(spec, operations, bias=True)

    def tokens(self, projector: nn.Module, features: Tensor, face_scale: float) -> Tensor:
        return projector.get_submodule("matrix")(features)[:, None]


def test_one_class_and_one_line_in_formats_add_a_family(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    layers = {key: t for key, t in tiny_state("base").items() if key.startswith("ip_adapter.")}
    biases = {key.replace("weight", "bias"): torch.ones(len(t)) for key, t in layers.items()}
    state = {"image_proj.matrix.weight": torch.randn(32, 24), **layers, **biases}
    with pytest.raises(UnknownFormatError):
        load_adapter(state)
    monkeypatch.setattr(checkpoints, "FORMATS", (*FORMATS, Toy()))
    adapter = load_adapter(save_adapter(load_adapter(state), tmp_path / "a.safetensors"))
    assert all(torch.equal(t, state[key]) for key, t in adapter.module.checkpoint_state().items())
    assert "toy (one matrix)" in describe_spec(adapter.spec, "a")
    features = torch.randn(2, 24)
    prompt = prompt_from_features(adapter, features, torch.zeros(1, 24))
    torch.testing.assert_close(prompt.cond, (features @ state["image_proj.matrix.weight"].T)[None])
    key, _ = adapter.key_value(0, torch.zeros(1, 1, 32))
    assert torch.equal(key, torch.ones(1, 1, 8))
    with pytest.raises(
        CorruptFileError, match=r"\(toy adapter\): of its 13 tensors these are missing: ip_adapter.3.to_v_ip.bias"
    ):
        load_adapter({k: t for k, t in state.items() if k != "ip_adapter.3.to_v_ip.bias"})
    with pytest.raises(UnknownFormatError, match=r"resembles the family toy but has keys .*: image_proj\.more"):
        load_adapter({**state, "image_proj.more": torch.ones(1)})


# --- incomplete and damaged sets ---------------------------------------------------------------------------------

RAW_FACE = {"token_dim": 2048, "feature_dim": 512, "inner_dim": 64, "ff_dim": 40, "depth": 2}
PUBLIC: dict[str, tuple[str, str, dict[str, int]]] = {
    "base": ("base", "a.bin", {}),
    "plus": ("plus", "a.bin", {}),
    "full-face": ("full-face", "a.bin", {}),
    "faceid": ("faceid", "a.bin", {"lora_rank": 2}),
    "faceid-plus": ("faceid-plus", "faceid-plusv2.bin", {"lora_rank": 2, "inner_dim": 64, "ff_dim": 40}),
    "faceid-unnorm": ("plus", "portrait_unnorm.bin", RAW_FACE),
    "instantid": ("plus", "ip-adapter.bin", RAW_FACE),
    "xlabs": ("xlabs", "ip_adapter.safetensors", {}),
    "xlabs-diffusers": ("xlabs-diffusers", "ip_adapter.safetensors", {}),
    "instantx": ("instantx", "ip-adapter.bin", {}),
    "instantx-resampler": ("instantx-resampler", "ip-adapter.bin", {}),
    "instantcharacter": ("instantcharacter", "instantcharacter_ip-adapter.bin", {"channels": (8, 8, 8)}),
    "sd3.5": ("sd3.5", "ip-adapter.bin", {"channels": (8, 8, 8)}),
    "anima-character": (
        "anima-character",
        "ip_adapter-Character_Reference-10.safetensors",
        {"lora_rank": 2, "channels": (8, 8, 8)},
    ),
    "anima-pe": ("anima-pe", "anima_ip_adapter.safetensors", {}),
}
"""Every family: the shape of its files, a name that one has, and sizes."""


@cache
def public_file(family: str) -> dict[str, Tensor]:
    shape, _, sizes = PUBLIC[family]
    return {key: t.to("meta") for key, t in tiny_state(shape, **sizes).items()}


def refusal(family: str, state: dict[str, Tensor]) -> str:
    with pytest.raises(AdapterError) as caught:
        describe_adapter(state, name=PUBLIC[family][1])
    return str(caught.value)


def test_no_other_file_asks_for_a_family_by_name() -> None:
    """Comparisons of texts; the demo trains two adapters of its own, and may."""
    root, names = Path(checkpoints.__file__).parents[1], {format.name for format in FORMATS}
    asked: list[str] = []
    for path in [*root.rglob("*.py"), *(root.parent / "nodes").rglob("*.py")]:
        if {"checkpoints", "demo", "lora", "models"} & {*path.parts}:  # LoRAs have a block "base"
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Compare, ast.MatchValue)):
                told = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
                asked += [f"{path.name}:{node.lineno} {ast.unparse(node)}"] if told & names else []
    assert asked == []


def test_families_that_are_trained() -> None:
    """Each makes as many tokens as it says, and is where those who choose one look: in the node and in the trainer's page."""
    page = (Path(training.__file__).parent / "README.md").read_text(encoding="utf-8")
    made: dict[str, int] = {}
    for format in FORMATS:
        if not format.trains:
            continue
        projector, made[format.name] = format.fresh(32, EncoderSizes(24, 40, 5), AdapterConfig(depth=1))
        width = 24 if format.feature.encoded == "image_embeds" else 40
        features = torch.zeros(*(2, 5)[: format.feature.rank - 1], width)
        assert projector(features).shape == (2, made[format.name], 32)
        assert f"\n| {format.name} | " in page, f"the table of training/README.md has no row of {format.name}"
        assert format.summary, "the node's tooltip says it"
    assert tuple(made) == trainable_families()
    assert made.items() >= {"base": 4, "plus": 16, "full-face": 5}.items()
    with pytest.raises(InvalidInputError, match="'pluss' is no family of adapters; choose one of: base, plus"):
        format_named("pluss")


def test_every_family_has_a_public_file_here() -> None:
    assert set(PUBLIC) == {format.name for format in FORMATS}
    for family, (_, name, _) in PUBLIC.items():
        file = TensorFile(public_file(family), name=name)
        assert (
            [format.name for format in claimants(file)]
            == [describe_adapter(file.tensors, name=name).family]
            == [family]
        )


@pytest.mark.parametrize(
    "stray", ["image_proj.surprise.weight", "ip_adapter.1.surprise.weight", "text_model.encoder.x"]
)
@pytest.mark.parametrize("family", PUBLIC)
def test_one_stray_key_is_named_with_the_family(family: str, stray: str) -> None:
    told = refusal(family, {**public_file(family), stray: torch.ones(1)})
    assert f"resembles the family {family} but has keys that such a file has not: {stray}." in told


@pytest.mark.parametrize("family", PUBLIC)
def test_one_missing_key_is_named_with_the_family(family: str) -> None:
    state = public_file(family)
    for missing in state:
        told = refusal(family, {key: t for key, t in state.items() if key != missing})
        # without its input, nothing tells a face resampler from plus
        blind = missing == "image_proj.proj_in.weight" and PUBLIC[family][0] == "plus"
        assert f"({family} adapter)" in told or f"the family {family}," in told or (blind and "(plus adapter)" in told)
        assert missing.removeprefix("ip_adapter.") in told


@pytest.mark.parametrize("family", PUBLIC)
def test_one_misshapen_key_is_named_with_the_family(family: str) -> None:
    state = public_file(family)
    for key, tensor in state.items():
        for damaged in (
            (tensor[:-1], tensor[None], tensor[..., :0]) if tensor.ndim else (tensor[None], tensor.new_empty(0))
        ):
            told = refusal(family, {**state, key: damaged})
            blind = 0 in damaged.shape and key == "image_proj.proj_in.weight"
            assert f"({family} adapter)" in told or (blind and "(plus adapter)" in told), (key, told)
            assert key.removeprefix("ip_adapter.") in told, (key, told)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_single_missing_tensor_is_an_error_of_ours(family: str) -> None:
    state = tiny_state(family)
    for missing in state:
        with pytest.raises(AdapterError) as caught:
            load_adapter({key: t for key, t in state.items() if key != missing})
        assert missing.split(".", 1)[1] in str(caught.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_single_misshapen_tensor_is_an_error_of_ours(family: str) -> None:
    state = tiny_state(family)
    (feature,) = (key for key, tensor in state.items() if tensor.shape[-1] == 24)
    for key, tensor in state.items():
        shorter = [tensor[..., :-1]] if key != feature else []  # there it is another feature width
        for damaged in (*shorter, tensor[:-1], tensor[None], tensor.new_zeros(0), tensor.flatten()[0]):
            with pytest.raises(AdapterError, match=rf"state dict \({family} adapter\): "):
                load_adapter({**state, key: damaged})


def test_gaps_are_named() -> None:
    state = tiny_state("base", channels=(8,) * 5)
    with pytest.raises(CorruptFileError, match=r"5 key and 4 value layers.*missing ip_adapter\.5\.to_v_ip\.weight"):
        load_adapter({key: t for key, t in state.items() if key != "ip_adapter.5.to_v_ip.weight"})
    holed = {key: t for key, t in state.items() if not key.startswith("ip_adapter.5.")}
    with pytest.raises(CorruptFileError, match=r"missing ip_adapter\.5\.to_k_ip.*unexpected numbers 9"):
        load_adapter(holed)
    even = {
        **state,
        "ip_adapter.2.to_k_ip.weight": torch.zeros(8, 32),
        "ip_adapter.2.to_v_ip.weight": torch.zeros(8, 32),
    }
    with pytest.raises(CorruptFileError, match="unexpected numbers 2"):
        load_adapter(even)
    huge = {**state, "ip_adapter.99999.to_k_ip.weight": torch.zeros(8, 32)}
    with pytest.raises(CorruptFileError, match="missing"):
        load_adapter(huge)
    with pytest.raises(UnknownFormatError, match=r"keys that such a file has not: ip_adapter\.1\.to_k_ip\.bias"):
        load_adapter({**state, "ip_adapter.1.to_k_ip.bias": torch.zeros(8)})
    plus = {key.replace("layers.1.", "layers.2."): t for key, t in tiny_state("plus").items()}
    with pytest.raises(CorruptFileError, match=r"layers\.1 is missing"):
        load_adapter(plus)


def test_halves_of_different_adapters_are_named() -> None:
    mixed = {**tiny_state("base", token_dim=48)}
    mixed |= {key: t for key, t in tiny_state("base").items() if key.startswith("ip_adapter.")}
    with pytest.raises(CorruptFileError, match="tokens of 32 channels, but its tokens have 48"):
        load_adapter(mixed)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_single_bad_number_is_found_and_named(value: float, dtype: torch.dtype) -> None:
    for key in ("image_proj.latents", "ip_adapter.3.to_v_ip.weight"):
        state = tiny_state("plus", dtype=dtype)
        state[key].view(-1)[-1] = value
        with pytest.raises(CorruptFileError, match=rf"NaN or infinite numbers in {key}\."):
            load_adapter(state)
        describe_adapter(state)  # does not look at numbers


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64, torch.uint8])
def test_other_numbers_are_no_weights(dtype: torch.dtype) -> None:
    state = {key: tensor.to(dtype) for key, tensor in tiny_state("base").items()}
    with pytest.raises(CorruptFileError, match="floating point"):
        load_adapter(state)


def test_float8_computes_nothing() -> None:
    state = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in tiny_state("base").items()}
    with pytest.raises(InvalidInputError, match="float16"):
        load_adapter(state).tokens(torch.ones(1, 24))
    assert load_adapter(state, dtype=torch.float32).tokens(torch.ones(1, 24)).isfinite().all()


def test_an_adapter_cut_off_while_in_use(tmp_path: Path) -> None:
    """Of a mapped file, looking at the numbers then would end the process (SIGBUS)."""
    for suffix, layout in ((".safetensors", "flat"), (".bin", "nested")):
        path = tmp_path / f"a{suffix}"
        save_adapter(load_adapter(tiny_state("base")), path, layout=layout)  # pyright: ignore
        adapter = load_adapter(path)
        os.truncate(path, 0)
        assert adapter.tokens(torch.ones(1, 24)).isfinite().all()


@pytest.mark.parametrize("layout", ["flat", "nested"])
def test_tied_weights_are_saved_one_by_one(tmp_path: Path, layout: str) -> None:
    state = tiny_state("base", channels=(8, 8))
    state["ip_adapter.3.to_k_ip.weight"] = state["ip_adapter.1.to_k_ip.weight"]
    torch.save(nested(state), tmp_path / "tied.bin")
    path = tmp_path / ("a.safetensors" if layout == "flat" else "a.bin")
    save_adapter(load_adapter(tmp_path / "tied.bin"), path, layout=layout)  # pyright: ignore
    assert load_adapter(path).module.to_k_ip[1].weight.equal(state["ip_adapter.1.to_k_ip.weight"])


@pytest.mark.parametrize("layers", ["ip_adapter", "resampler"])
def test_more_layers_than_any_model_has(layers: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats_of_checkpoints, "MOST_LAYERS", 4)
    state = tiny_state(
        "plus", channels=(4,) * (5 if layers == "ip_adapter" else 2), depth=2 if layers == "ip_adapter" else 5
    )
    with pytest.raises(CorruptFileError, match="has over 4"):
        load_adapter(state)


def test_hints_stay_on_one_line(tmp_path: Path) -> None:
    save_file(tiny_state("base"), tmp_path / "a.safetensors", {"encoder": "x\n" * 999, "base_model": "\x1b[2J"})
    spec = describe_adapter(tmp_path / "a.safetensors")
    assert spec.encoder.isprintable()
    assert len(spec.encoder) <= 81
    assert spec.base_model.isprintable()


def test_float8_nan_is_found() -> None:
    state = {key: t.to(torch.float8_e4m3fn) for key, t in tiny_state("base").items()}
    state["image_proj.norm.weight"] = torch.full((32,), float("nan")).to(torch.float8_e4m3fn)
    with pytest.raises(CorruptFileError, match=r"image_proj\.norm\.weight"):
        load_adapter(state)


def test_integers_are_no_weights() -> None:
    state = tiny_state("base")
    state["ip_adapter.1.to_k_ip.weight"] = state["ip_adapter.1.to_k_ip.weight"].to(torch.int8)
    with pytest.raises(CorruptFileError, match=r"floating point: ip_adapter\.1\.to_k_ip\.weight is torch\.int8"):
        load_adapter(state)


# --- saving ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "name"), [("flat", "a.safetensors"), ("nested", "a.bin"), ("nested", "a.pt")])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip(tmp_path: Path, family: str, layout: str, name: str) -> None:
    adapter = load_adapter(tiny_state(family, dtype=torch.float16))
    path = save_adapter(adapter, tmp_path / name, layout=layout)  # pyright: ignore
    again = load_adapter(path)
    assert again.spec == adapter.spec
    before, after = adapter.module.checkpoint_state(), again.module.checkpoint_state()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) and after[key].dtype == torch.float16 for key in before)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    (tmp_path / "plain").touch()
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode  # whoever may read new files may read this one
    # once more, from a file that is mapped, over that very file
    save_adapter(again, path, layout=layout)  # pyright: ignore
    assert all(torch.equal(t, before[key]) for key, t in load_adapter(path).module.checkpoint_state().items())
    assert path.stat().st_size < 1.5 * sum(t.nbytes for t in before.values()) + 20_000


def test_layouts_are_those_of_released_files(tmp_path: Path) -> None:
    state = tiny_state("base")
    adapter = load_adapter(state)
    flat = load_file(save_adapter(adapter, tmp_path / "a.safetensors"))
    assert flat.keys() == state.keys()
    content = torch.load(save_adapter(adapter, tmp_path / "a.bin", layout="nested"), weights_only=True)
    assert list(content) == ["image_proj", "ip_adapter"]
    assert content["ip_adapter"].keys() == nested(state)["ip_adapter"].keys()


def test_a_saved_file_describes_itself(tmp_path: Path) -> None:
    adapter = load_adapter(meta_free_sd15(), name="mine")
    path = save_adapter(adapter, tmp_path / "a.safetensors", metadata={"trained_on": "emoji"})
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    assert metadata == {
        "format": "pt",
        "family": "base",
        "base_model": "custom 768",
        "encoder": "ViT-H/14",
        "num_tokens": "4",
        "token_dim": "768",
        "feature": "image_embeds",
        "feature_dim": "1024",
        "unconditional": "zero_embeds",
        "trained_on": "emoji",
    }
    assert load_adapter(path).metadata == metadata


def meta_free_sd15() -> dict[str, Tensor]:
    return tiny_state("base", token_dim=768, feature_dim=1024)


def test_metadata_only_fills_what_shapes_leave_open(tmp_path: Path) -> None:
    def describe(family: str, sizes: dict[str, int], metadata: dict[str, str]) -> checkpoints.AdapterSpec:
        save_file(tiny_state(family, **sizes), tmp_path / "a.safetensors", metadata=metadata)
        spec = describe_adapter(tmp_path / "a.safetensors")
        assert spec == load_adapter(tmp_path / "a.safetensors").spec
        return spec

    lies = {"family": "plus", "num_tokens": "99", "token_dim": "1", "feature_dim": "1", "feature": "penultimate"}
    spec = describe("base", {"feature_dim": 1024}, {**lies, "encoder": "my encoder", "base_model": "SDXL"})
    assert spec == describe("base", {"feature_dim": 1024}, {})
    spec = describe("full-face", {}, {"encoder": "world vit", "num_tokens": "17", "base_model": "tiny world"})
    assert (spec.encoder, spec.num_tokens, spec.base_model) == ("world vit", 17, "tiny world")
    assert describe("full-face", {}, {"num_tokens": "٣"}).num_tokens == 0
    assert describe("base", {}, {"encoder": "ViT-H/14"}).encoder == "custom"  # 24 wide: it cannot be
    assert describe("plus", {}, {"unconditional": "zero_embeds"}).unconditional == "zero_embeds"
    assert describe("plus", {}, {"unconditional": "nonsense"}).unconditional == "zero_pixels"


@pytest.mark.parametrize("layout", ["flat", "nested"])
@pytest.mark.parametrize("moment", ["writing", "replacing"])
def test_a_failed_save_leaves_the_old_file(
    tmp_path: Path, layout: str, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / ("a.safetensors" if layout == "flat" else "a.bin")
    path.write_bytes(b"the old file")

    def half(*args: object, **_: object) -> None:
        target = next(a for a in args if isinstance(a, Path))
        target.write_bytes(b"half")
        raise OSError("No space left on device")

    if moment == "writing":
        monkeypatch.setattr(
            checkpoints if layout == "flat" else torch, "save_file" if layout == "flat" else "save", half
        )
    else:
        monkeypatch.setattr(os, "replace", half)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(load_adapter(tiny_state()), path, layout=layout)  # pyright: ignore
    assert path.read_bytes() == b"the old file"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_saves_that_cannot_work_say_why(tmp_path: Path) -> None:
    adapter = load_adapter(tiny_state())
    with pytest.raises(InvalidInputError, match=r"should end in \.safetensors or \.sft"):
        save_adapter(adapter, tmp_path / "a.bin")
    with pytest.raises(InvalidInputError, match=r"should end in \.bin"):
        save_adapter(adapter, tmp_path / "a.safetensors", layout="nested")
    with pytest.raises(InvalidInputError, match="choose 'flat'"):
        save_adapter(adapter, tmp_path / "a.bin", layout="flatt")  # pyright: ignore
    with pytest.raises(InvalidInputError, match="does not exist"):
        save_adapter(adapter, tmp_path / "no" / "a.safetensors")
    with pytest.raises(InvalidInputError, match="text to text"):
        save_adapter(adapter, tmp_path / "a.safetensors", metadata={"steps": 100})  # pyright: ignore
    with pytest.raises(InvalidInputError, match="no numbers"):
        save_adapter(load_adapter(meta("base")), tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_trained_module_saves_and_loads(tmp_path: Path) -> None:
    spec = load_adapter(tiny_state("plus")).spec
    module = load_adapter(tiny_state("plus", seed=5)).module.requires_grad_(True)
    path = save_adapter(AdapterWeights(spec, module), tmp_path / "a.safetensors")
    assert all(torch.equal(t, tiny_state("plus", seed=5)[key]) for key, t in load_file(path).items())
