"""Whole adapter files on diffusers' transformers, from the encoder's feature to the model's output, against other implementations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import ChromaPipeline, FluxImg2ImgPipeline, FluxPipeline
from torch import Tensor
from torch.testing import assert_close

import ipadapter_core.backends.diffusers.doors as backend
from ipadapter_core import AdapterWeights, ImagePrompt, bake, load_adapter
from ipadapter_core.attention.patch import AdapterPatch
from ipadapter_core.attention.schedule import WeightSchedule
from ipadapter_core.backends.diffusers.transformer import TransformerEntry
from ipadapter_core.errors import IncompatibleAdapterError
from ipadapter_core.models import layout_of
from packed_calls import BATCH, COLUMNS, PROMPT, ROWS, call
from tiny import nested, tiny_state
from tiny_flux import TEXT_DIM, WIDTH, diffusers_chroma, diffusers_flux
from tiny_models import noise
from tiny_pipelines import chroma_pipeline, flux_pipeline, sd3_pipeline
from tiny_sd3 import call_sd3, diffusers_sd3

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}  # fp32; outputs are of size 1, both sides run the same kernels in other orders
FEATURE_DIM = 24
LATENTS = noise(BATCH, 4, 2 * ROWS, 2 * COLUMNS, seed=6)
SD3_SIZES: dict[str, Any] = {"attention_head_dim": 64, "num_attention_heads": 3, "caption_projection_dim": 192}
SD35: dict[str, Any] = {
    "token_dim": 192, "channels": (192,) * 3, "num_tokens": 5, "feature_dim": FEATURE_DIM, "hidden_dim": 128, "inner_dim": 128,
    "depth": 4,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def prompt_of(adapter: AdapterWeights, features: Tensor) -> ImagePrompt:
    """An image prompt of features ``2 i …``: those that stand for no image, and the picture's; ``i`` references side by side."""
    with torch.no_grad():
        uncond, cond = (adapter.tokens(f).flatten(0, 1)[None] for f in features)
    return ImagePrompt(cond, uncond, features[1][None], features[0][None], adapter.name, "none", adapter.spec.token_dim)


def patch_of(model: Any, adapter: AdapterWeights, features: Tensor, mask: Tensor | None = None, **schedule: Any) -> AdapterPatch:  # fmt: skip
    return bake(adapter, prompt_of(adapter, features), layout_of(model), WeightSchedule(**schedule), mask)


