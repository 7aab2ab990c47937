"""Adapters of transformers: published files by keys and shapes alone, and their tokens, keys and values beside a reference's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.loaders.transformer_sd3 import SD3Transformer2DLoadersMixin
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, IPAdapterTimeImageProjection
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close

from ipadapter_core import models
from ipadapter_core.bake import bake, check_adapter
from ipadapter_core.checkpoints import claimants, describe_adapter, format_named, load_adapter, projectors, save_adapter
from ipadapter_core.compatibility import rules_for
from ipadapter_core.errors import IncompatibleAdapterError, UnknownFormatError
from ipadapter_core.features import ENCODERS
from ipadapter_core.files.state_dict import TensorFile
from ipadapter_core.lora import load_lora
from ipadapter_core.models.sd3 import SD3
from ipadapter_core.models.sites import ModelLayout, Site
from ipadapter_core.report import describe_fit, describe_spec, spec_facts
from tiny import TRANSFORMERS, adapter_shapes, tiny_state
from tiny_flux import comfy_chroma, comfy_flux
from tiny_models import tiny_prompt

# rounding of a few float32 layers whose results are of unit size
TOLERANCE = {"rtol": 0.0, "atol": 1e-5}


def noise(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def described(family: str, **sizes: Any) -> dict[str, Tensor]:
    shapes = adapter_shapes(family, **sizes)
    return {key: torch.empty(shape, dtype=torch.bfloat16, device="meta") for key, shape in shapes.items()}


DOUBLE, FLUX, SD35, ANIMA = (3072,) * 19, (3072,) * 57, (2432,) * 38, (2048,) * 28
SIGLIP, TWO = "SigLIP so400m/14-384", "SigLIP so400m/14-384 + DINOv2 giant/14"
TIMED = {"hidden_dim": 1280, "inner_dim": 1280, "depth": 4}
XLABS = {"token_dim": 4096, "channels": DOUBLE, "feature_dim": 768}
INSTANTX = {"token_dim": 4096, "channels": FLUX, "num_tokens": 128, "feature_dim": 1152}
RESAMPLER = {"token_dim": 4096, "channels": FLUX, "num_tokens": 64, "feature_dim": 1152, **TIMED}
CHARACTER = {"token_dim": 4096, "channels": FLUX, "num_tokens": 1024, "feature_dim": 2688, **TIMED}
SD = {"token_dim": 2432, "channels": SD35, "num_tokens": 64, "feature_dim": 1152, **TIMED}
REFERENCE = {
    "token_dim": 768,
    "channels": ANIMA,
    "hidden_dim": 2048,
    "lora_rank": 32,
    "text_dim": 1024,
    "feature_dim": 768,
}
PE = {"token_dim": 1024, "channels": ANIMA, "num_tokens": 16, "feature_dim": 1024, "hidden_dim": 1024, "depth": 2}

# name: family, sizes, its numbers in all (published or computed from its shapes), base model, tokens, encoder
PUBLISHED: dict[str, tuple[str, dict[str, Any], int, str, int, str]] = {
    "flux-ip-adapter": ("xlabs", {**XLABS, "num_tokens": 4}, 490_874_880, "FLUX", 4, "ViT-L/14"),
    "flux-ip-adapter-v2": ("xlabs", {**XLABS, "num_tokens": 16}, 528_672_768, "FLUX", 16, "ViT-L/14"),
    "v2 by diffusers": ("xlabs-diffusers", {**XLABS, "num_tokens": 16}, 528_672_768, "FLUX", 16, "ViT-L/14"),
    "FLUX.1-dev-IP-Adapter": ("instantx", INSTANTX, 2_645_600_512, "FLUX", 128, SIGLIP),
    "the same with a resampler": ("instantx-resampler", RESAMPLER, 1_519_938_816, "FLUX", 64, SIGLIP),
    "InstantCharacter": ("instantcharacter", CHARACTER, 2_794_932_864, "FLUX", 1024, TWO),
    "SD3.5-Large-IP-Adapter": ("sd3.5", SD, 797_925_888, "SD3.5", 64, SIGLIP),
    "Character_Reference-10": ("anima-character", REFERENCE, 251_568_128, "Anima", 1024, "SigLIP2 base/16-512"),
    "anima_ip_adapter_quality": ("anima-pe", PE, 153_156_636, "Anima", 16, "PE-Core L/14-336"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_by_their_shapes(name: str) -> None:
    family, sizes, numbers, base_model, tokens, encoder = PUBLISHED[name]
    state = described(family, **sizes)
    assert sum(t.numel() for t in state.values()) == numbers
    assert [format.name for format in claimants(TensorFile(state))] == [family]
    spec = describe_adapter(state)
    assert (spec.family, spec.base_model, spec.num_tokens, spec.encoder) == (family, base_model, tokens, encoder)
    assert spec.layer_channels == sizes["channels"]
    assert (spec.token_dim, spec.feature_dim) == (sizes["token_dim"], sizes["feature_dim"])
    adapter = load_adapter(state)
    held = [*adapter.module.parameters(), *adapter.lora.values()]
    assert sum(t.numel() for t in held) == numbers
    assert adapter.module.checkpoint_state().keys() | adapter.lora.keys() == state.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_people_read_of_a_file(name: str) -> None:
    """The family, its base, every encoder with its files, the usual strength, where it is from, and a LoRA inside."""
    family, sizes, _, base_model, _, encoder = PUBLISHED[name]
    spec = describe_adapter(described(family, **sizes))
    text, facts = describe_spec(spec, "a.bin"), spec_facts(spec)
    assert spec.format.advice
    assert spec.format.released or family == "instantx-resampler"  # forks of InstantX', nowhere by a lasting name
    for words in (spec.format.label, f"base model     {base_model} (", spec.format.advice, *spec.format.released):
        assert words in text
    assert spec.encoders == tuple(encoder.split(" + ")) == tuple(facts["encoders"])  # pyright: ignore[reportArgumentType]
    assert all(file in text for known in spec.encoders for file in ENCODERS[known].files)
    assert ("280 layers of the model" in text) == (family == "anima-character") == (facts["lora_layers"] == 280)
    assert ("made anew at every step" in text) == (family in ("sd3.5", "instantcharacter"))
    json.dumps(facts)


@pytest.mark.parametrize("family", ["xlabs", "instantx", "instantcharacter"])
def test_flux_files_on_chroma_are_experimental(family: str) -> None:
    for model, told in ((comfy_flux(), False), (comfy_chroma(newer=False), True)):
        layout = models.layout_of(model)
        reached = format_named(family).reach.sites(layout)
        channels = tuple(layout.sites[i].channels for i in reached)
        adapter = load_adapter(tiny_state(family, channels=channels, token_dim=layout.token_dim))
        text = describe_fit(adapter, layout, [])
        assert ("experimental: it was trained for Flux, and for Chroma nobody has trained one" in text) == told


def test_what_a_prompt_holds_is_told() -> None:
    """At every step the tokens of two timesteps and one block's keys and values (InstantCharacter), or those of all blocks."""
    layout = models.layout_of(comfy_flux())
    sizes = {"channels": tuple(site.channels for site in layout.sites), "token_dim": layout.token_dim}
    adapter = load_adapter(tiny_state("instantcharacter", num_tokens=100, **sizes), name="mine")
    text = describe_fit(adapter, layout, [bake(adapter, tiny_prompt(adapter, tokens=8), layout)])
    width = sizes["channels"][0]
    assert (
        f"prompt 1 holds {4 * 2 * 100 * (2 * layout.token_dim + 2 * width) / 1000:.3g} kB of tokens of two timesteps"
        in text
    )
    held = sum(p.numel() for p in adapter.module.parameters()) * 4
    assert f"and mine, {held / 1e6:.3g} MB, is used at every step" in text


