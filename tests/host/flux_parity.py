"""Image prompts in a real ComfyUI's FLUX.1 and Chroma, next to the predictions that flux_oracles.py wrote.

    COMFY/.venv/bin/python flux_parity.py COMFY FOLDER

Prints one JSON object per line: {"case", "difference"}, the largest one to the oracle's prediction of a branch (None where a
case has no oracle), with what else the case is about. tests/host/test_flux_parity.py judges.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

host_folder, folder = sys.argv[1:3]
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, host_folder)

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
importlib.import_module(
    "utils.extra_config"
)  # as main.py does: 0.3.64's nodes.py puts a folder with another utils before it

import comfy.model_detection  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.supported_models  # noqa: E402
import torch  # noqa: E402
from in_host import Counting, hooks_on, load, weights_packed, without_options  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

FOLDER, HERE = Path(folder), Path(__file__).resolve().parent
SHAPES = json.loads((FOLDER / "shapes.json").read_text())
SIGMA: float = SHAPES["sigma"]
INPUTS, EXPECTED = load_file(FOLDER / "inputs.safetensors"), load_file(FOLDER / "expected.safetensors")


load("ours", HERE.parents[1] / "__init__.py", package=True)
from ours import ipadapter_core  # type: ignore # noqa: E402
from ours.ipadapter_core.backends.comfy import doors  # type: ignore # noqa: E402
from ours.ipadapter_core.checkpoints.instantx import InstantX  # type: ignore # noqa: E402
from ours.ipadapter_core.models.reach import Reach, every  # type: ignore # noqa: E402

# --- the host's models -------------------------------------------------------------------------------------------------


def transformer(kind: str) -> Any:
    """A MODEL of the host around its own transformer, with diffusers' weights by the host's own map of keys."""
    config: dict[str, Any] = {
        "image_model": kind, "patch_size": 2, "context_in_dim": SHAPES["text"], "hidden_size": SHAPES["width"], "mlp_ratio": 4.0,
        "num_heads": SHAPES["heads"], "depth": SHAPES["double"], "depth_single_blocks": SHAPES["single"], "axes_dim": [16, 56, 56],
        "theta": 10000, "qkv_bias": True,
    }  # fmt: skip
    if kind == "flux":
        config |= {"in_channels": 16, "out_channels": 16, "vec_in_dim": SHAPES["pooled"], "guidance_embed": True}
        module, params, known = comfy.ldm.flux.model, "FluxParams", comfy.supported_models.Flux
    else:
        config |= {"in_channels": 64, "out_channels": 64, "in_dim": 64, "out_dim": SHAPES["width"], "hidden_dim": 48, "n_layers": 1}  # fmt: skip
        module, params, known = comfy.ldm.chroma.model, "ChromaParams", comfy.supported_models.Chroma
    newer = getattr(module, params).__dataclass_fields__
    config |= {name: value for name, value in (("txt_ids_dims", []), ("vec_in_dim", None)) if name in newer and name not in config}  # fmt: skip
    described = known(config)
    described.set_inference_dtype(torch.float32, None)
    model = described.get_model({}, "", device=torch.device("cpu"))
    theirs = load_file(FOLDER / f"{kind}.safetensors")
    state = comfy.model_detection.convert_diffusers_mmdit(theirs, "")
    for key, tensor in theirs.items():  # what is left: Chroma's own layers
        words = {"x_embedder": "img_in", "context_embedder": "txt_in", "proj_out": "final_layer.linear"}
        for word, other in (*words.items(), ("linear_1", "in_layer"), ("linear_2", "out_layer")):
            key = key.replace(word, other)
        state[key] = tensor
    own = model.diffusion_model.state_dict()
    state = {(k if k in own else k.replace("norm.weight", "norm.scale").replace("norms.0.weight", "norms.0.scale")): v for k, v in state.items()}  # fmt: skip
    missing, unexpected = model.diffusion_model.load_state_dict(state, strict=False)
    assert not missing, missing
    assert not unexpected, unexpected
    model.diffusion_model.eval().requires_grad_(False)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def predict(model: Any, *, texts: dict[str, str] | None = None, area: bool = False, reference: bool = False) -> dict[str, Tensor]:  # fmt: skip
    """The velocity of both branches in one step of the host's own sampler and guider."""
    model, seen = model.clone(), dict[str, Tensor]()

    def look(args: Any) -> Any:
        for name, out in zip(("positive", "negative"), args["conds_out"], strict=True):
            seen[name] = (args["input"] - out) / SIGMA
        return args["conds_out"]

    model.set_model_sampler_pre_cfg_function(look)
    conds: list[Any] = []
    for branch in ("positive", "negative"):
        text = INPUTS[(texts or {}).get(branch, branch)]
        more: dict[str, Any] = {"pooled_output": INPUTS["pooled"]}
        if model.model.diffusion_model.__class__.__name__ == "Flux":
            more["guidance"] = SHAPES["guidance"]
        if area:
            more |= {"area": (6, 4, 2, 2), "strength": 1.0, "set_area_to_bounds": False}
        if reference:
            more["reference_latents"] = [model.model.process_latent_out(INPUTS["reference"])]
        conds.append([[text, more]])
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(*conds)
    guider.set_cfg(1.0 if area else 3.0)
    x = INPUTS["x"]
    sigmas, sampler = torch.tensor([SIGMA, 0.0]), comfy.samplers.sampler_object("euler")
    guider.sample(x / SIGMA, torch.zeros_like(x), sampler, sigmas, seed=0, disable_pbar=True)
    return {"positive": seen["positive"][..., 2:8, 2:6]} if area else seen


