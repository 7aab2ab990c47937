"""diffusers: image prompts (``unet``) and LoRAs (``lora``) on its pipelines."""

from .unet import AppliedAdapters, apply, apply_to_pipeline

__all__ = ["AppliedAdapters", "apply", "apply_to_pipeline"]
