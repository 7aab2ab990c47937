"""Image prompts in diffusers' Flux and Chroma: the same numbers as other implementations, in every place and call that pipelines make."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

import ipadapter_core.backends.diffusers.doors as backend
from ipadapter_core.attention.kv import Baked, Norms
from ipadapter_core.attention.masks import RegionMask
from ipadapter_core.attention.maths import split_heads
from ipadapter_core.attention.patch import AdapterPatch, resolve_weights
from ipadapter_core.attention.schedule import WeightSchedule
from ipadapter_core.backends.diffusers.notes import raster
from ipadapter_core.backends.diffusers.transformer import TransformerEntry
from ipadapter_core.compatibility import CORRECT
from ipadapter_core.errors import IncompatibleAdapterError
from ipadapter_core.models import layout_of
from ipadapter_core.models.reach import Reach, every, sites_in
from packed_calls import BATCH, COLUMNS, PROMPT, ROWS, TEXT, X, call, places
from tiny_flux import HEADS, TEXT_DIM, WIDTH, diffusers_chroma, diffusers_flux
from tiny_models import noise

TOLERANCE = {"rtol": 0.0, "atol": 1e-5}  # fp32; outputs are of size 1, both sides run the same kernels in other orders
XLABS = Reach(sites_in("double"), query="normed", join="residual")
CHARACTER = Reach(every, query="raw")
INSTANTX = Reach(every, query="normed", span="all")
KINDS: dict[str, Callable[[], Any]] = {"Flux": diffusers_flux, "Chroma": diffusers_chroma}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


class Layer:
    """The image half of an adapter at one site: keys and values with bias for tokens ``m n c`` of a branch."""

    def __init__(self, seed: int) -> None:
        self.k, self.v, self.k_bias, self.v_bias = (
            noise(*shape, seed=seed + i) / 4 for i, shape in enumerate(((WIDTH, TEXT_DIM), (WIDTH, TEXT_DIM), (WIDTH,), (WIDTH,)))
        )  # fmt: skip

    def __call__(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return F.linear(tokens, self.k, self.k_bias), F.linear(tokens, self.v, self.v_bias)


def image_tokens(count: int = 5, latents: int = 1, seed: int = 20) -> Tensor:
    """Image tokens ``2 m n c`` of the negative branch and the positive one."""
    return noise(2, latents, count, TEXT_DIM, seed=seed)


def query_weight(index: int) -> Tensor:
    """The weight of an adapter's own norm of queries at a site."""
    return 1 + 0.3 * noise(WIDTH // HEADS, seed=90 + index)


def baked(model: nn.Module, reach: Reach, tokens: Tensor, mask: Tensor | None = None, seed: int = 50, **schedule: Any) -> AdapterPatch:  # fmt: skip
    layout, plan = layout_of(model), WeightSchedule(**schedule)
    sites: list[Baked | None] = [None] * len(layout.sites)
    for index in reach.sites(layout):
        k, v = (
            split_heads(t.flatten(0, 1), HEADS).unflatten(0, tokens.shape[:2]) for t in Layer(seed + 10 * index)(tokens)
        )
        norms = Norms(query_weight(index)) if reach.query == "raw" else None
        sites[index] = Baked(k.contiguous(), v.contiguous(), norms=norms)
    weights, per_latent = resolve_weights(plan, layout, CORRECT)
    region = None if mask is None else RegionMask.from_tensor(mask)
    return AdapterPatch("tiny", layout, tuple(sites), plan, region, weights, CORRECT, per_latent, reach)


def run(model: Any, *patches: AdapterPatch, branches: Any = ("uncond", "cond"), **how: Any) -> Tensor:
    with backend.apply(model, *patches, branches=branches):
        return call(model, **how)


def per_member(tokens: Tensor) -> Tensor:
    """Image tokens of every member of the batch, the negative half first."""
    return tokens.expand(-1, BATCH // 2, -1, -1).flatten(0, 1)


# --- parity ----------------------------------------------------------------------------------------------------------


class XLabs:
    """diffusers' own IP-Adapter for Flux with the layers of ``baked``, its tokens given to them as they are."""

    def __init__(self, kind: str, seeds: Sequence[int]) -> None:
        self.model = KINDS[kind]()
        state = [self.state(seed) for seed in seeds]
        self.model._load_ip_adapter_weights(state, low_cpu_mem_usage=False)
        self.model.encoder_hid_proj = AsTheyAre()

    @staticmethod
    def state(seed: int) -> dict[str, dict[str, Tensor]]:
        layers: dict[str, Tensor] = {}
        for index in range(2):
            layer = Layer(seed + 10 * index)
            layers |= {f"{index}.to_k_ip.weight": layer.k, f"{index}.to_k_ip.bias": layer.k_bias}
            layers |= {f"{index}.to_v_ip.weight": layer.v, f"{index}.to_v_ip.bias": layer.v_bias}
        sizes = {"proj.weight": (4 * TEXT_DIM, 24), "proj.bias": (4 * TEXT_DIM,), "norm.weight": (TEXT_DIM,), "norm.bias": (TEXT_DIM,)}  # fmt: skip
        return {"ip_adapter": layers, "image_proj": {key: torch.zeros(size) for key, size in sizes.items()}}

    def run(self, tokens: Sequence[Tensor], scales: Sequence[float]) -> Tensor:
        for processor in self.model.attn_processors.values():
            if hasattr(processor, "scale"):
                processor.scale = list(scales)
        embeds = [per_member(t) for t in tokens]
        return call(self.model, joint_attention_kwargs={"ip_adapter_image_embeds": embeds})


class AsTheyAre(nn.Module):
    def forward(self, embeds: list[Tensor]) -> list[Tensor]:
        return embeds


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("counts", "scales"), [((4,), (0.7,)), ((9,), (-0.4,)), ((16, 3), (0.7, 0.5))], ids=["4", "9", "16 and 3"]
)
def test_behind_double_blocks_equals_diffusers(kind: str, counts: tuple[int, ...], scales: tuple[float, ...]) -> None:
    seeds = [100 * (i + 1) for i in range(len(counts))]
    tokens = [image_tokens(count, seed=20 + i) for i, count in enumerate(counts)]
    theirs, ours = XLabs(kind, seeds), KINDS[kind]()
    expected = theirs.run(tokens, scales)
    patches = [baked(ours, XLABS, t, seed=s, strength=f) for t, s, f in zip(tokens, seeds, scales, strict=True)]
    assert (expected - call(ours)).abs().max() > 0.05, "the adapter hardly acts, so equality would prove nothing"
    assert_close(run(ours, *patches), expected, **TOLERANCE)
    assert torch.equal(theirs.run(tokens, [0.0] * len(counts)), call(ours))
    off = [baked(ours, XLABS, t, seed=s, strength=0.0) for t, s in zip(tokens, seeds, strict=True)]
    assert torch.equal(run(ours, *off), call(ours))


class InstantX:
    """The formula of InstantX as a processor: the normed query before rotation attends to image tokens, in single blocks the
    text's too; the result is added before the output projection (their ``attention_processor.py``)."""

    def __init__(self, index: int, tokens: Tensor, scale: float, mask: Tensor | None = None) -> None:
        self.index, self.tokens, self.scale, self.mask = index, tokens, scale, mask

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Any = None, image_rotary_emb: Any = None, **_: Any) -> Any:  # fmt: skip
        from diffusers.models.embeddings import apply_rotary_emb

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q, k, v = attn.norm_q(heads(attn.to_q(hidden_states))), attn.norm_k(heads(attn.to_k(hidden_states))), heads(attn.to_v(hidden_states))  # fmt: skip
        image = F.scaled_dot_product_attention(q, *map(heads, Layer(50 + 10 * self.index)(self.tokens)))
        if encoder_hidden_states is not None:
            text = [
                heads(layer(encoder_hidden_states)) for layer in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)
            ]
            text[0], text[1] = attn.norm_added_q(text[0]), attn.norm_added_k(text[1])
            q, k, v = (torch.cat(pair, 2) for pair in zip(text, (q, k, v), strict=True))
        q, k = (apply_rotary_emb(t, image_rotary_emb) for t in (q, k))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        image = self.scale * image.transpose(1, 2).flatten(2)
        if encoder_hidden_states is None:
            return out + image
        count = encoder_hidden_states.shape[1]
        out, of_text = out[:, count:] + image, out[:, :count]
        return attn.to_out[0](out), attn.to_add_out(of_text)


