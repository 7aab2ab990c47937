"""A section of ``check.py``, inside ComfyUI's own process: every dtype next to float32 on the CPU, costs beside the plain model.

    COMFY/.venv/bin/python in_comfy.py COMFY FOLDER reference|standard|dynamic|novram [--toy] [--bare] [--old PACK]

``reference`` writes what float32 on the CPU predicts into FOLDER, for the others to compare with.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[1]
parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("host")
parser.add_argument("folder", type=Path)
parser.add_argument("part", choices=["reference", "standard", "dynamic", "novram"])
parser.add_argument("--toy", action="store_true")
parser.add_argument("--bare", action="store_true", help="hide what a bare machine has not")
parser.add_argument("--old", type=Path, help="the folder of ComfyUI_IPAdapter_plus")
args = parser.parse_args()
sys.path.insert(0, str(TESTS))

from gpu import stand_ins  # noqa: E402

known = (Path(args.host) / "comfy/cli_args.py").read_text()
flags = ["--cpu"] if args.part == "reference" or args.toy else []
if args.part == "novram" and not args.toy:
    flags.append("--novram")
if args.part in ("standard", "novram") and "--disable-dynamic-vram" in known:
    flags.append("--disable-dynamic-vram")
stood_in = stand_ins.enter(args.host, flags, bare=args.bare)
stand_ins.before_torch(args.part == "dynamic" and not args.toy)

import comfy.model_management  # noqa: E402
import torch  # noqa: E402

from gpu.host_models import FP8, REAL, SHRUNK, Bench, Kind, weights  # noqa: E402
from gpu.rows import (  # noqa: E402
    KERNELS,
    apart,
    attempt,
    count,
    cuda,
    holds,
    log,
    peak,
    rounding,
    seconds,
    set_toy,
    show,
    show_counts,
    show_memory,
    wait,
    without,
)

WHERE = {"standard": "ComfyUI", "dynamic": "ComfyUI, dynamic memory", "novram": "ComfyUI, --novram", "reference": "ComfyUI, CPU"}[args.part]  # fmt: skip
DTYPES = (torch.float16, torch.bfloat16, FP8)
LEAST_EFFECT = 0.02
"""An adapter or LoRA that moves the prediction less proves nothing."""
STEPS = 4
ONE_SIZE = "this ComfyUI builds it in its published size alone"


def variants(bench: Bench, model: Any) -> dict[str, Any]:
    return {
        "plain": model,
        "adapter": bench.prompted(model),
        "LoRA live": bench.lora(model, "live"),
        "LoRA merged": bench.lora(model, "merged"),
    }


def reference(pack: Any, kind: Kind) -> None:
    """What float32 predicts; and that the two ways of a LoRA are one there."""
    name = f"{WHERE}, {kind.name} fp32"
    bench = Bench(pack, kind, weights(kind))
    try:
        model = bench.model(torch.float32)
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        return without(name, ONE_SIZE)
    found = {what: bench.sample(one).cpu() for what, one in variants(bench, model).items()}
    torch.save(found, args.folder / f"{kind.name}.pt")
    for what in ("adapter", "LoRA live"):
        moved = apart(found[what], found["plain"])
        show(f"{name}: least effect / effect of {what}", LEAST_EFFECT / max(moved, 1e-9), "", 1.0)
    differ = apart(found["LoRA live"], found["LoRA merged"])
    return show(f"{name}: LoRA live beside merged", differ, "relative", rounding(torch.float32))


def label(dtype: torch.dtype) -> str:
    return {torch.float16: "fp16", torch.bfloat16: "bf16", FP8: "fp8", torch.float32: "fp32"}[dtype]


def parity(pack: Any, kind: Kind, dtypes: tuple[torch.dtype, ...]) -> None:
    """Every dtype next to float32 on the CPU, fresh and after the host unloaded everything."""
    expected = torch.load(args.folder / f"{kind.name}.pt")
    bench = Bench(pack, kind, weights(kind))
    for dtype in dtypes:
        name = f"{WHERE}, {kind.name} {label(dtype)}"
        model = bench.model(dtype)
        computed = model.model.manual_cast_dtype or dtype
        bound = rounding(computed)
        found: dict[str, torch.Tensor] = {}
        for what, one in variants(bench, model).items():
            if what.startswith("LoRA") and dtype is FP8:
                continue  # merged into fp8, a LoRA is rounded to it: another model
            found[what] = bench.sample(one)
            allowed = max(bound, rounding(dtype)) if what == "LoRA merged" else bound  # merged weights are rounded
            show(f"{name}: {what} next to fp32 on the CPU", apart(found[what], expected[what]), "relative", allowed)
        zero = bench.sample(bench.prompted(model, strength=0.0))
        holds(f"{name}: strength 0 changes no bit", torch.equal(zero, found["plain"]))
        applied = bench.prompted(model)
        first = bench.sample(applied)
        comfy.model_management.unload_all_models()
        show(f"{name}: unloaded and loaded again", apart(bench.sample(applied), first), "relative", bound / 10)


def partly(pack: Any, kind: Kind) -> None:
    """Half of the base stays in main memory, as on a card that is too small."""
    name = f"{WHERE}, {kind.name} fp16, partly loaded"
    if not cuda():
        return without(name, "needs CUDA")
    bench, manager = Bench(pack, kind, weights(kind)), comfy.model_management
    model = bench.model(torch.float16)
    applied, real = bench.prompted(model), manager.get_free_memory
    manager.unload_all_models()
    room = manager.minimum_inference_memory() + model.model_size() // 2

    def free(device: Any = None, torch_free_too: bool = False) -> Any:
        return (room, room) if torch_free_too else room

    manager.get_free_memory = free
    try:
        found = bench.sample(applied)
        share = model.loaded_size() / model.model_size()
    finally:
        manager.get_free_memory = real
    show(f"{name}: share of the base on the card", share, "", 0.95)
    expected = torch.load(args.folder / f"{kind.name}.pt")["adapter"]
    show(f"{name}: adapter next to fp32 on the CPU", apart(found, expected), "relative", rounding(torch.float16))
    manager.unload_all_models()


def costs(pack: Any, kind: Kind, dtype: torch.dtype, old_nodes: Any) -> None:
    """A step's time, kernels, waits and memory beside the plain model, in turns in one run."""
    name = f"{WHERE}, {kind.name} {label(dtype)}, {kind.pixels or 'shrunk'}"
    bench = Bench(pack, kind, weights(kind))
    model = bench.model(dtype)
    bench.managed.to_device()
    bench.sample(model)
    taken: list[Any] = []
    apply = seconds({"": lambda: taken.append(bench.prompted(model, bench.prompt()))}, repeats=3)[""]
    taken.clear()
    show(f"{name}: adapter applied in", apply, "s")
    ours = bench.prompted(model)
    models: dict[str, Any] = {"plain": model, "ours": ours}
    models |= {f"LoRA {mode}": bench.lora(model, mode) for mode in ("live", "merged")}
    memory(name, bench, models)
    if not kind.published:
        without(f"{name}: old pack", "knows the published topologies of SD1.5 and SDXL alone")
    elif old_nodes is None:
        without(f"{name}: old pack", "not at hand; give --old or set IPADAPTER_PLUS_PATH")
    else:
        before = peak(lambda: bench.sample(model))
        begun = seconds({"": lambda: taken.append(bench.old(old_nodes, model))}, repeats=1)[""]
        taken.clear()
        show(f"{name}: old pack applied in", begun, "s")
        old = models["old pack"] = bench.old(old_nodes, model)
        show_memory(f"{name}: memory of old pack", before, peak(lambda: bench.sample(old)))
        differ = apart(bench.sample(ours), bench.sample(old))
        # which computes its keys and values in half precision wherever the host would
        show(f"{name}: ours next to the old pack", differ, "relative", rounding(torch.bfloat16))
    steps, repeats = (1, 1) if args.toy else (STEPS, 3)
    # the untimed call before each timed one merges a LoRA, or takes it out
    found = seconds({what: partial(bench.sample, one, steps) for what, one in models.items()}, repeats)
    show(f"{name}: plain", 1000 * found["plain"] / steps, "ms a step")
    for what, value in found.items():
        if what != "plain":
            show(f"{name}: {what} / plain", value / found["plain"], "of the time")
    plain = count(lambda: bench.sample(model, steps))
    show_counts(f"{name}: ours", plain, count(lambda: bench.sample(ours, steps)), bench.sites, steps)
    if "old pack" in models:
        old_count = count(lambda: bench.sample(models["old pack"], steps))
        show(f"{name}: old pack: added per site", (old_count.kernels - plain.kernels) / bench.sites / steps, KERNELS)
        show(f"{name}: old pack: synchronisations added", old_count.waits - plain.waits, f"in {steps} steps")
    comfy.model_management.unload_all_models()


