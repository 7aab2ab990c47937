"""Python and dispatch of one attention site in ComfyUI, beyond the host's own attention: microseconds per adapter.

    python tests/benchmarks/site_cost.py                                   # plain, least, ours
    python tests/benchmarks/site_cost.py --host ~/comfy/ComfyUI            # with the host's attention, in its own python
    python tests/benchmarks/site_cost.py --host … --pack ~/ComfyUI_IPAdapter_plus   # and the old pack, in the same run

The tensors are so small that arithmetic takes next to nothing: what is left is what a GPU waits for, as launches dominate
there. ``plain`` is the host's attention to the text. ``least`` is what an image prompt cannot do without: one fused
attention and one add on the same tensors, with keys and values ready (its views of them included). The others are what one
adapter, or one more on the same site, adds to ``plain``. All take turns in one run, and the best round of each counts.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
BATCH, TOKENS, CHANNELS, HEADS, IMAGE_TOKENS, WIDTH, SITES = 2, 4, 16, 2, 4, 32, 16
ROUNDS, CALLS = 200, 5
OPTIONS: dict[str, Any] = {
    "n_heads": HEADS,
    "cond_or_uncond": [1, 0],
    "uuids": ["u", "c"],
    "block": ("input", 4),
    "transformer_index": 2,
    "original_shape": [BATCH, 4, 2, 2],
    "activations_shape": [BATCH, CHANNELS, 2, 2],
}


def rates(*calls: Callable[[], object]) -> list[float]:
    """Microseconds per site of each model call: the best of ROUNDS, taken in turns so that a busy machine is busy for all of them."""
    best = [float("inf")] * len(calls)
    for number in range(ROUNDS + 1):
        for index, call in enumerate(calls):
            start = time.perf_counter()
            for _ in range(CALLS):
                call()
            if number:  # the first round warms up
                best[index] = min(best[index], (time.perf_counter() - start) / CALLS / SITES * 1e6)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", type=Path, help="a ComfyUI folder; its .venv runs the measurement")
    parser.add_argument("--pack", type=Path, help="the folder of ComfyUI_IPAdapter_plus")
    args = parser.parse_args()
    inside = os.environ.get("SITE_COST_INSIDE")
    if args.host and not inside:
        python = args.host.expanduser() / ".venv/bin/python"
        os.environ["SITE_COST_INSIDE"] = "1"
        os.execv(str(python if python.exists() else sys.executable), [str(python), str(HERE), *sys.argv[1:]])
    host_attention, old = (None, None)
    if args.host:
        sys.argv = [sys.argv[0], "--cpu", "--use-pytorch-cross-attention"]
        sys.path.insert(0, str(args.host.expanduser()))
        with redirect_stdout(sys.stderr):
            import comfy.options

            comfy.options.enable_args_parsing()
            import comfy.ldm.modules.attention as attention_module

            host_attention = attention_module.optimized_attention
            old = old_site(args.pack.expanduser()) if args.pack else None
        folder = tempfile.mkdtemp()  # the repository root would hide the host's ``nodes``
        (Path(folder) / "ipadapter_core").symlink_to(HERE.parents[2] / "ipadapter_core")
        sys.path.insert(0, folder)
    measure(host_attention, old)


def old_site(pack: Path) -> Callable[..., Any]:
    """The old pack's hook for one site."""
    import importlib.util

    import torch

    spec = importlib.util.spec_from_file_location(
        "old_pack", pack / "__init__.py", submodule_search_locations=[str(pack)]
    )
    assert spec is not None
    assert spec.loader is not None
    sys.modules["old_pack"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    from old_pack.CrossAttentionPatch import Attn2Replace, ipadapter_attention
    from old_pack.IPAdapterPlus import IPAdapter

    weights = {
        "image_proj": {
            "proj.weight": torch.randn(IMAGE_TOKENS * WIDTH, 8),
            "proj.bias": torch.randn(IMAGE_TOKENS * WIDTH),
            "norm.weight": torch.ones(WIDTH),
            "norm.bias": torch.zeros(WIDTH),
        },
        "ip_adapter": {f"1.to_{x}_ip.weight": torch.randn(CHANNELS, WIDTH) for x in "kv"},
    }
    cond, uncond = torch.randn(1, IMAGE_TOKENS, WIDTH), torch.randn(1, IMAGE_TOKENS, WIDTH)
    return Attn2Replace(
        ipadapter_attention, ipadapter=IPAdapter(weights, WIDTH, WIDTH, 8, IMAGE_TOKENS), weight=0.7, cond=cond,
        uncond=uncond, weight_type="linear", mask=None, sigma_start=99.0, sigma_end=0.0, module_key="1",
        embeds_scaling="V only",
    )  # fmt: skip


def measure(host_attention: Callable[..., Any] | None, old: Callable[..., Any] | None) -> None:
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(1)
    function = host_attention or _attention
    q, k, v = (torch.randn(BATCH, n, CHANNELS) for n in (TOKENS, 7, 7))
    image_k, image_v = (torch.randn(BATCH, HEADS, IMAGE_TOKENS, CHANNELS // HEADS) for _ in range(2))
    base = torch.randn(BATCH, TOKENS, CHANNELS)
    one, two, three = (model_call(count, function) for count in (1, 2, 3))

    def least() -> Any:
        rows = q.view(BATCH, TOKENS, HEADS, -1).transpose(1, 2)
        image = F.scaled_dot_product_attention(rows, image_k, image_v)
        return torch.add(base, image.transpose(1, 2).reshape(BATCH, TOKENS, CHANNELS), alpha=0.7)

    def sites(site: Callable[[], Any]) -> Callable[[], None]:
        def call() -> None:
            for _ in range(SITES):
                site()

        return call

    options = {**OPTIONS, "sigmas": torch.ones(BATCH)}
    calls = [
        sites(lambda: function(q, k, v, HEADS, attn_precision=None, transformer_options=options)),
        sites(least),
        lambda: one(q, k, v),
        lambda: two(q, k, v),
        lambda: three(q, k, v),
    ]
    if old is not None:
        calls.append(sites(lambda: old(q, k, v, options)))
    with torch.inference_mode():
        plain, needed, *hooked = rates(*calls)
    rows = [
        ("plain: the host's attention to the text", plain),
        ("least: a fused attention and an add", needed),
        ("ours, one adapter", hooked[0] - plain),
        ("ours, the second on the same site", hooked[1] - hooked[0]),
        ("ours, the third on the same site", hooked[2] - hooked[1]),
    ]
    if old is not None:
        rows.append(("ComfyUI_IPAdapter_plus, one adapter", hooked[3] - plain))
    print(f"torch {torch.__version__}, one thread, attention: {function.__name__}")
    for name, value in rows:
        print(f"{name:<44} {value:>7.1f} µs {value / needed:>6.2f} of the least")


def model_call(prompts: int, attention: Callable[..., Any]) -> Callable[[Any, Any, Any], None]:
    """All sites of a model call with so many image prompts: what ComfyUI tells our hooks, described once per call as there."""
    import torch

    from ipadapter_core.attention.kv import Baked
    from ipadapter_core.attention.patch import AdapterPatch
    from ipadapter_core.attention.schedule import WeightSchedule
    from ipadapter_core.backends.comfy.notes import KEY, CallNote, Chunk, call_of
    from ipadapter_core.backends.comfy.unet import AttentionHook
    from ipadapter_core.models.sites import ModelLayout, Site
    from ipadapter_core.models.unet import SD15

    layout = ModelLayout(SD15, WIDTH, tuple(Site("", "input", i, 0, i, CHANNELS, HEADS) for i in range(SITES)))
    schedule = WeightSchedule(0.7)
    patches = tuple(
        AdapterPatch(
            "a", layout, tuple(Baked(*torch.randn(2, 2, 1, HEADS, IMAGE_TOKENS, CHANNELS // HEADS)) for _ in range(SITES)),
            schedule, None, schedule.site_weights(layout),
        )
        for _ in range(prompts)
    )  # fmt: skip
    hooks = [AttentionHook(i, patches, None, attention) for i in range(SITES)]
    note = CallNote(None, {"u": Chunk(0, None), "c": Chunk(1, None)}, (2, 2))
    x = torch.zeros(BATCH, 4, 2, 2)

    def call(q: Any, k: Any, v: Any) -> None:
        options = {**OPTIONS, KEY: note}
        options[KEY] = call_of(x, (), {"transformer_options": options})
        for hook in hooks:
            hook(q, k, v, options)

    return call


def _attention(q: Any, k: Any, v: Any, heads: int, **_: Any) -> Any:
    from ipadapter_core.backends.comfy.unet import torch_attention

    return torch_attention(q, k, v, heads)


if __name__ == "__main__":
    main()