def per_member(features: Tensor) -> Tensor:
    """Features ``2 i …`` as diffusers takes them: one row per member of the batch, the negative half first."""
    return features.repeat_interleave(BATCH // 2, 0)


# --- XLabs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [diffusers_flux, diffusers_chroma])
@pytest.mark.parametrize("references", [1, 2])
def test_xlabs_equals_diffusers_from_the_embedding_on(build: Any, references: int) -> None:
    """Also with two references, whose tokens stand side by side; in XLabs' own keys and in diffusers'."""
    sizes: dict[str, Any] = {
        "token_dim": TEXT_DIM,
        "channels": (WIDTH,) * 2,
        "num_tokens": 4,
        "feature_dim": FEATURE_DIM,
    }
    theirs, ours, features = build(), build(), noise(2, references, FEATURE_DIM, seed=9)
    state = tiny_state("xlabs-diffusers", **sizes)
    theirs._load_ip_adapter_weights([nested(state)], low_cpu_mem_usage=False)
    for processor in theirs.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [0.7]
    expected = call(theirs, joint_attention_kwargs={"ip_adapter_image_embeds": [per_member(features)]})
    assert (expected - call(ours)).abs().max() > 0.05
    own = dict(zip(tiny_state("xlabs", **sizes), state.values(), strict=True))
    for file in (state, own):
        with backend.apply(ours, patch_of(ours, load_adapter(file), features, strength=0.7)):
            assert_close(call(ours), expected, **TOLERANCE)


# --- InstantX --------------------------------------------------------------------------------------------------------


class Official:
    """InstantX' formula as a processor: K normed over each head's 128 numbers, eps 1e-5, V plain; all tokens of single blocks ask."""

    def __init__(self, adapter: AdapterWeights, index: int, tokens: Tensor, scale: float) -> None:
        self.layers = adapter.module.to_k_ip[index], adapter.module.to_v_ip[index]
        self.tokens, self.scale = tokens, scale

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Any = None, image_rotary_emb: Any = None) -> Any:  # fmt: skip
        from diffusers.models.embeddings import apply_rotary_emb

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q, k, v = (heads(layer(hidden_states)) for layer in (attn.to_q, attn.to_k, attn.to_v))
        q, k = attn.norm_q(q), attn.norm_k(k)
        ip_k, ip_v = (heads(layer(self.tokens)) for layer in self.layers)
        ip_k = ip_k * torch.rsqrt(ip_k.square().mean(-1, keepdim=True) + 1e-5)
        image = self.scale * F.scaled_dot_product_attention(q, ip_k, ip_v).transpose(1, 2).flatten(2)
        if encoder_hidden_states is not None:
            text = [
                heads(layer(encoder_hidden_states)) for layer in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            ]
            text[0], text[1] = attn.norm_added_q(text[0]), attn.norm_added_k(text[1])
            q, k, v = (torch.cat(pair, 2) for pair in zip(text, (q, k, v), strict=True))
        q, k = (apply_rotary_emb(t, image_rotary_emb) for t in (q, k))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return out + image
        count = encoder_hidden_states.shape[1]
        return attn.to_out[0](out[:, count:] + image), attn.to_add_out(out[:, :count])


def in_order(model: Any) -> list[str]:
    return sorted(model.attn_processors, key=lambda name: "single" in name)


@pytest.mark.parametrize("build", [diffusers_flux, diffusers_chroma])
def test_instantx_equals_the_official_formula(build: Any) -> None:
    model = build(attention_head_dim=128, num_attention_heads=2, axes_dims_rope=(16, 56, 56), num_single_layers=2)
    sizes: dict[str, Any] = {
        "token_dim": TEXT_DIM,
        "channels": (256,) * 4,
        "num_tokens": 12,
        "feature_dim": FEATURE_DIM,
    }
    adapter, features = load_adapter(tiny_state("instantx", **sizes)), noise(2, 1, FEATURE_DIM, seed=9)
    oracle = copy.deepcopy(model)
    tokens = per_member(torch.stack([adapter.tokens(f)[0] for f in features]))
    oracle.set_attn_processor({name: Official(adapter, i, tokens, 0.7) for i, name in enumerate(in_order(model))})
    expected = call(oracle)
    assert (expected - call(model)).abs().max() > 0.05
    with backend.apply(model, patch_of(model, adapter, features, strength=0.7)):
        assert_close(call(model), expected, **TOLERANCE)


# --- InstantCharacter ------------------------------------------------------------------------------------------------


class CharacterLayer:
    """InstantCharacter's formula as a processor, at one timestep: the raw query of the picture's tokens, its own norms."""

    def __init__(self, adapter: AdapterWeights, index: int, tokens: Tensor, scale: float) -> None:
        module: Any = adapter.module
        self.k, self.v = module.to_k_ip[index], module.to_v_ip[index]
        self.norm_q, self.norm_k = (getattr(module, name)[index].scale for name in ("norm_ip_q", "norm_ip_k"))
        self.tokens, self.scale = tokens, scale

    def image(self, attn: Any, hidden_states: Tensor) -> Tensor:
        def normed(x: Tensor, weight: Tensor) -> Tensor:
            return weight * x / (x.square().mean(-1, keepdim=True).sqrt() + 1e-6)

        q, k, v = (
            x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for x in (attn.to_q(hidden_states), self.k(self.tokens), self.v(self.tokens))
        )
        out = F.scaled_dot_product_attention(normed(q, self.norm_q), normed(k, self.norm_k), v)
        return self.scale * out.transpose(1, 2).flatten(2)

    def hooks(self, block: Any) -> None:
        """The plain processor stays; what it computes is added to from outside."""
        attn, text = block.attn, PROMPT.shape[1]
        found: list[Tensor] = []
        if not hasattr(attn, "to_out"):
            attn.register_forward_pre_hook(lambda m, a, k: found.append(k["hidden_states"][:, text:]), with_kwargs=True)
            attn.register_forward_hook(lambda m, a, out: out + F.pad(self.image(attn, found.pop()), (0, 0, text, 0)))
        else:
            attn.register_forward_pre_hook(lambda m, a, k: found.append(k["hidden_states"]), with_kwargs=True)
            attn.to_out[0].register_forward_pre_hook(lambda m, a: (a[0] + self.image(attn, found.pop()),))


