"""Workflows rewritten with our nodes: links, places and titles kept, and said what could not be."""

from __future__ import annotations

import copy
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ipadapter_core.commands.cli import main
from ipadapter_core.errors import AdapterError, CorruptFileError, InvalidInputError
from ipadapter_core.legacy.migrate import REPLACEMENTS, bases, graph, migrate, migrate_graph, replace_in_prompt
from ipadapter_core.legacy.migrate.bases import base_of_name
from ipadapter_core.legacy.migrate.files import read_graph
from ipadapter_core.legacy.migrate.names import OLD_TYPES, PICTURE_APPLIES, PICTURE_LOADERS, POWER_LORAS
from ipadapter_core.lora.rows import LoRARow, parse_rows

OLD = os.environ.get("IPADAPTER_PLUS_PATH")


def node(
    number: int, kind: str, inputs: dict[str, tuple[str, int | None]], outputs: list[str], widgets: list[Any]
) -> Any:
    return {
        "id": number, "type": kind, "pos": [100 * number, 50], "title": f"title {number}", "widgets_values": widgets,
        "inputs": [{"name": name, "type": type_, "link": link} for name, (type_, link) in inputs.items()],
        "outputs": [{"name": type_, "type": type_, "links": []} for type_ in outputs],
    }  # fmt: skip


def workflow(kind: str = "IPAdapterAdvanced", widgets: list[Any] | None = None, **extra: Any) -> dict[str, Any]:
    """Checkpoint, unified loader, image and mask into one apply node, and a sampler behind it."""
    values = widgets or [0.8, "ease in", "average", 0.1, 0.9, "K+V"]
    sockets = {"model": ("MODEL", 2), "ipadapter": ("IPADAPTER", 3), "image": ("IMAGE", 4), "attn_mask": ("MASK", 5)}
    nodes = [
        node(1, "CheckpointLoaderSimple", {}, ["MODEL", "CLIP", "VAE"], ["sd15.safetensors"]),
        node(2, "IPAdapterUnifiedLoader", {"model": ("MODEL", 1)}, ["MODEL", "IPADAPTER"], ["PLUS (high strength)"]),
        node(3, "LoadImage", {}, ["IMAGE", "MASK"], ["a.png"]),
        node(4, kind, {**sockets, **extra}, ["MODEL"], values),
        node(5, "KSampler", {"model": ("MODEL", 6)}, ["LATENT"], [1]),
    ]
    links = [[1, 1, 0, 2, 0, "MODEL"], [2, 2, 0, 4, 0, "MODEL"], [3, 2, 1, 4, 1, "IPADAPTER"]]
    links += [[4, 3, 0, 4, 2, "IMAGE"], [5, 3, 1, 4, 3, "MASK"], [6, 4, 0, 5, 0, "MODEL"]]
    return {"nodes": nodes, "links": links, "version": 0.4, "groups": [{"title": "kept"}]}


def fed_by(made: dict[str, Any]) -> dict[tuple[str, str], tuple[str, int]]:
    """(type of node, input) to (type of the node that feeds it, output), checked from both sides."""
    nodes = {n["id"]: n for n in made["nodes"]}
    found: dict[tuple[str, str], tuple[str, int]] = {}
    for number, source, slot, target, target_slot, kind in made["links"]:
        assert number in nodes[source]["outputs"][slot]["links"]
        entry = nodes[target]["inputs"][target_slot]
        assert entry["link"] == number
        if "IMAGE_PROMPT" in kind:
            assert (entry["type"], nodes[source]["outputs"][slot]["type"]) == (kind, kind)
        found[nodes[target]["type"], entry["name"]] = (nodes[source]["type"], slot)
    return found


def test_an_apply_node_becomes_encode_and_apply() -> None:
    made, report = migrate(workflow())
    assert fed_by(made) == {
        ("ImagePromptApply", "model"): ("CheckpointLoaderSimple", 0),
        ("ImagePromptApply", "adapter"): ("ImagePromptLoadAdapter", 0),
        ("ImagePromptApply", "image_prompt"): ("ImagePromptEncode", 0),
        ("ImagePromptApply", "mask"): ("LoadImage", 1),
        ("ImagePromptEncode", "adapter"): ("ImagePromptLoadAdapter", 0),
        ("ImagePromptEncode", "clip_vision"): ("CLIPVisionLoader", 0),
        ("ImagePromptEncode", "image"): ("LoadImage", 0),
        ("KSampler", "model"): ("ImagePromptApply", 0),
    }
    nodes = {n["type"]: n for n in made["nodes"]}
    assert nodes["ImagePromptApply"]["widgets_values"] == [0.8, "ease in", "K+V", 0.1, 0.9, "IPAdapter_plus"]
    assert nodes["ImagePromptEncode"]["widgets_values"] == ["center", "average", "", "auto", False, "IPAdapter_plus"]
    assert nodes["ImagePromptLoadAdapter"]["widgets_values"] == ["ip-adapter-plus_sd15.safetensors"]
    assert (nodes["ImagePromptApply"]["title"], nodes["ImagePromptApply"]["pos"]) == ("title 4", [400, 50])
    assert made["groups"] == [{"title": "kept"}]
    assert any("SD1.5" in line and "ip-adapter-plus_sd15" in line for line in report)


def test_simple_nodes_and_sdxl_files() -> None:
    made, _ = migrate(workflow("IPAdapter", [0.7, 0.0, 1.0, "prompt is more important"]), "sdxl")
    nodes = {n["type"]: n for n in made["nodes"]}
    assert nodes["ImagePromptApply"]["widgets_values"][:3] == [0.7, "ease out", "V only"]
    assert nodes["ImagePromptLoadAdapter"]["widgets_values"] == ["ip-adapter-plus_sdxl_vit-h.safetensors"]


def test_faces_become_encode_face_and_apply() -> None:
    old = workflow("IPAdapterFaceID", [0.8, 0.7, "linear", "average", 0.0, 0.9, "K+V"])
    old["nodes"][1] |= {"type": "IPAdapterUnifiedLoaderFaceID", "widgets_values": ["FACEID PLUS V2", 0.6, "CUDA"]}
    old["nodes"][3]["outputs"].append({"name": "face_image", "type": "IMAGE", "links": []})
    old["nodes"].append(node(6, "PreviewImage", {"images": ("IMAGE", 7)}, [], []))
    old["links"].append([7, 4, 1, 6, 0, "IMAGE"])
    made, report = migrate(old)
    assert fed_by(made) == {
        ("ImagePromptApplyFaceLoRA", "model"): ("CheckpointLoaderSimple", 0),
        ("ImagePromptApplyFaceLoRA", "adapter"): ("ImagePromptLoadAdapter", 0),
        ("ImagePromptApply", "model"): ("ImagePromptApplyFaceLoRA", 0),
        ("ImagePromptApply", "adapter"): ("ImagePromptLoadAdapter", 0),
        ("ImagePromptApply", "image_prompt"): ("ImagePromptEncodeFace", 0),
        ("ImagePromptApply", "mask"): ("LoadImage", 1),
        ("ImagePromptEncodeFace", "adapter"): ("ImagePromptLoadAdapter", 0),
        ("ImagePromptEncodeFace", "face_model"): ("ImagePromptLoadFaceModel", 0),
        ("ImagePromptEncodeFace", "clip_vision"): ("CLIPVisionLoader", 0),
        ("ImagePromptEncodeFace", "image"): ("LoadImage", 0),
        ("PreviewImage", "images"): ("ImagePromptEncodeFace", 1),
        ("KSampler", "model"): ("ImagePromptApply", 0),
    }
    nodes = {n["type"]: n["widgets_values"] for n in made["nodes"]}
    assert nodes["ImagePromptEncodeFace"] == ["best", 1, "average", 0.7, False, "IPAdapter_plus"]
    assert nodes["ImagePromptApply"] == [0.8, "linear", "K+V", 0.0, 0.9, "IPAdapter_plus"]
    assert (nodes["ImagePromptApplyFaceLoRA"], nodes["ImagePromptLoadFaceModel"]) == (
        [0.6, "all"],
        ["buffalo_l", "CUDA"],
    )
    assert nodes["ImagePromptLoadAdapter"] == ["ip-adapter-faceid-plusv2_sd15.bin"]
    assert any("Apply Face LoRA" in line for line in report)


