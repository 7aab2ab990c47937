"""The tables that rewrite old graphs, against what ComfyUI says of the nodes (tests/host/object_info.py keeps that fresh)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args

import pytest

from ipadapter_core.attention.presets import PRESETS
from ipadapter_core.checkpoints import trainable_families
from ipadapter_core.legacy.migrate import REPLACEMENTS
from ipadapter_core.legacy.migrate.apply import steering_widgets
from ipadapter_core.legacy.migrate.graph import Migration, Wires
from ipadapter_core.legacy.migrate.names import (
    DEFAULTS,
    EMBED_SOCKETS,
    EMBEDS,
    NEW_NAMES,
    OPTIONS,
    OUR_NODES,
    SETTINGS,
    SOCKETS,
    STAYING,
    TEXTS,
    WIDGETS,
)
from ipadapter_core.lora.algorithms import trainings
from ipadapter_core.lora.convert import KEY_FORMATS
from ipadapter_core.prompt.combine import Combine
from workflows.graph import widget_names

INFO: dict[str, Any] = json.loads(Path(__file__).with_name("object_info.json").read_text(encoding="utf-8"))


def inputs(kind: str) -> dict[str, list[Any]]:
    return {**INFO[kind]["input"].get("required", {}), **INFO[kind]["input"].get("optional", {})}


def widgets(kind: str) -> list[str]:
    return [name for name in widget_names(INFO[kind]) if name is not None]


def sockets(kind: str) -> dict[str, str]:
    return {name: entry[0] for name, entry in inputs(kind).items() if name not in widgets(kind)}


def outputs(kind: str) -> dict[str, str]:
    return dict(zip(INFO[kind]["output_name"], INFO[kind]["output"], strict=True))


@pytest.mark.parametrize("kind", OUR_NODES)
def test_our_nodes_are_as_the_table_says(kind: str) -> None:
    """Widgets in their order, by which saved graphs give them, and with no other behind them; every socket and output."""
    ours = OUR_NODES[kind]
    assert list(ours.widgets) == widgets(kind)
    assert list(ours.inputs.items()) == list(sockets(kind).items())
    assert list(ours.outputs.items()) == list(outputs(kind).items())


def test_a_node_is_made_with_all_its_widgets_and_no_others() -> None:
    made = Migration({}, Wires(), iter(range(1, 9)).__next__, lambda number: ("sd15", ""))
    number = made.add("ImagePromptNoise", (0, 0), blur=3, kind="fade", strength=0.5)
    assert made.nodes[number].widgets == ("fade", 0.5, 3)
    with pytest.raises(ValueError, match="ImagePromptNoise has the widgets kind, strength, blur"):
        made.add("ImagePromptNoise", (0, 0), kind="fade", strength=0.5)
    with pytest.raises(ValueError, match="values were given for strength, colour"):
        made.become(number, "ImagePromptApplyFaceLoRA", strength=1.0, colour=2)


@pytest.mark.parametrize("kind", SETTINGS)
def test_old_nodes_have_their_widgets_in_the_tables_order(kind: str) -> None:
    """The old pack's own come first; behind them stand ours, and those that no graph of the rewritten kind has."""
    ours = {"compatibility", "encode_batch_size"}
    first = {"noise", *(f"weight_{i}" for i in range(1, 5))} if kind == "IPAdapterEncoder" else set[str]()
    found = widgets(kind)
    assert found[: len(SETTINGS[kind])] == list(SETTINGS[kind])
    assert set(found[len(SETTINGS[kind]) :]) <= ours | first
    assert set(DEFAULTS.get(kind, {})) <= {*SETTINGS[kind], "model_name"}


def test_every_old_name_is_a_node() -> None:
    assert {*SETTINGS, *STAYING} == {name for name in INFO if not name.startswith("ImagePrompt")} - {"CLIPVisionLoader"}


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_options_of_old_widgets_are_those_that_the_nodes_offer(kind: str) -> None:
    for name in SETTINGS[kind]:
        offered = inputs(kind)[name][1].get("options")
        if name in OPTIONS:
            assert set(offered) <= set(OPTIONS[name](kind)), name
        else:
            assert offered is None or name in TEXTS, f"{name} has options that no table knows"


@pytest.mark.parametrize("kind", [*WIDGETS, *EMBEDS])
def test_old_sockets_are_those_that_the_tables_name(kind: str) -> None:
    named = EMBEDS.get(kind, SOCKETS - {"clip_vision", "image_negative"} if kind == "IPAdapter" else SOCKETS)
    assert named <= {*sockets(kind)}
    carried = {name for name, value in sockets(kind).items() if value == "EMBEDS"}
    assert carried == {*sockets(kind)} & EMBED_SOCKETS


def test_what_becomes_of_an_old_input_is_an_input_of_ours() -> None:
    ours = {name for kind in OUR_NODES for name in inputs(kind)}
    assert set(NEW_NAMES.values()) <= ours
    assert set(NEW_NAMES) <= {name for kind in SETTINGS for name in inputs(kind)}
    assert set(steering_widgets({}, "linear")) < set(widgets("ImagePromptApply"))


@pytest.mark.parametrize("entry", REPLACEMENTS, ids=lambda entry: entry.old)
def test_one_node_stands_for_an_old_one(entry: Any) -> None:
    """Every name is one of the old or of our node, every required input is filled, outputs have the types of the old."""
    assert widgets(entry.old)[: len(entry.widgets)] == list(entry.widgets)
    given = {*entry.inputs, *entry.values}
    assert given <= {*inputs(entry.new)}
    assert set(entry.inputs.values()) <= {*inputs(entry.old)}
    required: Mapping[str, Any] = INFO[entry.new]["input"]["required"]
    assert set(required) <= given
    for name, value in entry.values.items():
        assert value in inputs(entry.new)[name][1].get("options", (True, False, "buffalo_l", "antelopev2"))
    assert len(INFO[entry.old]["output"]) >= entry.outputs
    same = {"IPADAPTER": "IMAGE_PROMPT_ADAPTER", "INSIGHTFACE": "IMAGE_PROMPT_FACE_MODEL"}
    old = [same.get(kind, kind) for kind in INFO[entry.old]["output"][: entry.outputs]]
    assert old == INFO[entry.new]["output"][: entry.outputs]


@pytest.mark.parametrize(
    ("widget", "kinds", "options"),
    [
        ("preset", ("ImagePromptApply", "ImagePromptApplyImage", "ImagePromptApplyTiled"), PRESETS),
        ("combine", ("ImagePromptApplyImage", "ImagePromptCombine", "ImagePromptEncode"), get_args(Combine)),
        ("family", ("ImagePromptTrain",), trainable_families()),
        ("algorithm", ("ImagePromptTrainLoRA",), trainings()),
        ("spelling", ("ImagePromptLoRASave", "ImagePromptLoRAExtract"), KEY_FORMATS),
    ],
)
def test_the_stored_choices_are_the_cores(widget: str, kinds: tuple[str, ...], options: Iterable[str]) -> None:
    for kind in kinds:
        assert inputs(kind)[widget][1]["options"] == list(options), (
            f"{widget} of {kind} offers other choices than tests/core/object_info.json says; run `python tests/host/object_info.py`"
        )
