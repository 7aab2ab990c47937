"""Image prompts in a real ComfyUI's SD3.5, next to the predictions that sd3_oracles.py wrote.

    COMFY/.venv/bin/python sd3_parity.py COMFY FOLDER

Prints one JSON object per line: {"case", "difference"}, the largest one to the oracle's prediction of a branch (None where a
case has no oracle), with what else the case is about. tests/host/test_sd3_parity.py judges.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

host_folder, folder = sys.argv[1:3]
sys.argv = [sys.argv[0], "--cpu"]
sys.path.insert(0, host_folder)

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()

import comfy.model_patcher  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.supported_models  # noqa: E402
import torch  # noqa: E402
from in_host import Counting, hooks_on, load, weights_packed, without_options  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import Tensor  # noqa: E402

torch.set_num_threads(1)
FOLDER, HERE = Path(folder), Path(__file__).resolve().parent
SHAPES = json.loads((FOLDER / "shapes.json").read_text())
INPUTS, EXPECTED = load_file(FOLDER / "inputs.safetensors"), load_file(FOLDER / "expected.safetensors")


# the core without the nodes around it, which want the host's server
load("ipadapter_core", HERE.parents[1] / "ipadapter_core" / "__init__.py", package=True)
import ipadapter_core  # noqa: E402
from ipadapter_core.backends.comfy import doors  # noqa: E402

# --- the host's model --------------------------------------------------------------------------------------------------


def transformer(kind: str) -> Any:
    """A MODEL of the host around its own transformer."""
    described = comfy.supported_models.SD3({
        "in_channels": 16, "patch_size": 2, "depth": SHAPES["heads"], "num_blocks": SHAPES["blocks"], "input_size": None,
        "adm_in_channels": SHAPES["pooled"], "num_patches": 256, "pos_embed_max_size": 16, "pos_embed_scaling_factor": None,
        "qk_norm": "rms", "x_block_self_attn_layers": [0, 1] if kind == "medium" else [],
        "context_embedder_config": {
            "target": "torch.nn.Linear", "params": {"in_features": SHAPES["text"], "out_features": SHAPES["width"]},
        },
    })  # fmt: skip
    described.set_inference_dtype(torch.float32, None)
    model = described.get_model({}, "", device=torch.device("cpu"))
    model.diffusion_model.load_state_dict(load_file(FOLDER / f"{kind}.safetensors"))
    model.diffusion_model.eval().requires_grad_(False)
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def predict(model: Any, *, texts: dict[str, str] | None = None, area: bool = False, sigma: float = SHAPES["sigma"]) -> dict[str, Tensor]:  # fmt: skip
    """The velocity of both branches in one step of the host's own sampler and guider."""
    model, seen = model.clone(), dict[str, Tensor]()

    def look(args: Any) -> Any:
        for name, out in zip(("positive", "negative"), args["conds_out"], strict=True):
            seen[name] = (args["input"] - out) / sigma
        return args["conds_out"]

    model.set_model_sampler_pre_cfg_function(look)
    conds: list[Any] = []
    for branch in ("positive", "negative"):
        more: dict[str, Any] = {"pooled_output": INPUTS["pooled"]}
        if area:
            more |= {"area": (6, 4, 2, 2), "strength": 1.0, "set_area_to_bounds": False}
        conds.append([[INPUTS[(texts or {}).get(branch, branch)], more]])
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(*conds)
    guider.set_cfg(1.0 if area else 3.0)
    x = INPUTS["x"]
    sigmas, sampler = torch.tensor([sigma, 0.0]), comfy.samplers.sampler_object("euler")
    guider.sample(x / sigma, torch.zeros_like(x), sampler, sigmas, seed=0, disable_pbar=True)
    return {"positive": seen["positive"][..., 2:8, 2:6]} if area else seen