@pytest.mark.parametrize("sigma", [1.0, 0.37])
def test_instantcharacter_equals_the_official_formula(sigma: float) -> None:
    """Tokens are those of the timestep, and both branches see the same."""
    flux = {"attention_head_dim": 128, "num_attention_heads": 2, "axes_dims_rope": (16, 56, 56), "num_single_layers": 2}
    model = diffusers_flux(**flux)
    sizes: dict[str, Any] = {
        "token_dim": TEXT_DIM, "channels": (256,) * 4, "num_tokens": 5, "feature_dim": 128, "hidden_dim": 64, "inner_dim": 64, "depth": 2,
    }  # fmt: skip
    adapter = load_adapter(tiny_state("instantcharacter", **sizes))
    features = noise(
        1, 8 * 9, 128, seed=9
    )  # small and whole pictures: of the former two kinds of states, of the latter one
    with torch.no_grad():
        constant = adapter.tokens(features)
        tokens = adapter.tokens_at(constant, 1000 * sigma)
    prompt = ImagePrompt(
        constant,
        constant,
        features[None],
        features[None],
        adapter.name,
        "none",
        adapter.spec.token_dim,
        negative_branch="same",
    )
    oracle = copy.deepcopy(model)
    for i, name in enumerate(in_order(model)):
        block = oracle.get_submodule(name.removesuffix(".attn.processor"))
        CharacterLayer(adapter, i, tokens.expand(BATCH, -1, -1), 0.8).hooks(block)
    expected = call(oracle, t=sigma)
    assert (expected - call(model, t=sigma)).abs().max() > 0.05
    with backend.apply(model, bake(adapter, prompt, layout_of(model), WeightSchedule(0.8))):
        assert_close(call(model, t=sigma), expected, **TOLERANCE)


# --- SD3.5 -----------------------------------------------------------------------------------------------------------


def sd3(model: Any, t: float = 500.0, **more: Any) -> Tensor:
    with torch.no_grad():
        return call_sd3(model, LATENTS, torch.tensor(t), PROMPT, **more)


class Sd35:
    """diffusers' own adapter of SD3.5 on a model of the same weights as ours."""

    def __init__(self, scale: float, **changes: Any) -> None:
        self.ours, self.theirs = (diffusers_sd3(**SD3_SIZES, **changes) for _ in range(2))
        state = tiny_state("sd3.5", **SD35)
        self.adapter = load_adapter(state)
        self.theirs._load_ip_adapter_weights(nested(state), low_cpu_mem_usage=False)
        self.scale(scale)
        self.features = torch.stack([torch.zeros(1, 7, FEATURE_DIM), noise(1, 7, FEATURE_DIM, seed=9)])

    def scale(self, scale: float) -> None:
        for processor in self.theirs.attn_processors.values():
            processor.scale = scale

    def expected(self, t: float) -> Tensor:
        return sd3(self.theirs, t, joint_attention_kwargs={"ip_adapter_image_embeds": per_member(self.features[:, 0])})

    def got(self, t: float, mask: Tensor | None = None, **schedule: Any) -> Tensor:
        with backend.apply(self.ours, patch_of(self.ours, self.adapter, self.features, mask, **schedule)):
            return sd3(self.ours, t)


