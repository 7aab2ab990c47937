"""Pictures to latents and features, captions to embeddings, by the frozen encoders; the same numbers with and without a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import torch
from torch import Tensor

from ..checkpoints import AdapterSpec
from ..errors import IncompatibleEncoderError
from ..features import PixelSpec
from ..images.encoder import TransformersImageEncoder
from ..prompt.needs import check_encoder
from .config import DataConfig, ModelConfig
from .frozen import FrozenBase, files_stamp, onto

CacheSettings = dict[str, object]
"""What a cache's numbers depend on; its folder is named by a digest of it."""


class TargetEncoders:
    """The VAE of a run, and the text encoders if they only have to be asked once per caption.

    Results have ``data.cache_dtype``, whether they are kept or not.
    """

    pixels: PixelSpec | None = None
    """What reference pictures are prepared for; None: there are none."""

    def __init__(self, base: FrozenBase, config: DataConfig, device: torch.device, *, keep_text: bool = False) -> None:
        self.base, self.config, self.device, self.keep_text = base, config, device, keep_text
        self.dtype: torch.dtype = getattr(torch, config.cache_dtype)
        for module in (base.vae, *(base.text_encoders if keep_text else ())):
            if module is not None:
                onto(module, device)

    @torch.no_grad()
    def latents(self, pixels: Sequence[Tensor]) -> list[Tensor]:
        """Each picture's latents ``1 c y x``, or mean and deviation ``2 c y x`` where they are drawn at every step."""
        mean, std = self.base.encode_latents(torch.stack(list(pixels)))
        moments = torch.stack([mean, std] if self.config.latents == "sample" else [mean], 1)
        return list(moments.to("cpu", self.dtype).unbind(0))

    @torch.no_grad()
    def text(self, ids: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Context ``b l d`` and SDXL's pooled embedding ``b d`` of token ids ``b l``; nothing if text is encoded at every step."""
        if not self.keep_text:
            return ()
        context, pooled = self.base.encode_text(tuple(one.to(self.device) for one in ids))
        found = (context,) if pooled is None else (context, pooled)
        return tuple(one.to("cpu", self.dtype) for one in found)

    def features(self, pixel_values: Tensor) -> Tensor:
        """Features of references ``b …``; without an image encoder the references are empty, and so are these."""
        return pixel_values

    def neutral(self) -> Tensor:
        """The features ``1 …`` that stand for no image."""
        return torch.empty(1, 0)


class Encoders(TargetEncoders):
    """VAE and image encoder of an adapter's run."""

    def __init__(
        self,
        base: FrozenBase,
        encoder: TransformersImageEncoder,
        spec: AdapterSpec,
        config: DataConfig,
        device: torch.device,
    ) -> None:
        check_encoder(spec, encoder)
        super().__init__(base, config, device)
        self.encoder, self.spec = encoder, spec
        self.pixels = PixelSpec(encoder.image_size, encoder.mean, encoder.std)
        encoder.model.to(device)

    def features(self, pixel_values: Tensor) -> Tensor:
        """Features ``b …`` of the kind that the adapter reads."""
        return self.spec.format.feature.of(self.encoder.encode(pixel_values)).to("cpu", self.dtype)

    def neutral(self) -> Tensor:
        """The features ``1 …`` that stand for no image, by the family's rule."""
        size = self.encoder.image_size
        features = self.features(torch.zeros(1, 3, size, size))
        return torch.zeros_like(features) if self.spec.unconditional == "zero_embeds" else features


def cache_settings(model: ModelConfig, data: DataConfig, base: FrozenBase, spec: AdapterSpec) -> CacheSettings:
    """Everything that the numbers in an adapter's cache depend on, besides the pictures."""
    encoder = (model.image_encoder, ".") if model.image_encoder else (base.home, "image_encoder")
    values = asdict(data)
    return {
        **target_settings(model, data, base),
        **{key: values[key] for key in ("augment", "variants")},
        "feature": spec.feature,
        "unconditional": spec.unconditional,
        "image_encoder": files_stamp(encoder[0], encoder[1]),
    }


def target_settings(
    model: ModelConfig, data: DataConfig, base: FrozenBase, *, keep_text: bool = False
) -> CacheSettings:
    """The same for pictures that are only targets; with ``keep_text`` the embeddings of captions are kept too."""
    values = asdict(data)
    keys = ("resolution", "buckets", "bucket_step", "cache_dtype", "latents")
    text = {"text_encoders": files_stamp(model.base, "text_encoder", "text_encoder_2")} if keep_text else {}
    return {
        **{key: values[key] for key in keys},
        **text,
        "vae": files_stamp(model.base, "vae"),
        "tokenizer": files_stamp(base.home, "tokenizer", "tokenizer_2"),
        "text_lengths": [int(tokenizer.model_max_length) for tokenizer in base.tokenizers],
        "layout": 2,  # 1 had grey of 16 bits as white, and odd EXIF not turned
    }


def check_widths(spec: AdapterSpec, features: Tensor) -> None:
    """Raise IncompatibleEncoderError if cached features are not what the adapter reads."""
    if features.shape[-1] != spec.feature_dim:
        raise IncompatibleEncoderError(
            f"the cached features are {features.shape[-1]} wide, the adapter reads {spec.feature_dim}; delete the cache"
        )
