"""Encode Face Prompt."""

from __future__ import annotations

from typing import Literal, get_args

from comfy_api.latest import io
from torch import Tensor

from ..ipadapter_core import EncodeOptions, rules_for
from ..ipadapter_core.images.faces import FaceAnalyzer, Nth, Which
from ..ipadapter_core.prompt.combine import Combine
from . import host
from .host.schema import advanced, schema
from .sockets import CATEGORY, FaceModel, Prompt, adapter_input, combine_input, compatibility_input

Choice = Literal["largest", "best", "all", "nth largest", "nth from left"]


class EncodeFacePrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ImagePromptEncodeFace",
            display_name="Encode Face Prompt",
            category=CATEGORY,
            search_aliases=[
                "faceid",
                "face id",
                "faceid for ipadapter",
                "instantid",
                "portrait",
                "identity",
                "same person",
                "character",
                "likeness",
                "face swap",
            ],
            description="Turns faces in reference images into an image prompt for a FaceID adapter.",
            inputs=[
                adapter_input(),
                FaceModel.Input("face_model", tooltip="From Load Face Model."),
                io.Image.Input("image", tooltip="One or more pictures with a clear face and some room around it."),
                io.Combo.Input(
                    "face",
                    options=list(get_args(Choice)),
                    tooltip="Which face of every picture: the largest, the best detection, all of them (as several references), or "
                    "the one with the number below.",
                ),
                advanced(
                    io.Int.Input(
                        "number",
                        default=1,
                        min=1,
                        max=64,
                        tooltip="For 'nth largest' and 'nth from left': 1 is the first.",
                    )
                ),
                combine_input(),
                io.Float.Input(
                    "picture_strength",
                    default=1.0,
                    min=-1.0,
                    max=5.0,
                    step=0.05,
                    tooltip="FaceID Plus v2: how much it reads in the picture of the face beside who it is; less frees pose and "
                    "style. Others ignore it.",
                ),
                advanced(
                    io.Boolean.Input(
                        "per_latent",
                        default=False,
                        tooltip="On: face i steers image i of the latent batch. Off: all faces steer every image.",
                    )
                ),
                io.ClipVision.Input(
                    "clip_vision",
                    optional=True,
                    tooltip="The image encoder; only FaceID Plus needs it. Inspect Adapter names it.",
                ),
                io.Mask.Input(
                    "mask",
                    optional=True,
                    tooltip="Only faces whose centre lies inside (white) count. Several masks on one picture choose one face each.",
                ),
                io.Image.Input(
                    "negative",
                    optional=True,
                    tooltip="A picture to steer away from: FaceID Plus from how it looks, other FaceID adapters from the face in it.",
                ),
                compatibility_input(),
            ],
            outputs=[Prompt.Output(display_name="image_prompt"), io.Image.Output(display_name="faces")],
        )

    @classmethod
    def execute(
        cls,
        adapter: host.adapters.ManagedAdapter,
        face_model: FaceAnalyzer,
        image: Tensor,
        face: Choice,
        number: int,
        combine: Combine,
        picture_strength: float,
        per_latent: bool,
        clip_vision: object | None = None,
        mask: Tensor | None = None,
        negative: Tensor | None = None,
        compatibility: str = "correct",
    ) -> io.NodeOutput:
        which: Which
        match face:
            case "nth largest":
                which = Nth(number, "size")
            case "nth from left":
                which = Nth(number, "left")
            case _:
                which = face
        options = EncodeOptions(
            which=which,
            combine=combine,
            per_latent=per_latent,
            face_scale=picture_strength,
            rules=rules_for(compatibility),
        )
        prompt, found = host.adapters.encode_face(
            adapter, face_model, clip_vision, image, options, mask=mask, negative=negative
        )
        return io.NodeOutput(prompt, found.crops)