@pytest.mark.parametrize("t", [1000.0, 371.25, 4.5])
def test_sd35_equals_diffusers_at_every_timestep(t: float) -> None:
    both = Sd35(0.6)
    expected = both.expected(t)
    assert (expected - sd3(both.ours, t)).abs().max() > 0.05
    assert_close(both.got(t, strength=0.6), expected, **TOLERANCE)
    both.scale(0.0)
    assert torch.equal(both.expected(t), sd3(both.ours, t))
    assert torch.equal(both.got(t, strength=0.0), sd3(both.ours, t))


def test_sd35_where_the_models_norms_cannot_be_undone() -> None:
    """Nearly a zero among the weights of a norm: raw queries and keys are listened to, and normed for the adapter."""
    both = Sd35(0.6)
    for model in (both.ours, both.theirs):
        for block in model.transformer_blocks:
            block.attn.norm_q.weight.data[5] = block.attn.norm_k.weight.data[7] = 1e-9
    layout = layout_of(both.ours)
    entry = TransformerEntry.of(both.ours, layout, layout.sites[0], both.adapter.spec.format.reach)
    names = {module: name for name, module in entry.attention.named_modules()}
    assert [names[module] for module in entry.modules()] == ["to_q", "to_k", "to_v", "to_out.0"]
    assert_close(both.got(500.0, strength=0.6), both.expected(500.0), **TOLERANCE)


@pytest.mark.parametrize("qk_norm", [None, "layer_norm"])
def test_sd3_without_norms_that_a_weight_undoes(qk_norm: str | None) -> None:
    """SD3 (not 3.5) norms nothing, and another norm takes the mean away; an adapter's norms then see what the projections give."""
    both = Sd35(0.6, qk_norm=qk_norm)
    assert_close(both.got(500.0, strength=0.6), both.expected(500.0), **TOLERANCE)


def test_sd35_medium_has_a_second_attention_that_sees_no_image() -> None:
    """diffusers' adapter acts in it too, with another layer of the file; ours acts where the text attends."""
    model = diffusers_sd3(**SD3_SIZES, medium=True)
    adapter = load_adapter(tiny_state("sd3.5", **SD35))
    features = Sd35(0.6).features
    hooked = {
        name
        for name, module in model.named_modules()
        if module._forward_hooks or module._forward_pre_hooks  # pyright: ignore[reportPrivateUsage]
    }
    assert not hooked
    with backend.apply(model, patch_of(model, adapter, features)):
        hooked = {name for name, m in model.named_modules() if m._forward_hooks or m._forward_pre_hooks}
        assert (sd3(model) - sd3(diffusers_sd3(**SD3_SIZES, medium=True))).abs().max() > 1e-2
    assert hooked == {""} | {
        f"transformer_blocks.{i}.attn.{name}" for i in range(3) for name in ("norm_q", "norm_k", "to_v", "to_out.0")
    }


def test_sd35_with_fused_projections_says_what_to_do() -> None:
    both = Sd35(0.6)
    both.ours.fuse_qkv_projections()
    with pytest.raises(
        IncompatibleAdapterError,
        match=r"norm_q and norm_k and to_v of the attention did not run: .*unfuse_qkv_projections",
    ):
        both.got(500.0)


@pytest.mark.parametrize("masked", [False, True])
def test_sd35_with_two_pictures_in_a_batch_is_each_alone(masked: bool) -> None:
    both = Sd35(1.0)
    mask = torch.rand(2 * ROWS, 2 * COLUMNS, generator=torch.Generator().manual_seed(0)) if masked else None
    with torch.no_grad():
        tokens = both.adapter.tokens(noise(2, 7, FEATURE_DIM, seed=12))
        nothing = both.adapter.tokens(torch.zeros(1, 7, FEATURE_DIM))
    layout = layout_of(both.ours)

    def run(cond: Tensor, rows: list[int]) -> Tensor:
        features = torch.zeros(len(cond), 1, 7, FEATURE_DIM)
        prompt = ImagePrompt(cond, nothing.expand(len(cond), -1, -1), features, features, "a", "none", 192)
        with backend.apply(both.ours, bake(both.adapter, prompt, layout, None, mask)), torch.no_grad():
            return call_sd3(both.ours, LATENTS[rows], torch.tensor(500.0), PROMPT[rows])

    together = run(tokens, [0, 1, 2, 3])
    for i in (0, 1):
        assert_close(run(tokens[i : i + 1], [i, i + 2]), together[[i, i + 2]], **TOLERANCE)
    assert (together[2] - run(tokens[:1], [0, 1, 2, 3])[3]).abs().max() > 1e-2


