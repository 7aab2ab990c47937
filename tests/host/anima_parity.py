"""Image prompts in a real ComfyUI's Anima (0.33 or later), next to its blocks written out by hand with the adapters' formulas.

    COMFY/.venv/bin/python anima_parity.py COMFY

Prints one JSON object per line: {"case", "difference"}, the largest one of a branch's prediction to the formula's (None where a
case has none), with what else the case is about; {"absent": …} on a host without Anima. tests/host/test_anima_parity.py judges.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

(host_folder,) = sys.argv[1:2]
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, host_folder)
HERE = Path(__file__).resolve().parent

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.model_patcher  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import comfy.supported_models  # noqa: E402
import comfy.weight_adapter  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from in_host import Counting, hooks_on, load, weights_packed, without_options  # noqa: E402
from torch import Tensor, nn  # noqa: E402

torch.set_num_threads(1)
if not hasattr(comfy.supported_models, "Anima"):
    print(json.dumps({"absent": "this ComfyUI has no Anima"}))
    sys.exit()


tiny_state = load("tiny", HERE.parent / "tiny.py").tiny_state
load("ipadapter_core", HERE.parents[1] / "ipadapter_core" / "__init__.py", package=True)
import ipadapter_core  # noqa: E402
from ipadapter_core import Window  # noqa: E402
from ipadapter_core.backends.comfy import doors  # noqa: E402
from ipadapter_core.backends.comfy import lora as backend_lora  # noqa: E402
from ipadapter_core.lora import LoRAPatch, choose_mode, load_lora  # noqa: E402

WIDTH, HEADS, TEXT, BLOCKS, FEATURE, SEEN = 64, 2, 32, 3, 12, 7
HEAD = WIDTH // HEADS
SIGMA, ROWS, COLUMNS = 0.6, 5, 3


def numbers(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


INPUTS = {
    "x": numbers(2, 16, 1, 2 * ROWS, 2 * COLUMNS, seed=5),
    "positive": numbers(1, 7, TEXT, seed=6),
    "negative": numbers(1, 7, TEXT, seed=7),
    "longer": numbers(1, 9, TEXT, seed=8),
    "features": numbers(2, SEEN, FEATURE, seed=10),
    "mask": torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(12)),
}
FILES: dict[str, dict[str, Tensor]] = {
    name: tiny_state("anima-character", seed=seed, token_dim=FEATURE, channels=(WIDTH,) * BLOCKS, hidden_dim=WIDTH)
    for name, seed in (("character", 1), ("other", 2))
} | {
    "pe": tiny_state("anima-pe", seed=3, token_dim=TEXT, feature_dim=FEATURE, channels=(WIDTH,) * BLOCKS),
}  # fmt: skip

# --- the host's model --------------------------------------------------------------------------------------------------


ADAPTER = comfy.ldm.anima.model.LLMAdapter


def transformer(adapter: Callable[..., nn.Module] = lambda **_: nn.Identity()) -> Any:
    """A MODEL of the host around its own Anima, without the text encoder's adapter, which has no part in most of this."""
    comfy.ldm.anima.model.LLMAdapter = adapter
    described = comfy.supported_models.Anima({
        "image_model": "anima", "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "in_channels": 16, "out_channels": 16,
        "patch_spatial": 2, "patch_temporal": 1, "model_channels": WIDTH, "concat_padding_mask": True,
        "crossattn_emb_channels": TEXT, "pos_emb_cls": "rope3d", "pos_emb_learnable": True, "pos_emb_interpolation": "crop",
        "min_fps": 1, "max_fps": 30, "use_adaln_lora": True, "adaln_lora_dim": 16, "num_blocks": BLOCKS, "num_heads": HEADS,
        "extra_per_block_abs_pos_emb": False, "rope_h_extrapolation_ratio": 4.0, "rope_w_extrapolation_ratio": 4.0,
        "rope_t_extrapolation_ratio": 1.0, "rope_enable_fps_modulation": False,
    })  # fmt: skip
    described.set_inference_dtype(torch.float32, None)
    model = described.get_model({}, "", device=torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    for parameter in model.diffusion_model.parameters():
        size, base = (0.8 / parameter.shape[-1] ** 0.5, 0.0) if parameter.ndim > 1 else (0.3, 1.0)
        parameter.data = base + size * torch.randn(parameter.shape, generator=generator)
    model.diffusion_model.eval().requires_grad_(False)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def predict(model: Any, branches: tuple[str, ...] = ("positive", "negative"), *, texts: dict[str, str] | None = None, area: bool = False, more: dict[str, Any] | None = None) -> dict[str, Tensor]:  # fmt: skip
    """The velocity of the branches in one step of the host's own sampler and guider, both at once or one alone."""
    model, seen = model.clone(), dict[str, Tensor]()

    def look(args: Any) -> Any:
        for name, out in zip(branches, args["conds_out"], strict=False):
            seen[name] = (args["input"] - out) / SIGMA
        return args["conds_out"]

    model.set_model_sampler_pre_cfg_function(look)
    more = {"area": (1, 6, 4, 0, 2, 2), "strength": 1.0, "set_area_to_bounds": False} if area else more or {}
    conds = [[[INPUTS[(texts or {}).get(branch, branch)], dict(more)]] for branch in branches]
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(conds[0], conds[-1])
    guider.set_cfg(1.0 if area or len(branches) == 1 else 3.0)
    x = INPUTS["x"]
    sigmas, sampler = torch.tensor([SIGMA, 0.0]), comfy.samplers.sampler_object("euler")
    # latents are named as the host's format scales them
    latent = model.model.process_latent_out(torch.zeros_like(x))
    guider.sample(x / SIGMA, latent, sampler, sigmas, seed=0, disable_pbar=True)
    return {name: out[..., 2:8, 2:6] for name, out in seen.items()} if area else seen


# --- by hand -------------------------------------------------------------------------------------------------------------


@dataclass
class Adapter:
    """One image prompt in a formula: its file, the tokens ``b n d`` of the branch, and a mask of the picture's tokens."""

    family: str
    state: dict[str, Tensor]
    tokens: Tensor
    scale: float
    mask: Tensor | None = None

    def attended(self, i: int, q: Tensor) -> Tensor:
        if self.family == "pe":
            k, v = (F.linear(self.tokens, self.state[f"to_{part}_ip.{i}.weight"]) for part in "kv")
            v = v * self.state[f"ip_gate.{i}"]
        else:
            k, v = (F.linear(self.tokens, *(self.state[f"blocks.{i}.ip_{part}_proj.{end}"] for end in ("weight", "bias"))) for part in "kv")  # fmt: skip
        return self.scale * attend(q, split(k), split(v)) * (1.0 if self.mask is None else self.mask)


def split(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, HEAD))


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2).flatten(2)