def test_a_face_model_goes_with_the_node_it_feeds() -> None:
    def faces(kind: str) -> tuple[dict[str, Any], list[str]]:
        values = [0.8, 0.7, "linear", "concat", 0.0, 0.9, "K+V"]
        old = workflow(kind, values, insightface=("INSIGHTFACE", 8))
        old["nodes"][1] |= {"type": "IPAdapterModelLoader", "widgets_values": ["f.bin"]}
        old["nodes"][1]["outputs"] = [{"name": "IPADAPTER", "type": "IPADAPTER", "links": []}]
        old["links"][1:3] = [[2, 1, 0, 4, 0, "MODEL"], [3, 2, 0, 4, 1, "IPADAPTER"]]
        old["links"] = [link for link in old["links"] if link[0] != 1]
        old["nodes"][1]["inputs"] = []
        old["nodes"].append(node(6, "IPAdapterInsightFaceLoader", {}, ["INSIGHTFACE"], ["CPU", "antelopev2"]))
        old["links"].append([8, 6, 0, 4, 4, "INSIGHTFACE"])
        return migrate(old)

    made, report = faces("IPAdapterFaceID")
    assert fed_by(made)["ImagePromptEncodeFace", "face_model"] == ("ImagePromptLoadFaceModel", 0)
    assert {n["type"]: n["widgets_values"] for n in made["nodes"]}["ImagePromptLoadFaceModel"] == ["antelopev2", "CPU"]
    made, report = faces("IPAdapterFaceIDKolors")
    assert fed_by(made)["IPAdapterFaceIDKolors", "insightface"] == ("IPAdapterInsightFaceLoader", 0)
    assert len([line for line in report if "stays" in line]) == 3


def test_a_prompt_without_the_old_nodes_gets_ours() -> None:
    def prompt() -> dict[str, Any]:
        inputs = {"model": ["2", 0], "ipadapter": ["3", 0], "image": ["2", 1], "weight": 0.7, "combine_embeds": "add"}
        return {
            "1": {"class_type": "IPAdapterAdvanced", "inputs": inputs},
            "2": {"class_type": "Other", "inputs": {"weight": 1}},
            "3": {"class_type": "IPAdapterModelLoader", "inputs": {"ipadapter_file": "a.bin"}},
        }

    ours = {entry.new for entry in REPLACEMENTS}
    old, new = prompt(), prompt()
    replace_in_prompt(old, ours | {entry.old for entry in REPLACEMENTS})
    assert old == prompt()  # the old nodes are there: nothing to replace
    replace_in_prompt(new, ours)
    assert new["2"] == prompt()["2"]
    assert new["3"] == {"class_type": "ImagePromptLoadAdapter", "inputs": {"file": "a.bin"}}
    assert new["1"]["class_type"] == "ImagePromptApplyImage"
    assert new["1"]["inputs"] == {
        "model": ["2", 0], "adapter": ["3", 0], "image": ["2", 1], "strength": 0.7, "combine": "add",
        "per_latent": False, "compatibility": "IPAdapter_plus",
    }  # fmt: skip


def embeds_workflow(method: str = "average", second: str = "LoadImage", negative: int = 1) -> dict[str, Any]:
    """Two encoders, combined, saved and applied, as in ipadapter_weighted_embeds.json."""
    encoder = {"ipadapter": ("IPADAPTER", 3), "image": ("IMAGE", 4)}
    embeds = {
        "model": ("MODEL", 2),
        "ipadapter": ("IPADAPTER", 6),
        "pos_embed": ("EMBEDS", 9),
        "neg_embed": ("EMBEDS", 10),
    }
    other = {"ipadapter": ("IPADAPTER", 5), "image": ("IMAGE", 7)}
    nodes = [
        node(1, "CheckpointLoaderSimple", {}, ["MODEL", "CLIP", "VAE"], ["sd15.safetensors"]),
        node(2, "IPAdapterUnifiedLoader", {"model": ("MODEL", 1)}, ["MODEL", "IPADAPTER"], ["PLUS (high strength)"]),
        node(3, "LoadImage", {}, ["IMAGE", "MASK"], ["a.png"]),
        node(4, "IPAdapterEncoder", encoder, ["EMBEDS", "EMBEDS"], [1.5]),
        node(5, second, {}, ["IMAGE", "MASK"], ["b.png"]),
        node(6, "IPAdapterEncoder", other, ["EMBEDS", "EMBEDS"], [1.0]),
        node(7, "IPAdapterCombineEmbeds", {"embed1": ("EMBEDS", 8), "embed2": ("EMBEDS", 12)}, ["EMBEDS"], [method]),
        node(8, "IPAdapterEmbeds", embeds, ["MODEL"], [0.8, "linear", 0.1, 0.9, "K+V", "correct"]),
        node(9, "IPAdapterSaveEmbeds", {"embeds": ("EMBEDS", 11)}, [], ["mine"]),
    ]
    links = [[1, 1, 0, 2, 0, "MODEL"], [2, 2, 0, 8, 0, "MODEL"], [3, 2, 1, 4, 0, "IPADAPTER"], [4, 3, 0, 4, 1, "IMAGE"]]
    links += [[5, 2, 1, 6, 0, "IPADAPTER"], [6, 2, 1, 8, 1, "IPADAPTER"], [7, 5, 0, 6, 1, "IMAGE"]]
    links += [[8, 4, 0, 7, 0, "EMBEDS"], [12, 6, 0, 7, 1, "EMBEDS"], [9, 7, 0, 8, 2, "EMBEDS"]]
    links += [[10, 4, negative, 8, 3, "EMBEDS"], [11, 7, 0, 9, 0, "EMBEDS"]]
    return {"nodes": nodes, "links": links, "version": 0.4}


def test_encoded_references_become_image_prompts() -> None:
    made, _ = migrate(embeds_workflow())
    assert fed_by(made) == {
        ("ImagePromptEncode", "adapter"): ("ImagePromptLoadAdapter", 0),
        ("ImagePromptEncode", "clip_vision"): ("CLIPVisionLoader", 0),
        ("ImagePromptEncode", "image"): ("LoadImage", 0),
        ("ImagePromptCombine", "adapter"): ("ImagePromptLoadAdapter", 0),
        ("ImagePromptCombine", "prompt_1"): ("ImagePromptEncode", 0),
        ("ImagePromptCombine", "prompt_2"): ("ImagePromptEncode", 0),
        ("ImagePromptApply", "model"): ("CheckpointLoaderSimple", 0),
        ("ImagePromptApply", "adapter"): ("ImagePromptLoadAdapter", 0),
        ("ImagePromptApply", "image_prompt"): ("ImagePromptCombine", 0),
        ("ImagePromptSave", "image_prompt"): ("ImagePromptCombine", 0),
    }
    nodes = {n["id"]: n["widgets_values"] for n in made["nodes"]}
    assert nodes[4] == ["center", "concat", "1.5", "auto", False, "IPAdapter_plus"]
    assert nodes[6][2] == ""
    assert nodes[7] == ["average", 1.0, 1.0, 1.0, 1.0, 1.0]
    assert nodes[8] == [0.8, "linear", "K+V", 0.1, 0.9, "correct"]
    assert nodes[9] == ["mine"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"method": "norm average"}, "its norm average is not ours"),
        ({"second": "ImageBatch"}, "it mixes the images inside its inputs too"),
        ({"negative": 0}, "its negative embeds are not those of no image"),
    ],
)
def test_embeds_stay_together_where_ours_would_give_another_picture(change: dict[str, Any], reason: str) -> None:
    old = embeds_workflow(**change)
    made, report = migrate(old)
    assert [n["type"] for n in made["nodes"]] == [n["type"] for n in old["nodes"]]
    assert len(fed_by(made)) == len({(n["type"], i["name"]) for n in old["nodes"] for i in n["inputs"]})
    assert reason in " ".join(report)
    assert len([line for line in report if "stays" in line]) == 6
    assert reason not in " ".join(migrate(embeds_workflow("concat"))[1])


def test_saved_embeds_are_loaded_one_per_latent() -> None:
    old = embeds_workflow()
    apply = old["nodes"][7] | {"type": "IPAdapterEmbedsBatch"}
    apply["inputs"] = apply["inputs"][:3]
    old["nodes"] = [*old["nodes"][:3], node(4, "IPAdapterLoadEmbeds", {}, ["EMBEDS"], ["x.ipadpt"]), apply]
    old["links"] = [
        [1, 1, 0, 2, 0, "MODEL"],
        [2, 2, 0, 8, 0, "MODEL"],
        [6, 2, 1, 8, 1, "IPADAPTER"],
        [9, 4, 0, 8, 2, "EMBEDS"],
    ]
    made, _ = migrate(old)
    edges = fed_by(made)
    assert edges["ImagePromptLoad", "clip_vision"] == ("CLIPVisionLoader", 0)
    assert edges["ImagePromptApply", "image_prompt"] == ("ImagePromptLoad", 0)
    nodes = {n["type"]: n["widgets_values"] for n in made["nodes"]}
    assert nodes["ImagePromptLoad"] == ["x.ipadpt [input]", True, "IPAdapter_plus"]


