"""The former place of ``backends.diffusers.lora``. Kept for one version."""

from .diffusers.lora import LiveLoRAs, MergedLoRAs, apply, merge, parts_of, place

__all__ = ["LiveLoRAs", "MergedLoRAs", "apply", "merge", "parts_of", "place"]
