"""A model folder as the command reads it: an SD1.5 pipeline of random weights with image encoder, adapter and pictures."""

# pyright: basic, reportPrivateImportUsage=false, reportArgumentType=false

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ipadapter_core.demo.pictures import Pictures
from ipadapter_core.demo.train_parts import world_tokenizer
from ipadapter_core.demo.train_unet import build_scheduler
from ipadapter_core.models import layout_of
from tiny_models import checkpoint_channels


def sd15_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers pipeline folder of random weights, 32-pixel pictures, with an image encoder."""
    from diffusers import AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    pictures = Pictures(torch.zeros(1, 4, 8, 8), ("cat",), ("noto",), torch.tensor([False]))
    tokenizer = world_tokenizer(pictures, tmp_path_factory.mktemp("tokenizer"))
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, projection_dim=24,
        image_size=28, patch_size=14,
    )  # fmt: skip
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32, attention_head_dim=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("model")
    StableDiffusionPipeline(
        vae=vae, text_encoder=CLIPTextModel(text), tokenizer=tokenizer, unet=unet, scheduler=build_scheduler(),
        safety_checker=None, feature_extractor=None, image_encoder=CLIPVisionModelWithProjection(vision), requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
    channels = checkpoint_channels(layout_of(unet))
    from safetensors.torch import save_file

    from tiny import tiny_state

    state = tiny_state("base", token_dim=32, channels=tuple(channels), feature_dim=24)
    save_file({key: value.contiguous() for key, value in state.items()}, str(folder / "adapter.safetensors"))
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (40, 30, 3), dtype=np.uint8)).save(folder / "a.png")
    Image.fromarray(rng.integers(0, 255, (30, 50), dtype=np.uint8)).save(folder / "grey.png")
    mask = np.zeros((32, 32), dtype=np.uint8)
    mask[:, 16:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    return folder