def memory(name: str, bench: Bench, models: dict[str, Any]) -> None:
    """Peaks beside the plain model's, and what stays allocated for a prompt beside what the host is told of it."""
    comfy.model_management.unload_all_models()
    bench.sample(models["plain"])
    plain = peak(lambda: bench.sample(models["plain"]))
    counted = sum(one.model_size() for one in models["ours"].get_additional_models_with_key("image_prompt")) / 1e6
    show(f"{name}: memory that the host counts for the prompt", counted, "MB")
    if cuda():
        before = torch.cuda.memory_allocated()
        bench.sample(models["ours"])
        wait()
        grown = (torch.cuda.memory_allocated() - before) / 1e6
        show(f"{name}: allocated for the prompt beyond what is counted", grown - counted, "MB", 8)
    for what, one in models.items():
        if what != "plain":
            show_memory(f"{name}: memory of {what}", plain, peak(partial(bench.sample, one)))


def main() -> None:
    set_toy(args.toy)
    torch.set_grad_enabled(False)
    log(f"{WHERE}: stood in for: {', '.join(stood_in) or 'nothing'}")
    pack = stand_ins.load_package("image_prompt", TESTS.parent)
    if args.part == "reference":
        for kind in SHRUNK:
            attempt(f"{WHERE}, {kind.name}", partial(reference, pack, kind))
        return None
    if args.part == "dynamic":
        why = stand_ins.dynamic_memory()
        if why:
            return without(WHERE, why)
    if args.part == "novram" and not cuda():
        return without(WHERE, "needs CUDA")
    dtypes = {"novram": (torch.float16,), "dynamic": DTYPES, "standard": DTYPES}[args.part]
    there = [kind for kind in SHRUNK if (args.folder / f"{kind.name}.pt").exists()]
    for kind in (kind for kind in SHRUNK if kind not in there):
        without(f"{WHERE}, {kind.name} shrunk", f"no reference: {ONE_SIZE}, or it failed")
    for kind in there:
        # FLUX is computed in bf16 or fp32 by the host itself
        chosen = tuple(d for d in dtypes if not (kind.transformer and d == torch.float16)) or (torch.bfloat16,)
        attempt(f"{WHERE}, {kind.name}: parity", partial(parity, pack, kind, chosen))
    if args.part == "novram":
        return None
    if args.part == "standard":
        for kind in there[:2]:
            attempt(f"{WHERE}, {kind.name}: partly loaded", partial(partly, pack, kind))
    old_nodes = None
    if args.old is not None:
        try:
            old_nodes = stand_ins.load_package("old_pack", args.old).NODE_CLASS_MAPPINGS
        except Exception as error:
            without(f"{WHERE}: old pack", f"it does not load: {error}")
    for kind in there if args.toy else REAL:
        dtype = torch.bfloat16 if kind.transformer else torch.float32 if args.toy else torch.float16
        attempt(f"{WHERE}, {kind.name}: costs", partial(costs, pack, kind, dtype, old_nodes))
    return None


main()