def instantx(model: Any, tokens: Tensor, scale: float) -> Any:
    model = copy.deepcopy(model)
    names = [name for name in model.attn_processors if "single" not in name] + [
        name for name in model.attn_processors if "single" in name
    ]
    model.set_attn_processor({name: InstantX(i, tokens, scale) for i, name in enumerate(names)})
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [4, 128])
def test_before_the_output_projection_equals_the_published_formula(kind: str, count: int) -> None:
    model, tokens = KINDS[kind](), image_tokens(count)
    expected = call(instantx(model, per_member(tokens), 0.7))
    assert (expected - call(model)).abs().max() > 0.05
    assert_close(call(instantx(model, per_member(tokens), 0.0)), call(model), **TOLERANCE)
    assert_close(run(model, baked(model, INSTANTX, tokens, strength=0.7)), expected, **TOLERANCE)


class Character(InstantX):
    """The formula of InstantCharacter: the picture's raw query under a norm of the adapter's, ``w · x / (rms + 1e-6)``, in single
    blocks too; the result is added before the output projection (their ``pipeline.py``)."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *more: Any) -> Any:  # fmt: skip
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        text = TEXT if encoder_hidden_states is None else 0
        q = heads(attn.to_q(hidden_states[:, text:]))
        q = query_weight(self.index) * q / (q.square().mean(-1, keepdim=True).sqrt() + 1e-6)
        image = F.scaled_dot_product_attention(q, *map(heads, Layer(50 + 10 * self.index)(self.tokens)))
        image = F.pad(self.scale * image.transpose(1, 2).flatten(2), (0, 0, text, 0))
        layer = None if encoder_hidden_states is None else attn.to_out[0]
        if layer is None:
            return HeadsFirst()(attn, hidden_states, None, *more) + image
        attn.to_out[0] = nn.Identity()
        out, of_text = HeadsFirst()(attn, hidden_states, encoder_hidden_states, *more)
        attn.to_out[0] = layer
        return layer(out + image), of_text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weights", ["sound", "unsound", "none"])
def test_a_norm_of_the_adapters_own_sees_the_raw_query(kind: str, weights: str) -> None:
    """The model's norm is undone by its weight; where it has nearly a zero there, or no norm, the raw query is listened to."""
    model, tokens = KINDS[kind](), image_tokens()
    for module in model.modules():
        if hasattr(module, "norm_q") and weights == "unsound":
            module.norm_q.weight.data[3] = 1e-9
    heard = {"sound": ["norm_q"], "unsound": ["to_q"], "none": ["to_q"]}[weights]
    if weights == "none":
        for module in model.modules():
            if hasattr(module, "norm_q"):
                module.norm_q = nn.RMSNorm(WIDTH // HEADS, eps=1e-6, elementwise_affine=False)
        heard = ["norm_q"]
    layout = layout_of(model)
    entry = TransformerEntry.of(model, layout, layout.sites[0], CHARACTER)
    assert entry.modules()[0] is getattr(entry.attention, heard[0])
    oracle = copy.deepcopy(model)
    names = sorted(oracle.attn_processors, key=lambda name: "single" in name)
    oracle.set_attn_processor({name: Character(i, per_member(tokens), 0.7) for i, name in enumerate(names)})
    expected = call(oracle)
    assert (expected - call(model)).abs().max() > 0.05
    assert_close(run(model, baked(model, CHARACTER, tokens, strength=0.7)), expected, **TOLERANCE)


@pytest.mark.parametrize("reach", [XLABS, INSTANTX, CHARACTER], ids=["behind", "before", "raw"])
@pytest.mark.parametrize("at", ["layers", "blocks"])
def test_weights_that_are_elsewhere_between_calls(reach: Reach, at: str) -> None:
    """Offloaded layer by layer, or block by block: then a norm's weight is there in a call and not before."""
    from accelerate import cpu_offload
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model, tokens = diffusers_flux(), image_tokens()
    patch = baked(model, reach, tokens)
    expected, away = run(model, patch), copy.deepcopy(model)
    if at == "layers":
        cpu_offload(away, execution_device=torch.device("cpu"))
    else:
        for block in (*away.transformer_blocks, *away.single_transformer_blocks):
            weights = {key: tensor.clone() for key, tensor in block.state_dict().items()}
            hook = AlignDevicesHook("cpu", offload=True, weights_map=weights, place_submodules=True)
            add_hook_to_module(block, hook)
    assert away.transformer_blocks[0].attn.norm_q.weight.is_meta
    assert_close(run(away, patch), expected, **TOLERANCE)


@pytest.mark.parametrize("broken", ["all tokens", "projected query", "branches swapped"])
def test_the_comparison_with_the_formula_can_fail(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = diffusers_flux(), image_tokens()
    expected, branches, reach = call(instantx(model, per_member(tokens), 0.7)), ("uncond", "cond"), INSTANTX
    if broken == "all tokens":
        reach = replace(INSTANTX, span="image")
    elif broken == "projected query":
        monkeypatch.setattr(TransformerEntry, "_names", lambda self: ["to_q"])
    else:
        branches = ("cond", "uncond")
    got = run(model, baked(model, reach, tokens, strength=0.7), branches=branches)
    assert (got - expected).abs().max() > 1e-2


class HeadsFirst(InstantX):
    """Another processor that has heads before tokens, and adds nothing."""

    def __init__(self) -> None:
        super().__init__(0, torch.zeros(BATCH, 1, TEXT_DIM), 0.0)


def test_whoever_computes_the_attention_the_image_is_added() -> None:
    """Heads first or tokens first, one matrix for queries, keys and values, or layers with LoRAs."""
    model, tokens = diffusers_flux(), image_tokens()
    patch = baked(model, INSTANTX, tokens)
    expected = run(model, patch) - call(model)
    other = copy.deepcopy(model)
    other.set_attn_processor(HeadsFirst())
    assert_close(run(other, patch) - call(other), expected, **TOLERANCE)
    fused = copy.deepcopy(model)
    fused.fuse_qkv_projections()
    assert any(hasattr(module, "to_qkv") for module in fused.modules())
    assert_close(run(fused, patch) - call(fused), expected, **TOLERANCE)


@pytest.mark.parametrize("count", [HEADS, 1, 7])
def test_as_many_tokens_as_heads_are_not_mixed_up(count: int) -> None:
    """A stream of two tokens and two heads has the same shape either way round."""
    model, tokens = diffusers_flux(), image_tokens()
    patch, ids, x = baked(model, XLABS, tokens), places(1, count), X[:, :count]
    alone = [run(model, patch, x=x[i : i + 1], text=PROMPT[i : i + 1], ids=ids, branches=("cond",)) for i in range(2)]
    assert_close(
        run(model, patch, x=x[:2], text=PROMPT[:2], ids=ids, branches=("cond",)), torch.cat(alone), **TOLERANCE
    )
    theirs = XLabs("Flux", [50])
    embeds = [tokens[1].expand(2, -1, -1)]
    expected = call(
        theirs.model, x[:2], PROMPT[:2], ids=ids, joint_attention_kwargs={"ip_adapter_image_embeds": embeds}
    )
    assert_close(torch.cat(alone), expected, **TOLERANCE)


def test_a_lora_of_peft_is_in_the_query() -> None:
    """Before or after the image prompt was applied; a LoRA on the layer that the attention ends in stays too."""
    from peft import LoraConfig, inject_adapter_in_model

    tokens = image_tokens()

    def with_lora(model: Any) -> Any:
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False), model)
        for i, (name, weight) in enumerate(sorted(model.named_parameters())):
            if "lora_" in name:
                weight.data = noise(*weight.shape, seed=i)
        return model.eval().requires_grad_(False)

    before = with_lora(diffusers_flux())
    patch = baked(before, INSTANTX, tokens)
    expected = run(before, patch)
    oracle = with_lora(instantx(diffusers_flux(), per_member(tokens), 1.0))
    assert_close(expected, call(oracle), **TOLERANCE)
    after = diffusers_flux()
    with backend.apply(after, patch):
        without = call(after)
        with_lora(after)
        assert_close(call(after), expected, **TOLERANCE)
    assert (without - expected).abs().max() > 1e-2
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in after.modules())


