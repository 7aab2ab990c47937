"""A section of ``check.py``: our backend beside diffusers' own IP-Adapter, eager, compiled, and recorded as a CUDA graph.

python tests/gpu/in_diffusers.py [--toy]
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from gpu.rows import (
    apart,
    attempt,
    count,
    cuda,
    peak,
    rounding,
    seconds,
    set_toy,
    show,
    show_counts,
    show_memory,
    without,
)
from ipadapter_core import WeightSchedule, bake, layout_of, load_adapter
from ipadapter_core.backends.diffusers import doors
from ipadapter_core.prompt.image_prompt import ImagePrompt
from tiny import nested
from tiny_models import SD15, SDXL, adapter_state, noise, tiny_unet

DEVICE = torch.device("cuda" if cuda() else "cpu")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
REAL: dict[str, dict[str, Any]] = {
    "SD1.5": {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64},
    "SDXL": {
        "block_out_channels": (320, 640, 1280), "layers_per_block": 2, "transformer_layers_per_block": (1, 2, 10),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048, "use_linear_projection": True, "sample_size": 128, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip
"""The released UNets' configs."""


def real_unet(kind: str, dtype: torch.dtype) -> Any:
    """A UNet of the real shapes; matrices keep the variance, norms are identities."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(in_channels=4, out_channels=4, **REAL[kind])
    unet.to(dtype).to_empty(device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    with torch.no_grad():
        for name, p in unet.named_parameters():
            if p.ndim > 1:
                p.normal_(0, 1 / p[0].numel() ** 0.5, generator=generator)
            else:
                p.fill_(0.0 if name.endswith("bias") else 1.0)
    return unet.eval().requires_grad_(False)


class Bench:
    """A UNet, an adapter by our backend and the same one by diffusers, and a call of each."""

    def __init__(
        self, unet: Any, family: str, side: int, dtype: torch.dtype, device: torch.device, **sizes: Any
    ) -> None:
        self.unet, self.dtype, self.device = unet.to(device, dtype), dtype, device
        self.layout = layout_of(unet)
        state = adapter_state(family, self.layout, **sizes)
        self.state = {key: value.to(device, dtype) for key, value in state.items()}
        self.adapter = load_adapter(dict(self.state), name=family)
        self.adapter.module.to(device, dtype)
        width = self.adapter.spec.format.feature
        wide = state["image_proj.proj.weight" if family == "base" else "image_proj.proj_in.weight"].shape[1]
        seen = noise(1, wide, seed=3) if width.rank == 2 else noise(1, 257, wide, seed=3)
        self.features = seen.to(device, dtype)
        self.sites = len(self.adapter.spec.layer_channels)
        to = {"device": device, "dtype": dtype}
        self.x, self.text = (
            noise(2, 4, side, side, seed=1).to(**to),
            noise(2, 77, self.layout.token_dim, seed=2).to(**to),
        )
        self.added: dict[str, Tensor] = {}
        if unet.config.addition_embed_type == "text_time":
            pooled = unet.add_embedding.linear_1.in_features - 6 * unet.config.addition_time_embed_dim
            self.added = {"text_embeds": noise(2, pooled, seed=4).to(**to), "time_ids": torch.ones(2, 6, **to)}
        self.t = torch.tensor([500.0, 500.0], device=device)

    def prompt(self) -> ImagePrompt:
        features = self.features
        with torch.no_grad():
            cond, uncond = self.adapter.tokens(features), self.adapter.tokens(torch.zeros_like(features))
        width = self.adapter.spec.token_dim
        return ImagePrompt(
            cond, uncond, features[:, None], torch.zeros_like(features)[:, None], self.adapter.name, "none", width
        )

    def applied(self, prompt: ImagePrompt | None = None) -> Any:
        """Our adapter on the UNet, until its ``remove``."""
        return doors.apply(self.unet, bake(self.adapter, prompt or self.prompt(), self.layout, WeightSchedule(1.0)))

    def theirs(self) -> Any:
        """A copy of the UNet with diffusers' own adapter; its weights are shared where they are the same."""
        memo = {id(p): p for p in self.unet.parameters()}
        unet = copy.deepcopy(self.unet, memo)
        unet._load_ip_adapter_weights([nested(self.state)])
        return unet.to(self.device, self.dtype)

    def call(self, unet: Any = None, image: bool = False) -> Tensor:
        """The UNet's prediction for both branches, the negative one first."""
        added = dict(self.added)
        if image:
            added["image_embeds"] = [torch.cat([torch.zeros_like(self.features), self.features])[:, None]]
        with torch.no_grad():
            model = self.unet if unet is None else unet  # a compiled one has no truth
            return model(self.x, self.t, self.text, added_cond_kwargs=added, return_dict=False)[0]


def parity(kind: str) -> None:
    """Every dtype on the device next to float32 on the CPU, where diffusers' own adapter is the judge."""
    cpu = torch.device("cpu")
    sizes: dict[str, Any] = {
        "block_out_channels": (16, 32, 32, 32) if kind == SD15 else (16, 32, 64),
        "attention_head_dim": 2,
    }
    unet = tiny_unet(kind, **sizes)
    exact = Bench(copy.deepcopy(unet), "base", 16, torch.float32, cpu)
    expected, plain = exact.call(exact.theirs(), image=True), exact.call()
    for label, dtype in DTYPES.items():
        bench = Bench(copy.deepcopy(unet), "base", 16, dtype, DEVICE)
        name = f"diffusers, {kind} shrunk, {label}"
        with bench.applied():
            found = bench.call()
        show(
            f"{name}: ours next to diffusers' own in fp32 on the CPU",
            apart(found, expected),
            "relative",
            rounding(dtype),
        )
        if label == "fp32":
            show(f"{name}: least effect / effect of the adapter", 0.02 / apart(expected, plain), "", 1.0)
        show(f"{name}: after removal next to plain in fp32", apart(bench.call(), plain), "relative", rounding(dtype))


