"""Inspect Adapter."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..ipadapter_core import describe_fit, describe_spec
from ..ipadapter_core.backends.comfy.doors import applied_patches, comfy_layout
from ..ipadapter_core.backends.comfy.notes import PatcherLike
from . import host
from .host.schema import schema
from .sockets import CATEGORY, adapter_input


class InspectAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ImagePromptInspect",
            display_name="Inspect Adapter",
            category=CATEGORY,
            search_aliases=[
                "adapter facts",
                "what is this file",
                "weights",
                "layers",
                "inspect ipadapter",
            ],
            description="Shows what an adapter file is, which image encoder and base model it needs, and which sites of a model "
            "it reaches with which weight.",
            inputs=[
                adapter_input(),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="A model, before or after Apply Adapter to Model: lists its sites and weights.",
                ),
            ],
            outputs=[io.String.Output(display_name="text")],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, adapter: host.adapters.ManagedAdapter, model: PatcherLike | None = None) -> io.NodeOutput:
        text = describe_spec(adapter.weights.spec, adapter.weights.name)
        if model is not None:
            text += "\n\n" + describe_fit(adapter.weights, comfy_layout(model), applied_patches(model))
        host.frontend.show_in_node(text, cls.hidden.unique_id)
        return io.NodeOutput(text, ui=ui.PreviewText(text))
