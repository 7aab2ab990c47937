"""The demo world's base models as small as they can be and still be of their kind, and pictures to learn."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import UNet2DConditionModel

from ipadapter_core.demo.pictures import Pictures
from ipadapter_core.demo.train_flux import Flux
from ipadapter_core.demo.train_parts import TEXT_DIM
from ipadapter_core.demo.train_unet import UNet
from tiny_training import six_discs


class SmallUNet(UNet):
    def build(self) -> Any:
        unet: Any = UNet2DConditionModel(
            sample_size=16, in_channels=16, out_channels=16, layers_per_block=1, block_out_channels=(32, 32, 64),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=TEXT_DIM, attention_head_dim=4, norm_num_groups=32,
        )  # fmt: skip
        return unet.to(memory_format=torch.channels_last)


class SmallFlux(Flux):
    blocks, heads = (1, 1), 1


SMALL = {"unet": SmallUNet, "flux": SmallFlux}


def few_pictures() -> Pictures:
    """Six discs, of which one is of another category than references."""
    discs = six_discs()
    return Pictures(discs.rgba, discs.names, discs.studios, discs.held_out, others=1)