def test_sd35_large_on_medium_is_refused_with_both_sizes() -> None:
    sites = tuple(Site(f"joint_blocks.{i}", "joint", i, 0, i, 1536, 24) for i in range(24))
    medium = ModelLayout(SD3, 4096, sites)
    adapter = load_adapter(described("sd3.5", **SD))
    with pytest.raises(IncompatibleAdapterError, match=r"adapter for SD3\.5 \(38 attention layers.*SD3 \(24 layers"):
        check_adapter(adapter, medium)


LOOK_ALIKES: dict[str, tuple[dict[str, tuple[int, ...]], str]] = {
    "a LoRA of Flux (kohya)": ({"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (4, 3072)}, "a LoRA"),
    "a LoRA of Flux (XLabs)": ({"double_blocks.0.processor.qkv_lora1.down.weight": (4, 3072)}, "a LoRA"),
    "a LoRA of Flux (PEFT)": ({"transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight": (4, 3072)}, "a LoRA"),
    "a LoRA of SD3.5": ({"transformer.transformer_blocks.0.attn.to_k.lora_B.weight": (2432, 4)}, "a LoRA"),
    "a LoRA of Anima (PEFT)": (
        {f"base_model.model.blocks.0.cross_attn.q_proj.lora_{side}.weight": (32, 2048) for side in "AB"},
        "a LoRA",
    ),
    "a LoRA of Anima": ({"diffusion_model.blocks.0.cross_attn.q_proj.lora_A.weight": (32, 2048)}, "a LoRA"),
    "Flux": ({"double_blocks.0.img_attn.qkv.weight": (9216, 3072), "single_blocks.0.linear1.weight": (21504, 3072)}, "model"),
    "Flux, diffusers": ({"single_transformer_blocks.0.attn.to_q.weight": (3072, 3072)}, "model"),
    "SD3.5": ({"joint_blocks.0.x_block.attn.qkv.weight": (7296, 2432)}, "model"),
    "Anima": ({"net.blocks.0.cross_attn.q_proj.weight": (2048, 2048), "net.llm_adapter.embed.weight": (9, 9)}, "model"),
    "Anima, bare": ({"blocks.0.cross_attn.q_proj.weight": (2048, 2048), "blocks.0.mlp.layer1.weight": (8192, 2048)}, "model"),
    "a Flux ControlNet": ({"controlnet_blocks.0.weight": (3072, 3072), "transformer_blocks.0.attn.to_q.weight": (1, 1)}, "ControlNet"),
    "SigLIP": ({"vision_model.embeddings.patch_embedding.weight": (1152, 3, 14, 14), "vision_model.head.probe": (1, 1, 1152)}, "encoder"),
}  # fmt: skip


@pytest.mark.parametrize("kind", LOOK_ALIKES)
def test_look_alikes_are_no_adapters(kind: str) -> None:
    shapes, word = LOOK_ALIKES[kind]
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    assert claimants(TensorFile(state)) == []
    with pytest.raises(UnknownFormatError, match=f"looks like a.*{word}"):
        describe_adapter(state)


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_adapters_are_no_loras(family: str) -> None:
    """Only what is a LoRA of a file is read as one: that of Anima's Character Reference, with none of its layers."""
    state = tiny_state(family, channels=(8, 8), lora_rank=2)
    if family != "anima-character":
        with pytest.raises(UnknownFormatError, match="has no LoRA in it"):
            load_lora(state)
        return
    lora = load_lora(state)
    assert lora.key_format == "inside an IP-Adapter file"
    assert lora.left_out == ()
    names = {module.name for module in lora.modules}
    assert len(names) == 20
    inside = load_adapter(state)
    assert names == {module.name for module in load_lora(inside.loadable_lora()).modules}
    cross = {module.name for module in load_lora(inside.loadable_lora(cross_attention=True)).modules}
    assert cross == {name for name in names if "cross_attn" in name}


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ("shared_ip_k_proj.expand.weight", "projections that all blocks share"),
        ("shared_ip_q_proj.weight", "projections that all blocks share"),
        ("ip_self_attn.qkv.weight", "an attention of the image tokens to themselves"),
        ("siglip_norm.weight", "a norm of the encoder's tokens"),
        ("siglip_compressor.queries", "a compressor of the encoder's tokens"),
        ("null_tokens", "learned tokens for no image"),
        ("lora.base_model.model.blocks.0.cross_attn.q_proj.lora_A.default.weight", "PEFT's key for an adapter's name"),
    ],
)
def test_unpublished_variants_of_anima_character_are_named(extra: str, told: str) -> None:
    state = {**tiny_state("anima-character", channels=(8, 8), lora_rank=2), extra: torch.ones(2, 2)}
    with pytest.raises(UnknownFormatError, match=rf"anima-character but has .*{told}, which no published file has"):
        load_adapter(state)