def costs(name: str, bench: Bench) -> None:
    """Time, kernels, waits and memory of one call, in turns in one run."""
    prompt, theirs = bench.prompt(), bench.theirs()
    plain = copy.deepcopy(bench.unet, {id(p): p for p in bench.unet.parameters()})
    calls = {"plain": lambda: bench.call(plain), "ours": bench.call, "diffusers' own": lambda: bench.call(theirs, True)}

    def apply_and_remove() -> None:
        bench.applied(bench.prompt()).remove()

    show(f"{name}: applied and removed in", seconds({"": apply_and_remove}, 3)[""], "s")
    with bench.applied(prompt):
        show(f"{name}: ours next to diffusers' own", apart(bench.call(), calls["diffusers' own"]()), "relative", rounding(bench.dtype))  # fmt: skip
        found = seconds(calls, 3)
        show(f"{name}: plain", 1000 * found["plain"], "ms a call")
        for what in ("ours", "diffusers' own"):
            show(f"{name}: {what} / plain", found[what] / found["plain"], "of the time")
        counts = {what: count(call) for what, call in calls.items()}
        show_counts(f"{name}: ours", counts["plain"], counts["ours"], bench.sites)
        own = counts["diffusers' own"]
        show(f"{name}: diffusers' own: added per site", (own.kernels - counts["plain"].kernels) / bench.sites, "")
        memory = {what: peak(call) for what, call in calls.items()}
        show_memory(f"{name}: memory of ours in a call", memory["plain"], memory["ours"])
        show_memory(f"{name}: memory of diffusers' own in a call", memory["plain"], memory["diffusers' own"])
        attempt(f"{name}: CUDA graph", lambda: recorded(name, bench))


def recorded(name: str, bench: Bench) -> None:
    """One call with ours applied, recorded and replayed on other latents."""
    name = f"{name}: recorded as a CUDA graph"
    if not cuda():
        return without(name, "needs CUDA")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            bench.call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = bench.call()
    bench.x.copy_(noise(*bench.x.shape, seed=9))
    graph.replay()
    replayed = out.clone()
    show(f"{name}: replayed next to eager", apart(replayed, bench.call()), "relative", rounding(bench.dtype) / 10)
    found = seconds({"eager": bench.call, "replayed": graph.replay})
    show(f"{name}: replayed / eager", found["replayed"] / found["eager"], "of the time")
    return None


def compiled(name: str, bench: Bench, backend: str) -> None:
    """The compiled UNet, plain and with ours: the same numbers, no graph broken, and its time."""
    import torch._dynamo as dynamo

    plain = copy.deepcopy(bench.unet, {id(p): p for p in bench.unet.parameters()})

    def breaks(unet: Any) -> int:
        dynamo.reset()
        with torch.no_grad():
            told = dynamo.explain(unet)(bench.x, bench.t, bench.text, added_cond_kwargs=dict(bench.added))
        dynamo.reset()
        return int(told.graph_break_count)

    without_it, whole = bench.call(), breaks(plain)
    compiled_plain = torch.compile(plain, backend=backend)
    with bench.applied():
        show(f"{name}: graph breaks added", breaks(bench.unet) - whole, "breaks", 0)
        eager, compiled_ours = bench.call(), torch.compile(bench.unet, backend=backend)
        for what, unet, expected in (("ours", compiled_ours, eager), ("plain", compiled_plain, without_it)):
            show(
                f"{name}: {what} compiled next to eager",
                apart(bench.call(unet), expected),
                "relative",
                rounding(bench.dtype),
            )
        calls = {
            "plain": lambda: bench.call(compiled_plain),
            "ours": lambda: bench.call(compiled_ours),
            "eager": bench.call,
        }
        found = seconds(calls, 3)
    show(f"{name}: compiled, ours / plain", found["ours"] / found["plain"], "of the time")
    show(f"{name}: ours, compiled / eager", found["ours"] / found["eager"], "of the time")
    dynamo.reset()


def shrunk(kind: str) -> None:
    name = f"diffusers, {kind} shrunk, fp32" if kind == SD15 else f"diffusers, {kind}, fp32"
    bench = Bench(tiny_unet(kind), "base", 16, torch.float32, DEVICE)
    attempt(f"{name}: costs", lambda: costs(name, bench))
    if kind == "one site":
        attempt(f"{name}: compiled", lambda: compiled(name, bench, "eager"))


def real(kind: str, side: int) -> None:
    name = f"diffusers, {kind} fp16, {8 * side} px"
    inner = 1280 if kind == "SDXL" else 768
    sizes: dict[str, Any] = {"feature_dim": 1280, "hidden_dim": inner, "inner_dim": inner}
    bench = Bench(real_unet(kind, torch.float16), "plus", side, torch.float16, DEVICE, **sizes)
    attempt(f"{name}: costs", lambda: costs(name, bench))
    if kind == "SD1.5":  # SDXL takes minutes to compile
        attempt(f"{name}: compiled", lambda: compiled(name, bench, "inductor"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--only", help="a part of the section by name")
    args = parser.parse_args()
    set_toy(args.toy)
    parts: dict[str, Callable[[], None]] = {f"{kind} parity": partial(parity, kind) for kind in (SD15, SDXL)}
    if args.toy:
        parts |= {kind: partial(shrunk, kind) for kind in (SD15, "one site")}
    else:
        parts |= {kind: partial(real, kind, side) for kind, side in (("SD1.5", 64), ("SDXL", 128))}
    for name, part in parts.items():
        if args.only in (None, name):
            attempt(f"diffusers, {name}", part)


if __name__ == "__main__":
    main()
