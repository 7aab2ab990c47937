"""The old pack's class types on a real ComfyUI: there under their names, with its widgets in its order; graphs that use them run."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from host.comfy_server import ComfyServer, ExecutionFailed, Graph, GraphRejected, Link
from host.tiny_adapters import build_adapter
from workflows.graph import widget_names

OLD_PACK: dict[str, Any] = json.loads((Path(__file__).parents[1] / "core" / "old_pack.json").read_text())
"""Every class type that the old pack ever had; see tests/core/test_legacy.py."""

OLD = os.environ.get("IPADAPTER_PLUS_PATH")
CONTROL = ["weight", "weight_type", "combine_embeds", "start_at", "end_at", "embeds_scaling"]
BATCH = ["weight", "weight_type", "start_at", "end_at", "embeds_scaling"]
FACE = ["weight", "weight_faceidv2", *CONTROL[1:]]
STYLE = ["weight_style", "weight_composition", "expand_style"]
FRAMES = ["frames", "start_frame", "end_frame", "add_starting_frames", "add_ending_frames"]

# class type: widgets in the order in which old workflows store their values
WIDGETS: dict[str, list[str]] = {
    "IPAdapter": ["weight", "start_at", "end_at", "weight_type"],
    "IPAdapterAdvanced": CONTROL,
    "IPAdapterBatch": [*BATCH, "encode_batch_size"],
    "IPAdapterFaceID": FACE,
    "IPAAdapterFaceIDBatch": FACE,
    "IPAdapterFaceIDKolors": [*FACE[:2], "weight_kolors", *FACE[2:]],
    "IPAdapterTiled": ["weight", "weight_type", "combine_embeds", "start_at", "end_at", "sharpening", "embeds_scaling"],
    "IPAdapterTiledBatch": ["weight", "weight_type", "start_at", "end_at", "sharpening", "embeds_scaling", "encode_batch_size"],
    "IPAdapterEmbeds": BATCH,
    "IPAdapterEmbedsBatch": BATCH,
    "IPAdapterStyleComposition": [*STYLE, *CONTROL[2:]],
    "IPAdapterStyleCompositionBatch": [*STYLE, *CONTROL[3:]],
    "IPAdapterMS": [*FACE, "layer_weights"],
    "IPAdapterClipVisionEnhancer": [*CONTROL, "enhance_tiles", "enhance_ratio"],
    "IPAdapterClipVisionEnhancerBatch": [*BATCH, "enhance_tiles", "enhance_ratio", "encode_batch_size"],
    "IPAdapterFromParams": ["combine_embeds", "embeds_scaling"],
    "IPAdapterPreciseStyleTransfer": ["weight", "style_boost", *CONTROL[2:]],
    "IPAdapterPreciseStyleTransferBatch": ["weight", "style_boost", *CONTROL[2:]],
    "IPAdapterPreciseComposition": ["weight", "composition_boost", *CONTROL[2:]],
    "IPAdapterPreciseCompositionBatch": ["weight", "composition_boost", *CONTROL[2:]],
    "IPAdapterUnifiedLoader": ["preset"],
    "IPAdapterUnifiedLoaderFaceID": ["preset", "lora_strength", "provider"],
    "IPAdapterUnifiedLoaderCommunity": ["preset"],
    "IPAdapterModelLoader": ["ipadapter_file"],
    "IPAdapterInsightFaceLoader": ["provider", "model_name"],
    "IPAdapterEncoder": ["weight", "noise", "weight_1", "weight_2", "weight_3", "weight_4"],
    "IPAdapterCombineEmbeds": ["method"],
    "IPAdapterNoise": ["type", "strength", "blur"],
    "PrepImageForClipVision": ["interpolation", "crop_position", "sharpening"],
    "IPAdapterSaveEmbeds": ["filename_prefix"],
    "IPAdapterLoadEmbeds": ["embeds"],
    "IPAdapterWeights": ["weights", "timing", *FRAMES, "method"],
    "IPAdapterWeightsFromStrategy": [],
    "IPAdapterPromptScheduleFromWeightsStrategy": ["prompt"],
    "IPAdapterCombineWeights": ["weights_1", "weights_2"],
    "IPAdapterRegionalConditioning": ["image_weight", "prompt_weight", "weight_type", "start_at", "end_at"],
    "IPAdapterCombineParams": [],
    "IPAdapterCLIPVisionEncode": [],
    "IPAdapterApply": ["weight", "noise", "weight_type", "start_at", "end_at", "unfold_batch"],
    "IPAdapterApplyFaceID": ["weight", "noise", "weight_type", "start_at", "end_at", "faceid_v2", "weight_v2", "unfold_batch"],
    "IPAdapterApplyEncoded": ["weight", "weight_type", "start_at", "end_at", "unfold_batch"],
    "IPAdapterTilesMasked": ["weight", "noise", "weight_type", "start_at", "end_at", "short_side_tiles", "tile_weight"],
    "IPAdapterBatchEmbeds": [],
    "InsightFaceLoader": ["provider"],
    "PrepImageForInsightFace": ["crop_position", "sharpening", "pad_around"],
}  # fmt: skip


def test_every_class_type_has_the_old_widgets_in_the_old_order(server: ComfyServer) -> None:
    found = server.object_info()
    missing = [name for name in WIDGETS if name not in found]
    assert missing == [], server.log[-3000:]
    assert server.import_problems() == []
    for name, widgets in WIDGETS.items():
        names = [widget for widget in widget_names(found[name]) if widget != "compatibility"]
        assert names == widgets, name
        assert found[name]["deprecated"] is True
        assert found[name]["python_module"] == "custom_nodes.ipadapter-studio"


@pytest.mark.parametrize("kind", OLD_PACK)
def test_nodes_of_every_version_of_the_old_pack_fit_ours(server: ComfyServer, kind: str) -> None:
    """Prompts of any of its versions: no input of theirs is unknown here, and none that ours requires is missing there."""
    sections, facts = server.object_info(kind)["input"], OLD_PACK[kind]
    inputs = {**sections["required"], **sections.get("optional", {})}
    assert set(sections["required"]) <= set(facts["always"])
    assert set(facts["inputs"]) <= set(inputs)
    for name, entry in facts["inputs"].items():
        kind_of, *options = inputs[name]
        assert "type" not in entry or kind_of == entry["type"], name
        if "range" in entry:
            assert options[0]["min"] <= entry["range"][0] <= entry["range"][1] <= options[0]["max"], name
        for option in entry.get("options", ()):
            assert not refused(server, kind, name, option), (name, option)
        if entry.get("options"):
            assert refused(server, kind, name, "no such option"), name


def refused(server: ComfyServer, kind: str, name: str, option: str) -> bool:
    """Whether ComfyUI refuses a prompt for this value of an input, whatever else the prompt lacks."""
    graph = Graph()
    node = graph.add(kind, **{name: option})
    graph.add("TestSaveTensor", value=node)
    try:
        server.submit(graph)
    except GraphRejected as error:
        told = error.errors["node_errors"].get(node.id, {}).get("errors", [])
        return any((entry["extra_info"] or {}).get("input_name") == name for entry in told)
    return False


EXAMPLES = sorted(Path(OLD).glob("examples/*.json")) if OLD else []


@pytest.mark.skipif(not EXAMPLES, reason="no old pack at $IPADAPTER_PLUS_PATH")
def test_the_old_packs_examples_fit_our_nodes(server: ComfyServer) -> None:
    """Every value of its nodes fits the widget at its place, and every link a socket of its type."""
    info = server.object_info()
    seen: set[str] = set()
    for file in EXAMPLES:
        workflow = json.loads(file.read_text())
        types = {node["id"]: node["type"] for node in workflow["nodes"]}
        for node in workflow["nodes"]:
            kind = node["type"]
            if kind not in WIDGETS:
                assert not kind.startswith("IPA"), kind
                continue
            seen.add(kind)
            check_values(info[kind], node, file.name)
            inputs = {**info[kind]["input"]["required"], **info[kind]["input"].get("optional", {})}
            assert {entry["name"] for entry in node.get("inputs") or ()} <= set(inputs), (file.name, kind)
        for _, source, slot, target, _, kind in workflow["links"]:
            if types[source] in WIDGETS:
                assert info[types[source]]["output"][slot] == kind, (file.name, types[source], types[target])
    assert len(seen) > 10


def check_values(info: dict[str, Any], node: dict[str, Any], where: str) -> None:
    values = node.get("widgets_values") or []
    names = list(widget_names(info))
    assert len(values) <= len(names), (where, node["type"], values, names)
    for name, value in zip(names, values, strict=False):
        kind, *options = {**info["input"]["required"], **info["input"].get("optional", {})}[name]
        if name in ("ipadapter_file", "embeds"):
            continue  # a file that this server has not
        if isinstance(kind, list):
            assert value in kind, (where, node["type"], name, value)
        elif kind in ("FLOAT", "INT"):
            assert options[0]["min"] <= value <= options[0]["max"], (where, node["type"], name, value)


# --- graphs -----------------------------------------------------------------------------------------------------------


def sampled(graph: Graph, model: Link) -> str:
    conds = [graph.add("TestConditioning", seed=seed, width=768) for seed in (1, 2)]
    latent = graph.add("EmptyLatentImage", width=64, height=64, batch_size=1)
    out = graph.add(
        "KSampler", model=model, positive=conds[0], negative=conds[1], latent_image=latent, seed=0, steps=1, cfg=3.0,
        sampler_name="euler", scheduler="normal", denoise=1.0,
    )  # fmt: skip
    return graph.add("TestSaveTensor", value=out).id


def test_a_graph_of_old_nodes_follows_its_image(server: ComfyServer, sd15: str, adapters: Path) -> None:
    file = server.add_model("ipadapter", build_adapter("plus", "sd15", adapters))
    results: list[str] = []
    for seed in (1, 2):
        graph = Graph()
        model = graph.add("CheckpointLoaderSimple", ckpt_name=sd15)
        image = graph.add("EmptyImage", width=64, height=64, batch_size=1, color=seed * 90000)
        adapter = graph.add("IPAdapterModelLoader", ipadapter_file=file)
        vision = graph.add("TestClipVision", seed=0)
        # as graphs from before embeds_scaling have it: without that widget
        applied = graph.add(
            "IPAdapterAdvanced", model=model, ipadapter=adapter, image=image, clip_vision=vision, weight=0.9,
            weight_type="ease out", combine_embeds="concat", start_at=0.0, end_at=1.0,
        )  # fmt: skip
        saved = sampled(graph, applied[0])
        results.append(server.run(graph).sha256(saved))
    assert results[0] != results[1]


def test_a_missing_file_is_named_with_its_place(server: ComfyServer, sd15: str) -> None:
    graph = Graph()
    model = graph.add("CheckpointLoaderSimple", ckpt_name=sd15)
    loader = graph.add("IPAdapterUnifiedLoader", model=model, preset="PLUS FACE (portraits)")
    sampled(graph, loader[0])
    with pytest.raises(
        ExecutionFailed, match=r"no file for the preset 'PLUS FACE.*models/ipadapter.*ip-adapter-plus-face_sd15"
    ):
        server.run(graph)


def test_a_face_graph_of_old_nodes_gives_what_ours_give(server: ComfyServer, sd15: str, adapters: Path) -> None:
    """As in the old pack's example ipadapter_faceid.json, from one pipeline; `best` is the face that it takes."""
    file = server.add_model("ipadapter", build_adapter("faceid", "sd15", adapters))
    graph = Graph()
    model = graph.add("CheckpointLoaderSimple", ckpt_name=sd15)
    image = graph.add("EmptyImage", width=96, height=64, batch_size=1, color=70000)
    faces, vision = graph.add("TestFaceModel"), graph.add("TestClipVision", seed=0)
    loaded = graph.add("IPAdapterModelLoader", ipadapter_file=file)
    pipeline = graph.add("TestUnifiedLoader", model=model, adapter=loaded, clip_vision=vision, insightface=faces[1])
    old = graph.add(
        "IPAdapterFaceID", model=pipeline[0], ipadapter=pipeline[1], image=image, weight=0.9, weight_faceidv2=1.0,
        weight_type="linear", combine_embeds="concat", start_at=0.0, end_at=1.0, embeds_scaling="V only",
    )  # fmt: skip
    adapter = graph.add("ImagePromptLoadAdapter", file=file)
    prompt = graph.add(
        "ImagePromptEncodeFace", adapter=adapter, face_model=faces, image=image, face="best", number=1,
        combine="concat", picture_strength=1.0, per_latent=False, compatibility="IPAdapter_plus",
    )  # fmt: skip
    ours = graph.add(
        "ImagePromptApply", model=model, adapter=adapter, image_prompt=prompt, strength=0.9, preset="linear",
        scaling="V only", start=0.0, end=1.0, compatibility="IPAdapter_plus",
    )  # fmt: skip
    saved = [sampled(graph, applied[0]) for applied in (old, ours)]
    pictures = [graph.add("TestSaveTensor", value=shown).id for shown in (old[1], prompt[1])]
    result = server.run(graph)
    assert result.sha256(saved[0]) == result.sha256(saved[1])
    assert result.sha256(pictures[0]) == result.sha256(pictures[1])