@pytest.mark.parametrize("name", ["ip_norm_keys", "ip_inject_before_mlp"])
def test_what_metadata_says_of_anima_character_counts(name: str, tmp_path: Path) -> None:
    state = tiny_state("anima-character", channels=(8, 8), lora_rank=2)
    save_file(state, tmp_path / "a.safetensors", {name: "False", "lora_alpha": "2"})
    plain = load_adapter(tmp_path / "a.safetensors").loadable_lora()
    save_file(state, tmp_path / "a.safetensors", {name: "False", "lora_alpha": "4"})
    doubled = load_adapter(tmp_path / "a.safetensors").loadable_lora()
    for key, tensor in plain.items():
        assert torch.equal(doubled[key], 2 * tensor if ".lora_B." in key else tensor)
    save_file(state, tmp_path / "a.safetensors", {name: "True"})
    with pytest.raises(UnknownFormatError, match="which no published file has"):
        load_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize(("layout", "name"), [("flat", "a.safetensors"), ("nested", "a.bin")])
@pytest.mark.parametrize("family", TRANSFORMERS)
def test_round_trip(tmp_path: Path, family: str, layout: str, name: str) -> None:
    """Every number under its own key, without a copy while it is loaded; twice, the second time from what was written."""
    state = tiny_state(family, channels=(8, 8), lora_rank=2)
    adapter = load_adapter(state)
    for _ in range(2):
        held = {**adapter.module.checkpoint_state(), **adapter.lora}
        assert held.keys() == state.keys()
        assert all(torch.equal(held[key], state[key]) for key in state)
        path = save_adapter(adapter, tmp_path / name, layout=layout)  # pyright: ignore[reportArgumentType]
        again = load_adapter(path)
        assert again.spec == adapter.spec == describe_adapter(path)
        assert again.spec.lora_layers == len(adapter.lora) // 2
        adapter = again
    assert all(
        load_adapter(state).module.checkpoint_state()[key].data_ptr() == state[key].data_ptr()
        for key in held
        if "lora" not in key
    )


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_metadata_cannot_claim_a_base_model_that_shapes_tell(family: str, tmp_path: Path) -> None:
    for told, expected in (("FLUX", "custom 32"), ("SD3.5", "custom 32"), ("Anima", "custom 32"), ("mine", "mine")):
        save_file(tiny_state(family, channels=(8, 8)), tmp_path / "a.safetensors", {"base_model": told})
        assert describe_adapter(tmp_path / "a.safetensors").base_model == expected


