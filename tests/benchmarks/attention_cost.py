"""What an image prompt costs: operations, synchronisations, projections and bytes counted; times only reported.

    python tests/benchmarks/attention_cost.py            # the table
    IPADAPTER_PLUS_PATH=… COMFYUI_PATH=… python tests/benchmarks/attention_cost.py   # and ComfyUI_IPAdapter_plus beside it

tests/core/test_counts.py asserts the counts of the same functions.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

if __name__ == "__main__":  # pytest has tests/ on its path already
    sys.path.insert(0, str(Path(__file__).parents[1]))

from ipadapter_core import AdapterPatch, WeightSchedule, bake, describe_adapter, layout_of, load_adapter
from ipadapter_core.attention.schedule import SCALINGS
from ipadapter_core.backends.comfy import doors as comfy_backend
from ipadapter_core.backends.diffusers import doors as diffusers_backend
from ipadapter_core.prompt.image_prompt import ImagePrompt
from tiny import SDXL_CHANNELS, adapter_shapes
from tiny_models import (
    SD15,
    SDXL,
    Guider,
    call_unet,
    conditioning,
    noise,
    tiny_adapter,
    tiny_host,
    tiny_prompt,
    tiny_unet,
)

SYNCHRONISING = {
    "aten._local_scalar_dense",
    "aten.item",
    "aten.nonzero",
    "aten.equal",
    "aten.is_nonzero",
    "aten.masked_select",
}
"""Operations after which the host has to wait for the device; ``.item()``, ``float(t)`` and ``bool(t)`` are the first."""

PROJECTING = {"aten.mm", "aten.addmm", "aten.bmm", "aten.baddbmm", "aten.linear", "aten.matmul"}


class Operations(TorchDispatchMode):
    """Counts every aten operation, views included."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Cost:
    """Of one call: all operations, those that synchronise, matrix products, and calls of the adapter's layers."""

    operations: int
    synchronisations: int
    products: int
    layer_calls: int = 0


def cost_of(call: Callable[[], object], *watched: nn.Module) -> Cost:
    """Count one call; ``watched`` modules' Linear layers are counted as ``layer_calls``."""
    calls: list[object] = []
    layers = [m for module in watched for m in module.modules() if isinstance(m, nn.Linear)]
    hooks = [layer.register_forward_hook(lambda *_: calls.append(1)) for layer in layers]
    with Operations() as counted:
        call()
    for hook in hooks:
        hook.remove()
    seen = counted.seen
    return Cost(
        sum(seen.values()),
        sum(seen[name] for name in SYNCHRONISING),
        sum(seen[name] for name in PROJECTING),
        len(calls),
    )


@dataclass(frozen=True)
class Case:
    """A schedule and a mask whose cost is counted."""

    name: str
    schedule: WeightSchedule
    mask: bool = False

    @property
    def windowed(self) -> bool:
        return not self.schedule.window.constant


CASES = (
    *(Case(scaling, WeightSchedule(0.7, scaling=scaling)) for scaling in SCALINGS),
    *(Case(f"{scaling}, mask", WeightSchedule(0.7, scaling=scaling), True) for scaling in SCALINGS),
    Case("window", WeightSchedule(0.7, end_percent=0.9)),
    Case("window, mask, K+mean(V)", WeightSchedule(0.7, end_percent=0.9, scaling="K+mean(V) w/ C penalty"), True),
    Case("curve", WeightSchedule(0.7, curve=((0.0, 1.0), (1.0, 0.2)))),
    Case("precise style", WeightSchedule(0.7, preset="style transfer precise")),
)


@dataclass(frozen=True)
class Row:
    """What one adapter adds to one model call, after the first: operations per hooked site, the others per call."""

    case: Case
    sites: int
    operations_per_site: float
    synchronisations: int
    products: int
    layer_calls: int


def _row(case: Case, sites: int, plain: Cost, patched: Cost) -> Row:
    return Row(
        case,
        sites,
        (patched.operations - plain.operations) / sites,
        patched.synchronisations - plain.synchronisations,
        patched.products - plain.products,
        patched.layer_calls,
    )


def diffusers_rows(kind: str = SD15, cases: tuple[Case, ...] = CASES) -> Iterator[Row]:
    """Added cost per case on a diffusers UNet."""
    unet = tiny_unet(kind)
    layout = layout_of(unet)
    adapter = tiny_adapter(layout)
    prompt = tiny_prompt(adapter)
    x, text = noise(2, 4, 16, 16), noise(2, 7, layout.token_dim)

    def run() -> Tensor:
        return call_unet(unet, x, text)

    run()
    plain = cost_of(run)
    for case in cases:
        patch = bake(adapter, prompt, layout, case.schedule, noise(64, 64) if case.mask else None)
        with diffusers_backend.apply(unet, patch):
            run()  # arranges K/V and the mask's grids, once
            yield _row(case, _acting(patch), plain, cost_of(run, adapter.module))