def block_by_hand(block: Any, i: int, adapters: list[Adapter], x: Tensor, emb: Tensor, text: Tensor, rope_emb_L_1_1_D: Any = None, adaln_lora_B_T_3D: Any = None, **_: Any) -> Tensor:  # fmt: skip
    """A block of Cosmos-Predict2, with PE in its attention to the text and Character References behind it."""

    def modulated(name: str) -> tuple[Tensor, Tensor]:
        mods = getattr(block, f"adaln_modulation_{name}")(emb) + adaln_lora_B_T_3D
        shift, scale, gate = (part[:, :, None, None] for part in mods.chunk(3, -1))
        return F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale) + shift, gate

    h, gate = modulated("self_attn")
    x = x + gate * block.self_attn(h.flatten(1, 3), None, rope_emb=rope_emb_L_1_1_D, transformer_options={}).view_as(x)
    h, gate = modulated("cross_attn")
    attention = block.cross_attn
    q = rms(split(F.linear(h.flatten(1, 3), attention.q_proj.weight)), attention.q_norm.weight)
    k = rms(split(F.linear(text, attention.k_proj.weight)), attention.k_norm.weight)
    out = attend(q, k, split(F.linear(text, attention.v_proj.weight)))
    for adapter in adapters:
        if adapter.family == "pe":
            out = out + adapter.attended(i, q)
    x = x + gate * F.linear(out, attention.output_proj.weight).view_as(x)
    h, gate = modulated("mlp")
    x = x + gate * block.mlp(h)
    for adapter in adapters:
        if adapter.family == "character":
            layer = (adapter.state[f"blocks.{i}.adaln_ip.1.{end}"] for end in ("weight", "bias"))
            ip_gate = F.linear(F.silu(emb), *layer)[:, :, None, None]
            x = x + ip_gate * adapter.attended(i, q).view_as(x)
    return x