def test_noise_and_negative_pictures_come_along() -> None:
    values = [0.8, 0.7, "linear", "average", 0.0, 0.9, "K+V"]
    old = workflow("IPAdapterFaceID", values, image_negative=("IMAGE", 7))
    old["nodes"][1] |= {"type": "IPAdapterUnifiedLoaderFaceID", "widgets_values": ["FACEID PLUS V2", 0.6, "CUDA"]}
    old["nodes"].append(node(6, "IPAdapterNoise", {"image_optional": ("IMAGE", 8)}, ["IMAGE"], ["fade", 0.3, 5]))
    old["links"] += [[7, 6, 0, 4, 4, "IMAGE"], [8, 3, 0, 6, 0, "IMAGE"]]
    made, report = migrate(old)
    edges = fed_by(made)
    assert edges["ImagePromptEncodeFace", "negative"] == ("ImagePromptNoise", 0)
    assert edges["ImagePromptNoise", "image"] == ("LoadImage", 0)
    assert {n["type"]: n["widgets_values"] for n in made["nodes"]}["ImagePromptNoise"] == ["fade", 0.3, 5]
    assert not any("stays" in line for line in report)


@pytest.mark.parametrize(
    ("kind", "values", "preset", "boost"),
    [
        ("IPAdapterPreciseComposition", [0.8, 0.3, "average", 0.1, 0.9, "K+V"], "composition precise", 0.3),
        ("IPAdapterPreciseStyleTransferBatch", [0.8, 0.6, "concat", 0.1, 0.9, "K+V"], "style transfer precise", 0.6),
        ("IPAdapterAdvanced", [0.8, "style and composition", "concat", 0.1, 0.9, "K+V"], "style and composition", 1.0),
    ],
)
def test_strengths_of_their_own_become_a_schedule(kind: str, values: list[Any], preset: str, boost: float) -> None:
    made, report = migrate(workflow(kind, values))
    assert fed_by(made)["ImagePromptApply", "schedule"] == ("ImagePromptSchedule", 0)
    nodes = {n["type"]: n["widgets_values"] for n in made["nodes"]}
    assert nodes["ImagePromptApply"] == [0.8, preset, "K+V", 0.1, 0.9, "IPAdapter_plus"]
    assert nodes["ImagePromptSchedule"] == ["0: 1, 1: 1", "", True, 1.0, boost, 1.0]
    assert nodes["ImagePromptEncode"][4] is kind.endswith("Batch")
    assert not any("stays" in line for line in report)


@pytest.mark.parametrize("batch", [False, True])
def test_tiles_become_one_node(batch: bool) -> None:
    combine = [] if batch else ["average"]
    values = [0.7, "ease in", *combine, 0.1, 0.9, 0.2, "K+V", *([2] if batch else [])]
    old = workflow("IPAdapterTiledBatch" if batch else "IPAdapterTiled", values)
    old["nodes"][3]["outputs"] += [{"name": t, "type": t, "links": []} for t in ("IMAGE", "MASK")]
    old["nodes"].append(node(6, "PreviewImage", {"images": ("IMAGE", 7)}, [], []))
    old["links"].append([7, 4, 1, 6, 0, "IMAGE"])
    made, _ = migrate(old)
    assert fed_by(made) == {
        ("ImagePromptApplyTiled", "model"): ("CheckpointLoaderSimple", 0),
        ("ImagePromptApplyTiled", "adapter"): ("ImagePromptLoadAdapter", 0),
        ("ImagePromptApplyTiled", "clip_vision"): ("CLIPVisionLoader", 0),
        ("ImagePromptApplyTiled", "image"): ("LoadImage", 0),
        ("ImagePromptApplyTiled", "mask"): ("LoadImage", 1),
        ("PreviewImage", "images"): ("ImagePromptApplyTiled", 1),
        ("KSampler", "model"): ("ImagePromptApplyTiled", 0),
    }
    widgets = next(n["widgets_values"] for n in made["nodes"] if n["type"] == "ImagePromptApplyTiled")
    mixed = "concat" if batch else "average"
    assert widgets == [0.7, "ease in", "K+V", 0.1, 0.9, mixed, batch, 0.2, "IPAdapter_plus"]


def test_chained_unified_loaders_load_on_their_own() -> None:
    """As in ipadapter_ideal_faceid_config.json: the second takes over what the first one loaded."""
    for second in ("IPAdapter", "IPAdapterMS"):
        old = workflow()
        chained = {"model": ("MODEL", 6), "ipadapter": ("IPADAPTER", 7)}
        inputs = {"model": ("MODEL", 8), "ipadapter": ("IPADAPTER", 9), "image": ("IMAGE", 10)}
        old["nodes"][4] = node(
            5, "IPAdapterUnifiedLoader", chained, ["MODEL", "IPADAPTER"], ["STANDARD (medium strength)"]
        )
        old["nodes"].append(node(6, second, inputs, ["MODEL"], [0.4, 0.0, 1.0, "standard"]))
        old["links"] += [[7, 2, 1, 5, 1, "IPADAPTER"], [8, 5, 0, 6, 0, "MODEL"], [9, 5, 1, 6, 1, "IPADAPTER"]]
        old["links"] += [[10, 3, 0, 6, 2, "IMAGE"]]
        made, report = migrate(old)
        fed_by(made)
        kinds = [n["type"] for n in made["nodes"]]
        assert (
            kinds.count("ImagePromptLoadAdapter")
            == kinds.count("ImagePromptApply")
            == (2 if second == "IPAdapter" else 1)
        )
        assert len([line for line in report if "stays" in line]) == (0 if second == "IPAdapter" else 2)


def test_one_node_changes_with_what_it_cannot_change_without() -> None:
    """Two checkpoints, loaders and apply nodes side by side: of one pair the other stays as it was, to the last value."""
    one, other = workflow(), workflow()
    for entry in other["nodes"]:
        entry["id"] += 10
        for socket in entry["inputs"]:
            socket["link"] += 10
    other["links"] = [[n + 10, a + 10, slot, b + 10, to, kind] for n, a, slot, b, to, kind in other["links"]]
    both = {**one, "nodes": one["nodes"] + other["nodes"], "links": one["links"] + other["links"]}
    for asked in (
        4,
        2,
        "4",
    ):  # the node, or the loader that it shares its adapter with; newer editors have texts for numbers
        made = migrate_graph(both, only=[asked])
        types = {n["id"]: n["type"] for n in made.graph["nodes"]}
        assert types[4] == "ImagePromptApply"
        assert "IPAdapterUnifiedLoader" not in {kind for number, kind in types.items() if number < 10}
        kept = [(n["type"], n["widgets_values"], n["inputs"]) for n in made.graph["nodes"] if n["id"] in range(11, 16)]
        assert kept == [(n["type"], n["widgets_values"], n["inputs"]) for n in other["nodes"]]
        assert (made.found, made.rewritten) == (4, 2)
        assert not any("(node 12)" in line or "(node 14)" in line for line in made.report)
    assert migrate_graph(both, only=[]).rewritten == 0
    assert migrate_graph(both, only=[1, 99, "x"]).rewritten == 0
    everything = migrate_graph(both)
    assert everything.rewritten == 4
    assert migrate_graph(migrate_graph(both, only=[4]).graph, only=[14]).rewritten == 2


def test_a_node_that_cannot_change_says_why_only_if_it_is_asked_for() -> None:
    old = workflow(widgets=["0.8x", "ease in", "average", 0.1, 0.9, "K+V"])
    told = [line for line in migrate_graph(old, only=[4]).report if "stays" in line]
    assert told
    assert [line for line in migrate_graph(old, only=[5]).report if "stays" in line] == []


def test_what_has_no_counterpart_stays_with_its_loader() -> None:
    old = workflow("IPAdapterClipVisionEnhancer")
    made, report = migrate(old)
    assert [n["type"] for n in made["nodes"]] == [n["type"] for n in old["nodes"]]
    assert len(fed_by(made)) == 6
    assert any("IPAdapterClipVisionEnhancer (node 4) stays" in line for line in report)
    assert any("IPAdapterUnifiedLoader (node 2) stays" in line for line in report)
    weights = workflow(weight=("FLOAT", 4))
    weights["links"].append([7, 3, 0, 4, 4, "FLOAT"])
    weights["nodes"][3]["inputs"][-1]["link"] = 7
    assert "weight comes from another node" in " ".join(migrate(weights)[1])


def test_what_is_no_saved_workflow_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InvalidInputError, match="exported as API"):
        migrate({"1": {"class_type": "IPAdapter"}})
    file = tmp_path / "old.json"
    file.write_text("{")
    assert main(["migrate", str(file)]) == 1
    assert "is no JSON file" in capsys.readouterr().err
    file.write_text(json.dumps(workflow()))
    assert main(["migrate", str(file)]) == 0
    assert "Apply Adapter to Model" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "old.migrated.json").read_text())["nodes"]) == 7


