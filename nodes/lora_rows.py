"""LoRA Rows."""

from __future__ import annotations

from typing import Literal

from comfy_api.latest import io

from ..ipadapter_core.errors import AdapterError
from ..ipadapter_core.lora import Partial, parse_where
from ..ipadapter_core.lora.inspection import trigger_words
from ..ipadapter_core.lora.patch import MODES, Mode
from ..ipadapter_core.lora.rows import EXAMPLE, parse_rows, parse_stack, stack_of
from . import host
from .host.schema import advanced, schema
from .sockets import LORA_CATEGORY, MODE_TOOLTIP, LoRAList, partial_input


class LoRARows(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ImagePromptLoRARows",
            display_name="LoRA Rows",
            category=LORA_CATEGORY,
            search_aliases=[
                "power lora",
                "power lora loader",
                "lora loader",
                "multi lora",
                "several loras",
                "lora stack",
                "lora stacker",
                "lora block weight",
                "trigger words",
                "lora by block",
                "lora by layer",
                "loras",
            ],
            description="Any number of LoRAs, a row each: switched, searched by name, weighted by dragging, by block where wanted; ⓘ "
            "tells base model, trigger words and where it acts.",
            inputs=[
                io.Model.Input(
                    "model", optional=True, tooltip="The model that they act on; none where only the stack is wanted."
                ),
                io.Clip.Input("clip", optional=True, tooltip="The text encoders that they act on."),
                LoRAList.Input(
                    "lora_stack",
                    optional=True,
                    tooltip="LoRAs before these rows, as LoRA stackers of other packs give them.",
                ),
                io.String.Input(
                    "rows",
                    default="[]",
                    multiline=True,
                    tooltip=f"The rows as a JSON list: {EXAMPLE}; also text_strength (on the text encoders; the same where left "
                    "out), selector (as in LoRA Strength) and on (true or false). The editor draws it as rows.",
                ),
                advanced(io.Combo.Input("mode", options=list(MODES), tooltip=MODE_TOOLTIP)),
                partial_input(),
            ],
            outputs=[
                io.Model.Output(display_name="model"),
                io.Clip.Output(display_name="clip"),
                LoRAList.Output(
                    display_name="lora_stack",
                    tooltip="All that are on, for LoRA stackers and loaders of other packs; selectors have no place in it. What is applied "
                    "from it once more acts twice.",
                ),
                io.String.Output(display_name="trigger_words", tooltip="Of all that are on, with commas between them."),
                io.String.Output(display_name="report"),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, rows: str | None = None) -> Literal[True] | str:
        try:
            parse_rows(rows or "")  # None where it comes through a link
        except AdapterError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, rows: str | None = None, **inputs: object) -> str:
        return host.files.fingerprint(
            "loras", *(host.files.named("loras", row.file) for row in parse_rows(rows or "") if row.acts)
        )

    @classmethod
    def execute(
        cls,
        rows: str,
        mode: Mode,
        model: object | None = None,
        clip: object | None = None,
        lora_stack: object | None = None,
        partial: Partial = "refuse",
    ) -> io.NodeOutput:
        acting = [row for row in (*parse_stack(lora_stack or ()), *parse_rows(rows)) if row.acts]
        words: dict[str, None] = {}
        reports: list[str] = []
        shown: list[str] = []
        for row in acting:
            loaded = host.lora.load(host.files.named("loras", row.file))
            words |= dict.fromkeys(trigger_words(loaded.weights.metadata))
            strength, text_strength = row.strengths
            selector = parse_where(row.selector, loaded.weights.base_model)
            if model is not None or clip is not None:
                model, clip, report, part = host.lora.apply(
                    model,
                    clip,
                    loaded,
                    mode,
                    partial,
                    strength=strength,
                    text_strength=text_strength,
                    selector=selector,
                )
                reports.append(report)
                shown.append(part)
        host.frontend.show_in_node("\n".join(shown), cls.hidden.unique_id)
        report = "\n".join(reports) or ("no row is on" if not acting else "nothing to apply them to is connected")
        return io.NodeOutput(model, clip, stack_of(acting), ", ".join(words), report)
