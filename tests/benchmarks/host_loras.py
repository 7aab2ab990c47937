"""ComfyUI's own LoRA loader and hook LoRAs beside this pack's, inside the host's own python; times only reported.

    ~/comfy/ComfyUI/.venv/bin/python host_loras.py HOST

lora_cost.py runs it with COMFYUI_PATH. A checkpoint of SD1.5's topology, every level 320 channels wide, random weights;
a LoRA of rank 16 on its attentions, feed-forwards and resnets. All rows of a table are taken in turns in one run.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

host, *_ = sys.argv[1:]
sys.argv = [sys.argv[0], "--cpu"]
TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [host, str(TESTS)]

import torch  # noqa: E402

RANK, STEPS, SIZE = 16, 2, 32


def load_pack() -> Any:
    spec = importlib.util.spec_from_file_location(
        "image_prompt", TESTS.parent / "__init__.py", submodule_search_locations=[str(TESTS.parent)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["image_prompt"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def seconds(calls: Mapping[str, Callable[[int], object]], *, warm: bool, repeats: int = 3) -> dict[str, float]:
    """Shortest of a few runs of each call, taken in turns; a call gets the number of its run.

    ``warm``: every timed run follows an untimed one of the same call, so that a change of model is not measured.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for run in range(repeats):
        for name, call in calls.items():
            if warm:
                call(run)
            start = time.perf_counter()
            call(run)
            taken[name].append(time.perf_counter() - start)
    return {name: min(found) for name, found in taken.items()}


def show(title: str, found: Mapping[str, float], base: str, share: int = 1) -> None:
    print(f"\n{title}")
    for name, value in found.items():
        print(f"  {name:<66} {1000 * value / share:>9.1f} ms   x {value / found[base]:.2f}", flush=True)


class Bench:
    """A model, two LoRA files, and a sampler."""

    def __init__(self, folder: Path) -> None:
        import comfy.sd
        import comfy.utils

        from host.shrunk import build_checkpoint
        from host.tiny_lora_files import build_lora

        with redirect_stdout(sys.stderr):
            self.pack = load_pack()
        checkpoint = build_checkpoint("sd15", folder)
        self.model: Any = comfy.sd.load_checkpoint_guess_config(str(checkpoint), output_vae=False, output_clip=False)[0]
        self.files = [str(build_lora("sd15", folder, seed=seed, rank=RANK, size=0.3)) for seed in (1, 2)]
        self.tensors = [comfy.utils.load_torch_file(file, safe_load=True) for file in self.files]
        loras = self.pack.ipadapter_core.lora
        self.loaded = [self.pack.nodes.host.lora.LoadedLoRA(loras.load_lora(file)) for file in self.files]
        generator = torch.Generator().manual_seed(0)
        self.positive = [[torch.randn(1, 77, 768, generator=generator), {}]]
        self.negative = [[torch.randn(1, 77, 768, generator=generator), {}]]
        self.latent = torch.zeros(1, 4, SIZE, SIZE)
        self.noise = torch.randn(1, 4, SIZE, SIZE, generator=generator)

    def sample(self, model: Any, positive: Any = None, negative: Any = None) -> torch.Tensor:
        import comfy.sample

        return comfy.sample.sample(
            model, self.noise, STEPS, 3.0, "euler", "normal", positive or self.positive, negative or self.negative,
            self.latent, disable_pbar=True, seed=0,
        )  # fmt: skip

    def ours(self, mode: str, strength: float = 1.0, **settings: Any) -> Any:
        return self.pack.nodes.host.lora.apply(self.model, None, self.loaded[0], mode, strength=strength, **settings)[0]

    def hosts(self, strength: float = 1.0) -> Any:
        import comfy.sd

        return comfy.sd.load_lora_for_models(self.model, None, dict(self.tensors[0]), strength, 0)[0]

    def hooks(self, index: int = 0, curve: tuple[float, ...] = ()) -> Any:
        """The host's LoRA as a hook on conditionings, with a strength per part of the way."""
        import comfy.hooks

        group = comfy.hooks.create_hook_lora(dict(self.tensors[index]), 1.0, 0.0)
        if curve:
            frames = comfy.hooks.HookKeyframeGroup()
            for i, strength in enumerate(curve):
                frames.add(comfy.hooks.HookKeyframe(strength, start_percent=i / len(curve)))
            group.set_keyframes_on_hooks(frames)
        return group

    def hooked(self, cond: Any, hooks: Any, mask: torch.Tensor | None = None) -> Any:
        import comfy.hooks

        cond = comfy.hooks.set_hooks_for_conditioning(cond, hooks)
        return cond if mask is None else [[cond[0][0], cond[0][1] | {"mask": mask, "mask_strength": 1.0}]]


def main() -> None:
    import comfy.options

    comfy.options.enable_args_parsing()  # the host ignores its command line otherwise
    import comfy.model_management

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        bench = Bench(Path(name))
        window = bench.pack.ipadapter_core.Window
        region = bench.pack.ipadapter_core.RegionMask.from_tensor
        print(f"\nComfyUI, {STEPS} steps with both prompts, latent {SIZE} x {SIZE}, one thread, rank {RANK}")

        load = lambda model: comfy.model_management.load_models_gpu([model])  # noqa: E731
        strengths = (0.5, 0.6, 0.7)  # never one that was there before
        show(
            "another strength, until the model is ready to sample",
            seconds({
                "LoRA Strength, live": lambda run: load(bench.ours("live", strengths[run])),
                "LoRA Strength, merged": lambda run: load(bench.ours("merged", strengths[run])),
                "host's LoraLoader": lambda run: load(bench.hosts(strengths[run])),
            }, warm=False),
            "host's LoraLoader",
        )  # fmt: skip

        plain = bench.model
        models = {
            "plain": plain, "LoRA Strength, live": bench.ours("live"), "LoRA Strength, merged": bench.ours("merged"),
            "host's LoraLoader": bench.hosts(),
        }  # fmt: skip
        calls: dict[str, Callable[[int], object]] = {
            name: lambda _, model=model: bench.sample(model) for name, model in models.items()
        }
        whole = bench.hooks()
        prompts = bench.hooked(bench.positive, whole), bench.hooked(bench.negative, whole)
        calls["host's hook LoRA on both prompts"] = lambda _: bench.sample(plain, *prompts)

        curve = tuple((i / STEPS, 1 - i / STEPS) for i in range(STEPS))
        falling = bench.ours("live", window=window(curve=curve))
        frames = bench.hooks(curve=tuple(factor for _, factor in curve))
        curved = bench.hooked(bench.positive, frames), bench.hooked(bench.negative, frames)
        calls["LoRA Strength with a curve"] = lambda _: bench.sample(falling)
        calls["host's hook LoRA, a keyframe per step"] = lambda _: bench.sample(plain, *curved)

        left = torch.zeros(1, 256, 256)
        left[..., :128] = 1
        first = bench.ours("live", mask=region(left))
        both = bench.pack.nodes.host.lora.apply(
            first, None, bench.loaded[1], "live", strength=1.0, mask=region(1 - left)
        )[0]
        parts = [bench.hooked(bench.positive, bench.hooks(i), m)[0] for i, m in enumerate((left, 1 - left))]
        calls["LoRA Strength, two masks (one model call)"] = lambda _: bench.sample(both)
        calls["host's hook LoRAs on two masked prompts"] = lambda _: bench.sample(plain, parts, bench.negative)
        show("a step, the model loaded", seconds(calls, warm=True), "plain", STEPS)


if __name__ == "__main__":
    main()
