"""InstantX' adapter on a shrunk SD3 in a real server: tokens that follow the timestep, and what the memory manager is told of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

from host.comfy_server import ComfyServer, Node
from host.shrunk_transformers import POOLED, TEXT, WIDTH, build_transformer
from host.steering import Steering
from host.tiny_adapters import VISION_HIDDEN
from tiny import tiny_state

EFFECT = 2e-3
BLOCKS, QUERIES = 2, 4


class SD3Steering(Steering):
    """A graph around a shrunk SD3 of two blocks, whose queries and keys have no norm: raw ones are taken."""

    def __post_init__(self) -> None:
        file = self.server.add_model("diffusion_models", build_transformer("sd3", self.folder))
        self.model = self.graph.add("UNETLoader", unet_name=file, weight_dtype="default")
        self.vision = self.graph.add("TestClipVision", seed=0)
        self.positive, self.negative = (self.text(seed) for seed in (1, 2))
        self.latent = self.graph.add("EmptySD3LatentImage", width=96, height=64, batch_size=self.batch)

    def text(self, seed: int) -> Node:
        return self.graph.add("TestConditioning", seed=seed, width=TEXT, tokens=8, pooled=POOLED)

    def adapter(self, family: str = "sd3.5", seed: int = 0) -> Node:
        sizes: dict[str, Any] = {"token_dim": WIDTH, "num_tokens": QUERIES, "feature_dim": VISION_HIDDEN}
        path = self.folder / f"{family}_{seed}.safetensors"
        save_file(tiny_state(family, seed=seed, channels=(WIDTH,) * BLOCKS, **sizes), path)
        return self.graph.add("ImagePromptLoadAdapter", file=self.server.add_model("ipadapter", path))

    def steered(self, model: Node | None = None, *, seed: int = 0, part: int = 0, **settings: Any) -> Node:
        adapter = self.adapter(seed=seed)
        return self.apply(model or self.model, adapter, self.encode(adapter, self.photo(part)), **settings)


def apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


@pytest.fixture
def s(server: ComfyServer, tmp_path: Path) -> SD3Steering:
    return SD3Steering(server, "", tmp_path)


def test_load_encode_apply_and_sample(s: SD3Steering) -> None:
    """Strength, window, per-block table, masks, two adapters, and samplers of two evaluations."""
    ones, halves = s.mask(1.0, 1.0, 96, 64), s.mask(0.0, 1.0, 96, 64)
    models = {
        "plain": s.model,
        "steered": s.steered(),
        "off": s.steered(strength=0.0),
        "early": s.steered(end=0.3),
        "ones": s.steered(mask=ones),
        "halves": s.steered(mask=halves),
        "two": s.steered(s.steered(), seed=1, part=1, strength=0.5),
        "no joint": s.steered(schedule=s.schedule(sites="joint 0-1: 0")),
        "half": s.steered(schedule=s.schedule(sites="joint 0: 0")),
        "plain again": s.model,
    }
    nodes = {name: s.sample(model) for name, model in models.items()}
    nodes |= {f"heun, {name}": s.sample(models[name], sampler_name="heun") for name in ("plain", "steered")}
    nodes |= {f"one pass, {name}": s.sample(models[name], cfg=1.0) for name in ("plain", "steered")}
    result = s.run()
    out = {name: result.tensor(node) for name, node in nodes.items()}
    for name in ("off", "no joint", "plain again"):
        assert np.array_equal(out[name], out["plain"]), name
    assert apart(out["ones"], out["steered"]) < 2e-4
    different = ["plain", "steered", "early", "halves", "two", "half"]
    pairs = [(a, b) for i, a in enumerate(different) for b in different[i + 1 :]]
    assert {pair: apart(out[pair[0]], out[pair[1]]) for pair in pairs if not apart(out[pair[0]], out[pair[1]]) > EFFECT} == {}  # fmt: skip
    for how in ("heun", "one pass"):
        assert apart(out[f"{how}, steered"], out[f"{how}, plain"]) > EFFECT


def test_the_memory_manager_loads_the_weights_too_and_makes_room_for_two_timesteps(s: SD3Steering) -> None:
    """Tokens, keys and values of both branches; two strengths of one prompt are held once, and so is the adapter."""
    adapter = s.adapter()
    prompt = s.encode(adapter, s.photo())
    model = s.apply(s.apply(s.model, adapter, prompt), adapter, prompt, strength=0.3)
    report = s.graph.add("TestPromptMemory", model=model, after=s.sampled(model))
    found = json.loads(s.run().text(report)[0])
    assert len(found["held"]) == 2
    held, weights = found["held"]
    numbers = 2 * QUERIES * 2 * (WIDTH + BLOCKS * 2 * WIDTH)
    assert held in (2 * numbers, 4 * numbers)  # in float16 or float32
    assert weights > 1e5
    assert found["counted"] == found["held"]