def comfy_rows(kind: str = SD15, cases: tuple[Case, ...] = CASES) -> Iterator[Row]:
    """Added cost per case on a fake ComfyUI, of one sampling step with both conditionings in one model call."""
    model = tiny_host(kind)
    layout = comfy_backend.comfy_layout(model)
    adapter = tiny_adapter(layout)
    prompt = tiny_prompt(adapter)
    conds: Any = {name: [conditioning(noise(1, 7, layout.token_dim))] for name in ("positive", "negative")}
    x = noise(1, 4, 16, 16)
    plain = cost_of(lambda: Guider(model, conds)(x))
    for case in cases:
        patch = bake(adapter, prompt, layout, case.schedule, noise(64, 64) if case.mask else None)
        guider = Guider(comfy_backend.apply(model, patch), conds)
        guider(x)
        yield _row(case, _acting(patch), plain, cost_of(lambda guider=guider: guider(x), adapter.module))


def _acting(patch: AdapterPatch) -> int:
    return sum(patch.active(i) for i in range(len(patch.layout.sites)))


def graph_breaks(applied: bool) -> int:
    """Graph breaks of torch.compile on a UNet with one site (few sites: tracing takes seconds each)."""
    import torch._dynamo as dynamo

    unet = tiny_unet("one site")
    layout = layout_of(unet)
    adapter = tiny_adapter(layout)
    x, text, t = noise(2, 4, 8, 8), noise(2, 7, layout.token_dim), torch.tensor(500)

    def explain() -> int:
        dynamo.reset()
        with torch.no_grad():
            return int(dynamo.explain(unet)(x, t, text).graph_break_count)

    if not applied:
        return explain()
    with diffusers_backend.apply(unet, bake(adapter, tiny_prompt(adapter), layout)):
        return explain()


# --- bytes -------------------------------------------------------------------------------------------------------------


def reachable(root: object) -> tuple[list[Tensor], list[nn.Module]]:
    """Tensors and modules that an object keeps alive through its fields, containers and attributes."""
    tensors: dict[int, Tensor] = {}
    modules: dict[int, nn.Module] = {}
    visited: set[int] = set()
    queue: list[Any] = [root]
    while queue:
        item = queue.pop()
        if id(item) in visited:
            continue
        visited.add(id(item))
        if isinstance(item, Tensor):
            tensors[id(item)] = item
        elif isinstance(item, nn.Module):
            modules[id(item)] = item
        elif isinstance(item, dict):
            queue += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set, frozenset)):
            queue += item
        elif is_dataclass(item) and not isinstance(item, type):
            queue += [getattr(item, f.name) for f in fields(item)]
    return list(tensors.values()), list(modules.values())


def held_bytes(root: object) -> int:
    """Bytes of the storages behind every reachable tensor, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in reachable(root)[0]}
    return sum(storages.values())


def kv_bytes(patch: AdapterPatch, prompt: ImagePrompt) -> int:
    """K and V, both branches, every site: what must be held and no more."""
    images, tokens, _ = prompt.cond.shape
    return sum(2 * 2 * images * tokens * site.channels * 4 for site in patch.layout.sites)


# --- times, reported only ----------------------------------------------------------------------------------------------


@contextmanager
def sdxl_plus_file() -> Iterator[Path]:
    """An 850 MB file with the shapes of ip-adapter-plus_sdxl_vit-h in fp16, sparse on disk, all zeros."""
    shapes = adapter_shapes(
        "plus",
        token_dim=2048,
        channels=SDXL_CHANNELS,
        num_tokens=16,
        feature_dim=1280,
        hidden_dim=1280,
        inner_dim=1280,
        depth=4,
    )
    header: dict[str, object] = {}
    end = 0
    for key, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[key] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ip-adapter-plus_sdxl_vit-h.safetensors"
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        yield path


def milliseconds(*calls: Callable[[], object], repeats: int = 5) -> list[float]:
    """Shortest of a few runs of each call, taken in turns so that a busy machine is busy for all of them."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(repeats):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    return [1000 * min(taken) for taken in times]


