"""The demo world's models and how each learned in the first world, in the trainer's loop; ``train_world`` is the command.

1. ``train_autoencoder``   an AutoencoderTiny: the encoder is an exact PCA of 4x4 patches, only the decoder is learned;
2. ``train_unet``          text encoder and UNet together, v-prediction with zero terminal SNR;
3. ``train_image_encoder`` a CLIP-style vision tower, aligned with the captions and able to redraw what it sees.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DDIMScheduler, EulerAncestralDiscreteScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from einops import rearrange
from PIL import Image
from torch import Tensor, nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

from ..training.order import seeded
from .pictures import BACKGROUNDS, SIZE, STUDIOS, Pictures, caption, draw_captions, draw_scenes
from .stages import picture_grid, stage_config, train_stage
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


def decode(autoencoder: AutoencoderTiny, latents: Tensor) -> Tensor:
    """Scaled latents to images in 0..1."""
    return (autoencoder.decode(latents / LATENT_SCALE).sample / 2 + 0.5).clamp(0, 1)


def train_autoencoder(pictures: Pictures, work: Path, steps: int) -> AutoencoderTiny:
    seen = pictures.where(held_out=False)

    def scenes(count: int, generator: torch.Generator) -> Tensor:
        index = seen[torch.randint(len(seen), (count,), generator=generator)]
        return draw_scenes(pictures, index, generator, recolour_rate=0.25).images

    torch.manual_seed(1)
    autoencoder = build_autoencoder(*patch_pca(scenes(2000, torch.Generator().manual_seed(1))))
    autoencoder.encoder.requires_grad_(False)
    decoder = autoencoder.decoder.to(memory_format=torch.channels_last)

    def loss(step: int) -> Tensor:
        generator = seeded("autoencoder", step)
        images = scenes(8, generator)
        latents = encode(autoencoder, images)
        latents = latents + 0.05 * torch.randn(latents.shape, generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            out = decoder((latents / LATENT_SCALE).contiguous(memory_format=torch.channels_last))
        out = out.float() / 2 + 0.5
        edges = (out.diff(dim=-1) - images.diff(dim=-1)).abs().mean() + (
            out.diff(dim=-2) - images.diff(dim=-2)
        ).abs().mean()
        return (out - images).abs().mean() + edges

    def preview() -> Image.Image:
        images = scenes(16, seeded("autoencoder", "preview"))
        out = decoder(encode(autoencoder, images) / LATENT_SCALE) / 2 + 0.5
        return picture_grid(torch.cat([images, out]), 16)

    config = stage_config("autoencoder", work, steps=steps, lr=2e-3, seed=1)
    autoencoder.decoder = train_stage(config, decoder, loss, preview)
    return autoencoder


# --- 2. UNet and text encoder ---------------------------------------------------------------------------------------


def world_tokenizer(pictures: Pictures, folder: Path) -> CLIPTokenizer:
    """A CLIP byte-pair tokenizer learned from every caption of the world, written into ``folder``."""
    captions = [
        caption(studio, name, colour)
        for name in sorted(set(pictures.names))
        for studio in STUDIOS
        for colour in BACKGROUNDS
    ]
    return train_tokenizer(captions, 1200, TEXT_LENGTH, folder)


def tokenize(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    return tokenizer(
        captions, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


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


def build_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=1,
        block_out_channels=(64, 128, 256),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_DIM,
        attention_head_dim=4,
        norm_num_groups=32,
    )


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,  # without effect in trailing spacing; diffusers' pipeline insists on it
    )


def build_sampler() -> EulerAncestralDiscreteScheduler:
    """What the world samples with: fresh noise at every step mends what a small UNet gets wrong in the step before.

    The deterministic DDIM carries such errors on as confetti-coloured patches, at 100 steps as at 20.
    """
    return EulerAncestralDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        steps_offset=1,  # without effect in trailing spacing; diffusers' pipeline insists on it
    )


def draw_timesteps(count: int, generator: torch.Generator) -> Tensor:
    """Timesteps of which half lie above 750, where these small latents settle what is shown and where.

    Below, colours and edges are settled; with a quarter of the samples there, they stayed confetti.
    """
    early = torch.where(torch.arange(count) % 4 == 0, 0.25, 1.0)
    power = torch.where(torch.arange(count) % 4 == 1, 2.0, 1.0)
    return (999 * (1 - early * torch.rand(count, generator=generator).pow(power))).round().long()


def velocity_loss(
    unet: nn.Module, latents: Tensor, text: Tensor, scheduler: DDIMScheduler, generator: torch.Generator
) -> Tensor:
    """Mean squared error of the predicted velocity, computed in bfloat16."""
    noise = torch.randn(latents.shape, generator=generator)
    t = draw_timesteps(latents.shape[0], generator)
    noisy = scheduler.add_noise(latents, noise, t).contiguous(memory_format=torch.channels_last)
    target = scheduler.get_velocity(latents, noise, t)
    with torch.autocast("cpu", torch.bfloat16):
        predicted = unet(noisy, t, text).sample
    return F.mse_loss(predicted.float(), target)


PREVIEW_PROMPTS = [
    "fluent apple on white background", "noto frog on blue background", "twemoji pizza on yellow background",
    "panda face on red background", "fluent banana on purple background", "rose on black background",
    "noto elephant on pink background", "twemoji strawberry on sky background", "green apple", "octopus",
    "emoji on teal background", "noto emoji on orange background", "carrot on white background",
    "fluent hamburger on blue background", "bee on green background", "penguin on grey background",
]  # fmt: skip


@torch.no_grad()
def sample(
    unet: nn.Module,
    text: Tensor,
    empty: Tensor,
    *,
    steps: int = 25,
    guidance: float = 2.0,
    seed: int = 0,
) -> Tensor:
    scheduler = build_sampler()
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(text.shape[0], LATENT_CHANNELS, SIZE // 4, SIZE // 4, generator=generator)
    x = x * scheduler.init_noise_sigma
    both = torch.cat([empty.expand_as(text), text])
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        negative, positive = unet(torch.cat([scaled, scaled]), t, both).sample.chunk(2)
        x = scheduler.step(negative + guidance * (positive - negative), t, x, generator=generator).prev_sample
    return x


def train_unet(
    pictures: Pictures, tokenizer: CLIPTokenizer, autoencoder: AutoencoderTiny, work: Path, steps: int, batch: int
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    torch.manual_seed(2)
    seen = pictures.where(held_out=False)
    unet = build_unet().to(memory_format=torch.channels_last)
    # torch's CPU flash attention is several times slower than plain matmuls in bfloat16 backward
    unet.set_attn_processor(AttnProcessor())
    models = nn.ModuleDict({"unet": unet, "text": build_text_encoder(tokenizer)})
    scheduler = build_scheduler()

    def loss(step: int) -> Tensor:
        generator = seeded("unet", step)
        index = seen[torch.randint(len(seen), (batch,), generator=generator)]
        scenes = draw_scenes(pictures, index, generator, recolour_rate=0.2)
        ids = tokenize(tokenizer, draw_captions(pictures, scenes, generator))
        with torch.autocast("cpu", torch.bfloat16):
            text = models["text"](ids).last_hidden_state
        return velocity_loss(models["unet"], encode(autoencoder, scenes.images), text, scheduler, generator)

    pinv = torch.linalg.pinv(autoencoder.encoder.layers[-1].weight[:, :, 1, 1])

    def preview() -> Image.Image:
        text = models["text"](tokenize(tokenizer, [*PREVIEW_PROMPTS, ""])).last_hidden_state
        x = sample(unet, text[:-1], text[-1:])
        bias = autoencoder.encoder.layers[-1].bias[:, None, None]
        patches = torch.einsum("pl,blyx->bpyx", pinv, x / LATENT_SCALE - bias)
        return picture_grid(rearrange(patches, "b (c i j) y x -> b c (y i) (x j)", c=3, i=4), 8)

    config = stage_config("unet", work, steps=steps, lr=1e-3, seed=2, optimizer="muon")
    train_stage(config, models, loss, preview)
    return unet, models["text"]  # pyright: ignore


# --- 3. image encoder -----------------------------------------------------------------------------------------------

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
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
    """Images ``b 3 y x`` in 0..1 to CLIP pixel values."""
    return (images - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)


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

    def redraw(self, embeds: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The thumbnail ``b 3 16 16`` that image_embeds hold and the picture ``b 3 64 64`` that the tokens hold."""
        flat = self.thumbnail(embeds).float() @ torch.linalg.pinv(self.components).T + self.centre
        small = rearrange(flat, "b (c y x) -> b c y x", c=3, y=THUMBNAIL)
        return small, self.redraw_tokens(tokens)

    def redraw_tokens(self, tokens: Tensor) -> Tensor:
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