# --- our prompts -------------------------------------------------------------------------------------------------------


class Raw(InstantX):  # pyright: ignore[reportUntypedBaseClass]
    """The query before the model's norm, with norms of the adapter's own, on the picture's tokens alone."""

    name = "raw"
    reach = Reach(every, query="raw")

    def key_value(self, module: Any, index: int, tokens: Tensor, timestep: float | None) -> tuple[Tensor, Tensor]:
        k, v = super().key_value(module, index, tokens, timestep)
        return (k.unflatten(-1, (SHAPES["heads"], -1)) * self.weight(k).flip(0)).flatten(-2), v

    def query_weight(self, module: Any, index: int) -> Tensor:
        return self.weight(next(module.parameters()))

    def weight(self, like: Tensor) -> Tensor:
        return (0.5 + torch.linspace(0, 1, SHAPES["width"] // SHAPES["heads"])).to(like)


def prompted(model: Any, file: str, *, family: str = "", each: bool = False, mask: bool = False, scale: float = 0.7) -> Any:  # fmt: skip
    adapter = ipadapter_core.load_adapter(dict(load_file(FOLDER / f"{file}.safetensors")), name=file)
    if family == "raw":
        adapter = replace(adapter, spec=replace(adapter.spec, format=Raw()))
    features, neutral = INPUTS["features"] if each else INPUTS["features"][:1], INPUTS["neutral"]
    branch = "same" if adapter.spec.unconditional == "same" else "tokens"
    if branch == "same":
        features = neutral = INPUTS["seen"]
    with torch.no_grad():
        cond, uncond = adapter.tokens(features), adapter.tokens(neutral.expand_as(features))
    prompt = ipadapter_core.ImagePrompt(
        cond, uncond, features[:, None], neutral[:, None], file, "none", adapter.spec.token_dim, spec=adapter.spec,
        negative_branch=branch,
    )  # fmt: skip
    region = INPUTS["mask"].repeat_interleave(2, 0).repeat_interleave(2, 1) if mask else None
    schedule = ipadapter_core.WeightSchedule(strength=scale)
    layout = doors.comfy_layout(model)
    return doors.apply(model, ipadapter_core.bake(adapter, prompt, layout, schedule, region))


# --- cases -------------------------------------------------------------------------------------------------------------


def report(case: str, got: dict[str, Tensor], oracle: str | None, **more: Any) -> None:
    names = [] if oracle is None else [key for key in EXPECTED if key.startswith(f"{oracle}/")]
    differences = [float((got[key.split("/")[1]] - EXPECTED[key]).abs().max()) for key in names]
    print(json.dumps({"case": case, "difference": max(differences) if differences else None, **more}), flush=True)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def parity(models: dict[str, Any]) -> None:
    for kind, model in models.items():
        plain = predict(model)
        report(f"{kind} plain", plain, f"{kind} plain")
        for family in ("xlabs", "instantx"):
            steered = prompted(model, family)
            report(f"{kind} {family}", predict(steered), f"{kind} {family}", left=hooks_on(model))
            report(f"{kind} {family} off", predict(prompted(model, family, scale=0.0)), None, same=same(predict(prompted(model, family, scale=0.0)), plain))  # fmt: skip
            report(f"{kind} after {family}", predict(model), f"{kind} plain", same=same(predict(model), plain))
        report(f"{kind} raw", predict(prompted(model, "instantx", family="raw")), f"{kind} raw")
        character = predict(prompted(model, "instantcharacter"))
        report(f"{kind} instantcharacter", character, f"{kind} instantcharacter")
        off = same(predict(prompted(model, "instantcharacter", scale=0.0)), plain)
        report(f"{kind} instantcharacter off", plain, None, same=off)
    model = models["flux"]
    for family in ("xlabs", "instantx"):
        report(f"{family} apart", predict(prompted(model, family), texts={"negative": "longer"}), f"{family} apart")
        report(f"{family} each", predict(prompted(model, family, each=True)), f"{family} each")
        report(f"{family} mask", predict(prompted(model, family, mask=True)), f"{family} mask")
        report(f"{family} reference", predict(prompted(model, family), reference=True), f"{family} reference")
        both = predict(prompted(model, family, mask=True), reference=True)
        report(f"{family} reference mask", both, f"{family} reference mask")
        report(f"{family} area", predict(prompted(model, family, mask=True), area=True), f"{family} area")
    masked = predict(prompted(model, "instantcharacter", mask=True))
    report("instantcharacter mask", masked, "instantcharacter mask")
    report("two xlabs", predict(prompted(prompted(model, "xlabs"), "xlabs two", scale=-0.4)), "two xlabs")
    report("xlabs and instantx", predict(prompted(prompted(model, "xlabs"), "instantx", scale=0.5)), "xlabs and instantx")  # fmt: skip
    swapped = predict(prompted(prompted(model, "instantx", scale=0.5), "xlabs"))
    report("instantx and xlabs", swapped, "xlabs and instantx")


def neighbours(model: Any) -> None:
    """Other packs on the same model, before and behind us."""
    calls: Counter[str] = Counter()

    def occupant(args: Any, extra: Any) -> Any:
        calls["dit"] += 1
        return extra["original_block"](args)

    def override(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        calls["override"] += 1
        return function(*args, **kwargs)

    def occupied(model: Any) -> Any:
        model = model.clone()
        for kind, count in (("double_block", SHAPES["double"]), ("single_block", SHAPES["single"])):
            for i in range(count):
                model.set_model_patch_replace(occupant, "dit", kind, i)
        return model

    def overridden(model: Any) -> Any:
        model = model.clone()
        options = dict(model.model_options["transformer_options"], optimized_attention_override=override)
        model.model_options["transformer_options"] = options
        return model

    blocks = SHAPES["double"] + SHAPES["single"]
    for family in ("xlabs", "instantx"):
        for name, other in (("dit", occupied), ("override", overridden)):
            for when, steered in (
                ("before", prompted(other(model), family)),
                ("behind", other(prompted(model, family))),
            ):
                calls.clear()
                got = predict(steered)
                report(f"{family}, {name} {when}", got, f"flux {family}", calls=calls[name] / blocks)
        with without_options([*model.model.diffusion_model.double_blocks, *model.model.diffusion_model.single_blocks]):
            report(f"{family}, blocks called without options", predict(prompted(model, family)), f"flux {family}")
        with weights_packed(model):
            report(f"{family}, packed weights", predict(prompted(model, family)), f"flux {family}")


def unsound(model: Any) -> None:
    """A norm that cannot be undone: the raw query itself is heard."""
    norm = model.model.diffusion_model.double_blocks[0].img_attn.norm.query_norm
    weight = norm.weight if hasattr(norm, "weight") else norm.scale
    kept = weight.clone()
    weight[3] = 1e-9
    report("raw unsound", predict(prompted(model, "instantx", family="raw")), "raw unsound")
    weight.copy_(kept)


def failing(model: Any) -> None:
    """An error in the middle of a call leaves no hook."""

    def broken(args: Any, extra: Any) -> Any:
        raise RuntimeError("on purpose")

    steered = prompted(model, "instantx")
    steered.set_model_patch_replace(broken, "dit", "single_block", 0)
    try:
        predict(steered)
    except RuntimeError as error:
        report("an error inside", {}, None, said=str(error), left=hooks_on(model))


VIEWS = {
    "view", "_unsafe_view", "t", "transpose", "permute", "slice", "select", "unsqueeze", "expand", "split", "split_with_sizes",
    "unbind", "alias", "detach", "squeeze", "as_strided", "_reshape_alias", "lift_fresh",
}  # fmt: skip


def costs(model: Any) -> None:
    """Kernels that a prompt adds to every block it acts in, and whether anything reads the device, from the second step on."""

    def counted(model: Any) -> Counter[str]:
        predict(model)
        with Counting() as mode:
            predict(model)
        return mode.calls

    def flops(model: Any) -> int:
        predict(model)
        # of the fused kernel for CPUs nothing is counted; by plain maths every product is
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as mode:
            predict(model)
        return mode.get_total_flops()

    plain, before = counted(model), flops(model)
    for family, blocks in (("xlabs", SHAPES["double"]), ("instantx", SHAPES["double"] + SHAPES["single"])):
        more = counted(prompted(model, family))
        more.subtract(plain)
        kernels = {name: count / blocks for name, count in more.items() if count and name not in VIEWS}
        added = flops(prompted(model, family)) - before
        report(
            f"{family} kernels", {}, None, kernels=kernels, synchronisations=more["_local_scalar_dense"], flops=added
        )


def compiled(model: Any) -> None:
    """The host's node compiles the whole transformer, other packs' each block; prompts come and go on clones of it."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    blocks = [f"diffusion_model.{name}.{i}" for name, count in (("double_blocks", SHAPES["double"]), ("single_blocks", SHAPES["single"])) for i in range(count)]  # fmt: skip
    for what, keys, backend in (("whole", ["diffusion_model"], "aot_eager"), ("blocks", blocks, "eager")):
        clone = model.clone()
        set_torch_compile_wrapper(clone, backend=backend, keys=keys)
        for turn in (1, 2):
            report(f"compiled {what}, plain {turn}", predict(clone), "flux plain")
            for family in ("xlabs", "instantx"):
                report(f"compiled {what}, {family} {turn}", predict(prompted(clone, family)), f"flux {family}")
            both = prompted(prompted(clone, "xlabs"), "instantx", scale=0.5)
            report(f"compiled {what}, both {turn}", predict(both), "xlabs and instantx")
        torch.compiler.reset()


def main() -> None:
    models = {kind: transformer(kind) for kind in ("flux", "chroma")}
    with torch.inference_mode():
        parity(models)
        neighbours(models["flux"])
        failing(models["flux"])
        compiled(models["flux"])
    with torch.no_grad():
        costs(models["flux"])
        unsound(models["flux"])
        report("clones", predict(copy.copy(models["flux"])), "flux plain")


main()