EXAMPLES = sorted(Path(OLD).glob("examples/*.json")) if OLD else []


@pytest.mark.skipif(not EXAMPLES, reason="no old pack at $IPADAPTER_PLUS_PATH")
def test_the_old_packs_examples_migrate() -> None:
    changed = 0
    for file in EXAMPLES:
        made, report = migrate(json.loads(file.read_text()))
        fed_by(made)
        changed += any(n["type"] == "ImagePromptApply" for n in made["nodes"])
        assert report
    assert changed >= 8


# --- subgraphs, group nodes, prompts ----------------------------------------------------------------------------------

OUTER = "11111111-2222-4333-8444-555555555555"


def in_a_subgraph(old: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A workflow whose apply node and loader are in a subgraph; checkpoint, picture and sampler are outside."""
    old = copy.deepcopy(old)
    inner = [n for n in old["nodes"] if n["id"] in (2, 4)]
    for n in inner:
        for entry in n["inputs"]:
            entry["link"] = {1: 11, 4: 14, 5: 15}.get(entry["link"], entry["link"])
    inner[-1]["outputs"][0]["links"] = [16]
    rows = [
        (11, -10, 0, 2, 0, "MODEL"),
        (2, 2, 0, 4, 0, "MODEL"),
        (3, 2, 1, 4, 1, "IPADAPTER"),
        (14, -10, 1, 4, 2, "IMAGE"),
    ]
    rows += [(15, -10, 2, 4, 3, "MASK"), (16, 4, 0, -20, 0, "MODEL")]
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    sockets = [("model", "MODEL", 11), ("image", "IMAGE", 14), ("mask", "MASK", 15)]
    subgraph = {
        "id": OUTER, "name": "inside", "state": {"lastNodeId": 4, "lastLinkId": 16}, "inputNode": {"id": -10},
        "outputNode": {"id": -20}, "nodes": inner, "links": [dict(zip(names, r, strict=True)) for r in rows],
        "inputs": [{"id": n, "name": n, "type": t, "linkIds": [link]} for n, t, link in sockets],
        "outputs": [{"id": "o", "name": "model", "type": "MODEL", "linkIds": [16]}],
    }  # fmt: skip
    whole = node(7, OUTER, {"model": ("MODEL", 1), "image": ("IMAGE", 4), "mask": ("MASK", 5)}, ["MODEL"], [])
    old["nodes"] = [*(n for n in old["nodes"] if n["id"] not in (2, 4)), whole | more]
    old["links"] = [
        [1, 1, 0, 7, 0, "MODEL"],
        [4, 3, 0, 7, 1, "IMAGE"],
        [5, 3, 1, 7, 2, "MASK"],
        [6, 7, 0, 5, 0, "MODEL"],
    ]
    return old | {"definitions": {"subgraphs": [subgraph]}}


def test_nodes_inside_a_subgraph_are_rewritten() -> None:
    old = in_a_subgraph(workflow())
    before = copy.deepcopy(old)
    made = migrate_graph(old)
    assert old == before, "the caller's graph stays as it is"
    assert (made.found, made.rewritten) == (2, 2)
    assert made.report[0].startswith("in the subgraph 'inside': IPAdapterUnifiedLoader (node 2, PLUS")
    assert "SD1.5" in made.report[0], "as the checkpoint outside says"
    assert {**made.graph, "definitions": 0} == {**old, "definitions": 0}, "the graph outside is as it was"
    (inner,) = made.graph["definitions"]["subgraphs"]
    links = {link["id"]: link for link in inner["links"]}
    ids = {n["type"]: n["id"] for n in inner["nodes"]}
    assert len(ids) == len(inner["nodes"]) == 4
    assert min(ids["ImagePromptEncode"], ids["CLIPVisionLoader"]) > 7, "numbers that no graph of the file has"
    assert [links[16]["origin_id"], links[16]["target_id"]] == [4, -20]
    # what comes from outside kept its link, or has the one that the loader handed on; the sockets know them
    assert {slot: entry["linkIds"] for slot, entry in enumerate(inner["inputs"])} == {0: [2], 1: [14], 2: [15]}
    assert [(links[i]["origin_id"], links[i]["target_id"]) for i in (2, 14, 15)] == [
        (-10, 4), (-10, ids["ImagePromptEncode"]), (-10, 4)
    ]  # fmt: skip
    assert 11 not in links
    assert inner["state"] == {"lastNodeId": max(ids.values()), "lastLinkId": max(links)}


def test_one_node_inside_a_subgraph_changes_alone() -> None:
    """Numbers are those of one graph: the same number outside, or in another subgraph, is another node."""
    inside, outside = in_a_subgraph(workflow()), workflow()
    other = copy.deepcopy(inside["definitions"]["subgraphs"][0]) | {"id": "another", "name": "other"}
    inside["definitions"]["subgraphs"].append(other)
    both = {**inside, "nodes": [*inside["nodes"], *(n for n in outside["nodes"] if n["id"] in (2, 4))]}
    made = migrate_graph(both, "sd15", only=[4], inside=OUTER)
    first, second = made.graph["definitions"]["subgraphs"]
    assert {n["type"] for n in first["nodes"]} >= {"ImagePromptApply", "ImagePromptEncode"}
    assert [n["type"] for n in second["nodes"]] == [n["type"] for n in other["nodes"]]
    assert [n["type"] for n in made.graph["nodes"]] == [n["type"] for n in both["nodes"]]
    assert made.rewritten == 2
    assert all(line.startswith("in the subgraph 'inside': ") for line in made.report[:-1])
    assert migrate_graph(both, "sd15", only=[4], inside="no such").rewritten == 0
    assert migrate_graph(both, "sd15", only=[4], inside="").rewritten == 0
    assert migrate_graph(inside, "sd15", only=[4]).rewritten == 0, "the graph itself has no node 4"


def test_a_subgraph_in_a_subgraph_is_reached() -> None:
    old = in_a_subgraph(workflow())
    deep = {"nodes": [], "links": [], "definitions": {"subgraphs": [{"nodes": [], "definitions": old["definitions"]}]}}
    assert migrate_graph(deep, "sd15").rewritten == 2


def test_a_widget_shown_on_the_subgraphs_node_keeps_its_node() -> None:
    made = migrate_graph(in_a_subgraph(workflow(), properties={"proxyWidgets": [["4", "weight"]]}))
    assert made.rewritten == 0
    assert "the subgraph's node shows its 'weight'" in " ".join(made.report)


def test_old_nodes_in_group_nodes_are_told() -> None:
    inner = [{"type": "IPAdapterAdvanced"}, {"type": "IPAdapterModelLoader"}, {"type": "KSampler"}]
    old = workflow() | {"extra": {"groupNodes": {"mine\x1b": {"nodes": inner, "links": [[None, 0]]}}}}
    made = migrate_graph(old)
    assert made.graph["extra"] == old["extra"]
    assert (made.found, made.rewritten) == (4, 2)
    assert any(line.startswith("2 old nodes inside the group node 'mine\\x1b'") for line in made.report)


def prompt_of(saved: dict[str, Any]) -> dict[str, Any]:
    """The API format of the workflow above."""
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd15.safetensors"}},
        "2": {"class_type": "IPAdapterUnifiedLoader", "inputs": {"preset": "PLUS (high strength)", "model": ["1", 0]}},
        "3:1": {"class_type": "LoadImage", "inputs": {"image": "a.png"}},
        "4": {
            "class_type": "IPAdapterAdvanced",
            "inputs": {
                "weight": 0.8, "weight_type": "style transfer (SDXL)", "combine_embeds": "average", "start_at": 0.1,
                "end_at": 0.9, "model": ["2", 0], "ipadapter": ["2", 1], "image": ["3:1", 0], "attn_mask": ["3:1", 1],
            },
            "_meta": {"title": "mine"},
        },
        "5": {"class_type": "KSampler", "inputs": {"seed": 1, "model": ["4", 0], "list": [1, 2]}},
    }  # fmt: skip


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_prompt_is_rewritten_too(wrapped: bool) -> None:
    old = prompt_of(workflow())
    made = migrate_graph({"prompt": old, "client_id": "x"} if wrapped else old)
    graph = made.graph["prompt"] if wrapped else made.graph
    assert (made.found, made.rewritten) == (2, 2)
    assert graph["1"] == old["1"]
    assert graph["5"] == old["5"]
    assert graph["4"] == {
        "class_type": "ImagePromptApply",
        "inputs": {
            "strength": 0.8, "preset": "style transfer", "scaling": "V only", "start": 0.1, "end": 0.9,
            "compatibility": "IPAdapter_plus", "model": ["1", 0], "adapter": ["2", 0], "image_prompt": ["7", 0],
            "mask": ["3:1", 1],
        },
        "_meta": {"title": "mine"},
    }  # fmt: skip
    assert graph["7"]["inputs"]["clip_vision"] == ["6", 0]
    assert graph["6"] == {
        "class_type": "CLIPVisionLoader",
        "inputs": {"clip_name": "CLIP-ViT-H-14-laion2B-s32B-b79K.safetensors"},
    }


# --- links and dots ---------------------------------------------------------------------------------------------------


def test_links_keep_their_numbers_and_dots_their_wires() -> None:
    old = workflow() | {
        "last_link_id": 40,
        "extra": {
            "reroutes": [
                {"id": 1, "pos": [0, 0], "linkIds": [6]},
                {"id": 2, "linkIds": [1, 4]},
                {"id": 3, "linkIds": 7},
            ],
            "linkExtensions": [{"id": 6, "parentId": 1}, {"id": 1, "parentId": 2}, {"id": 4, "parentId": 2}],
            "ds": {"scale": 1},
        },
        "floatingLinks": [[30, 4, 0, -1, -1, "MODEL"], [31, 5, 0, -1, 0, "LATENT"]],
    }
    made, _ = migrate(old)
    nodes = {n["id"]: n["type"] for n in made["nodes"]}
    links = {link[0]: [nodes[link[1]], nodes[link[3]], link[5]] for link in made["links"]}
    assert links[6] == ["ImagePromptApply", "KSampler", "MODEL"]
    assert links[4] == ["LoadImage", "ImagePromptEncode", "IMAGE"]
    assert links[2] == ["CheckpointLoaderSimple", "ImagePromptApply", "MODEL"]
    assert links[3] == ["ImagePromptLoadAdapter", "ImagePromptApply", "IMAGE_PROMPT_ADAPTER"]
    assert sorted(links)[-1] == made["last_link_id"] > 40
    assert min(number for number in links if number > 6) > 40
    assert made["last_node_id"] == max(nodes)
    assert made["extra"] == {
        "reroutes": [{"id": 1, "pos": [0, 0], "linkIds": [6]}, {"id": 2, "linkIds": [4]}, {"id": 3, "linkIds": 7}],
        "linkExtensions": [{"id": 6, "parentId": 1}, {"id": 4, "parentId": 2}],
        "ds": {"scale": 1},
    }
    assert made["floatingLinks"] == [[30, 4, 0, -1, -1, "MODEL"], [31, 5, 0, -1, 0, "LATENT"]]


def test_links_as_objects_keep_what_else_they_say() -> None:
    names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    old = workflow()
    old["links"] = [{**dict(zip(names, link, strict=True)), "parentId": link[0] + 100} for link in old["links"]]
    made, _ = migrate(old)
    (moved,) = [link for link in made["links"] if link["id"] == 4]
    assert moved["parentId"] == 104
    assert [n["type"] for n in made["nodes"] if n["id"] == moved["target_id"]] == ["ImagePromptEncode"]
    assert all(isinstance(link, dict) for link in made["links"])


def test_reroute_nodes_are_seen_through() -> None:
    old = workflow()
    old["nodes"].append(node(8, "Reroute", {"": ("*", 3)}, ["IPADAPTER"], []))
    old["links"][2] = [3, 2, 1, 8, 0, "IPADAPTER"]
    old["links"].append([9, 8, 0, 4, 1, "IPADAPTER"])
    old["nodes"][3]["inputs"][1]["link"] = 9
    made, report = migrate(old)
    edges = {(link[1], link[3]): link[5] for link in made["links"]}
    assert edges[2, 8] == edges[8, 4] == "IMAGE_PROMPT_ADAPTER"
    assert not any("stays" in line for line in report)
    old["nodes"][-1]["inputs"][0]["link"] = 9  # a reroute that feeds itself
    assert any("stays" in line for line in migrate(old)[1])


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "names"),
    [
        (
            "sdxl",
            "waiNSFWIllustrious_v140 ponyRealism_v22 animagine-xl-3.1 noobaiXLNAIXL_vPred10 sd_xl_base_1.0 dreamshaperXL_v21 "
            "juggernautXL_version8 sdxl/ProteusV0.3 cosxl_edit Illustrious-XL-v2.0 realvisxlV40 novaAnimeXL_ilV120 WAI_ANI "
            "hassakuXLIllustrious cyberrealisticPony_v110 Kolors playground-v2.5-1024px autismmixSDXL epicrealismXL_v1.5",
        ),
        (
            "sd15",
            "sd15 dreamshaper_8 realisticVisionV51_v51VAE v1-5-pruned-emaonly-fp16 epicrealism_naturalSinRC1 majicmixRealistic_v7 "
            "sd15/juggernaut_reborn sd-v1-4 stable-diffusion-v1-5 AnythingV5_v5 absolutereality_v181 cyberrealistic_v40",
        ),
        ("", "flux1-dev-fp8 sd3.5_large v2-1_768-ema-pruned stable-diffusion-2-1 svd_xt hunyuan3d-dit-v2 ltx-2-19b-dev"),
        (None, "mymodel merge_final hawaii_v2 model-10 checkpoint"),
    ],
)  # fmt: skip
def test_the_family_is_told_by_the_name_or_not_at_all(base: str | None, names: str) -> None:
    assert {name: base_of_name(f"{name}.safetensors") for name in names.split()} == dict.fromkeys(names.split(), base)


def test_where_the_name_does_not_tell_only_that_loader_stays() -> None:
    old = workflow()
    old["nodes"][0]["widgets_values"] = ["mymerge_v3.safetensors"]
    old["nodes"].append(node(9, "IPAdapterNoise", {}, ["IMAGE"], ["fade", 1.0, 0]))
    made = migrate_graph(old)
    assert (made.found, made.rewritten) == (3, 1)
    assert "'mymerge_v3.safetensors' does not tell SD1.5 from SDXL: add --base sd15 or --base sdxl" in " ".join(
        made.report
    )
    assert migrate_graph(old, "sdxl").rewritten == 3
    old["nodes"][1]["widgets_values"] = ["FULL FACE - SD1.5 only (portraits stronger)"]
    assert migrate_graph(old).rewritten == 3, "that preset itself is for one family only"


def test_a_preset_that_a_family_has_not_keeps_its_loader() -> None:
    old = workflow()
    old["nodes"][0]["widgets_values"] = ["juggernautXL.safetensors"]
    old["nodes"][1]["widgets_values"] = ["FULL FACE - SD1.5 only (portraits stronger)"]
    old["nodes"].append(node(9, "IPAdapterModelLoader", {}, ["IPADAPTER"], ["a.bin"]))
    made = migrate_graph(old)
    assert made.rewritten == 1
    assert "there is no 'FULL FACE" in " ".join(made.report)


def test_two_checkpoints_each_for_its_own_loader() -> None:
    old = workflow()
    old["nodes"].append(node(11, "CheckpointLoaderSimple", {}, ["MODEL"], ["sdxl/some.safetensors"]))
    old["nodes"].append(node(12, "LoraLoader", {"model": ("MODEL", 21)}, ["MODEL"], ["sd15_lora.safetensors"]))
    second = node(
        13, "IPAdapterUnifiedLoader", {"model": ("MODEL", 22)}, ["MODEL", "IPADAPTER"], ["VIT-G (medium strength)"]
    )
    old["nodes"].append(second)
    old["links"] += [[21, 11, 0, 12, 0, "MODEL"], [22, 12, 0, 13, 0, "MODEL"]]
    made, _ = migrate(old)
    files = {n["id"]: n["widgets_values"] for n in made["nodes"]}
    assert (files[2], files[13]) == (["ip-adapter-plus_sd15.safetensors"], ["ip-adapter_sdxl.safetensors"])


# --- packs for transformers --------------------------------------------------------------------------------------------


def picture_workflow(kind: str, values: list[Any], loader: str, loaded: list[Any]) -> dict[str, Any]:
    """A model, a loader and a picture into one node that applies it, and a sampler behind; SD3's picture is encoded before."""
    (adapter, picture), _ = PICTURE_APPLIES[kind]
    nodes = [
        node(1, "UNETLoader", {}, ["MODEL"], ["flux1-dev.safetensors", "default"]),
        node(2, loader, {}, ["ADAPTER"], loaded),
        node(3, "LoadImage", {}, ["IMAGE", "MASK"], ["a.png"]),
        node(4, kind, {"model": ("MODEL", 1), adapter: ("ADAPTER", 2), picture: ("IMAGE", 3)}, ["MODEL"], values),
        node(5, "KSampler", {"model": ("MODEL", 4)}, ["LATENT"], [1]),
    ]
    links: list[Any] = [[1, 1, 0, 4, 0, "MODEL"], [2, 2, 0, 4, 1, "ADAPTER"], [4, 4, 0, 5, 0, "MODEL"]]
    if picture == "image":
        links.append([3, 3, 0, 4, 2, "IMAGE"])
    else:
        seen = {"clip_vision": ("CLIP_VISION", 5), "image": ("IMAGE", 6)}
        nodes += [
            node(6, "CLIPVisionLoader", {}, ["CLIP_VISION"], ["sigclip.safetensors"]),
            node(7, "CLIPVisionEncode", seen, ["CLIP_VISION_OUTPUT"], ["none"]),
        ]
        links += [[3, 7, 0, 4, 2, "CLIP_VISION_OUTPUT"], [5, 6, 0, 7, 0, "CLIP_VISION"], [6, 3, 0, 7, 1, "IMAGE"]]
    return {"nodes": nodes, "links": links, "version": 0.4}


FLUX_FILE, SHAKKERS = (
    ["a.safetensors", "clip.safetensors", "CPU"],
    ["a.bin", "google/siglip-so400m-patch14-384", "cuda"],
)


@pytest.mark.parametrize(
    ("kind", "values", "loader", "loaded", "applied", "encoded", "vision"),
    [
        (
            "ApplyFluxIPAdapter", [0.6], "LoadFluxIPAdapter", FLUX_FILE, [0.6, "linear", "V only", 0.0, 1.0, "correct"],
            ["auto", "concat", "", "auto", False, "correct"], "CLIPVisionLoader",
        ),
        (
            "ApplyAdvancedFluxIPAdapter", [0.9, 0.0, "Linear"], "LoadFluxIPAdapter", FLUX_FILE,
            [1.0, "linear", "V only", 0.0, 1.0, "correct"], ["auto", "average", "", "auto", False, "correct"],
            "CLIPVisionLoader",
        ),
        (
            "ApplyIPAdapterFlux", [0.75, 0.2, 0.6], "IPAdapterFluxLoader", SHAKKERS,
            [0.75, "linear", "V only", 0.2, 0.6, "IPAdapter-Flux"], ["auto", "concat", "", "auto", False, "correct"],
            "ImagePromptLoadEncoder",
        ),
        (
            "ApplyIPAdapterFluxAdvanced", [0.2, 0.9, 10, 0.1, 0.8], "IPAdapterFluxLoaderAdvanced", SHAKKERS,
            [1.0, "linear", "V only", 0.1, 0.8, "IPAdapter-Flux"], ["auto", "concat", "", "auto", False, "correct"],
            "ImagePromptLoadEncoder",
        ),
        (
            "ApplyIPAdapterSD3", [0.5, 0, 1], "IPAdapterSD3Loader", ["a.bin", "cuda"],
            [0.5, "linear", "V only", 0, 1, "correct"], ["stretch", "concat", "", "auto", False, "correct"],
            "CLIPVisionLoader",
        ),
    ],
)  # fmt: skip
def test_packs_for_transformers(
    kind: str, values: list[Any], loader: str, loaded: list[Any], applied: list[Any], encoded: list[Any], vision: str
) -> None:
    old = picture_workflow(kind, values, loader, loaded)
    old["nodes"].append(node(9, "XlabsSampler", {}, ["LATENT"], [4, "fixed", 50, 1, 3.5, 0]))
    made = migrate_graph(old)
    assert made.rewritten == 2
    assert "put KSampler in its place" in " ".join(made.report)
    links = fed_by(made.graph)
    assert links["ImagePromptApply", "model"] == ("UNETLoader", 0)
    assert links["ImagePromptApply", "image_prompt"] == ("ImagePromptEncode", 0)
    assert (
        links["ImagePromptApply", "adapter"] == links["ImagePromptEncode", "adapter"] == ("ImagePromptLoadAdapter", 0)
    )
    assert links["ImagePromptEncode", "image"] == ("LoadImage", 0)
    assert links["ImagePromptEncode", "clip_vision"] == (vision, 0)
    assert links["KSampler", "model"] == ("ImagePromptApply", 0)
    nodes: dict[str, Any] = {n["type"]: n for n in made.graph["nodes"]}  # type: ignore[attr-defined]
    assert nodes["ImagePromptApply"]["widgets_values"] == applied
    assert nodes["ImagePromptEncode"]["widgets_values"] == encoded
    assert nodes["ImagePromptLoadAdapter"]["widgets_values"] == loaded[:1]
    schedule = nodes.get("ImagePromptSchedule")
    assert (schedule is not None) == ("Advanced" in kind)
    if kind == "ApplyAdvancedFluxIPAdapter":
        sites = schedule["widgets_values"][1].split(", ")
        assert (len(sites), sites[0], sites[9], sites[18]) == (19, "double 0: 0.9", "double 9: 0.45", "double 18: 0")
    elif schedule is not None:
        assert schedule["widgets_values"][:2] == ["0.1: 0.2, 0.8: 0.9", ""]


@pytest.mark.parametrize("prompt", [False, True])
def test_what_packs_for_transformers_keep(prompt: bool) -> None:
    """A node of theirs that cannot change keeps its loader, and the other way round."""
    graph = picture_workflow("ApplyIPAdapterSD3", [0.5, 0, 1], "IPAdapterSD3Loader", ["a.bin", "cuda"])
    graph["nodes"][6]["type"] = "AnothersEncode"
    old: Any = graph
    if prompt:
        old = {
            "1": {"class_type": "IPAdapterSD3Loader", "inputs": {"ipadapter": "a.bin", "provider": "cpu"}},
            "2": {"class_type": "AnothersEncode", "inputs": {}},
            "3": {
                "class_type": "ApplyIPAdapterSD3",
                "inputs": {"model": ["4", 0], "ipadapter": ["1", 0], "image_embed": ["2", 0], "weight": 1.0},
            },
            "4": {"class_type": "UNETLoader", "inputs": {}},
        }
    made = migrate_graph(old)
    assert made.rewritten == 0
    assert "comes from no CLIP Vision Encode" in " ".join(made.report)
    assert made.found == 2


INK: dict[str, Any] = {"on": True, "lora": "ink \u6c34.safetensors", "strength": 0.8, "strengthTwo": None}
CAT: dict[str, Any] = {"on": False, "lora": "a/cat.safetensors", "strength": -1, "strengthTwo": 0.25}
ROWS = (LoRARow("ink \u6c34.safetensors", 0.8), LoRARow("a/cat.safetensors", -1.0, 0.25, on=False))


def power_loras_workflow(*rows: Any) -> dict[str, Any]:
    """A checkpoint's model and clip through rgthree's rows into a sampler and a prompt; its headings and buttons as it saves them."""
    widgets = [{}, {"type": "PowerLoraLoaderHeaderWidget"}, *map(dict, rows), {}, ""]
    nodes = [
        node(1, "CheckpointLoaderSimple", {}, ["MODEL", "CLIP", "VAE"], ["sd15.safetensors"]),
        node(2, POWER_LORAS, {"model": ("MODEL", 1), "clip": ("CLIP", 2)}, ["MODEL", "CLIP"], widgets),
        node(3, "KSampler", {"model": ("MODEL", 3)}, ["LATENT"], [1]),
        node(4, "CLIPTextEncode", {"clip": ("CLIP", 4)}, ["CONDITIONING"], ["a cat"]),
    ]
    links = [[1, 1, 0, 2, 0, "MODEL"], [2, 1, 1, 2, 1, "CLIP"], [3, 2, 0, 3, 0, "MODEL"], [4, 2, 1, 4, 0, "CLIP"]]
    return {"nodes": nodes, "links": links, "version": 0.4}


def test_rgthrees_rows_become_lora_rows() -> None:
    empty = {"on": True, "lora": None, "strength": 1, "strengthTwo": None}
    old = power_loras_workflow(INK, empty, CAT)
    made, report = migrate(old)
    assert report == [
        f"{POWER_LORAS} (node 2) is LoRA Rows",
        "1 nodes of other packs found: 1 rewritten, 0 as they were",
    ]
    assert made["links"] == old["links"]
    assert fed_by(made) == {
        ("ImagePromptLoRARows", "model"): ("CheckpointLoaderSimple", 0),
        ("ImagePromptLoRARows", "clip"): ("CheckpointLoaderSimple", 1),
        ("KSampler", "model"): ("ImagePromptLoRARows", 0),
        ("CLIPTextEncode", "clip"): ("ImagePromptLoRARows", 1),
    }
    rows, mode, partial = made["nodes"][1]["widgets_values"]
    assert parse_rows(rows) == ROWS
    assert (mode, partial) == ("auto", "allow")
    assert migrate(power_loras_workflow())[0]["nodes"][1]["widgets_values"][0] == "[]"


def test_rgthrees_rows_in_a_prompt_too() -> None:
    sent = {name: value for name, value in INK.items() if name != "strengthTwo"}
    old: Any = {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sd15.safetensors"}},
        "2": {"class_type": POWER_LORAS, "inputs": {"PowerLoraLoaderHeaderWidget": {"type": "PowerLoraLoaderHeaderWidget"},
              "lora_1": sent, "lora_2": CAT, "\u2795 Add Lora": "", "model": ["1", 0]}},
    }  # fmt: skip
    inputs: Any = migrate(old)[0]["2"]["inputs"]
    assert parse_rows(inputs.pop("rows")) == ROWS
    assert inputs == {"model": ["1", 0], "mode": "auto", "partial": "allow"}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"strength": "strong"}, "its row 2 has a strength that is no number"),
        ({"strengthTwo": []}, "its row 2 has a strength that is no number"),
        ({"strength": 21}, "its row 2 is stronger than 20"),
        ({"lora": ["a"]}, "its row 2 has lora: '['a']'"),
        ({"on": "yes"}, "on: 'yes'"),
    ],
)
def test_a_row_that_ours_could_not_read_keeps_rgthrees_node(change: dict[str, Any], told: str) -> None:
    old = power_loras_workflow(INK, CAT | change)
    made, report = migrate(old)
    assert without_links(made["nodes"][1]) == without_links(old["nodes"][1])
    assert told in report[0]


