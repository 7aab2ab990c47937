"""Workflows rewritten with our nodes: links, places and titles kept, and said what could not be."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from ipadapter_core.cli import main
from ipadapter_core.errors import InvalidInputError
from ipadapter_core.migrate import REPLACEMENTS, migrate, replace_in_prompt

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
    assert (nodes["ImagePromptApplyFaceLoRA"], nodes["ImagePromptLoadFaceModel"]) == ([0.6], ["buffalo_l", "CUDA"])
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
    assert nodes["ImagePromptSchedule"] == ["0: 1, 1: 1", "", True, 1.0, boost]
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
