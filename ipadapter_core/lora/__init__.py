"""LoRA of every spelling and algorithm: read, placed on a model, applied at any strength, merged or live."""

from .formats import describe_lora, load_lora, parse_lora
from .placement import PlacedLoRA, Placement, place_lora
from .targets import Target, TargetTable, targets_of
from .update import Layer, Update
from .weights import Component, LoRAModule, LoRAWeights

__all__ = [
    "Component",
    "Layer",
    "LoRAModule",
    "LoRAWeights",
    "PlacedLoRA",
    "Placement",
    "Target",
    "TargetTable",
    "Update",
    "describe_lora",
    "load_lora",
    "parse_lora",
    "place_lora",
    "targets_of",
]