def test_rgthrees_node_stays_where_its_names_are_used_or_there_are_more_rows_than_ours_reads() -> None:
    old = power_loras_workflow(INK)
    old["nodes"][1]["outputs"].append({"name": "LORAS", "type": "STRING", "links": [5]})
    old["nodes"].append(node(5, "PreviewAny", {"source": ("*", 5)}, [], []))
    old["links"].append([5, 2, 2, 5, 0, "STRING"])
    assert "its list of names feeds another node" in migrate(old)[1][0]
    assert "more than 200 rows" in migrate(power_loras_workflow(*[INK] * 201))[1][0]
    assert migrate_graph(power_loras_workflow(*[INK] * 200)).rewritten == 1


# --- damaged graphs ---------------------------------------------------------------------------------------------------


def test_the_names_are_those_that_the_old_pack_ever_had() -> None:
    facts = json.loads((Path(__file__).parent / "old_pack.json").read_text())
    assert set(facts) == OLD_TYPES - {*PICTURE_LOADERS, *PICTURE_APPLIES, "FluxLoraLoader", "XlabsSampler", POWER_LORAS}


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("0.5", ""), (True, "its weight is no number"), ([1, 2], "its weight is no number"), (None, "its weight is no number"),
        (float("nan"), "its weight is no number"), (2**60, "its weight is no number"),
    ],
)  # fmt: skip
def test_a_value_that_is_none_keeps_its_node(value: Any, told: str) -> None:
    made, report = migrate(workflow(widgets=[value, "ease in", "average", 0.1, 0.9, "K+V"]))
    assert told in " ".join(report)
    widgets = {n["id"]: n["widgets_values"] for n in made["nodes"]}[4]
    assert widgets[0] == value or (told == "" and widgets[0] == 0.5) or value != value


