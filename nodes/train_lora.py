"""Train LoRA."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..ipadapter_core.lora import parse_selector
from ..ipadapter_core.lora.algorithms import trainings
from . import host
from .host.schema import advanced
from .sockets import LORA_CATEGORY
from .train_ip_adapter import FRESH, train, training_schema


class TrainLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return training_schema(
            node_id="ImagePromptTrainLoRA",
            display_name="Train LoRA",
            category=LORA_CATEGORY,
            search_aliases=[
                "training",
                "lora trainer",
                "fine-tune",
                "finetune",
                "kohya",
                "dreambooth",
                "learn a style",
                "ai-toolkit",
                "train a lora",
            ],
            description="Trains a LoRA on pictures with captions, in a process of its own. Cancelling saves its state; queueing it "
            "again goes on from there. The result lies in output/loras, where LoRA lists find it.",
            name="my-lora",
            samples="Text of the sample sheets; empty: the captions of held-out pictures.",
            result=io.String.Output(display_name="path"),
            inputs=[
                io.Combo.Input(
                    "algorithm",
                    options=list(trainings()),
                    tooltip=" ".join(f"{name}: {t.summary}." for name, (_, t) in trainings().items() if t.summary),
                ),
                io.Int.Input(
                    "rank",
                    default=16,
                    min=1,
                    max=1024,
                    tooltip="Inner width, 1 or more; the file grows with it, 4 to 64 are usual.",
                ),
                advanced(
                    io.Float.Input(
                        "alpha",
                        default=0.0,
                        min=0.0,
                        max=1024.0,
                        step=0.5,
                        tooltip="The scale is alpha / rank; 0: as the rank.",
                    )
                ),
                advanced(
                    io.String.Input(
                        "targets",
                        default="",
                        multiline=True,
                        tooltip="Which layers are trained, in the words of LoRA Strength: 'all: 0, attn2: 1, mid: 1'. Empty: as the algorithm "
                        "says.",
                    )
                ),
                advanced(
                    io.Boolean.Input(
                        "text_encoders",
                        default=False,
                        tooltip="On: train attention layers of the text encoders too, SDXL's both.",
                    )
                ),
                advanced(
                    io.Combo.Input(
                        "start_from",
                        options=[FRESH, *host.files.names("loras")],
                        tooltip="A LoRA to train on; it says layers, ranks and algorithms itself.",
                    )
                ),
                advanced(
                    io.String.Input(
                        "trigger",
                        default="",
                        tooltip="Trigger words to note in the file; write them into the captions too.",
                    )
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, targets: str | None = None) -> bool | str:
        return host.inputs.valid((parse_selector, targets))

    @classmethod
    def execute(
        cls,
        name: str,
        algorithm: str,
        rank: int,
        alpha: float,
        targets: str,
        text_encoders: bool,
        start_from: str,
        trigger: str,
        **run: Any,
    ) -> io.NodeOutput:
        lora = {
            "algorithm": algorithm, "rank": rank, "alpha": alpha, "targets": targets, "text_encoders": text_encoders,
            "start_from": "" if start_from == FRESH else host.files.path("loras", start_from),
        }  # fmt: skip
        sections = {"lora": lora, "output": {"trigger": trigger}}
        _, path, *pictures = train("loras", name, sections, cls.hidden.unique_id, **run)
        return io.NodeOutput(str(path), *pictures)
