"""Load Face Model."""

from __future__ import annotations

from comfy_api.latest import io

from ..ipadapter_core.images.faces import PROVIDERS
from . import host
from .host.schema import schema
from .sockets import CATEGORY, FaceModel


class LoadFaceModel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ImagePromptLoadFaceModel",
            display_name="Load Face Model",
            category=CATEGORY,
            search_aliases=[
                "insightface",
                "antelopev2",
                "buffalo",
                "faceid",
                "face id",
                "face analysis",
                "insightface loader of ipadapter",
            ],
            description="Loads what finds and recognises faces, from models/insightface/models. Needs the package onnxruntime; "
            "insightface is used where it is installed.",
            inputs=[
                io.Combo.Input(
                    "pack",
                    options=list(host.faces.PACKS),
                    tooltip="The face model that the adapter was trained with: buffalo_l for FaceID, antelopev2 for Kolors FaceID "
                    "and InstantID.",
                ),
                io.Combo.Input(
                    "provider",
                    options=list(PROVIDERS),
                    tooltip="Where onnxruntime runs it; falls back to the CPU, which is fast enough.",
                ),
            ],
            outputs=[FaceModel.Output(display_name="face_model")],
        )

    @classmethod
    def execute(cls, pack: str, provider: str) -> io.NodeOutput:
        return io.NodeOutput(host.faces.load(pack, provider))