def test_widgets_as_a_table_and_options_of_other_packs() -> None:
    table = {"weight": 0.3, "weight_type": "composition (SDXL)", "start_at": 0, "compatibility": "correct"}
    old = workflow()
    old["nodes"][3]["widgets_values"] = table
    made, _ = migrate(old)
    widgets = {n["type"]: n["widgets_values"] for n in made["nodes"]}
    assert widgets["ImagePromptApply"] == [0.3, "composition", "V only", 0, 1.0, "correct"]
    old["nodes"][3]["widgets_values"] = [0.3, "a fork's own"]
    assert "its weight_type is 'a fork's own', which the old pack has not" in " ".join(migrate(old)[1])


def test_what_is_damaged_stays_and_the_rest_is_rewritten() -> None:
    old = workflow()
    strange: list[Any] = [
        None,
        5,
        "x",
        [1],
        {"id": 9, "pos": [0, 0]},
        {"id": "note-1", "type": "Note"},
        {"id": 20, "type": 3},
    ]
    twins = [{"id": 30, "type": "IPAdapterNoise", "which": i} for i in range(2)]
    rows: list[Any] = [None, [], [1], [9, 8, 7, 6], [9, 8, 7, 6, 5], {"id": 3}, [50, 1, -1, 4, 0, "MODEL"], "x", 2**70]
    old["nodes"] += [*strange, *twins]
    old["links"] = rows + old["links"]
    old |= {"groups": 7, "extra": [1], "config": None}
    made = migrate_graph(old)
    assert (made.found, made.rewritten) == (4, 2)
    assert "2 x IPAdapterNoise stays: its number is missing or another node has it too" in made.report
    assert [n for n in made.graph["nodes"] if n in strange + twins] == strange + twins
    assert [link for link in made.graph["links"] if link in rows] == rows
    assert [made.graph[key] for key in ("groups", "extra", "config")] == [7, [1], None]


