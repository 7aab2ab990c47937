"""The old pack's class types left out, and our nodes in their place by the host's own node replacement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import pytest

from host.comfy_server import PACK_NAME, ComfyServer, Graph, Node, find_hosts
from host.object_info import of_this_pack, stored
from host.shrunk import build_checkpoint
from host.test_legacy_nodes import WIDGETS, sampled
from host.tiny_adapters import build_adapter
from ipadapter_core.legacy.migrate import REPLACEMENTS


def replacements(server: ComfyServer) -> dict[str, Any]:
    try:
        return server.get("/node_replacements")
    except HTTPError:
        pytest.skip("this ComfyUI replaces no nodes")


def test_the_host_knows_what_replaces_an_old_node(server: ComfyServer) -> None:
    """Every name in the table is one of the old or of our node."""
    offered, info = replacements(server), server.object_info()
    for entry in REPLACEMENTS:
        (told,) = offered[entry.old]
        assert (told["new_node_id"], tuple(told["old_widget_ids"])) == (entry.new, entry.widgets)
        assert WIDGETS[entry.old][: len(entry.widgets)] == list(entry.widgets)
        for kind, names in ((entry.new, {*entry.inputs, *entry.values}), (entry.old, set(entry.inputs.values()))):
            inputs = info[kind]["input"]
            assert names <= {*inputs["required"], *inputs.get("optional", {})}, kind
        given = {*entry.inputs, *entry.values}
        assert set(info[entry.new]["input"]["required"]) <= given, "a required input would stay empty"


def test_the_stored_nodes_are_those_of_this_pack(server: ComfyServer) -> None:
    """tests/core checks the tables that rewrite graphs against the file; ``python tests/host/object_info.py`` renews it."""
    live = of_this_pack(server.object_info(), PACK_NAME)
    for kind, node in stored().items():
        assert json.dumps(live.pop(kind)) == json.dumps(node), kind  # texts, as order counts
    assert live == {}


def old_graph(checkpoint: str, adapter: str, ours: bool) -> tuple[Graph, str]:
    """A loader and an apply node, as the old pack names them or as we do."""
    graph = Graph()
    model = graph.add("CheckpointLoaderSimple", ckpt_name=checkpoint)
    image = graph.add("EmptyImage", width=64, height=64, batch_size=1, color=90000)
    vision = graph.add("TestClipVision", seed=0)
    shared: dict[str, Node | Any] = {"model": model, "image": image, "clip_vision": vision}
    if ours:
        loaded = graph.add("ImagePromptLoadAdapter", file=adapter)
        applied = graph.add(
            "ImagePromptApplyImage", **shared, adapter=loaded, strength=0.9, preset="ease out", scaling="K+V",
            combine="concat", start=0.0, end=1.0, per_latent=False, compatibility="IPAdapter_plus",
        )  # fmt: skip
    else:
        loaded = graph.add("IPAdapterModelLoader", ipadapter_file=adapter)
        applied = graph.add(
            "IPAdapterAdvanced", **shared, ipadapter=loaded, weight=0.9, weight_type="ease out", embeds_scaling="K+V",
            combine_embeds="concat", start_at=0.0, end_at=1.0,
        )  # fmt: skip
    return graph, sampled(graph, applied[0])


def test_old_graphs_run_without_the_old_names(
    model_cache: Path, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is connected to image_negative and attn_mask, as in most graphs."""
    monkeypatch.setenv("IMAGE_PROMPT_OLD_NAMES", "off")
    hosts = find_hosts()
    if not hosts:
        pytest.skip("no ComfyUI at $COMFYUI_PATH or ~/comfy/ComfyUI")
    with ComfyServer(hosts[0], tmp_path) as server:
        replacements(server)
        assert "IPAdapterAdvanced" not in server.object_info()
        assert server.import_problems() == []
        checkpoint = server.add_model("checkpoints", build_checkpoint("sd15", model_cache))
        adapter = server.add_model("ipadapter", build_adapter("plus", "sd15", adapters))
        hashes = set[str]()
        for ours in (True, False):
            graph, saved = old_graph(checkpoint, adapter, ours)
            hashes.add(server.run(graph).sha256(saved))
        assert len(hashes) == 1