def timings() -> Iterator[tuple[str, float]]:
    """Name and milliseconds, on this machine, in this run."""
    unet = tiny_unet(
        SD15, block_out_channels=(64, 128, 256, 256), norm_num_groups=32, attention_head_dim=8, cross_attention_dim=768
    )
    layout = layout_of(unet)
    adapter = tiny_adapter(layout, "plus")
    prompt = tiny_prompt(adapter)
    x, text = noise(2, 4, 32, 32), noise(2, 77, 768)

    def step(*patches: AdapterPatch) -> Callable[[], Tensor]:
        def run() -> Tensor:
            if not patches:
                return call_unet(unet, x, text)
            with diffusers_backend.apply(unet, *patches):
                return call_unet(unet, x, text)

        return run

    def fresh() -> None:
        again = ImagePrompt(
            prompt.cond, prompt.uncond, prompt.features, prompt.uncond_features, "a", "e", prompt.token_dim
        )
        diffusers_backend.apply(unet, bake(adapter, again, layout)).remove()

    patch = bake(adapter, prompt, layout)
    masked = patch.with_mask(noise(256, 256).clamp(0, 1))
    names = ("step without adapter", "step with a plus adapter", "the same with a mask", "step with two")
    model = "16-site UNet, 64..256 channels, 32x32 latents, batch 2"
    for name, value in zip(names, milliseconds(step(), step(patch), step(masked), step(patch, masked)), strict=True):
        yield f"{name} ({model})", value
    yield "bake and apply", milliseconds(fresh)[0]
    with sdxl_plus_file() as path:
        megabytes = path.stat().st_size / 1e6
        yield f"detection of an SDXL plus file ({megabytes:.0f} MB)", milliseconds(lambda: describe_adapter(path))[0]
        yield "loading it (fp16, sparse on disk)", milliseconds(lambda: load_adapter(path), repeats=1)[0]


def by_host(script: str, *arguments: str, shown_from: str) -> str:
    """What a script beside this one prints when $COMFYUI_PATH's own python runs it; or why there is nothing."""
    host = os.environ.get("COMFYUI_PATH")
    if not host:
        return f"{script}: not measured; set COMFYUI_PATH"
    python = Path(host) / ".venv/bin/python"
    command = [str(python if python.exists() else sys.executable), str(Path(__file__).with_name(script))]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=1200, check=False)
    if done.returncode != 0:
        return f"{script}: not measured: {(done.stderr.strip().splitlines() or ['no output'])[-1]}"
    return done.stdout[done.stdout.find(shown_from) :].strip()  # what comes before are the host's greetings


def old_pack() -> str:
    """The same counts for ComfyUI_IPAdapter_plus, by the host's own python; or why there are none."""
    pack, host = os.environ.get("IPADAPTER_PLUS_PATH"), os.environ.get("COMFYUI_PATH")
    if not pack or not host:
        return "ComfyUI_IPAdapter_plus: not measured; set IPADAPTER_PLUS_PATH and COMFYUI_PATH"
    return "\n\n".join(
        by_host("old_pack.py", pack, host, *flags, shown_from="one site of")
        for flags in ([], ["--use-pytorch-cross-attention"])
    )


def main() -> None:
    torch.set_num_threads(1)
    print(
        f"{'added by one adapter':<44} {'sites':>5} {'ops/site':>8} {'syncs/call':>10} {'products':>8} {'K/V layers':>10}"
    )
    for title, rows in (
        ("diffusers", diffusers_rows()),
        ("diffusers SDXL", diffusers_rows(SDXL)),
        ("ComfyUI", comfy_rows()),
        ("ComfyUI SDXL", comfy_rows(SDXL)),
    ):
        for row in rows:
            name = f"{title}: {row.case.name}"
            counts = f"{row.synchronisations:>10} {row.products:>8} {row.layer_calls:>10}"
            print(f"{name:<44} {row.sites:>5} {row.operations_per_site:>8.2f} {counts}")
    print(f"\ngraph breaks of torch.compile: {graph_breaks(False)} without, {graph_breaks(True)} with an adapter")
    unet = tiny_unet()
    adapter = tiny_adapter(layout_of(unet))
    prompt = tiny_prompt(adapter)
    patch = bake(adapter, prompt, layout_of(unet))
    print(f"bytes held by a patch: {held_bytes(patch)}, of which K and V {kv_bytes(patch, prompt)}\n")
    for name, value in timings():
        print(f"{name:<88} {value:>9.1f} ms", flush=True)
    print("\n" + old_pack())


if __name__ == "__main__":
    main()
