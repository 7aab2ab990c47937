"""Train IP-Adapter, and what all training nodes share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from comfy_api.latest import io
from torch import Tensor

from . import host
from .host.schema import advanced, schema
from .sockets import CATEGORY, Adapter

FRESH = "nothing"


def training_schema(*, name: str, inputs: list[io.Input], samples: str, result: io.Output, **texts: Any) -> io.Schema:
    """The schema of a training node. ``name`` is the result's at first, ``samples`` explains the prompt of the sheets."""
    pictures = [io.Image.Output(display_name="loss_plot"), io.Image.Output(display_name="samples")]
    return schema(
        **texts,
        is_output_node=True,
        hidden=[io.Hidden.unique_id],
        inputs=[*name_inputs(name), *inputs, *run_inputs(samples)],
        outputs=[result, *pictures],
    )


def name_inputs(default: str) -> list[io.Input]:
    """The first inputs of every training node."""
    return [
        io.String.Input(
            "name",
            default=default,
            tooltip="File name of the result, and of the run that a later queueing of this node goes on with.",
        ),
        io.Combo.Input(
            "base_model",
            options=list(host.training.base_models()) or [host.files.none_yet("checkpoints")],
            tooltip="An SD1.5 or SDXL checkpoint, or a diffusers folder of an SD1.5, SD2 or SDXL model in models/diffusers.",
        ),
    ]


def run_inputs(samples: str) -> list[io.Input]:
    """The last inputs of every training node, which ``train`` reads."""
    return [
        io.String.Input(
            "pictures",
            default="",
            tooltip="Folder of pictures with .txt captions, a .json list or .tar shards, inside ComfyUI's input folder; behind "
            "other folders that its owner allows (SECURITY.md), as a whole path. Empty: the images input.",
        ),
        io.String.Input(
            "captions",
            default="",
            multiline=True,
            tooltip="For the images input: one line per image, or one line for all of them.",
        ),
        io.Int.Input("steps", default=1000, min=1, max=1_000_000, tooltip="Training steps in all, 1 or more."),
        io.Int.Input(
            "batch",
            default=4,
            min=1,
            max=256,
            tooltip="Pictures per step, 1 or more; the memory needed grows with it.",
        ),
        io.Int.Input(
            "resolution",
            default=512,
            min=64,
            max=2048,
            step=64,
            tooltip="Side of the training pictures in pixels.",
        ),
        io.Float.Input(
            "learning_rate",
            default=1e-4,
            min=1e-8,
            max=1.0,
            step=1e-6,
            round=False,
            tooltip="Step size of the optimiser; 0.0001 at 512 pixels, less at 1024 or when training on.",
        ),
        advanced(
            io.Combo.Input(
                "precision",
                options=host.training.PRECISIONS,
                tooltip="What the frozen models compute in; what is trained is always kept in fp32.",
            )
        ),
        advanced(
            io.Int.Input(
                "sample_every",
                default=250,
                min=1,
                max=1_000_000,
                tooltip="Steps between sample sheets and validations.",
            )
        ),
        io.String.Input(
            "sample_prompt",
            default="",
            tooltip=samples,
        ),
        advanced(
            io.Int.Input(
                "seed", default=0, min=0, max=2**31, tooltip="Of all random choices of the training, 0 or more."
            )
        ),
        advanced(
            io.String.Input(
                "settings",
                default="",
                multiline=True,
                tooltip="Other settings of how ipadapter train learns, one per line, such as loss.min_snr=5 or train.checkpointing=true.",
            )
        ),
        advanced(
            io.Boolean.Input(
                "start_over",
                default=False,
                tooltip="On: set aside what an earlier run of this name had learned, as <name>.earlier-1, and begin anew. Off: go on "
                "with it.",
            )
        ),
        io.Image.Input("images", optional=True, tooltip="Training pictures from the graph, if no folder is given."),
    ]


class TrainIPAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return training_schema(
            node_id="ImagePromptTrain",
            display_name="Train IP-Adapter",
            category=CATEGORY,
            search_aliases=[
                "train ipadapter",
                "training",
                "fine-tune",
                "finetune",
                "kohya",
                "learn",
                "train an adapter",
            ],
            description="Trains an IP-Adapter on pictures with captions, in a process of its own. Cancelling saves its state; "
            "queueing it again goes on from there. The result lies in output/ipadapter and can be loaded at once.",
            name="my-adapter",
            samples="Text of the sample sheets; empty shows what the image alone does.",
            result=Adapter.Output(display_name="adapter"),
            inputs=[
                io.Combo.Input(
                    "image_encoder",
                    options=[host.training.INSIDE, *host.training.image_encoders()],
                    tooltip="The CLIP vision model that the adapter will read, such as CLIP-ViT-H-14-laion2B-s32B-b79K: a file or a "
                    "transformers folder in models/clip_vision.",
                ),
                io.Combo.Input(
                    "family",
                    options=list(host.training.FAMILIES),
                    tooltip=" ".join(f"{family}: {summary}." for family, summary in host.training.FAMILIES.items()),
                ),
                io.Combo.Input(
                    "start_from",
                    options=[FRESH, *host.files.names("ipadapter")],
                    tooltip="An adapter to train on. With few pictures this works far better than starting from nothing.",
                ),
            ],
        )

    @classmethod
    def execute(
        cls,
        name: str,
        base_model: str,
        image_encoder: str,
        family: str,
        start_from: str,
        **run: Any,
    ) -> io.NodeOutput:
        encoder = host.training.image_encoder_setting(image_encoder, base_model)
        adapter = {"family": family}
        if start_from != FRESH:
            adapter["start_from"] = host.files.path("ipadapter", start_from)
        sections = {"model": {"image_encoder": encoder}, "adapter": adapter}
        file, _, *pictures = train("ipadapter", name, sections, cls.hidden.unique_id, base_model=base_model, **run)
        return io.NodeOutput(host.adapters.load(file), *pictures)


def train(
    kind: host.files.Kind,
    name: str,
    sections: Mapping[str, Mapping[str, Any]],
    node_id: str,
    *,
    base_model: str,
    settings: str,
    start_over: bool,
    **run: Any,
) -> tuple[str, Path, Tensor, Tensor]:
    """Train what the sections of a config say, besides those that every node fills; the result lies in output/<kind>.

    Returns its name and path, the loss plot and the last sample sheet.
    """
    folder = host.training.open_folder(name, kind, start_over=start_over)
    values = run_values(name, folder, **run)
    for section, entries in sections.items():
        values[section] = {**values.get(section, {}), **entries}
    file, path = host.training.run(values, settings, name, kind, base_model, node_id)
    return (file, path, *host.training.result_pictures(folder))


def run_values(
    name: str,
    folder: Path,
    *,
    pictures: str,
    captions: str,
    steps: int,
    batch: int,
    resolution: int,
    learning_rate: float,
    precision: str,
    sample_every: int,
    sample_prompt: str,
    seed: int,
    images: Tensor | None = None,
) -> dict[str, dict[str, object]]:
    """The sections of a training's config that every training node fills."""
    source = host.training.make_data_section(pictures, images, captions, folder / "pictures")
    return {
        "model": {},
        "data": {**source, "resolution": resolution, "cache": str(folder / "cache")},
        "train": {"steps": steps, "batch": batch, "lr": learning_rate, "precision": precision, "seed": seed},
        "watch": {"validate_every": sample_every, "sample_every": sample_every, "sample_prompts": [sample_prompt]},
        "output": {
            "folder": str(folder), "name": name, "save_every": 0, "state_every": max(sample_every, math.ceil(steps / 20)),
        },
    }  # fmt: skip
