"""LoRA of every key format and algorithm: read, matched with a model, applied at any strength, merged or unfused."""

from .block_vectors import block_vector, parse_where
from .formats import describe_lora, load_lora, parse_lora
from .layer import Layer
from .matching import PARTIAL, MatchedLoRA, Partial, TargetMatch, match_lora
from .patch import MODES, LoRAPatch, choose_mode
from .saving import save_lora
from .selector import Selector, parse_selector
from .targets import Target, TargetTable, targets_of
from .update import Update
from .weights import Component, LeftOut, LoRAModule, LoRAWeights

PlacedLoRA, Placement, place_lora = MatchedLoRA, TargetMatch, match_lora  # older names

__all__ = [
    "MODES",
    "PARTIAL",
    "Component",
    "Layer",
    "LeftOut",
    "LoRAModule",
    "LoRAPatch",
    "LoRAWeights",
    "MatchedLoRA",
    "Partial",
    "PlacedLoRA",
    "Placement",
    "Selector",
    "Target",
    "TargetMatch",
    "TargetTable",
    "Update",
    "block_vector",
    "choose_mode",
    "describe_lora",
    "load_lora",
    "match_lora",
    "parse_lora",
    "parse_selector",
    "parse_where",
    "place_lora",
    "save_lora",
    "targets_of",
]