def test_keys_map_both_ways() -> None:
    """Every key of every family has one place in the module, and no key that a file could have beside it takes that place."""
    for family in TRANSFORMERS:
        keys = format_named(family).keys
        for key in adapter_shapes(family, channels=(8,) * 12):
            inside = keys.in_module(key)
            assert inside is not None
            assert keys.in_file(inside) == key
            strange = key.replace(".11.", ".011.")
            assert strange == key or keys.in_module(strange) != inside


# --- tokens, keys and values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["xlabs", "xlabs-diffusers"])
@pytest.mark.parametrize("tokens", [4, 7])
def test_xlabs(family: str, tokens: int) -> None:
    state = tiny_state(family, num_tokens=tokens, channels=(256, 256))
    adapter = load_adapter(state)
    projector = [t for key, t in state.items() if "_proj" in key.split(".")[0] or key.startswith("image_proj")]
    theirs = ImageProjection(image_embed_dim=24, cross_attention_dim=32, num_image_text_embeds=tokens)
    theirs.load_state_dict(dict(zip(theirs.state_dict(), projector, strict=True)))
    features = noise(3, 24)
    found = adapter.tokens(features)
    assert found.shape == (3, tokens, 32)
    assert_close(found, theirs(features).detach(), **TOLERANCE)
    layers = [t for key, t in state.items() if "double_blocks" in key or key.startswith("ip_adapter.")]
    for layer in range(2):
        k_weight, k_bias, v_weight, v_bias = layers[4 * layer : 4 * layer + 4]
        k, v = adapter.key_value(layer, found)
        assert_close(k, F.linear(found, k_weight, k_bias), **TOLERANCE)
        assert_close(v, F.linear(found, v_weight, v_bias), **TOLERANCE)


