"""Test-only ComfyUI nodes: the shipped demo world as MODEL, CLIP_VISION and CONDITIONING. V1 style."""

from __future__ import annotations

import json
import os
import tempfile

import comfy.clip_vision
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import numpy as np
import torch


class Latents(comfy.latent_formats.LatentFormat):
    """16 channels of unit variance; four pixels a latent."""

    latent_channels = 16
    scale_factor = 1.0
    latent_rgb_factors = None


def config_of(unet: dict) -> comfy.supported_models.SD15:
    """ComfyUI's description of a diffusers UNet whose first level has no attention."""
    widths = unet["block_out_channels"]
    depths = [int(name.startswith("CrossAttn")) for name in unet["down_block_types"]]
    config = {
        "image_size": unet["sample_size"],
        "in_channels": unet["in_channels"],
        "out_channels": unet["out_channels"],
        "model_channels": widths[0],
        "channel_mult": [width // widths[0] for width in widths],
        "num_res_blocks": [unet["layers_per_block"]] * len(widths),
        "transformer_depth": depths,
        "transformer_depth_output": [depth for depth in depths for _ in range(unet["layers_per_block"] + 1)],
        "transformer_depth_middle": 1,
        "context_dim": unet["cross_attention_dim"],
        "use_spatial_transformer": True,
        "use_linear_in_transformer": False,
        "use_temporal_attention": False,
        "adm_in_channels": None,
        "legacy": False,
    }
    made = comfy.supported_models.SD15(config)
    made.unet_config |= {"num_heads": unet["attention_head_dim"], "num_head_channels": -1}
    made.latent_format = Latents()
    made.sampling_settings = {"linear_start": 0.00085, "linear_end": 0.012, "zsnr": True}
    made.set_inference_dtype(torch.float32, None)
    return made


class DemoWorldModel:
    """The world's UNet, from its diffusers folder."""

    CATEGORY = "tests"
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"folder": ("STRING", {})}}

    def load(self, folder):
        with open(os.path.join(folder, "unet", "config.json")) as file:
            config = config_of(json.load(file))
        weights = comfy.utils.load_torch_file(os.path.join(folder, "unet", "diffusion_pytorch_model.safetensors"))
        names = comfy.utils.unet_to_diffusers(config.unet_config)
        state = {names[key]: value.float() for key, value in weights.items() if key in names}
        model = comfy.model_base.BaseModel(config, model_type=comfy.model_base.ModelType.V_PREDICTION)
        model.diffusion_model.load_state_dict(state, strict=True)
        device = comfy.model_management.get_torch_device()
        offload = comfy.model_management.unet_offload_device()
        return (comfy.model_patcher.ModelPatcher(model.to(offload), load_device=device, offload_device=offload),)


class DemoWorldVision:
    """The world's image encoder."""

    CATEGORY = "tests"
    RETURN_TYPES = ("CLIP_VISION",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"folder": ("STRING", {})}}

    def load(self, folder):
        with open(os.path.join(folder, "image_encoder", "config.json")) as file:
            config = json.load(file)
        descriptor, path = tempfile.mkstemp(suffix=".json")  # 0.3.64 takes a file only
        with os.fdopen(descriptor, "w") as file:
            json.dump(config, file)
        try:
            vision = comfy.clip_vision.ClipVisionModel(path)
        finally:
            os.unlink(path)
        weights = comfy.utils.load_torch_file(os.path.join(folder, "image_encoder", "model.safetensors"))
        missing, _ = vision.load_sd(weights)
        if missing:
            raise ValueError(f"the image encoder lacks {missing}")
        return (vision,)


class DemoWorldConditioning:
    """Text states ``1 n d`` that the test computed, from a .npy file."""

    CATEGORY = "tests"
    RETURN_TYPES = ("CONDITIONING",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"path": ("STRING", {})}}

    def load(self, path):
        return ([[torch.from_numpy(np.load(path)), {}]],)


class DemoWorldLatent:
    """An empty latent batch of the world."""

    CATEGORY = "tests"
    RETURN_TYPES = ("LATENT",)
    FUNCTION = "make"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"batch": ("INT", {"default": 1, "min": 1, "max": 64})}}

    def make(self, batch):
        return ({"samples": torch.zeros(batch, 16, 16, 16)},)


NODE_CLASS_MAPPINGS = {
    "DemoWorldModel": DemoWorldModel,
    "DemoWorldVision": DemoWorldVision,
    "DemoWorldConditioning": DemoWorldConditioning,
    "DemoWorldLatent": DemoWorldLatent,
}
