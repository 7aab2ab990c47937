"""XLabs' adapter on a shrunk FLUX.1 in a real server: the five nodes of UNets, with nothing else changed in the graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

from host.comfy_server import ComfyServer, ExecutionFailed, Node
from host.servers import newest
from host.shrunk_transformers import POOLED, TEXT, WIDTH, build_transformer, build_transformer_loras
from host.steering import Steering
from host.tiny_adapters import VISION_PROJECTION
from tiny import tiny_state

EFFECT = 1e-2


class FluxSteering(Steering):
    """A graph around a shrunk FLUX.1 of two double and two single blocks."""

    def __post_init__(self) -> None:
        scaled = self.checkpoint == "scaled"
        file = self.server.add_model("diffusion_models", build_transformer("flux", self.folder, scaled=scaled))
        if self.server.host.version.startswith("0.3."):  # takes every Flux to be 3072 wide
            self.model = self.graph.add("TestFlux", file=file)
        else:
            self.model = self.graph.add("UNETLoader", unet_name=file, weight_dtype="default")
        self.vision = self.graph.add("TestClipVision", seed=0)
        self.positive, self.negative = (self.text(seed) for seed in (1, 2))
        self.latent = self.graph.add("EmptySD3LatentImage", width=96, height=64, batch_size=self.batch)

    def text(self, seed: int) -> Node:
        return self.graph.add("TestConditioning", seed=seed, width=TEXT, tokens=8, pooled=POOLED)

    def adapter(self, family: str = "xlabs", seed: int = 0) -> Node:
        sizes: dict[str, Any] = {"token_dim": TEXT, "num_tokens": 4, "feature_dim": VISION_PROJECTION}
        path = self.folder / f"{family}_{seed}.safetensors"
        save_file(tiny_state(family, seed=seed, channels=(WIDTH,) * 2, **sizes), path)
        return self.graph.add("ImagePromptLoadAdapter", file=self.server.add_model("ipadapter", path))

    def steered(self, model: Node | None = None, *, seed: int = 0, part: int = 0, **settings: Any) -> Node:
        adapter = self.adapter(seed=seed)
        prompt = self.encode(adapter, self.photo(part))
        return self.apply(model or self.model, adapter, prompt, **settings)

    def sample(self, model: Any, **settings: Any) -> Node:
        return super().sample(model, **{"scheduler": "simple", **settings})


def apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


@pytest.fixture
def s(server: ComfyServer, tmp_path: Path) -> FluxSteering:
    return FluxSteering(server, "", tmp_path)


def test_load_encode_apply_and_sample(s: FluxSteering) -> None:
    """Strength, window, per-block table, masks, two adapters, batches; with true CFG and, as FLUX.1 dev is used, without."""
    ones, halves = s.mask(1.0, 1.0, 96, 64), s.mask(0.0, 1.0, 96, 64)
    scheduled = {
        name: s.steered(schedule=s.schedule(sites=sites)) for name, sites in (("no double", "double: 0"), ("half", "double 0-0: 0"))
    }  # fmt: skip
    models = {
        "plain": s.model,
        "steered": s.steered(),
        "off": s.steered(strength=0.0),
        "never": s.steered(start=1.0, end=1.0),
        "late": s.steered(start=0.4),
        "ones": s.steered(mask=ones),
        "halves": s.steered(mask=halves),
        "two": s.steered(s.steered(), seed=1, part=1, strength=0.5),
        "outside": s.graph.add("TestPartlyLoaded", model=s.steered()),
        **scheduled,
        "plain again": s.model,
    }
    nodes = {name: s.sample(model) for name, model in models.items()}
    nodes |= {f"one pass, {name}": s.sample(models[name], cfg=1.0) for name in ("plain", "steered", "off")}
    result = s.run()
    out = {name: result.tensor(node) for name, node in nodes.items()}
    for name in ("off", "never", "no double", "plain again"):
        assert np.array_equal(out[name], out["plain"]), name
    assert np.array_equal(out["one pass, off"], out["one pass, plain"])
    for name in ("ones", "outside"):
        assert apart(out[name], out["steered"]) < 1e-3, name
    different = ["plain", "steered", "late", "halves", "two", "half"]
    pairs = [(a, b) for i, a in enumerate(different) for b in different[i + 1 :]]
    assert {pair: apart(out[pair[0]], out[pair[1]]) for pair in pairs if not apart(out[pair[0]], out[pair[1]]) > EFFECT} == {}  # fmt: skip
    assert apart(out["one pass, steered"], out["one pass, plain"]) > EFFECT


def test_beside_a_lora(s: FluxSteering) -> None:
    file = s.server.add_model("loras", build_transformer_loras("flux", s.folder)["kohya"])

    def lora(model: Node) -> Node:
        return s.graph.add("LoraLoaderModelOnly", model=model, lora_name=file, strength_model=0.8)

    models = {"plain": s.model, "steered": s.steered(), "lora": lora(s.model), "before": s.steered(lora(s.model)), "behind": lora(s.steered())}  # fmt: skip
    nodes = {name: s.sample(model) for name, model in models.items()}
    result = s.run()
    out = {name: result.tensor(node) for name, node in nodes.items()}
    assert np.array_equal(out["before"], out["behind"])
    for name in ("plain", "steered", "lora"):
        assert apart(out["before"], out[name]) > EFFECT, name


@newest
def test_compiled(s: FluxSteering) -> None:
    """On older hosts too tests/host/flux_parity.py compiles."""

    def compiled(model: Node) -> Node:
        return s.graph.add("TestCompile", model=model, backend="aot_eager")

    models = {
        "plain": s.model, "steered": s.steered(),
        "compiled plain": compiled(s.model), "compiled before": compiled(s.steered()), "compiled behind": s.steered(compiled(s.model)),
    }  # fmt: skip
    nodes = {name: s.sample(model) for name, model in models.items()}
    result = s.run()
    out = {name: result.tensor(node) for name, node in nodes.items()}
    assert apart(out["plain"], out["steered"]) > EFFECT
    for name, same in (("compiled plain", "plain"), ("compiled before", "steered"), ("compiled behind", "steered")):
        assert apart(out[name], out[same]) < 1e-3, name


def test_matrices_of_eight_bits(s: FluxSteering) -> None:
    if s.server.host.version.startswith("0.3."):
        pytest.skip("this ComfyUI has no such tensors")
    eight = FluxSteering(s.server, "scaled", s.folder, graph=s.graph)
    models = {"plain": s.model, "steered": s.steered(), "eight plain": eight.model, "eight": s.steered(eight.model)}
    nodes = {name: s.sample(model) for name, model in models.items()}
    result = s.run()
    out = {name: result.tensor(node) for name, node in nodes.items()}
    effect = apart(out["steered"], out["plain"])
    assert apart(out["eight"], out["eight plain"]) > EFFECT
    assert apart(out["eight"], out["steered"]) < effect


def test_mistakes_get_one_sentence(s: FluxSteering, sd15_small: str, tmp_path: Path) -> None:
    def of_a_unet(s: FluxSteering) -> Node:
        adapter = Steering(s.server, sd15_small, tmp_path, graph=s.graph).adapter("base")
        return s.apply(s.model, adapter, s.encode(adapter, s.photo()))

    def on_a_unet(s: FluxSteering) -> Node:
        return s.steered(Steering(s.server, sd15_small, tmp_path, graph=s.graph).model)

    mistakes: list[tuple[Callable[[FluxSteering], Node], str]] = [
        (of_a_unet, "the model is Flux"),
        (on_a_unet, "the model is UNet with 7 sites"),
        (lambda s: s.steered(preset="style transfer"), "Flux has no such thing; use one of: linear"),
        (lambda s: s.steered(schedule=s.schedule(sites="input: 0")), "use all, double, single"),
    ]
    for mistake, said in mistakes:
        wrong = FluxSteering(s.server, "", tmp_path)
        wrong.sample(mistake(wrong))
        with pytest.raises(ExecutionFailed) as failure:
            wrong.run()
        assert said in failure.value.message