# --- whole pipelines -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Flux", "Flux img2img", "Chroma"])
def test_a_pipeline_with_a_negative_image_equals_diffusers(name: str) -> None:
    """Both prompts see an image of their own, in two calls of every step; the whole run is the same."""
    kind = {"Flux": FluxPipeline, "Flux img2img": FluxImg2ImgPipeline, "Chroma": ChromaPipeline}[name]
    ours, theirs = ((chroma_pipeline if name == "Chroma" else flux_pipeline)(kind) for _ in range(2))
    sizes: dict[str, Any] = {
        "token_dim": TEXT_DIM,
        "channels": (WIDTH,) * 2,
        "num_tokens": 4,
        "feature_dim": FEATURE_DIM,
    }
    state, features = tiny_state("xlabs-diffusers", **sizes), noise(2, 1, FEATURE_DIM, seed=9)
    given: dict[str, Any] = {"prompt": "a red circle", "negative_prompt": "ugly", "num_inference_steps": 3}
    given |= {"height": 12, "width": 20, "max_sequence_length": 16, "output_type": "latent"}
    given |= {"guidance_scale" if name == "Chroma" else "true_cfg_scale": 3.0}
    if name == "Flux img2img":
        given |= {"image": noise(1, 3, 12, 20, seed=1), "strength": 1.0}
    theirs.transformer._load_ip_adapter_weights([nested(state)], low_cpu_mem_usage=False)

    def run(pipeline: Any, **more: Any) -> Tensor:
        return pipeline(generator=torch.Generator().manual_seed(1), **given, **more).images

    plain = run(ours)
    expected = run(theirs, ip_adapter_image_embeds=[features[1:]], negative_ip_adapter_image_embeds=[features[:1]])
    with backend.apply_to_pipeline(ours, patch_of(ours.transformer, load_adapter(state), features)):
        got = run(ours)
    assert (expected - plain).abs().max() > 0.05
    assert_close(got, expected, rtol=0, atol=1e-4)  # three steps, guidance 3


def test_an_sd3_pipeline_equals_diffusers() -> None:
    """Both branches in one batch, tokens of every timestep."""
    ours, theirs = (sd3_pipeline(**SD3_SIZES) for _ in range(2))
    state = tiny_state("sd3.5", **SD35)
    theirs.transformer._load_ip_adapter_weights(nested(state), low_cpu_mem_usage=False)
    features = torch.stack([torch.zeros(1, 7, FEATURE_DIM), noise(1, 7, FEATURE_DIM, seed=9)])
    given: dict[str, Any] = {
        "prompt": "a red circle",
        "negative_prompt": "ugly",
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
    }
    given |= {"height": 12, "width": 20, "max_sequence_length": 16, "output_type": "latent"}

    def run(pipeline: Any, **more: Any) -> Tensor:
        return pipeline(generator=torch.Generator().manual_seed(1), **given, **more).images

    for processor in theirs.transformer.attn_processors.values():
        processor.scale = 0.6
    expected = run(theirs, ip_adapter_image_embeds=torch.cat([*features]))
    patch = patch_of(ours.transformer, load_adapter(state), features, strength=0.6)
    plain = run(ours)
    with backend.apply_to_pipeline(ours, patch):
        assert_close(run(ours), expected, rtol=0, atol=1e-4)
    assert (expected - plain).abs().max() > 0.05