def test_instantx() -> None:
    """The formula in float64: two layers with a GELU, tokens normed; keys normed over a head of 128, values plain."""
    state = {key: t.double() for key, t in tiny_state("instantx", num_tokens=5, channels=(256, 384)).items()}
    adapter, w = load_adapter(state), {key.removeprefix("image_proj."): t for key, t in state.items()}
    features = noise(2, 24).double()
    hidden = F.gelu(features @ w["proj.0.weight"].T + w["proj.0.bias"]) @ w["proj.2.weight"].T + w["proj.2.bias"]
    expected = F.layer_norm(hidden.reshape(2, 5, 32), (32,), w["norm.weight"], w["norm.bias"])
    found = adapter.tokens(features)
    assert_close(found, expected)
    for layer, heads in ((0, 2), (1, 3)):
        k, v = adapter.key_value(layer, found)
        plain = found @ state[f"ip_adapter.{layer}.to_k_ip.weight"].T
        parts = [part / (part.square().mean(-1, keepdim=True) + 1e-5).sqrt() for part in plain.chunk(heads, -1)]
        assert_close(k, torch.cat(parts, -1), **TOLERANCE)  # the norm computes in float32
        assert_close(v, found @ state[f"ip_adapter.{layer}.to_v_ip.weight"].T)


def test_instantx_as_shakkers_node_reads_it() -> None:
    adapter = load_adapter(tiny_state("instantx", num_tokens=5, channels=(256, 384)))
    spec = adapter.spec
    assert spec.format.under(rules_for("correct")) is spec.format.under(rules_for("IPAdapter_plus")) is spec.format
    theirs = replace(adapter, spec=replace(spec, format=spec.format.under(rules_for("IPAdapter-Flux"))))
    tokens = adapter.tokens(noise(2, 24))
    for layer, heads in ((0, 2), (1, 3)):
        (k, v), (their_k, their_v) = adapter.key_value(layer, tokens), theirs.key_value(layer, tokens)
        assert torch.equal(k, their_k)
        parts = [part / (part.square().mean(-1, keepdim=True) + 1e-5).sqrt() for part in v.chunk(heads, -1)]
        assert_close(their_v, torch.cat(parts, -1), **TOLERANCE)
        assert (their_v - v).abs().max() > 0.1


def renamed_resampler(state: dict[str, Tensor], group: str, theirs: IPAdapterTimeImageProjection) -> None:
    """A TimeResampler's weights put into diffusers' module, by diffusers' own conversion."""
    own = {key.removeprefix(group): t for key, t in state.items() if key.startswith(group)}
    converted = SD3Transformer2DLoadersMixin._convert_ip_adapter_image_proj_to_diffusers  # pyright: ignore[reportPrivateUsage]
    made = converted(_Loader(), own, low_cpu_mem_usage=False)
    theirs.load_state_dict(made.state_dict())


class _Loader(SD3Transformer2DLoadersMixin):
    """What diffusers' conversion asks of the model that it is part of."""

    device, dtype = torch.device("cpu"), torch.float32


RESAMPLED = {"num_tokens": 5, "hidden_dim": 64, "inner_dim": 128, "depth": 4, "feature_dim": 24, "token_dim": 32}


