"""ComfyUI_IPAdapter_plus and this pack side by side at one attention site, inside the host's own python.

    ~/comfy/ComfyUI/.venv/bin/python old_pack.py PACK HOST [host flags]

attention_cost.py runs it; it needs torch, ComfyUI and the old pack, and neither diffusers nor an installation of ours.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

pack, host, *flags = sys.argv[1:]
sys.argv = [sys.argv[0], "--cpu", *flags]
sys.path.insert(0, host)

import torch  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

CHANNELS, HEADS, TOKENS, WIDTH, BATCH = 1280, 8, 256, 768, 1


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func.overloadpacket)] += 1
        return func(*args, **(kwargs or {}))


def load_pack(path: str) -> Any:
    spec = importlib.util.spec_from_file_location(
        "old_pack", Path(path) / "__init__.py", submodule_search_locations=[path]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["old_pack"] = module
    spec.loader.exec_module(module)
    return module


def import_core() -> None:
    """Our core alone on the path: the repository root would hide the host's ``nodes``."""
    folder = tempfile.mkdtemp()
    (Path(folder) / "ipadapter_core").symlink_to(Path(__file__).resolve().parents[2] / "ipadapter_core")
    sys.path.append(folder)


def milliseconds(call: Callable[[], object], repeats: int = 9) -> float:
    call()
    times: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def main() -> None:
    import comfy.options

    comfy.options.enable_args_parsing()  # the host ignores its command line otherwise
    import comfy.ldm.modules.attention as host_attention

    with redirect_stdout(sys.stderr):  # other custom code greets on stdout
        load_pack(pack)
    import_core()
    from old_pack.CrossAttentionPatch import Attn2Replace, ipadapter_attention
    from old_pack.IPAdapterPlus import IPAdapter

    from ipadapter_core.attention.kv import Baked
    from ipadapter_core.attention.masks import RegionMask
    from ipadapter_core.attention.maths import split_heads
    from ipadapter_core.attention.patch import AdapterPatch
    from ipadapter_core.attention.schedule import WeightSchedule
    from ipadapter_core.backends.comfy.unet import AttentionHook
    from ipadapter_core.models.sites import ModelLayout, Site
    from ipadapter_core.models.unet import SD15

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    weights = {"image_proj": {"proj.weight": rand(4 * WIDTH, 1024), "proj.bias": rand(4 * WIDTH)}, "ip_adapter": {}}
    weights["image_proj"] |= {"norm.weight": torch.ones(WIDTH), "norm.bias": torch.zeros(WIDTH)}
    weights["ip_adapter"] = {"1.to_k_ip.weight": rand(CHANNELS, WIDTH), "1.to_v_ip.weight": rand(CHANNELS, WIDTH)}
    old = IPAdapter(weights, WIDTH, WIDTH, 1024, 4)
    cond, uncond = rand(1, 4, WIDTH), rand(1, 4, WIDTH)
    q, k, v = (rand(2 * BATCH, n, CHANNELS) for n in (TOKENS, 77, 77))
    options = {
        "n_heads": HEADS,
        "cond_or_uncond": [1, 0],
        "sigmas": torch.ones(BATCH),
        "block": ("input", 4),
        "transformer_index": 2,
        "original_shape": [2 * BATCH, 4, 64, 64],
        "activations_shape": [2 * BATCH, CHANNELS, 16, 16],
    }
    site = Site("", "input", 4, 0, 0, CHANNELS, HEADS)
    layout = ModelLayout(SD15, WIDTH, (site,))
    tokens = torch.cat([uncond, cond])
    baked = [
        split_heads(tokens @ weights["ip_adapter"][f"1.to_{x}_ip.weight"].T, HEADS).contiguous().unflatten(0, (2, -1))
        for x in "kv"
    ]
    mask = torch.ones(1, 512, 512)
    mask[..., :256] = 0
    function = host_attention.optimized_attention.__name__

    print(
        f"\none site of {CHANNELS} channels, {TOKENS} latent tokens, batch {2 * BATCH}, {function}: what one adapter adds"
    )
    print(
        f"{'':<34} {'old ops':>8} {'ours':>6} {'old syncs':>10} {'ours':>6} {'old ms':>8} {'ours':>8} {'difference':>11}"
    )

    def plain() -> torch.Tensor:
        return host_attention.optimized_attention(q, k, v, HEADS)

    for scaling in ("V only", "K+V", "K+V w/ C penalty", "K+mean(V) w/ C penalty"):
        for region in (None, mask):
            theirs = Attn2Replace(
                ipadapter_attention, ipadapter=old, weight=0.7, cond=cond, uncond=uncond, weight_type="linear", mask=region,
                sigma_start=99.0, sigma_end=0.0, module_key="1", embeds_scaling=scaling,
            )  # fmt: skip
            schedule = WeightSchedule(0.7, scaling=scaling)
            chosen = None if region is None else RegionMask.from_tensor(region)
            patch = AdapterPatch("ours", layout, (Baked(*baked),), schedule, chosen, schedule.site_weights(layout))
            ours = AttentionHook(0, (patch,), None, host_attention.optimized_attention)
            with torch.no_grad():  # inference mode would hide the parts of composite operations from the counter
                difference = (theirs(q, k, v, options) - ours(q, k, v, options)).abs().max()
                base, (a, b) = count(plain), (count(lambda f=f: f(q, k, v, options)) for f in (theirs, ours))
                seconds = milliseconds(plain)
                times = [milliseconds(lambda f=f: f(q, k, v, options)) - seconds for f in (theirs, ours)]
            name = scaling + (", mask" if region is not None else "")
            syncs = [c["aten._local_scalar_dense"] + c["aten.item"] for c in (a, b)]
            print(
                f"{name:<34} {a.total() - base.total():>8} {b.total() - base.total():>6} {syncs[0]:>10} {syncs[1]:>6} "
                f"{times[0]:>8.2f} {times[1]:>8.2f} {difference:>11.1e}"
            )


def count(call: Callable[[], object]) -> Counter[str]:
    with Operations() as counted:
        call()
    return counted.seen


if __name__ == "__main__":
    main()