def test_a_processor_that_passes_the_norm_by_is_named() -> None:
    model = diffusers_flux()
    patch = baked(model, INSTANTX, image_tokens())

    class Bypassing(InstantX):
        def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *_: Any, **__: Any) -> Any:  # fmt: skip
            return hidden_states if encoder_hidden_states is None else (attn.to_out[0](hidden_states), encoder_hidden_states)  # fmt: skip

    model.set_attn_processor(Bypassing(0, torch.zeros(1), 0.0))
    with pytest.raises(
        IncompatibleAdapterError, match=r"transformer_blocks\.0\.attn: norm_q of the attention did not run"
    ):
        run(model, patch)


@pytest.mark.parametrize("reach", [XLABS, INSTANTX], ids=["behind the block", "before the projection"])
def test_a_cache_that_skips_blocks_gives_what_they_gave(reach: Reach) -> None:
    """The first call computes, the second, of the same noise, none but the first block: its residual holds the image's part."""
    from diffusers.hooks import FirstBlockCacheConfig

    model = diffusers_flux()
    patch, cached, ran = baked(model, reach, image_tokens()), copy.deepcopy(model), list[int]()
    cached.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    cached.single_transformer_blocks[1].norm.register_forward_hook(lambda *_: ran.append(1))
    with backend.apply(cached, patch), cached.cache_context("cond"):
        first, second = call(cached), call(cached)
    assert_close(first, run(model, patch), **TOLERANCE)
    assert len(ran) == 1, "the second call skipped nothing"
    if reach is INSTANTX:
        assert_close(second, first, **TOLERANCE)
    else:  # the first block is computed again, and the image added behind it
        assert (second - first).abs().max() < (first - call(model)).abs().max()


