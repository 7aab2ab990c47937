"""diffusers: image prompts (``doors``) and LoRAs (``lora``) on its pipelines."""

from .doors import AppliedAdapters, apply, apply_to_pipeline

__all__ = ["AppliedAdapters", "apply", "apply_to_pipeline"]
