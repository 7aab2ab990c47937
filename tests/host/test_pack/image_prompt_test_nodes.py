"""Test-only ComfyUI nodes; the server copies this file into custom_nodes. V1 style, which every version loads."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile

import comfy.clip_vision
import folder_paths
import numpy as np
import torch
from comfy.comfy_types import IO

VISION = {
    "model_type": "clip_vision_model",
    "hidden_size": 32,
    "projection_dim": 24,
    "image_size": 56,
    "patch_size": 14,
    "num_channels": 3,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "hidden_act": "gelu",
}
SEED = ("INT", {"default": 0, "min": 0, "max": 2**31})


class TestConditioning:
    """Random text conditioning: what a CLIPTextEncode would give, without a text encoder."""

    CATEGORY = "tests"
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "seed": SEED,
                "width": ("INT", {"default": 768, "min": 1, "max": 8192}),
            },
            "optional": {
                "tokens": ("INT", {"default": 77, "min": 1, "max": 1024}),
                "pooled": ("INT", {"default": 1280, "min": 1, "max": 8192}),
            },
        }

    def make(self, seed, width, tokens=77, pooled=1280):
        generator = torch.Generator().manual_seed(seed)
        cond = torch.randn(1, tokens, width, generator=generator)
        return ([[cond, {"pooled_output": torch.randn(1, pooled, generator=generator)}]],)


class TestClipVision:
    """A real ClipVisionModel of 17 tokens x 32, projection 24, with seeded weights."""

    CATEGORY = "tests"
    RETURN_TYPES = ("CLIP_VISION",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seed": SEED}}

    def make(self, seed):
        descriptor, path = tempfile.mkstemp(suffix=".json")  # 0.3.64 takes a file only
        with os.fdopen(descriptor, "w") as file:
            json.dump(VISION, file)
        try:
            vision = comfy.clip_vision.ClipVisionModel(path)
        finally:
            os.unlink(path)
        generator = torch.Generator().manual_seed(seed)
        state = {}
        for key, value in sorted(vision.get_sd().items()):
            if not value.is_floating_point():
                continue
            if value.ndim == 1 and key.endswith("weight"):
                random = torch.ones(value.shape)
            elif value.ndim == 1 and key.endswith("bias"):
                random = torch.zeros(value.shape)
            else:
                random = torch.randn(value.shape, generator=generator) / value[0].numel() ** 0.5
            state[key] = random.to(value.dtype)
        vision.load_sd(state)
        return (vision,)


class TestSaveTensor:
    """Write a LATENT, IMAGE, MASK or CONDITIONING as .npy (float32) and report shape, dtype and hash."""

    CATEGORY = "tests"
    RETURN_TYPES = ()
    FUNCTION = "save"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"value": (IO.ANY, {})}}

    def save(self, value):
        if isinstance(value, dict):
            value = value["samples"]
        elif isinstance(value, list):
            value = value[0][0]
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"TestSaveTensor takes a LATENT, IMAGE, MASK or CONDITIONING, got {type(value).__name__}")
        array = np.ascontiguousarray(value.detach().float().cpu().numpy())
        digest = hashlib.sha256(array.tobytes()).hexdigest()
        name = f"{digest[:32]}.npy"
        folder = os.path.join(folder_paths.get_output_directory(), "tensors")
        os.makedirs(folder, exist_ok=True)
        np.save(os.path.join(folder, name), array)
        entry = {"filename": name, "subfolder": "tensors", "type": "output"}
        entry |= {"shape": list(value.shape), "dtype": str(value.dtype), "sha256": digest}
        return {"ui": {"tensor": [entry]}}


NODE_CLASS_MAPPINGS = {node.__name__: node for node in (TestConditioning, TestClipVision, TestSaveTensor)}
