"""rgthree's Power Lora Loader, rewritten as LoRA Rows.

In saved graphs each of its rows is an entry of ``widgets_values`` among those of headings and buttons, in prompts an input
``LORA_1``, ``lora_2``, …: a table ``{on, lora, strength, strengthTwo}`` where strengthTwo, on the text encoders, is missing
or null where it is the same (rgthree-comfy, py/power_lora_loader.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from ...errors import quoted
from .graph import Json, Migration, Node, NodeId, fed_besides, is_table, label, number_in
from .names import POWER_LORAS

STRONGEST = 20.0
"""Most strength that a row of ours has."""
MOST_ROWS = 200
"""That LoRA Rows reads."""
NOTHING = ("", "None", "none", None)
"""What the file of a row stands at before one is chosen."""


def power_loras_obstacle(made: Migration, number: NodeId) -> str:
    """Why a Power Lora Loader stays as it is; empty if it need not."""
    if made.uses(number, 2):
        return "its list of names feeds another node, and LoRA Rows gives trigger words there"
    return fed_besides(made, number, ("model", "clip")) or _rows(made.nodes[number])[1]


def power_loras(made: Migration, number: NodeId) -> None:
    """Make a Power Lora Loader LoRA Rows, which applies as much of a file as fits too."""
    rows, _ = _rows(made.nodes[number])
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    text = f"[\n{lines}\n]" if rows else "[]"
    made.become(number, "ImagePromptLoRARows", rows=text, mode="auto", partial="allow")
    made.report.append(f"{POWER_LORAS} (node {label(number)}) is LoRA Rows")


def _rows(node: Node) -> tuple[list[Json], str]:
    """Its rows in our words, and what is wrong with one, if anything is."""
    values = node.widgets.values() if isinstance(node.widgets, Mapping) else node.widgets
    rows: list[Json] = []
    for value in values:
        if not is_table(value) or value.get("lora") in NOTHING:
            continue
        at = f"its row {len(rows) + 1}"
        file, on, on_text = value["lora"], value.get("on", True), value.get("strengthTwo")
        strength = number_in(value.get("strength", 1.0))
        text_strength = None if on_text is None else number_in(on_text)
        if not isinstance(file, str) or not isinstance(on, bool):
            return [], f"{at} has lora: {quoted(file)} and on: {quoted(on)}, which are no name and no switch"
        if strength is None or (on_text is not None and text_strength is None):
            return [], f"{at} has a strength that is no number"
        if max(abs(strength), abs(text_strength or 0.0)) > STRONGEST:
            return [], f"{at} is stronger than {STRONGEST:g}"
        rows.append({"on": on, "file": file, "strength": strength})
        rows[-1] |= {} if text_strength is None else {"text_strength": text_strength}
    return rows, f"it has more than {MOST_ROWS} rows" if len(rows) > MOST_ROWS else ""
