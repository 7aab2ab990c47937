"""Hundreds of mixed runs in one real ComfyUI: does memory stay, does nothing leak into a fixed probe.

    python tests/benchmarks/soak.py --runs 600 --seed 1 --out soak.json       # about a quarter of an hour on two cores

Image prompts, LoRAs live and merged, masks, schedules, several adapters, wrong graphs and cancelled ones, in random order.
Before, between and after them a fixed probe (plain, image prompt, LoRA) must give the same bits, and a census is taken
right after it: like is compared with like. ComfyUI's own history of prompts grows with every run and is emptied first.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # pytest has tests/ on its path already
    sys.path.insert(0, str(Path(__file__).parents[1]))

from host.comfy_server import ComfyServer, ExecutionFailed, ExecutionInterrupted, Graph, GraphRejected, find_hosts
from host.shrunk import build_checkpoint
from host.steering import Steering
from host.tiny_lora_files import build_lora

WARM_UP = 60
"""Runs before the first census that counts: imports, caches of fixed size and the allocator's pools have settled then."""
PRESETS = ("linear", "style transfer", "composition", "weak input", "ease in-out")


class Soak:
    """One server and the graphs that are sent to it."""

    def __init__(self, server: ComfyServer, folder: Path, seed: int) -> None:
        self.server, self.folder, self.random = server, folder, random.Random(seed)
        self.checkpoint = server.add_model("checkpoints", build_checkpoint("sd15_small", folder))
        self.counts: Counter[str] = Counter()

    def scene(self, **settings: Any) -> Steering:
        return Steering(self.server, self.checkpoint, self.folder, **settings)

    def lora(self, scene: Steering, model: Any, seed: int, **settings: Any) -> Any:
        file = self.server.add_model("loras", build_lora(scene.unet, self.folder, seed=seed))
        inputs = {"strength": 1.0, "text_strength": 1.0, "selector": "", "mode": "live", "start": 0.0, "end": 1.0}
        return scene.graph.add("ImagePromptLoRAStrength", model=model, file=file, **(inputs | settings))

    def probe(self) -> dict[str, str]:
        """Hashes of three fixed pictures."""
        s = self.scene(width=96)
        loaded = s.adapter()
        steered = s.apply(s.model, loaded, s.encode(loaded, s.photo()), mask=s.mask(1, 0))
        saved = {"plain": s.sample(s.model), "prompt": s.sample(steered), "lora": s.sample(self.lora(s, steered, 0))}
        result = s.run()
        return {name: result.sha256(node) for name, node in saved.items()}

    def census(self, number: int) -> dict[str, Any]:
        self.server.post("/history", {"clear": True})
        graph = Graph()
        node = graph.add("TestCensus", run=number)
        return json.loads(self.server.run(graph).text(node)[0])

    def one(self) -> None:
        kind = self.random.choices(("fine", "wrong", "cancelled", "freed"), (80, 10, 9, 1))[0]
        self.counts[kind] += 1
        if kind == "freed":
            self.server.free()
            return
        s = self.mixed()
        if kind == "wrong":
            if self.random.random() < 0.5:
                s.graph["1"]["inputs"]["ckpt_name"] = "none"
            else:  # a prompt that was encoded for another adapter
                s.sample(s.apply(s.model, s.adapter("plus"), s.encode(s.adapter("base"), s.photo())))
        try:
            prompt = self.server.submit(s.graph)
            if kind == "cancelled":
                time.sleep(self.random.uniform(0, 0.3))
                self.server.interrupt()
            self.server.wait(prompt)
            self.counts["finished"] += 1
        except GraphRejected:
            self.counts["rejected"] += 1
        except ExecutionInterrupted:
            self.counts["interrupted"] += 1
        except ExecutionFailed as error:
            if kind != "wrong":
                raise
            self.counts[f"refused with {error.exception_type.rsplit('.', 1)[-1]}"] += 1

    def mixed(self) -> Steering:
        """A random graph of image prompts and LoRAs that samples."""
        draw = self.random
        s = self.scene(width=draw.choice((64, 96, 104)), batch=draw.choice((1, 1, 2)), steps=draw.choice((1, 2, 3)))
        model: Any = s.model
        for _ in range(draw.choice((0, 1, 1, 2))):
            loaded = s.adapter(draw.choice(("base", "plus")), seed=draw.choice((0, 1)))
            prompt = s.encode(loaded, s.photo(draw.randrange(4)), combine=draw.choice(("concat", "average")))
            settings: dict[str, Any] = {
                "strength": round(draw.uniform(-1, 2), 3), "preset": draw.choice(PRESETS), "end": draw.choice((0.5, 1.0)),
            }  # fmt: skip
            if draw.random() < 0.3:
                settings["mask"] = s.mask(draw.random(), draw.random())
            if draw.random() < 0.3:
                settings["schedule"] = s.schedule(curve=f"0: {draw.random():.2f}, 1: {draw.random():.2f}")
            model = s.apply(model, loaded, prompt, **settings)
        for _ in range(draw.choice((0, 1, 1, 2))):
            settings = {"strength": round(draw.uniform(-1, 1), 3), "mode": draw.choice(("live", "merged", "auto"))}
            model = self.lora(s, model, draw.randrange(3), **settings)
        s.sample(model, seed=draw.randrange(10**6))
        return s


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=600)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--every", type=int, default=60, help="runs between two probes")
    parser.add_argument("--out", type=Path, default=None, help="write all figures as JSON")
    args = parser.parse_args()
    host = find_hosts()[0]
    figures: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, ComfyServer(host, Path(folder) / "server") as server:
        soak = Soak(server, Path(folder), args.seed)
        expected = soak.probe()
        print(f"{host.name}; runs, RSS in MB, objects, tensors, patchers, files, threads; the probe's bits")
        for number in range(args.runs + 1):
            if number % args.every == 0 or number == args.runs:
                same = soak.probe() == expected
                census = soak.census(number)
                figures.append({"run": number, "same": same, **census})
                row = (census[key] for key in ("objects", "tensors", "patchers", "files", "threads"))
                print(
                    f"{number:6} {census['rss_kb'] / 1024:9.1f}",
                    *(f"{one:9}" for one in row),
                    "same" if same else "OTHER",
                    flush=True,
                )
            if number < args.runs:
                soak.one()
        print(dict(soak.counts))
    warm = next((one for one in figures if one["run"] >= WARM_UP), figures[0])
    grown = figures[-1]["rss_kb"] / warm["rss_kb"] - 1
    print(f"RSS from run {warm['run']} to {figures[-1]['run']}: {grown:+.2%}")
    more = Counter(figures[-1]["kinds"])
    more.subtract(warm["kinds"])
    print("classes with more objects:", [(name, count) for name, count in more.most_common(12) if count > 0])
    if args.out is not None:
        args.out.write_text(json.dumps({"figures": figures, "counts": soak.counts, "grown": grown}), encoding="utf-8")
    return 0 if all(one["same"] for one in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