def sample(model: Any, sampler: str, sigmas: list[float]) -> Tensor:
    """A whole run of one of the host's samplers."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(*([[INPUTS[name], {"pooled_output": INPUTS["pooled"]}]] for name in ("positive", "negative")))
    guider.set_cfg(3.0)
    x = INPUTS["x"]
    return guider.sample(
        x, torch.zeros_like(x), comfy.samplers.sampler_object(sampler), torch.tensor(sigmas), seed=0, disable_pbar=True
    )


# --- our prompts -------------------------------------------------------------------------------------------------------

MADE: Counter[str] = Counter()


def prompted(model: Any, file: str = "instantx", *, each: bool = False, mask: bool = False, scale: float = 0.7) -> Any:
    adapter = ipadapter_core.load_adapter(dict(load_file(FOLDER / f"{file}.safetensors")), name=file)
    adapter.module.to_k_ip[0].register_forward_hook(lambda *_: MADE.update(["sites"]))
    adapter.module.projector.time_embedding.register_forward_hook(lambda *_: MADE.update(["embeddings"]))
    adapter.module.projector.proj_out.register_forward_hook(lambda *_: MADE.update(["tokens"]))
    features, neutral = INPUTS["features"] if each else INPUTS["features"][:1], INPUTS["neutral"]
    with torch.no_grad():
        cond, uncond = adapter.tokens(features), adapter.tokens(neutral.expand_as(features))
    prompt = ipadapter_core.ImagePrompt(
        cond, uncond, features[:, None], neutral[:, None], file, "none", adapter.spec.token_dim, spec=adapter.spec
    )
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
        report(f"{kind} instantx", predict(prompted(model)), f"{kind} instantx", left=hooks_on(model))
        off = predict(prompted(model, scale=0.0))
        report(f"{kind} off", off, f"{kind} plain", same=same(off, plain))
        report(f"{kind} after", predict(model), f"{kind} plain", same=same(predict(model), plain))
    model = models["large"]
    report("apart", predict(prompted(model), texts={"negative": "longer"}), "apart")
    report("each", predict(prompted(model, each=True)), "each")
    report("mask", predict(prompted(model, mask=True)), "mask")
    report("later", predict(prompted(model), sigma=SHAPES["later"]), "later")
    report("area", predict(prompted(model, mask=True), area=True), "area")
    report("two", predict(prompted(prompted(model, mask=True), "other", scale=-0.4)), "two")
    report("two, swapped", predict(prompted(prompted(model, "other", scale=-0.4), mask=True)), "two")
    steered = prompted(model)
    report("first", predict(steered), "large instantx")
    report("then later", predict(steered, sigma=SHAPES["later"]), "later")
    report("then back", predict(steered), "large instantx")


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
        for i in range(SHAPES["blocks"]):
            model.set_model_patch_replace(occupant, "dit", "double_block", i)
        return model

    def overridden(model: Any) -> Any:
        model = model.clone()
        options = dict(model.model_options["transformer_options"], optimized_attention_override=override)
        model.model_options["transformer_options"] = options
        return model

    for name, other in (("dit", occupied), ("override", overridden)):
        for when, steered in (("before", prompted(other(model))), ("behind", other(prompted(model)))):
            calls.clear()
            got = predict(steered)
            report(f"{name} {when}", got, "large instantx", calls=calls[name] / SHAPES["blocks"])
    with without_options(model.model.diffusion_model.joint_blocks):
        report("blocks called without options", predict(prompted(model)), "large instantx")
    with weights_packed(model):
        report("packed weights", predict(prompted(model)), "large instantx")


def unsound(model: Any) -> None:
    """Norms that cannot be undone: raw queries and keys themselves are heard."""
    blocks = model.model.diffusion_model.joint_blocks
    weights = [blocks[0].x_block.attn.ln_q.weight, blocks[1].x_block.attn.ln_k.weight]
    kept = [weight.clone() for weight in weights]
    for weight in weights:
        weight[3] = 1e-9
    report("unsound", predict(prompted(model)), "unsound")
    for weight, before in zip(weights, kept, strict=True):
        weight.copy_(before)


def failing(model: Any) -> None:
    """An error in the middle of a call leaves no hook."""

    def broken(args: Any, extra: Any) -> Any:
        raise RuntimeError("on purpose")

    steered = prompted(model)
    steered.set_model_patch_replace(broken, "dit", "double_block", 1)
    try:
        predict(steered)
    except RuntimeError as error:
        report("an error inside", {}, None, said=str(error), left=hooks_on(model))


VIEWS = {
    "view", "_unsafe_view", "t", "transpose", "permute", "slice", "select", "unsqueeze", "expand", "split", "split_with_sizes",
    "unbind", "alias", "detach", "squeeze", "as_strided", "_reshape_alias", "lift_fresh", "unflatten", "reshape", "flatten",
}  # fmt: skip


def costs(model: Any) -> None:
    """What a prompt makes per sigma, and the kernels that it adds to a block where tokens of the timestep are there."""
    for sampler, sigmas in (("euler", [0.9, 0.7, 0.5, 0.3, 0.1]), ("heun", [0.9, 0.7, 0.5, 0.3, 0.1]), ("dpm_2", [0.9, 0.5, 0.1])):  # fmt: skip
        steered, distinct = prompted(model), set[float]()
        watched = steered.clone()

        def watch(apply: Any, args: Any, distinct: set[float] = distinct) -> Tensor:
            distinct.add(round(float(args["timestep"][0]), 6))
            return apply(args["input"], args["timestep"], **args["c"])

        watched.set_model_unet_function_wrapper(watch)
        MADE.clear()
        sample(watched, sampler, sigmas)
        report(f"made by {sampler}", {}, None, made=dict(MADE), sigmas=len(distinct))

    def counted(model: Any) -> Counter[str]:
        predict(model)
        with Counting() as mode:
            predict(model)
        return mode.calls

    more = counted(prompted(model))
    more.subtract(counted(model))
    reads = more["_local_scalar_dense"] + more.pop("item", 0)
    kernels = {name: count / SHAPES["blocks"] for name, count in more.items() if count and name not in VIEWS}
    report("kernels", {}, None, kernels=kernels, reads=reads)


def main() -> None:
    models = {kind: transformer(kind) for kind in ("large", "medium")}
    with torch.inference_mode():
        parity(models)
        neighbours(models["large"])
        failing(models["large"])
        costs(models["large"])
    with torch.no_grad():
        unsound(models["large"])
        report("outside of inference mode", predict(prompted(models["large"])), "large instantx")


main()