def test_the_first_versions_encoder_runs_under_the_name_it_shares(
    server: ComfyServer, sd15: str, adapters: Path
) -> None:
    """Its ipadapter_plus stands where today's weight does; its embeds carry both halves."""
    file = server.add_model("ipadapter", build_adapter("plus", "sd15", adapters))
    graph = Graph()
    model = graph.add("CheckpointLoaderSimple", ckpt_name=sd15)
    image = graph.add("EmptyImage", width=96, height=64, batch_size=1, color=70000)
    vision, adapter = graph.add("TestClipVision", seed=0), graph.add("IPAdapterModelLoader", ipadapter_file=file)
    embeds = graph.add(
        "IPAdapterEncoder", clip_vision=vision, image_1=image, weight=True, noise=0.0, weight_1=1.0, weight_2=1.0
    )
    shared = {"model": model, "ipadapter": adapter, "weight": 0.8, "weight_type": "channel penalty"}
    encoded = graph.add("IPAdapterApplyEncoded", embeds=embeds, start_at=0.0, end_at=1.0, **shared)
    at_once = graph.add("IPAdapterApply", clip_vision=vision, image=image, noise=0.0, **shared)
    saved = [sampled(graph, applied[0]) for applied in (encoded, at_once)]
    result = server.run(graph)
    assert result.sha256(saved[0]) == result.sha256(saved[1])
    empty = Graph()
    empty.add("TestSaveTensor", value=empty.add("IPAdapterEncoder", weight=1.0)[0])
    with pytest.raises(ExecutionFailed, match="IPAdapter Encoder has no ipadapter: connect it"):
        server.run(empty)