def by_hand(model: Any, *given: dict[str, Any], texts: dict[str, str] | None = None, area: bool = False) -> dict[str, Tensor]:  # fmt: skip
    found: dict[str, Tensor] = {}
    for branch in ("positive",) if area else ("positive", "negative"):
        adapters: list[Adapter] = []
        for how in given:
            file = how.get("file", "character")
            family = "pe" if file == "pe" else "character"
            if branch == "negative" and family == "character":
                continue  # the picture exists in the positive pass alone
            features = INPUTS["features"] if how.get("each") else INPUTS["features"][:1]
            tokens = weights(file).tokens(features).detach() if family == "pe" else features
            mask = INPUTS["mask"] if how.get("mask") else None
            if mask is not None:
                mask = (mask[1:4, 1:3] if area else mask).flatten()[None, :, None]
            adapters.append(Adapter(family, FILES[file], tokens.expand(2, -1, -1), how.get("scale", 0.7), mask))
        blocks = list(model.model.diffusion_model.blocks)
        for i, block in enumerate(blocks):
            block.forward = partial(block_by_hand, block, i, adapters)
        try:
            found |= predict(model, (branch,), texts=texts, area=area)
        finally:
            for block in blocks:
                del block.forward
    return found


# --- our prompts -------------------------------------------------------------------------------------------------------


def weights(file: str) -> Any:
    return ipadapter_core.load_adapter(dict(FILES[file]), name=file)


def prompted(model: Any, *, file: str = "character", each: bool = False, mask: bool = False, scale: float = 0.7) -> Any:
    adapter = weights(file)
    features = INPUTS["features"] if each else INPUTS["features"][:1]
    with torch.no_grad():
        cond = adapter.tokens(features)
    rule = adapter.spec.unconditional
    assert rule in ("off", "same")
    uncond = cond if rule == "same" else torch.zeros_like(cond)
    prompt = ipadapter_core.ImagePrompt(
        cond, uncond, features[:, None], features[:, None], file, "none", adapter.spec.token_dim, spec=adapter.spec, negative_branch=rule
    )  # fmt: skip
    region = INPUTS["mask"].repeat_interleave(2, 0).repeat_interleave(2, 1) if mask else None
    schedule = ipadapter_core.WeightSchedule(strength=scale)
    return doors.apply(model, ipadapter_core.bake(adapter, prompt, doors.comfy_layout(model), schedule, region))


# --- cases -------------------------------------------------------------------------------------------------------------


def report(case: str, got: dict[str, Tensor], expected: dict[str, Tensor] | None = None, **more: Any) -> None:
    differences = [float((got[name] - out).abs().max()) for name, out in (expected or {}).items()]
    print(json.dumps({"case": case, "difference": max(differences) if differences else None, **more}), flush=True)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in b)


def apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in b)


def parity(model: Any) -> None:
    plain = predict(model)
    report("plain", plain, by_hand(model))
    for file in ("character", "pe"):
        got = predict(prompted(model, file=file))
        report(file, got, by_hand(model, {"file": file}), left=hooks_on(model), effect=apart(got, plain))
        off = predict(prompted(model, file=file, scale=0.0))
        report(f"{file} off", off, same=same(off, plain))
        report(f"after {file}", predict(model), same=same(predict(model), plain))
        report(f"{file} each", predict(prompted(model, file=file, each=True)), by_hand(model, {"file": file, "each": True}))  # fmt: skip
        report(f"{file} mask", predict(prompted(model, file=file, mask=True)), by_hand(model, {"file": file, "mask": True}))  # fmt: skip
        texts = {"negative": "longer"}
        report(f"{file} apart", predict(prompted(model, file=file), texts=texts), by_hand(model, {"file": file}, texts=texts))  # fmt: skip
        in_area = predict(prompted(model, file=file, mask=True), area=True)
        report(f"{file} area", in_area, by_hand(model, {"file": file, "mask": True}, area=True))
    character = predict(prompted(model))
    report("negative of character", character, same=torch.equal(character["negative"], plain["negative"]))
    both = by_hand(model, {"mask": True}, {"file": "pe", "scale": -0.5}, {"file": "other", "scale": 0.4})
    chained = prompted(prompted(prompted(model, mask=True), file="pe", scale=-0.5), file="other", scale=0.4)
    report("three", predict(chained), both)
    swapped = prompted(prompted(prompted(model, file="other", scale=0.4), file="pe", scale=-0.5), mask=True)
    report("three, swapped", predict(swapped), both)


