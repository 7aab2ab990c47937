"""Adapter Schedule."""

from __future__ import annotations

from comfy_api.latest import io

from ..ipadapter_core import WeightSchedule, parse_curve, parse_site_factors
from ..ipadapter_core.attention.presets import check_site_factors
from ..ipadapter_core.attention.schedule import drawn_curve
from . import host
from .host.schema import advanced, schema
from .sockets import CATEGORY, DrawnCurve, Schedule


class AdapterSchedule(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ImagePromptSchedule",
            display_name="Adapter Schedule",
            category=CATEGORY,
            search_aliases=[
                "weights of ipadapter",
                "weights",
                "weight schedule",
                "strength over time",
                "curve",
                "block weight",
                "layer weights",
                "fade",
                "mad scientist of ipadapter",
                "composition",
                "strength over steps",
            ],
            description="Finer control for Apply Adapter to Model: strength over the steps and per place in the model.",
            inputs=[
                io.String.Input(
                    "curve",
                    default="0: 1, 1: 1",
                    multiline=True,
                    tooltip="Strength factor over the sampling progress as 'progress: factor' points, linear in between. "
                    "'0: 1, 0.5: 0.3, 1: 0' fades out. Empty: constant.",
                ),
                io.String.Input(
                    "sites",
                    default="",
                    multiline=True,
                    tooltip="Factor per place, later entries win: 'all: 0.2, output: 1', 'input 4: 0', 'input 4.1: 0', "
                    "'style: 1.2', 'composition: 0', 't3: 0' (the index of weight presets). Inspect Adapter lists them.",
                ),
                advanced(
                    io.Boolean.Input(
                        "separate_composition",
                        default=False,
                        tooltip="On: the presets with composition use composition_strength there, the precise ones boost. "
                        "Off: both follow the strength.",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "composition_strength",
                        default=1.0,
                        min=-5.0,
                        max=5.0,
                        step=0.05,
                        tooltip="Strength of the composition layers in 'style and composition'.",
                    )
                ),
                advanced(
                    io.Float.Input(
                        "boost",
                        default=1.0,
                        min=-5.0,
                        max=5.0,
                        step=0.05,
                        tooltip="How strongly the precise presets push the other part towards the negative prompt.",
                    )
                ),
                DrawnCurve.Input(
                    "drawn",
                    optional=True,
                    tooltip="A curve that another node draws, in place of the text: ComfyUI's Curve Editor, or numbers spread evenly over "
                    "the steps, such as the floats of KJNodes' Spline Editor.",
                ),
                advanced(
                    io.Float.Input(
                        "top",
                        default=1.0,
                        min=-20.0,
                        max=20.0,
                        step=0.05,
                        optional=True,
                        tooltip="The factor that 1 means in the drawn curve.",
                    )
                ),
            ],
            outputs=[Schedule.Output(display_name="schedule")],
        )

    @classmethod
    def validate_inputs(cls, curve: str | None = None, sites: str | None = None) -> bool | str:
        return host.inputs.valid((parse_curve, curve), (check_site_factors, sites))

    @classmethod
    def execute(
        cls,
        curve: str,
        sites: str,
        separate_composition: bool,
        composition_strength: float,
        boost: float,
        drawn: object | None = None,
        top: float = 1.0,
    ) -> io.NodeOutput:
        points = parse_curve(curve) if drawn is None else drawn_curve(drawn, top)
        return io.NodeOutput(
            WeightSchedule(
                curve=() if all(factor == 1 for _, factor in points) else points,
                site_factors=parse_site_factors(sites),
                composition_strength=composition_strength if separate_composition else None,
                boost=boost if separate_composition else None,
            )
        )