def test_diffusers_own_adapter_and_ours_are_two_adapters() -> None:
    tokens = image_tokens(6)
    theirs, ours = XLabs("Flux", [100]), diffusers_flux()
    for processor in theirs.model.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [0.7]
    first, second = (baked(ours, XLABS, tokens, seed=s, strength=f) for s, f in ((100, 0.7), (200, 0.5)))
    expected = run(ours, first, second)
    with backend.apply(theirs.model, second):
        got = call(theirs.model, joint_attention_kwargs={"ip_adapter_image_embeds": [per_member(tokens)]})
    assert_close(got, expected, **TOLERANCE)
    assert (got - run(ours, first)).abs().max() > 1e-2


def test_adapters_of_unets_are_refused() -> None:
    model = diffusers_flux()
    patch = replace(baked(model, XLABS, image_tokens()), reach=Reach(every))
    with pytest.raises(IncompatibleAdapterError, match="cross-attention, and Flux is a transformer"):
        run(model, patch)
    own = replace(patch, reach=Reach(every, query="raw", own_keys=True))
    with pytest.raises(IncompatibleAdapterError, match="own keys, which single 0 of Flux"):
        run(model, own)


@pytest.mark.parametrize("reach", [XLABS, INSTANTX, CHARACTER], ids=["behind", "before", "raw"])
def test_another_dtype_between_calls(reach: Reach) -> None:
    """The same handle serves the model in float32, in float16, and in float32 again; the image does the same up to rounding."""
    model, weights = diffusers_flux(), diffusers_flux().state_dict()
    patch, low = baked(model, reach, image_tokens()), {"x": X.half(), "text": PROMPT.half()}
    effect = run(model, patch) - call(model)
    with backend.apply(model, patch):
        first = call(model)
        got = call(model.half(), **low)
        model.float().load_state_dict(weights)
        assert_close(call(model), first, **TOLERANCE)
    assert got.dtype == torch.float16
    rounded = got - call(model.half(), **low)
    assert (rounded.float() - effect).abs().mean() < 0.1 * effect.abs().mean()