def neighbours(model: Any) -> None:
    """Other packs on the same model, before and behind us."""
    calls: Counter[str] = Counter()

    def patch(name: str) -> Callable[..., Any]:
        def called(q: Tensor, k: Tensor, v: Tensor, pe: Any = None, attn_mask: Any = None, extra_options: Any = None) -> Any:  # fmt: skip
            calls[name] += 1
            return {"q": q, "k": k, "v": v}

        return called

    def override(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        calls["override"] += 1
        return function(*args, **kwargs)

    def patched(model: Any) -> Any:
        model = model.clone()
        for name in ("attn1_patch", "attn2_patch"):
            model.set_model_patch(patch(name), name)
        return model

    def overridden(model: Any) -> Any:
        model = model.clone()
        options = dict(model.model_options["transformer_options"], optimized_attention_override=override)
        model.model_options["transformer_options"] = options
        return model

    for file in ("character", "pe"):
        expected = by_hand(model, {"file": file})
        for name, other, slot in (("patches", patched, "attn2_patch"), ("override", overridden, "override")):
            for when, steered in (("before", prompted(other(model), file=file)), ("behind", other(prompted(model, file=file)))):  # fmt: skip
                calls.clear()
                got = predict(steered)
                report(f"{file}, {name} {when}", got, expected, calls=calls[slot] / BLOCKS)
        with without_options(model.model.diffusion_model.blocks):
            report(f"{file}, blocks called without options", predict(prompted(model, file=file)), expected)
        with weights_packed(model):
            report(f"{file}, packed weights", predict(prompted(model, file=file)), expected)


def failing(model: Any) -> None:
    """An error in the middle of a call leaves no hook."""

    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("on purpose")

    steered = prompted(model)
    steered.set_model_patch(broken, "attn2_patch")
    try:
        predict(steered)
    except RuntimeError as error:
        report("an error inside", {}, said=str(error), left=hooks_on(model))


VIEWS = {
    "view", "_unsafe_view", "t", "transpose", "permute", "slice", "select", "unsqueeze", "expand", "split", "split_with_sizes",
    "unbind", "alias", "detach", "squeeze", "as_strided", "_reshape_alias", "lift_fresh", "unflatten", "reshape", "flatten",
    "view_as", "chunk", "to",
}  # fmt: skip


def costs(model: Any) -> None:
    """Kernels that a prompt adds to a block, and whether anything reads the device, from the second step on."""

    def counted(model: Any) -> Counter[str]:
        predict(model)
        with Counting() as mode:
            predict(model)
        return mode.calls

    plain = counted(model)
    for file in ("character", "pe"):
        more = counted(prompted(model, file=file))
        more.subtract(plain)
        reads = more["_local_scalar_dense"] + more.pop("item", 0)
        kernels = {name: count / BLOCKS for name, count in more.items() if count and name not in VIEWS}
        report(f"{file} kernels", {}, kernels=kernels, reads=reads)


def lora_inside(model: Any) -> None:
    """The LoRA in a Character Reference's file by the host's own loader, next to its products added to the weights."""
    state = tiny_state(
        "anima-character",
        seed=9,
        token_dim=FEATURE,
        channels=(WIDTH,) * BLOCKS,
        hidden_dim=WIDTH,
        lora_rank=4,
        text_dim=TEXT,
    )
    adapter, plain = ipadapter_core.load_adapter(state, name="with LoRA"), predict(model)
    for case, cross in (("LoRA", False), ("LoRA, cross-attention", True)):
        named = adapter.loadable_lora(cross_attention=cross)
        found = backend_lora.place(load_lora(dict(named), name="inside"), model)
        predict(model)  # the host takes back what it merged into the weights that its models share
        before: dict[str, Tensor] = {}
        ends = (".lora_A.weight", ".lora_B.weight")
        for name in sorted({name.removesuffix(ends[0]).removesuffix(ends[1]) for name in named}):
            weight = model.model.get_submodule(name).weight
            before[name] = weight.data.clone()
            weight.data += 0.5 * named[name + ends[1]] @ named[name + ends[0]]
        expected = predict(model)
        for name, data in before.items():
            model.model.get_submodule(name).weight.data.copy_(data)
        loaded = comfy.sd.load_lora_for_models(model, None, dict(named), 0.5, 0)[0]
        got = predict(loaded)
        report(case, got, expected, layers=len(loaded.patches), placed=len(found.matches), effect=apart(got, plain))


class Merged(comfy.weight_adapter.WeightAdapterBase):
    """Our kind of patch, as nodes/host has it."""

    name = "image_prompt_lora"

    def __init__(self, parts: tuple[Any, ...]) -> None:
        self.loaded_keys, self.parts = set[str](), parts

    def calculate_weight(self, weight: Tensor, *_: Any, **__: Any) -> Tensor:
        return weight + backend_lora.merge_parts(weight, self.parts)


def live_beside_the_texts_adapter() -> None:
    """A live LoRA on blocks and on the text's adapter, which the host runs before the steps, next to the host's own loader."""
    sizes = {"source_dim": TEXT, "target_dim": TEXT, "model_dim": TEXT, "num_layers": 1, "num_heads": 2}
    model = transformer(partial(ADAPTER, **sizes))
    prompt = {"t5xxl_ids": torch.tensor([3, 8, 1, 9]), "t5xxl_weights": torch.tensor([1.0, 1.1, 0.9, 1.0])}
    layers = {f"llm_adapter.blocks.0.{name}": (TEXT, TEXT) for name in ("cross_attn.q_proj", "self_attn.o_proj")}
    layers |= {"llm_adapter.blocks.0.mlp.0": (4 * TEXT, TEXT), "blocks.1.self_attn.q_proj": (WIDTH, WIDTH)}
    state: dict[str, Tensor] = {}
    for seed, (path, (rows, columns)) in enumerate(layers.items()):
        state[f"diffusion_model.{path}.lora_down.weight"] = numbers(2, columns, seed=seed)
        state[f"diffusion_model.{path}.lora_up.weight"] = numbers(rows, 2, seed=20 + seed)
    own = {name: tensor for name, tensor in state.items() if "llm_adapter" in name}
    for case, tensors in (("live LoRA", state), ("live LoRA on the text's adapter alone", own)):
        patch = LoRAPatch(backend_lora.place(load_lora(dict(tensors), name="live"), model), strength=0.7)
        plain = predict(model, more=prompt)
        expected = predict(comfy.sd.load_lora_for_models(model, None, dict(tensors), 0.7, 0)[0], more=prompt)
        beside = predict(backend_lora.apply_unfused(model, patch.apart()[1]), more=prompt)
        got = predict(backend_lora.apply_live(model, patch, Merged), more=prompt)
        report(case, got, expected, effect=apart(got, plain), without=apart(beside, expected))
        report(
            f"after {case}",
            {},
            same=all(torch.equal(a, plain[name]) for name, a in predict(model, more=prompt).items()),
        )
    scheduled = replace(patch, window=Window(end_percent=0.5))
    try:
        choose_mode([scheduled])
        said = ""
    except ipadapter_core.InvalidInputError as error:
        said = str(error)
    report("scheduled", {}, said=said)


def half(model: Any) -> None:
    """Blocks compute in bfloat16 beside a residual stream in float32."""
    halved = model.model.diffusion_model.to(torch.bfloat16)
    block = halved.blocks[0]
    x, emb = numbers(1, 1, ROWS, COLUMNS, WIDTH, seed=1), numbers(1, 1, WIDTH, seed=2).bfloat16()
    given = (x, emb, INPUTS["positive"].bfloat16(), None, numbers(1, 1, 3 * WIDTH, seed=3).bfloat16())
    from ipadapter_core.attention.call import ModelCall
    from ipadapter_core.backends.comfy.blocks import acting_inside, prompts_in

    steered = prompted(model, mask=True)
    prompts = tuple(prompts_in(steered.model_options["transformer_options"]))
    size = (2 * ROWS, 2 * COLUMNS)
    with acting_inside(halved, ModelCall(latent=size, size=size), prompts):
        out = block(*given)
    moved = float((out - block(*given)).abs().max())
    report("half", {}, dtype=str(out.dtype), effect=moved)


def main() -> None:
    model = transformer()
    with torch.inference_mode():
        parity(model)
        neighbours(model)
        failing(model)
        costs(model)
        lora_inside(model)
        live_beside_the_texts_adapter()
    with torch.no_grad():
        report("outside of inference mode", predict(prompted(model)), by_hand(model, {}))
        half(model)


main()
