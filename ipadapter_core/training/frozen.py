"""The frozen models of a run: text to context, pictures to latents and features."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..errors import InvalidInputError
from ..generate import load_pipeline
from ..image_encoder import ImageEncoder, TransformersImageEncoder
from .adapter import EncoderSizes, freeze


@dataclass(slots=True)
class FrozenBase:
    """A diffusers pipeline's parts. `vae` is None once everything is cached."""

    unet: Any
    text_encoders: tuple[Any, ...]
    tokenizers: tuple[Any, ...]
    scheduler: Any
    vae: Any
    folder: str

    @property
    def is_sdxl(self) -> bool:
        """Whether the UNet wants a pooled text embedding and time ids."""
        return getattr(self.unet.config, "addition_embed_type", None) == "text_time"

    @property
    def latent_factor(self) -> int:
        """Pixels per latent, on a side."""
        return latent_factor(self.vae.config)

    def tokenize(self, captions: list[str]) -> tuple[Tensor, ...]:
        """Token ids `b l`, one tensor per text encoder."""
        return tuple(
            tokenizer(
                captions,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            ).input_ids
            for tokenizer in self.tokenizers
        )

    def encode_text(self, ids: tuple[Tensor, ...]) -> tuple[Tensor, Tensor | None]:
        """Context `b l d` and SDXL's pooled embedding, as diffusers' pipelines make them.

        Frozen encoders keep nothing for a gradient; a LoRA beside their layers makes them do.
        """
        if not self.is_sdxl:
            return cast(Tensor, self.text_encoders[0](ids[0])[0]), None
        outputs = [
            encoder(tokens, output_hidden_states=True)
            for encoder, tokens in zip(self.text_encoders, ids, strict=True)
        ]  # fmt: skip
        # SDXL reads the last layer but one of both encoders; the pooled embedding is the second's.
        return torch.cat([out.hidden_states[-2] for out in outputs], -1), cast(Tensor, outputs[-1][0])

    def added(self, pooled: Tensor | None, sizes: Tensor) -> dict[str, Tensor]:
        """What SDXL wants besides text: the pooled embedding and `sizes` `b 6` (original, crop, target; y before x)."""
        return {} if pooled is None else {"text_embeds": pooled, "time_ids": sizes.to(pooled)}

    @torch.no_grad()
    def encode_latents(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels `b 3 y x` in -1..1 to mean and standard deviation of the scaled latents, `b c y x`."""
        vae = self.vae
        weight = next(vae.parameters())
        pixels = pixels.to(weight.device, weight.dtype)
        encoded = vae.encode(pixels)
        if hasattr(encoded, "latent_dist"):
            mean, std = encoded.latent_dist.mean, encoded.latent_dist.std
        else:  # AutoencoderTiny has no distribution
            mean, std = encoded.latents, torch.zeros_like(encoded.latents)
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        return (mean - shift) * vae.config.scaling_factor, std * vae.config.scaling_factor

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """UNet and text encoders to the compute device and dtype; the VAE keeps its dtype (SDXL's overflows in fp16)."""
        self.unet.to(device, dtype)
        for encoder in self.text_encoders:
            encoder.to(device, dtype)
        if self.vae is not None:
            self.vae.to(device)


def latent_factor(vae_config: Any) -> int:
    widths = getattr(vae_config, "block_out_channels", None) or vae_config.encoder_block_out_channels
    # AutoencoderTiny halves between its blocks too, and its demo twin has three such steps minus one
    return 2 ** (len(widths) - 1)


def load_base(folder: str) -> FrozenBase:
    """The models in a diffusers folder, on the CPU in float32, frozen. Raises InvalidInputError or CorruptFileError."""
    if not folder:
        raise InvalidInputError("model.base is empty; give the diffusers folder of an SD1.5, SD2 or SDXL model")
    pipeline = load_pipeline(folder)
    pairs = [
        (getattr(pipeline, encoder, None), getattr(pipeline, tokenizer, None))
        for encoder, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))
    ]
    pairs = [(encoder, tokenizer) for encoder, tokenizer in pairs if encoder is not None and tokenizer is not None]
    base = FrozenBase(
        unet=pipeline.unet,
        text_encoders=tuple(encoder for encoder, _ in pairs),
        tokenizers=tuple(tokenizer for _, tokenizer in pairs),
        scheduler=pipeline.scheduler,
        vae=pipeline.vae,
        folder=folder,
    )
    for module in (base.unet, base.vae, *base.text_encoders):
        freeze(cast(nn.Module, module))
    return base


def load_encoder(base: str, folder: str) -> TransformersImageEncoder:
    """The image encoder in `folder`, or the one inside the model folder."""
    if folder:
        return TransformersImageEncoder.from_pretrained(folder)
    if not (Path(base) / "image_encoder" / "config.json").is_file():
        raise InvalidInputError(
            f"{base} has no image_encoder folder; set model.image_encoder to one, e.g. models/image_encoder of h94/IP-Adapter"
        )
    return TransformersImageEncoder.from_pretrained(base, subfolder="image_encoder")


def encoder_sizes(base: str, folder: str) -> EncoderSizes:
    """Widths and token count of the image encoder, from its config.json: the weights may not be needed at all."""
    vision = _vision_config(base, folder)
    side = vision["image_size"] // vision["patch_size"]
    return EncoderSizes(vision["projection_dim"], vision["hidden_size"], side * side + 1)


def image_size(base: str, folder: str) -> int:
    """Side of the pictures that the image encoder sees, in pixels."""
    return _vision_config(base, folder)["image_size"]


def _vision_config(base: str, folder: str) -> dict[str, int]:
    path = Path(folder) if folder else Path(base) / "image_encoder"
    try:
        values: dict[str, Any] = json.loads((path / "config.json").read_text(encoding="utf-8"))
        vision: dict[str, Any] = {**values, **(values.get("vision_config") or {})}
        return {key: int(vision[key]) for key in ("image_size", "patch_size", "projection_dim", "hidden_size")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(
            f"{path} holds no readable config.json of a CLIP image encoder ({error}); set model.image_encoder to one, "
            "e.g. models/image_encoder of h94/IP-Adapter"
        ) from error


@dataclass(frozen=True, slots=True)
class EncoderLooks:
    """What preprocess() must know of an encoder; workers that prepare pictures need no weights."""

    name: str
    hidden_size: int
    projection_dim: int
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def encode(self, pixel_values: Tensor) -> Any:
        raise NotImplementedError("this is only the description of an encoder")


def looks_of(encoder: ImageEncoder) -> EncoderLooks:
    return EncoderLooks(
        encoder.name, encoder.hidden_size, encoder.projection_dim, encoder.image_size, encoder.mean, encoder.std
    )


def files_stamp(folder: str, *parts: str) -> str:
    """A digest of a model's weight files below `parts`, the same after copying them elsewhere.

    Sizes and the first and last mebibyte stand for a file: reading gigabytes at every start would be felt.
    """
    digest = hashlib.sha256()
    for part in parts:
        for path in sorted((Path(folder) / part).glob("*")):
            if path.suffix not in (".safetensors", ".bin", ".json"):
                continue
            size = path.stat().st_size
            digest.update(f"{part}/{path.name} {size}".encode())
            with path.open("rb") as file:
                digest.update(file.read(1 << 20))
                file.seek(max(0, size - (1 << 20)))
                digest.update(file.read())
    return digest.hexdigest()
