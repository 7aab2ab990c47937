"""Record Image Attention."""

from __future__ import annotations

from comfy_api.latest import io

from . import host
from .host.schema import schema
from .sockets import CATEGORY, Recording


class RecordAttention(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ImagePromptRecord",
            display_name="Record Image Attention",
            category=CATEGORY,
            search_aliases=[
                "attention map",
                "heat map",
                "where did the image act",
                "debug ipadapter",
                "saliency",
                "heatmap",
                "attention heatmap",
            ],
            description="Records, while a sampler runs, how much every place of the picture takes from each reference. Connect the model "
            "to the sampler and the recording to Show Image Attention. The picture stays the same to the bit; sampling takes a little longer.",
            inputs=[
                io.Model.Input("model", tooltip="The model that the sampler gets, with its image prompts."),
                io.Int.Input(
                    "stages",
                    default=3,
                    min=1,
                    max=20,
                    tooltip="Parts of the sampling progress that get a map of their own, besides the map of the whole run: 3 are 0 to 33 %, "
                    "33 to 67 % and 67 to 100 %, in the unit of start and end.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model"), Recording.Output(display_name="recording")],
        )

    @classmethod
    def execute(cls, model: object, stages: int) -> io.NodeOutput:
        return io.NodeOutput(*host.recording.record(model, stages))