def train_image_encoder(pictures: Pictures, work: Path, steps: int, batch: int) -> EncoderTraining:
    torch.manual_seed(3)
    generator = torch.Generator().manual_seed(3)
    seen = pictures.where(held_out=False)
    vocabulary = {name: i for i, name in enumerate(sorted(set(pictures.names)))}
    name_of = torch.tensor([vocabulary[name] for name in pictures.names])

    def thumbnails(images: Tensor) -> Tensor:
        return F.avg_pool2d(images, SIZE // THUMBNAIL)

    index = seen[torch.randint(len(seen), (3000,), generator=generator)]
    first = draw_scenes(pictures, index, generator, recolour_rate=0.3).images
    model = EncoderTraining(len(vocabulary), thumbnails(first))

    def loss(step: int) -> Tensor:
        generator = seeded("image-encoder", step)
        index = seen[torch.randint(len(seen), (batch,), generator=generator)]
        scenes = draw_scenes(pictures, index, generator, recolour_rate=0.3)
        with torch.autocast("cpu", torch.bfloat16):
            embeds, tokens = model.features(scenes.images)
            coefficients = model.thumbnail(embeds)
            large = model.redraw_tokens(tokens)
            matched = model.match_text(embeds, name_of[index], scenes.background)
        wanted = (thumbnails(scenes.images).flatten(1) - model.centre) @ model.components.T
        layout = F.mse_loss(coefficients.float(), wanted) / wanted.square().mean()
        return layout + 4 * (large.float() - scenes.images).abs().mean() + 0.05 * matched

    def preview() -> Image.Image:
        images, small, large = redraw_held_out(model, pictures, seed=0)
        rows = [images[:16], F.interpolate(small[:16], size=(SIZE, SIZE), mode="bilinear"), large[:16]]
        return picture_grid(torch.cat(rows), 16)

    config = stage_config("image-encoder", work, steps=steps, lr=1e-3, seed=3)
    train_stage(config, model, loss, preview)
    return model


@torch.no_grad()
def redraw_held_out(model: EncoderTraining, pictures: Pictures, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """One scene of every held-out picture and what the two decoders redraw of it."""
    generator = torch.Generator().manual_seed(seed)
    held_out = pictures.where(held_out=True)
    held_out = held_out[torch.randperm(len(held_out), generator=generator)]
    images = draw_scenes(pictures, held_out, generator, recolour_rate=0.0).images
    return images, *model.redraw(*model.features(images))


@torch.no_grad()
def measure_image_encoder(model: EncoderTraining, pictures: Pictures) -> dict[str, float]:
    """On held-out pictures: decibels of what the decoders redraw, and how often the nearest image_embeds among all
    held-out pictures, each drawn anew in another place on another background, are those of the same picture."""

    def decibels(a: Tensor, b: Tensor) -> float:
        return -10 * math.log10(F.mse_loss(a.clamp(0, 1), b).item())

    images, small, large = redraw_held_out(model, pictures, seed=0)
    half = F.avg_pool2d(images, SIZE // THUMBNAIL)
    figures = {
        "thumbnail_db": decibels(small, half),
        "mean_colour_db": decibels(half.mean((2, 3), keepdim=True).expand_as(half), half),
        "tokens64_db": decibels(large, images),
    }
    held_out = pictures.where(held_out=True)
    right = 0.0
    for seed in range(4):
        generator = torch.Generator().manual_seed(100 + seed)
        views = [draw_scenes(pictures, held_out, generator, recolour_rate=0.0) for _ in range(2)]
        a, b = (F.normalize(model.features(view.images)[0], dim=-1) for view in views)
        right += (torch.arange(len(held_out)) == (a @ b.T).argmax(1)).float().mean().item() / 4
    figures[f"retrieval_of_{len(held_out)}"] = right
    return {key: round(value, 3) for key, value in figures.items()}


def save_image_encoder(encoder: CLIPVisionModelWithProjection, folder: Path) -> None:
    """The vision model in fp16 with the preprocessor_config.json that transformers and diffusers read."""
    copy.deepcopy(encoder).half().save_pretrained(folder)
    processor = CLIPImageProcessor(
        size={"shortest_edge": SIZE},
        crop_size={"height": SIZE, "width": SIZE},
        image_mean=list(CLIP_MEAN),
        image_std=list(CLIP_STD),
    )
    processor.save_pretrained(folder)