@pytest.mark.parametrize("timestep", [1000.0, 503.7, 0.5])
def test_sd35(timestep: float) -> None:
    """Tokens, K and V of InstantX' adapter for SD3.5 at several timesteps equal diffusers'."""
    state = tiny_state("sd3.5", channels=(128, 128), **RESAMPLED)
    adapter = load_adapter(state)
    theirs = IPAdapterTimeImageProjection(24, 32, 64, 4, 64, 2, 5)
    renamed_resampler(state, "image_proj.", theirs)
    features = noise(2, 9, 24)
    expected, embedding = theirs(features, torch.full((2,), timestep))
    constant = adapter.tokens(features)
    assert constant.shape == (2, 9, 64)  # nothing of the timestep in it
    found = adapter.tokens_at(constant, timestep)
    assert_close(found, expected.detach(), **TOLERANCE)
    for layer in range(2):
        processor = SD3IPAdapterJointAttnProcessor2_0(128, 32, 64, 64)
        own = {key.removeprefix(f"ip_adapter.{layer}."): t for key, t in state.items()}
        processor.load_state_dict({key: own[key] for key in processor.state_dict()})
        normed = processor.norm_ip(expected, temb=embedding)
        k, v = adapter.key_value(layer, found, timestep)
        heads = processor.norm_ip_k(processor.to_k_ip(normed).unflatten(-1, (2, 64)))
        assert_close(k, heads.flatten(-2).detach(), **TOLERANCE)
        assert_close(v, processor.to_v_ip(normed).detach(), **TOLERANCE)
        form = adapter.spec.format
        assert torch.equal(form.query_weight(adapter.module, layer), processor.norm_q.weight)
        assert torch.equal(form.self_weight(adapter.module, layer), processor.norm_k.weight)


def test_instantcharacter() -> None:
    """Module by module: diffusers' transformer blocks, torch's MLPs, diffusers' resampler, and the authors' norm of keys."""
    sizes = {**RESAMPLED, "feature_dim": 128}
    state = tiny_state("instantcharacter", channels=(256, 256), **sizes)
    adapter = load_adapter(state)
    n, features = 3, noise(2, 8 * 3, 128)
    low, shallow, high = features[:, :n], features[:, n : 4 * n], features[:, 4 * n :]

    def weights(group: str) -> dict[str, Tensor]:
        return {key.removeprefix(group): t for key, t in state.items() if key.startswith(group)}

    def blocks(kind: str, x: Tensor, context: Tensor) -> Tensor:
        for number in range(4):
            block = BasicTransformerBlock(128, 2, 64, cross_attention_dim=128, norm_eps=1e-6)
            block.load_state_dict(weights(f"image_proj.cross_{kind}_blocks.{number}."))
            x = block(x, encoder_hidden_states=context)
        return x

    def mlp(name: str, x: Tensor) -> Tensor:
        w = weights(f"image_proj.{name}.")
        hidden = F.gelu(F.linear(x, w["fc1.weight"], w["fc1.bias"]), approximate="tanh")
        return F.linear(hidden, w["fc2.weight"], w["fc2.bias"])

    whole = mlp("proj", low) + mlp("proj_cross_scale", blocks("scale", low, high))
    both = torch.cat([whole, mlp("proj_cross_layer", blocks("layer", low, shallow))], 1)
    theirs = IPAdapterTimeImageProjection(128, 32, 64, 4, 64, 2, 5)
    renamed_resampler(state, "image_proj.resampler.", theirs)
    constant = adapter.tokens(features)
    assert_close(constant, theirs.proj_in(both).detach(), **TOLERANCE)
    for timestep in (1000.0, 250.25):
        found = adapter.tokens_at(constant, timestep)
        assert_close(found, theirs(both, torch.full((2,), timestep))[0].detach(), **TOLERANCE)
        for layer in range(2):
            w = weights(f"ip_adapter.{layer}.")
            k, v = adapter.key_value(layer, found, timestep)
            plain = F.linear(found, w["to_k_ip.weight"], w["to_k_ip.bias"]).unflatten(-1, (2, 128))
            normed = w["norm_ip_k.scale"] * plain / (plain.norm(dim=-1, keepdim=True) * 128**-0.5 + 1e-6)
            assert_close(k, normed.flatten(-2), **TOLERANCE)
            assert_close(v, F.linear(found, w["to_v_ip.weight"], w["to_v_ip.bias"]), **TOLERANCE)
            assert torch.equal(adapter.spec.format.query_weight(adapter.module, layer), w["norm_ip_q.scale"])


