"""The demo world's models that all its base models share: autoencoder, text encoder, image encoder; ``train_world`` is the command.

The autoencoder is an AutoencoderTiny whose encoder is an exact PCA of 4x4 patches, so that only its decoder is learned; the image
encoder is a CLIP-style vision tower, aligned with the captions and able to redraw what it sees.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from einops import rearrange
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from ..features import CLIP_MEAN, CLIP_STD
from .pictures import BACKGROUNDS, SIZE, STUDIOS, Pictures, caption
from .tokenizer import train_tokenizer

LATENT_CHANNELS = 16
LATENT_SCALE = 4.0
"""scaling_factor of the autoencoder: its tanh clamp at 3 leaves latents of a quarter of unit variance untouched."""
TEXT_DIM = 192
TEXT_LENGTH = 16


# --- 1. autoencoder -------------------------------------------------------------------------------------------------


def patch_pca(images: Tensor) -> tuple[Tensor, Tensor]:
    """PCA of 4x4 patches of ``b 3 y x`` images (0..1): mean ``48`` and projection ``16 48``.

    Latent channels keep the square root of their natural standard deviation, so that sampling settles the coarse
    channels first, and have a mean square of 1.
    """
    patches = rearrange(images, "b c (y i) (x j) -> (b y x) (c i j)", i=4, j=4)
    mean = patches.mean(0)
    values, vectors = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    values, vectors = values.flip(0)[:LATENT_CHANNELS], vectors.flip(1)[:, :LATENT_CHANNELS].T
    target = values.sqrt().sqrt()
    target = target / target.square().mean().sqrt()
    return mean, vectors * (target / values.sqrt())[:, None]


def build_autoencoder(mean: Tensor, projection: Tensor) -> AutoencoderTiny:
    """An AutoencoderTiny whose encoder computes the PCA exactly: identity, two 2x2 regroupings, projection."""
    autoencoder = AutoencoderTiny(
        encoder_block_out_channels=(48, 48, 48),
        decoder_block_out_channels=(48, 48, 48),
        num_encoder_blocks=(0, 0, 0),
        num_decoder_blocks=(3, 2, 1),
        latent_channels=LATENT_CHANNELS,
        scaling_factor=LATENT_SCALE,
    )
    first, half, quarter, last = autoencoder.encoder.layers
    with torch.no_grad():
        for layer in (first, half, quarter, last):
            layer.weight.zero_()
            if layer.bias is not None:
                layer.bias.zero_()
        for c in range(3):
            first.weight[c, c, 1, 1] = 1
            for i in range(2):
                for j in range(2):
                    fine = c * 4 + i * 2 + j
                    half.weight[fine, c, 1 + i, 1 + j] = 1
                    for y in range(2):
                        for x in range(2):
                            quarter.weight[c * 16 + (2 * y + i) * 4 + (2 * x + j), fine, 1 + y, 1 + x] = 1
        last.weight[:, :, 1, 1] = projection / LATENT_SCALE
        last.bias.copy_(-(projection @ mean) / LATENT_SCALE)
    return autoencoder


def encode(autoencoder: AutoencoderTiny, images: Tensor) -> Tensor:
    """Images ``b 3 64 64`` in 0..1 to scaled latents ``b 16 16 16`` (the same linear map, without the wide convs)."""
    last = autoencoder.encoder.layers[-1]
    patches = rearrange(images, "b c (y i) (x j) -> b (c i j) y x", i=4, j=4)
    with torch.no_grad():
        return F.conv2d(patches, last.weight[:, :, 1:2, 1:2], last.bias) * LATENT_SCALE


# --- 2. text encoder ------------------------------------------------------------------------------------------------


def world_tokenizer(pictures: Pictures, folder: Path) -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer learned from every caption of the world, written into ``folder``."""
    captions = [
        caption(studio, name, colour)
        for name in sorted(set(pictures.names))
        for studio in STUDIOS
        for colour in BACKGROUNDS
    ]
    return train_tokenizer(captions, 1200, TEXT_LENGTH, folder)


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    # An eos id of 2 would switch transformers to a legacy rule that pools at the largest token id.
    assert tokenizer.eos_token_id != 2
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_DIM,
            intermediate_size=4 * TEXT_DIM,
            num_hidden_layers=3,
            num_attention_heads=TEXT_DIM // 64,
            max_position_embeddings=TEXT_LENGTH,
            projection_dim=TEXT_DIM,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


# --- 3. image encoder -----------------------------------------------------------------------------------------------

VISION_DIM = 192
VISION_PATCH = 8
EMBED_DIM = 256
THUMBNAIL = 16
COEFFICIENTS = 192


