"""Where did the image act? Recorded and shown by the nodes in a running ComfyUI: regions, runs, caches, and the same picture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from host.comfy_server import ComfyServer, ExecutionFailed, Node
from host.steering import Input, Steering

Make = Callable[..., "Recorded"]


class Recorded(Steering):
    """A graph whose sampler's model is recorded."""

    def steered(self, **settings: Any) -> Node:
        adapter = self.adapter()
        return self.apply(self.model, adapter, self.encode(adapter, self.photo()), **settings)

    def record(self, model: Input, stages: int = 2) -> Node:
        return self.graph.add("ImagePromptRecord", model=model, stages=stages)

    def show(self, recorded: Node, sampled: Node, **more: Any) -> Node:
        picture = self.graph.add("VAEDecode", samples=sampled, vae=self.model[2])
        return self.graph.add("ImagePromptAttentionMaps", recording=recorded[1], image=picture, **more)


@pytest.fixture
def make(server: ComfyServer, sd15_small: str, adapters: Path) -> Make:
    return lambda **settings: Recorded(server, sd15_small, adapters, **settings)


def test_maps_of_a_batch_follow_the_mask_and_change_no_bit(make: Make) -> None:
    s = make(width=128, batch=2)
    steered = s.steered(mask=s.mask(0.0, 1.0))
    plain = s.sample(steered)
    recorded = s.record(steered)
    sampled = s.sampled(recorded)
    shown = s.show(recorded, sampled)
    saved = s.save(sampled), s.save(shown[0]), s.save(shown[1]), s.save(shown[2])
    result = s.run()
    assert result.sha256(saved[0]) == result.sha256(plain), "recording changed the picture"
    sheets, layers, maps = (result.tensor(node) for node in saved[1:])
    assert sheets.shape[0] == 2
    assert layers.shape[0] == 1
    assert maps.shape == (2, 64, 128)
    assert float(maps[:, :, :60].max()) == 0.0
    assert float(maps[:, :, 68:].min()) > 0.05
    assert len(result.images(shown)) == 3, "the node shows two sheets and the layers"
    text = result.text(shown)[0]
    assert "ip-adapter" in text or "plus" in text
    assert "50 to 100 %" in text


def test_runs_caches_and_samplers(make: Make, server: ComfyServer) -> None:
    """A cached sampler keeps its maps; a changed seed makes new ones; of two samplers each has its own."""
    s = make()
    recorded = s.record(s.steered(end=0.6))
    first, second = s.sampled(recorded, seed=1), s.sampled(recorded, seed=2, denoise=0.5)
    shown = [s.show(recorded, sampled, latent=sampled, smooth=True) for sampled in (first, second)]
    saved = [s.save(node[2]) for node in shown]
    result = server.run(s.graph)
    maps = [result.tensor(node) for node in saved]
    assert float(maps[0].min()) > 0.01
    assert float(np.abs(maps[0] - maps[1]).max()) > 0.01, "both samplers show the same run"
    for node in shown:  # the samplers and the recording come from the cache
        s.graph[node.id]["inputs"]["smooth"] = False
    again = server.run(s.graph)
    for node, before in zip(saved, maps, strict=True):
        assert np.array_equal(again.tensor(node), before)
    s.graph[first.id]["inputs"]["seed"] = 3
    changed = server.run(s.graph)
    assert float(np.abs(changed.tensor(saved[0]) - maps[0]).max()) > 1e-4
    assert np.array_equal(changed.tensor(saved[1]), maps[1])


def test_what_is_wrong_is_said(make: Make) -> None:
    s = make()
    steered = s.steered()
    recorded = s.record(steered)
    s.show(recorded, s.sampled(steered))
    with pytest.raises(
        ExecutionFailed, match="nothing was recorded: connect the model output of Record Image Attention"
    ):
        s.run()
    s = make()
    recorded = s.record(s.model)
    sampled = s.sampled(recorded)
    shown = s.show(recorded, sampled, latent=s.latent)
    with pytest.raises(ExecutionFailed, match="none of the last 1 recorded runs made this latent"):
        s.run()
    s.graph[shown.id]["inputs"].pop("latent")
    assert "no image prompt acted" in s.run().text(shown)[0]
