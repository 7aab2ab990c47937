"""Pictures to latents and features, by the frozen encoders; the same numbers with and without a cache."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..checkpoints import AdapterSpec
from ..errors import IncompatibleEncoderError
from ..image_encoder import TransformersImageEncoder, check_encoder
from .config import DataConfig, ModelConfig
from .frozen import FrozenBase, files_stamp, looks_of, model_home


class Encoders:
    """VAE and image encoder of a run. Results have `data.cache_dtype`, whether they are kept or not."""

    def __init__(
        self,
        base: FrozenBase,
        encoder: TransformersImageEncoder,
        spec: AdapterSpec,
        config: DataConfig,
        device: torch.device,
    ) -> None:
        check_encoder(spec, encoder)
        self.base, self.encoder, self.spec, self.config = base, encoder, spec, config
        self.dtype: torch.dtype = getattr(torch, config.cache_dtype)
        self.looks = looks_of(encoder)
        self.device = device
        encoder.model.to(device)
        if base.vae is not None:
            base.vae.to(device)

    def latents(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        """Each picture's latents `1 c y x`, or mean and deviation `2 c y x` where they are drawn at every step."""
        mean, std = self.base.encode_latents(torch.stack(list(pixels)))
        moments = torch.stack([mean, std] if self.config.latents == "sample" else [mean], 1)
        return list(moments.to("cpu", self.dtype).unbind(0))

    def features(self, pixel_values: Tensor) -> Tensor:
        """Features `b …` of the kind that the adapter reads."""
        return self.encoder.encode(pixel_values).get(self.spec.feature).to("cpu", self.dtype)

    def neutral(self) -> Tensor:
        """The features `1 …` that stand for no image, by the family's rule."""
        size = self.encoder.image_size
        features = self.features(torch.zeros(1, 3, size, size))
        return torch.zeros_like(features) if self.spec.unconditional == "zero_embeds" else features


def cache_settings(model: ModelConfig, data: DataConfig, base: FrozenBase, spec: AdapterSpec) -> dict[str, Any]:
    """Everything that the numbers in a cache depend on, besides the pictures."""
    home = model_home(model.base, model.config)
    encoder = (model.image_encoder, ".") if model.image_encoder else (home, "image_encoder")
    values = asdict(data)
    keys = ("resolution", "buckets", "bucket_step", "augment", "variants", "cache_dtype", "latents")
    return {
        **{key: values[key] for key in keys},
        "feature": spec.feature,
        "unconditional": spec.unconditional,
        "vae": files_stamp(model.base, "vae"),
        "image_encoder": files_stamp(encoder[0], encoder[1]),
        "tokenizer": files_stamp(home, "tokenizer", "tokenizer_2"),
        "text_lengths": [int(tokenizer.model_max_length) for tokenizer in base.tokenizers],
        "layout": 1,
    }


def describe_settings(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True)


def check_widths(spec: AdapterSpec, features: Tensor) -> None:
    """Raise IncompatibleEncoderError if cached features are not what the adapter reads."""
    if features.shape[-1] != spec.feature_dim:
        raise IncompatibleEncoderError(
            f"the cached features are {features.shape[-1]} wide, the adapter reads {spec.feature_dim}; delete the cache"
        )