def test_anima_character() -> None:
    state = tiny_state("anima-character", channels=(256, 256), lora_rank=2, hidden_dim=48)
    adapter = load_adapter(state)
    features, emb = noise(2, 9, 32), noise(2, 1, 48, seed=2)
    assert torch.equal(adapter.tokens(features), features)
    for layer in range(2):
        w = {key.removeprefix(f"blocks.{layer}."): t for key, t in state.items()}
        k, v = adapter.key_value(layer, features)
        assert_close(k, F.linear(features, w["ip_k_proj.weight"], w["ip_k_proj.bias"]), **TOLERANCE)
        assert_close(v, F.linear(features, w["ip_v_proj.weight"], w["ip_v_proj.bias"]), **TOLERANCE)
        gate = adapter.gate(layer)
        assert gate is not None
        silu = emb * torch.sigmoid(emb)
        assert_close(gate(emb), silu @ w["adaln_ip.1.weight"].T + w["adaln_ip.1.bias"], **TOLERANCE)


@pytest.mark.parametrize("heads", [None, 4])
def test_anima_pe(heads: int | None, tmp_path: Path) -> None:
    """The resampler beside torch's MultiheadAttention, in float64; the centroid is taken from the encoder's tokens."""
    state = {key: t.double() for key, t in tiny_state("anima-pe", channels=(256, 256), num_tokens=5).items()}
    path = tmp_path / "a.safetensors"
    save_file(state, path, {} if heads is None else {"ss_resampler_heads": str(heads)})
    adapter = load_adapter(path)
    features = noise(2, 9, 24).double()
    w = {key.removeprefix("resampler."): t for key, t in state.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"])

    def attend(x: Tensor, context: Tensor, name: str) -> Tensor:
        module = nn.MultiheadAttention(64, heads or 8, batch_first=True, dtype=torch.float64)
        module.load_state_dict({key: w[f"{name}.{key}"] for key in module.state_dict()})
        return module(x, context, context, need_weights=False)[0].detach()

    kv = F.linear(features - w["ip_centroid"], w["kv_proj.weight"], w["kv_proj.bias"])
    q = w["queries"].expand(2, -1, -1)
    for number in range(2):
        block = f"blocks.{number}"
        q = q + attend(norm(q, f"{block}.q_norm_x"), norm(kv, f"{block}.kv_norm_x"), f"{block}.xattn")
        q = q + attend(norm(q, f"{block}.norm_s"), norm(q, f"{block}.norm_s"), f"{block}.sattn")
        hidden = F.gelu(F.linear(norm(q, f"{block}.norm_f"), w[f"{block}.ffn.0.weight"], w[f"{block}.ffn.0.bias"]))
        q = q + F.linear(hidden, w[f"{block}.ffn.2.weight"], w[f"{block}.ffn.2.bias"])
    found = adapter.tokens(features)
    assert_close(found, F.linear(norm(q, "out_norm"), w["out.weight"], w["out.bias"]))
    for layer in range(2):
        k, v = adapter.key_value(layer, found)
        assert_close(k, found @ state[f"to_k_ip.{layer}.weight"].T)
        assert_close(v, found @ state[f"to_v_ip.{layer}.weight"].T * state[f"ip_gate.{layer}"])
    again = load_adapter(save_adapter(adapter, tmp_path / "b.safetensors"))
    assert_close(again.tokens(features), found, rtol=0, atol=0)


def test_a_huge_matrix_is_applied_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    state = tiny_state("instantx", num_tokens=7, feature_dim=24)
    features = noise(2, 24)
    whole = load_adapter(state).tokens(features)
    sizes: list[int] = []
    linear = F.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        sizes.append(weight.numel())
        return linear(x, weight, bias)

    monkeypatch.setattr(projectors, "MOST_AT_ONCE", 480)
    monkeypatch.setattr(projectors.F, "linear", counted)
    assert_close(load_adapter(state).tokens(features), whole, **TOLERANCE)
    assert len(sizes) > 20
    assert sizes[-1] <= 480
