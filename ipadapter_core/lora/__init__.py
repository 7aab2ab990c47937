"""LoRA of every spelling and algorithm: read, placed on a model, applied at any strength, merged or live."""

from .block_vectors import block_vector, parse_where
from .formats import describe_lora, load_lora, parse_lora
from .patch import MODES, LoRAPatch, choose_mode
from .placement import PARTIAL, Partial, PlacedLoRA, Placement, place_lora
from .saving import save_lora
from .selector import Selector, parse_selector
from .targets import Target, TargetTable, targets_of
from .update import Layer, Update
from .weights import Component, LeftOut, LoRAModule, LoRAWeights

__all__ = [
    "MODES",
    "PARTIAL",
    "Component",
    "Layer",
    "LeftOut",
    "LoRAModule",
    "LoRAPatch",
    "LoRAWeights",
    "Partial",
    "PlacedLoRA",
    "Placement",
    "Selector",
    "Target",
    "TargetTable",
    "Update",
    "block_vector",
    "choose_mode",
    "describe_lora",
    "load_lora",
    "parse_lora",
    "parse_selector",
    "parse_where",
    "place_lora",
    "save_lora",
    "targets_of",
]