# --- which tokens ------------------------------------------------------------------------------------------------------


class InPlaces(InstantX):
    """The formula with a weight for every token of text and picture."""

    def __call__(self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *more: Any) -> Any:  # fmt: skip
        assert self.mask is not None
        weights = self.mask if encoder_hidden_states is None else self.mask[:, TEXT:]
        part = InstantX(self.index, self.tokens, 1.0)
        part.scale = self.scale * weights  # type: ignore[assignment]
        return part(attn, hidden_states, encoder_hidden_states, *more)


def in_places(model: Any, reach: Reach, tokens: Tensor, weights: Tensor) -> Any:
    model = instantx(model, tokens, 0.0)
    reached = reach.sites(layout_of(model))
    for i, name in enumerate(sorted(model.attn_processors, key=lambda name: "single" in name)):
        module = model.get_submodule(name.removesuffix(".processor"))
        module.set_processor(InPlaces(i, tokens, float(i in reached), weights))
    return model


def test_a_mask_covers_the_pictures_tokens_and_texts_take_its_share() -> None:
    """Two of five columns: whole tokens inside or outside, so every weight is known; the text has two fifths."""
    model, tokens = diffusers_flux(), image_tokens()
    mask = torch.zeros(2 * ROWS, 2 * COLUMNS)
    mask[:, :4] = 1
    picture = torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]).repeat(ROWS)
    for reach, share in ((INSTANTX, 0.4), (replace(INSTANTX, span="image"), 0.0)):
        weights = torch.cat([torch.full((TEXT,), share), picture])[None, :, None]
        expected = call(in_places(model, reach, per_member(tokens), weights))
        got = run(model, baked(model, reach, tokens, mask))
        assert_close(got, expected, **TOLERANCE)
        assert (got - run(model, baked(model, reach, tokens))).abs().max() > 1e-2