def build_image_encoder() -> CLIPVisionModelWithProjection:
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=VISION_DIM,
            intermediate_size=4 * VISION_DIM,
            num_hidden_layers=4,
            num_attention_heads=VISION_DIM // 16,
            projection_dim=EMBED_DIM,
            image_size=SIZE,
            patch_size=VISION_PATCH,
            hidden_act="gelu",
            # torch's CPU flash attention is several times slower than plain matmuls in bfloat16 backward
            attn_implementation="eager",
        )
    )
    # With the usual start every head looks everywhere alike and the class token never learns where things are:
    # waves as positions and larger query and key weights give each head a region of its own from the first step.
    with torch.no_grad():
        encoder.vision_model.embeddings.position_embedding.weight[1:] = waves(VISION_DIM, SIZE // VISION_PATCH)
        for name, parameter in encoder.named_parameters():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                parameter.normal_(0, 0.1)
    return encoder


def waves(width: int, side: int) -> Tensor:
    """Sine and cosine positions of a ``side`` by ``side`` grid, ``(side side) width``, half of the width per axis."""
    frequency = 1 / 100 ** (torch.arange(width // 4) / (width // 4))
    angle = torch.arange(side)[:, None] * frequency
    axis = torch.cat([angle.sin(), angle.cos()], 1)
    rows, columns = axis[:, None].expand(side, side, -1), axis[None].expand(side, side, -1)
    return torch.cat([rows, columns], -1).flatten(0, 1)


def normalise(images: Tensor) -> Tensor:
    """Images ``b 3 y x`` in 0..1 to CLIP pixel values; numbers of Python, which a recorded step need not copy to its device."""
    channels = zip(images.unbind(1), CLIP_MEAN, CLIP_STD, strict=True)
    return torch.stack([(channel - mean) / std for channel, mean, std in channels], 1)


class EncoderTraining(nn.Module):
    """The image encoder with the parts that only its training needs.

    A table of name and background vectors stands in for a text tower. ``image_embeds`` must linearly hold the principal
    components of a thumbnail, and the penultimate patch tokens redraw the picture, so that both features keep what an
    adapter must see of pictures without a name: colours, layout, detail.
    """

    centre: Tensor
    components: Tensor

    def __init__(self, names: int, thumbnails: Tensor) -> None:
        super().__init__()
        self.encoder = build_image_encoder()
        self.to_text = nn.Linear(EMBED_DIM, 128, bias=False)
        self.names = nn.Embedding(names, 128)
        self.backgrounds = nn.Embedding(len(BACKGROUNDS), 128)
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.thumbnail = nn.Linear(EMBED_DIM, COEFFICIENTS)
        flat = thumbnails.flatten(1)
        _, spread, components = torch.linalg.svd(flat - flat.mean(0), full_matrices=False)
        # each coefficient weighs with the square root of its natural spread: coarse layout first, detail not lost
        scale = (spread[:COEFFICIENTS] / spread[0]).sqrt() / (spread[:COEFFICIENTS] / len(flat) ** 0.5)
        self.register_buffer("centre", flat.mean(0))
        self.register_buffer("components", components[:COEFFICIENTS] * scale[:, None])
        self.patches = nn.Sequential(
            nn.LayerNorm(VISION_DIM), nn.Linear(VISION_DIM, 384), nn.GELU(), nn.Linear(384, 3 * VISION_PATCH**2)
        )

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images ``b 3 64 64`` in 0..1 to image_embeds ``b 256`` and penultimate tokens ``b 65 192``."""
        out = self.encoder(normalise(images), output_hidden_states=True)
        return out.image_embeds, out.hidden_states[-2]

    def redraw(self, tokens: Tensor) -> Tensor:
        """The picture ``b 3 64 64`` that the tokens hold."""
        grid = {"y": SIZE // VISION_PATCH, "i": VISION_PATCH, "c": 3}
        return rearrange(self.patches(tokens[:, 1:]), "b (y x) (c i j) -> b c (y i) (x j)", **grid)

    def match_text(self, embeds: Tensor, name: Tensor, background: Tensor) -> Tensor:
        """CLIP's contrastive loss over the batch; pairs with the same name and background all count as right."""
        image = F.normalize(self.to_text(embeds), dim=-1)
        text = F.normalize(self.names(name) + self.backgrounds(background), dim=-1)
        logits = self.log_scale.clamp(max=math.log(50.0)).exp() * (image @ text.T).float()
        same = ((name[:, None] == name) & (background[:, None] == background)).float()
        target = same / same.sum(1, keepdim=True)
        return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def save_preprocessor(folder: Path) -> None:
    """The ``preprocessor_config.json`` beside a saved image encoder that transformers and diffusers read."""
    CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=list(CLIP_MEAN),
        image_std=list(CLIP_STD),
    ).save_pretrained(folder)