@pytest.mark.parametrize("empty", [{"nodes": [], "links": []}, {"nodes": []}, {"nodes": [{}], "links": [[1]]}])
def test_empty_workflows_are_workflows(empty: dict[str, Any]) -> None:
    made = migrate_graph(empty)
    assert made.graph == empty
    assert made.report == [
        "no nodes of ComfyUI_IPAdapter_plus, of packs for FLUX and SD3, or Power Lora Loaders of rgthree found"
    ]


@pytest.mark.parametrize("value", [None, [], [{}], 5, "x", {}, {"nodes": {}}, {"1": 2}, {"prompt": []}])
def test_other_values_are_no_workflow(value: Any) -> None:
    with pytest.raises(InvalidInputError, match="this is no workflow"):
        migrate_graph(value)


def test_a_graph_beyond_any_real_one_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="20,001 nodes"):
        migrate_graph({"nodes": [{}] * 20_001, "links": []})


def test_a_long_chain_is_followed_so_far_and_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each loader behind a row of reroutes, and each node that applies, would else walk the whole of it."""
    count, far = 300, 10
    walked: list[int] = []
    real = graph.Wires.first
    monkeypatch.setattr(graph.Wires, "first", lambda self, n, most: walked.append(0) or real(self, n, most))
    monkeypatch.setattr(graph, "FAR", far)
    monkeypatch.setattr(bases, "FAR", far)
    nodes: list[Any] = [node(0, "IPAdapterModelLoader", {}, [], ["a"])]
    nodes += [node(i, "Reroute", {"": ("*", i)}, [], []) for i in range(1, count)]
    for i in range(count, 2 * count):
        names = ("model",) if i % 2 else ("model", "ipadapter", "image")
        sockets = dict.fromkeys(names, ("*", i))
        nodes.append(
            node(i, "IPAdapterUnifiedLoader" if i % 2 else "IPAdapter", sockets, [], [] if i % 2 == 0 else ["PLUS"])
        )
    links = [[i, min(i, count) - 1, 0, i, 0, "MODEL"] for i in range(1, 2 * count)]
    migrate_graph({"nodes": nodes, "links": links})
    assert count < len(walked) <= 2 * count * (far + 1)


VALUES = st.sampled_from(
    [
        None,
        0,
        -1,
        1,
        5,
        2**60,
        1e300,
        1.5,
        True,
        "",
        "x",
        "5",
        "note-1",
        [],
        [[]],
        {},
        [1],
        "\ud800",
        float("nan"),
        [None, 0],
    ]
)


def places(value: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every part of a JSON value but itself."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way for key, part in parts for way in ((*before, key), *places(part, (*before, key)))]


def part_of(value: Any, way: tuple[Any, ...]) -> Any:
    for key in way:
        value = value[key]
    return value


SOUND: list[Callable[[], dict[str, Any]]] = [
    workflow, embeds_workflow, lambda: power_loras_workflow(INK, CAT), lambda: in_a_subgraph(workflow()), lambda: prompt_of(workflow())
]  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_damage_is_one_sentence_or_leaves_the_rest_alone(data: st.DataObject) -> None:
    """Parts dropped, doubled, or replaced by others and by odd values."""
    graph = data.draw(st.sampled_from(SOUND))()
    for _ in range(data.draw(st.integers(1, 4))):
        *way, key = data.draw(st.sampled_from(places(graph)))
        holder = part_of(graph, tuple(way))
        match data.draw(st.sampled_from(["drop", "double", "swap", "value"])):
            case "drop":
                del holder[key]
            case "double":
                holder[f"{key} again" if isinstance(holder, dict) else slice(key, key)] = (
                    copy.deepcopy(holder[key]) if isinstance(holder, dict) else [copy.deepcopy(holder[key])]
                )
            case "swap":
                holder[key] = copy.deepcopy(part_of(graph, data.draw(st.sampled_from(places(graph)))))
            case _:
                holder[key] = copy.deepcopy(data.draw(VALUES))
        if not places(graph):
            break
    before = json.dumps(graph)
    try:
        made = migrate_graph(graph, data.draw(st.sampled_from([None, "sd15", "sdxl"])))
    except AdapterError:
        return
    assert json.dumps(graph) == before
    if isinstance(graph.get("nodes"), list):
        assert len(made.graph["nodes"]) >= len(graph["nodes"])
        for was, now in zip(graph["nodes"], made.graph["nodes"], strict=False):
            if not isinstance(was, dict) or was.get("type") not in [*OLD_TYPES]:
                assert without_links(now) == without_links(was)
        assert {k: v for k, v in made.graph.items() if k not in CHANGING} == {
            k: v for k, v in json.loads(before).items() if k not in CHANGING
        } or "NaN" in before
    else:
        assert all(made.graph[k] == v for k, v in graph.items() if k in ("1", "3:1")) or "NaN" in before


CHANGING = ("nodes", "links", "definitions", "last_node_id", "last_link_id", "state", "prompt")


def without_links(raw: Any) -> str:
    """A node but for the numbers of links."""
    if not isinstance(raw, dict):
        return json.dumps(raw)
    sockets = {
        key: [{**s, "link": 0, "links": 0} if isinstance(s, dict) else s for s in raw[key]]
        for key in ("inputs", "outputs")
        if isinstance(raw.get(key), list)
    }
    return json.dumps({**raw, **sockets}, sort_keys=True)


# --- files ------------------------------------------------------------------------------------------------------------


def carriers(folder: Path, text: str) -> dict[str, Path]:
    """Files that carry a workflow, in the ways in which programs write them."""
    files: dict[str, Path] = {}
    for name, encoding in (("bom", "utf-8-sig"), ("utf16", "utf-16"), ("utf16be", "utf-16-be")):
        files[name] = folder / f"{name}.json"
        files[name].write_bytes(text.encode(encoding))
    picture = Image.new("RGB", (4, 4))
    for name in ("tEXt", "zTXt", "iTXt", "packed iTXt", "prompt"):
        info = PngInfo()
        if "iTXt" in name:
            info.add_itxt("workflow", text, zip=name != "iTXt")
        else:
            info.add_text("prompt", '{"3": 1}')
            info.add_text("Workflow" if name == "zTXt" else "workflow", text, zip=name == "zTXt")
        files[name] = folder / f"{name}.png"
        picture.save(files[name], pnginfo=info)
    exif = Image.Exif()
    exif[0x0110], exif[0x010F] = "prompt:{}", f"workflow:{text}"
    comment = Image.Exif()
    comment.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + json.dumps({"workflow": json.loads(text)}).encode("utf-16-be")
    for name, block in (("webp", exif), ("jpg", exif), ("comment.webp", comment), ("comment.jpg", comment)):
        files[name] = folder / f"a.{name}"
        picture.save(files[name], exif=block)
    header = json.dumps(
        {"__metadata__": {"workflow": text}, "a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}
    )
    files["latent"] = folder / "a.latent"
    files["latent"].write_bytes(len(header).to_bytes(8, "little") + header.encode())
    return files


def test_workflows_are_read_from_wherever_programs_put_them(tmp_path: Path) -> None:
    old = workflow()
    for name, file in carriers(tmp_path, json.dumps(old)).items():
        assert read_graph(file) == old, name


def test_a_picture_with_a_prompt_alone_has_that(tmp_path: Path) -> None:
    """ComfyUI wrote NaN into prompts."""
    info = PngInfo()
    info.add_text(
        "prompt",
        json.dumps(prompt_of(workflow()) | {"9": {"class_type": "A", "inputs": {}, "is_changed": [float("nan")]}}),
    )
    file = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(file, pnginfo=info)
    assert main(["migrate", str(file)]) == 0
    made = json.loads((tmp_path / "a.migrated.json").read_text())
    assert made["4"]["class_type"] == "ImagePromptApply"


def chunk(kind: bytes, content: bytes, length: int | None = None) -> bytes:
    return (len(content) if length is None else length).to_bytes(4, "big") + kind + content + bytes(4)


PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (PNG, "no workflow of ComfyUI"),
        (PNG + chunk(b"tEXt", b"parameters\0a cat"), "settings of another program"),
        (PNG + chunk(b"tEXt", b"workflow\0{"), "not valid JSON"),
        (PNG + chunk(b"tEXt", b"workflow\0{}", 2**31), "more than a workflow or this file can have"),
        (PNG + chunk(b"zTXt", b"workflow\0\0" + b"not packed"), "is damaged"),
        (PNG + chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(65 * 2**20))), "unpacks to over"),
        (b"RIFF\0\0\0\0WEBPEXIF\x10\0\0\0II*\0\x08\0\0\0\xff\xff\0\0", "no workflow of ComfyUI"),
        (b"\xff\xd8\xff\xe1\0\x10Exif\0\0MM\0*\xff\xff\xff\xff", "no workflow of ComfyUI"),
        (b"\xff\xff\xff\xff\0\0\0\0{\"a\": 1}", "more than a workflow or this file can have"),
        (b"\0\0\0\x18ftypmp42", "drop it onto ComfyUI"),
        (b"fLaC\0", "is a sound"),
        (b"", "is no JSON file"),
        (b"[" * 5000, "nested more than"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "a number of"),
        (b'{"nodes": "\xe9"}', "is not UTF-8"),
    ],
)  # fmt: skip
def test_a_file_without_a_workflow_is_one_sentence(tmp_path: Path, content: bytes, told: str) -> None:
    file = tmp_path / "a.file"
    file.write_bytes(content)
    with pytest.raises((InvalidInputError, CorruptFileError), match=told) as raised:
        read_graph(file)
    assert "\n" not in str(raised.value)


def test_a_pipe_is_no_workflow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "", "missing.json", "a\0b", "x" * 400):
        assert main(["migrate", str(tmp_path / name)]) == (2 if name == "missing.json" else 1)
        assert capsys.readouterr().err.count("\n") == 1


def test_the_workflow_itself_is_not_replaced_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "猫.json"
    file.write_text(json.dumps(workflow()))
    before = file.read_bytes()
    (tmp_path / "link.json").symlink_to(file)
    for out in (file, tmp_path / "link.json"):
        assert main(["migrate", str(file), "--out", str(out)]) == 1
        assert "is the workflow itself" in capsys.readouterr().err
    assert main(["migrate", str(file), "--out", str(tmp_path)]) == 1
    assert main(["migrate", str(file), "--out", str(tmp_path / "none" / "a.json")]) == 1
    assert file.read_bytes() == before
    assert main(["migrate", str(file), "--out", str(file), "--overwrite", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["found"], told["rewritten"]) == (2, 2)
    assert b"ImagePromptApply" in file.read_bytes()


def test_a_console_of_another_code_page_shows_what_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io
    import sys

    old = workflow()
    old["nodes"][0]["widgets_values"] = ["猫.safetensors"]
    file = tmp_path / "é猫.json"
    file.write_text(json.dumps(old))
    screen = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(screen, encoding="cp1252", errors="strict"))
    assert main(["migrate", str(file)]) == 0
    sys.stdout.flush()
    assert b"\\u732b" in screen.getvalue()


TEMPLATES = sorted(
    file
    for root in (Path.home() / "comfy", *map(Path, filter(None, os.environ.get("COMFYUI_PATH", "").split(":"))))
    for file in root.glob("**/site-packages/comfyui_workflow_templates*/**/*.json")
)
SHIPPED = sorted((Path(__file__).parents[2] / "workflows").glob("*.json"))


@pytest.mark.parametrize("files", [SHIPPED, TEMPLATES], ids=["ours", "ComfyUI's templates"])
def test_every_workflow_at_hand_goes_through_as_it_was(files: list[Path]) -> None:
    """They hold no nodes of the old pack, so nothing may change. The templates' package is where a ComfyUI is."""
    through = 0
    for file in files:
        graph = read_graph(file)
        if not isinstance(graph, dict) or "nodes" not in graph:
            continue  # an index
        made = migrate_graph(graph)
        assert made.rewritten == 0
        assert made.graph == graph, file.name
        through += 1
    assert through == len(files) or len(files) > 30
    print(f"{through} of {len(files)} files are workflows")