@pytest.mark.parametrize("masked", [False, True])
def test_reference_pictures_of_kontext_see_no_image(masked: bool) -> None:
    model, tokens, behind = diffusers_flux(), image_tokens(), 4 * 2
    x, ids = noise(BATCH, ROWS * COLUMNS + behind, 16, seed=8), torch.cat([places(ROWS, COLUMNS), places(4, 2, 1.0)])
    mask = torch.zeros(2 * ROWS, 2 * COLUMNS)
    mask[2:] = 1
    inside = mask[::2, ::2].flatten() if masked else torch.ones(ROWS * COLUMNS)
    for reach, share in ((INSTANTX, float(inside.mean())), (replace(INSTANTX, span="image"), 0.0)):
        weights = torch.cat([torch.full((TEXT,), share), inside, torch.zeros(behind)])[None, :, None]
        expected = call(in_places(model, reach, per_member(tokens), weights), x, ids=ids)
        assert_close(
            run(model, baked(model, reach, tokens, mask if masked else None), x=x, ids=ids), expected, **TOLERANCE
        )
    behind_block = run(model, baked(model, XLABS, tokens, mask if masked else None), x=x, ids=ids)
    assert (behind_block - call(model, x, ids=ids)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("ids", "expected"),
    [
        (places(3, 5), (3, 5)), (places(1, 5), (1, 5)), (places(5, 1), (5, 1)), (places(3, 5)[None].repeat(2, 1, 1), (3, 5)),
        (torch.cat([places(3, 5), places(4, 2, 1.0), places(2, 2, 2.0)]), (3, 5)), (places(300, 2).bfloat16(), (300, 2)),
        (places(3, 5)[:-1], None), (torch.zeros(0, 3), None), (torch.zeros(7), None),
    ],
)  # fmt: skip
def test_places_of_tokens_tell_the_pictures_grid(ids: Tensor, expected: tuple[int, int] | None) -> None:
    assert raster(ids) == expected


def test_one_picture_per_latent_and_one_mask_per_latent() -> None:
    model, tokens = diffusers_flux(), image_tokens(latents=2)
    masks = torch.zeros(2, ROWS, COLUMNS)
    masks[0, 1:], masks[1, :, 2:] = 1, 1
    for reach in (INSTANTX, XLABS):
        got = run(model, baked(model, reach, tokens, masks))
        for i in (0, 1):
            pair = [i, i + 2]
            alone = baked(model, reach, tokens[:, i : i + 1], masks[i])
            assert_close(run(model, alone, x=X[pair], text=PROMPT[pair]), got[pair], **TOLERANCE)
        assert (got[2] - run(model, baked(model, reach, tokens[:, :1], masks[0]))[3]).abs().max() > 1e-2


# --- training and compiling ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_with_checkpointing_are_those_without(reentrant: bool) -> None:
    from functools import partial

    from torch.utils.checkpoint import checkpoint

    model, tokens = diffusers_flux(), image_tokens()
    patches = baked(model, INSTANTX, tokens, torch.rand(3, 5)), baked(model, XLABS, tokens, seed=70)
    x, gradients = X.clone().requires_grad_(), list[Tensor]()
    for checkpointed in (False, True):
        if checkpointed:
            model.train()
            model.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=reentrant))
        with backend.apply(model, *patches):
            call(model, x).square().mean().backward()
        assert x.grad is not None
        gradients.append(x.grad)
        x.grad = None
    assert bool(gradients[0].any())
    assert_close(gradients[1], gradients[0], **TOLERANCE)
