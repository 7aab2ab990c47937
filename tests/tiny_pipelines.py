"""Tiny pipelines of diffusers around transformers: every part is real, of random weights, and can be saved as a model folder."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ChromaPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from ipadapter_core.demo.tokenizer import train_tokenizer
from tiny_flux import TEXT_DIM, diffusers_chroma, diffusers_flux
from tiny_sd3 import diffusers_sd3

CAPTIONS = ("a red circle", "a blue square on a white ground", "ugly, blurry")
POOLED = 24


def seeded(seed: int, build: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build().eval().requires_grad_(False)


def tiny_vae(channels: int = 4) -> AutoencoderKL:
    """Half the picture's size, as no pipeline needs more."""
    return seeded(1, lambda: AutoencoderKL(
        block_out_channels=(8, 8), latent_channels=channels, norm_num_groups=4, sample_size=16, shift_factor=0.1, scaling_factor=0.4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, use_quant_conv=False,
        use_post_quant_conv=False,
    ))  # fmt: skip


@cache
def clip_tokenizer() -> Any:
    with TemporaryDirectory() as folder:
        return train_tokenizer(CAPTIONS, 320, 16, Path(folder))


@cache
def t5_tokenizer() -> Any:
    """Words and letters, in files that transformers 4 and 5 both read."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    words = sorted({word.strip(",") for caption in CAPTIONS for word in caption.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in words)]
    pieces += [(sign, -9.0) for sign in "▁,abcdefghijklmnopqrstuvwxyz" if f"▁{sign}" not in words or sign != "▁"]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    with TemporaryDirectory() as folder:
        tokenizer.save(str(Path(folder) / "tokenizer.json"))
        facts = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>", "tokenizer_class": "T5TokenizerFast", "extra_ids": 0}  # fmt: skip
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(facts))
        return T5TokenizerFast.from_pretrained(folder)


def clip_text(width: int = POOLED, kind: Any = CLIPTextModel) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(clip_tokenizer()), hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=width, eos_token_id=1, bos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    return seeded(2, lambda: kind(config))


def t5_text() -> T5EncoderModel:
    sizes: dict[str, Any] = {"d_model": TEXT_DIM, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    return seeded(3, lambda: T5EncoderModel(T5Config(vocab_size=len(t5_tokenizer()), **sizes)))


def flux_pipeline(kind: Any = FluxPipeline, *, shift: bool = True, **changes: Any) -> Any:
    """A FLUX.1 dev pipeline: distilled guidance, true guidance on demand, a shift that grows with the picture."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=shift, base_image_seq_len=16, max_image_seq_len=64)
    return _quiet(
        kind(
            scheduler=scheduler, vae=tiny_vae(), text_encoder=clip_text(), tokenizer=clip_tokenizer(), text_encoder_2=t5_text(),
            tokenizer_2=t5_tokenizer(), transformer=diffusers_flux(**changes),
        )
    )  # fmt: skip


def chroma_pipeline(kind: Any = ChromaPipeline) -> Any:
    return _quiet(
        kind(
            scheduler=FlowMatchEulerDiscreteScheduler(), vae=tiny_vae(), text_encoder=t5_text(), tokenizer=t5_tokenizer(),
            transformer=diffusers_chroma(),
        )
    )  # fmt: skip


def sd3_pipeline(kind: Any = StableDiffusion3Pipeline, channels: int = 4, **changes: Any) -> Any:
    """An SD3.5 pipeline, whose scheduler shifts the noise by 3."""
    changes |= {"in_channels": channels, "out_channels": channels}
    clips = {f"text_encoder{suffix}": clip_text(POOLED // 2, CLIPTextModelWithProjection) for suffix in ("", "_2")}
    return _quiet(
        kind(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=tiny_vae(channels), **clips, tokenizer=clip_tokenizer(),
            tokenizer_2=clip_tokenizer(), text_encoder_3=t5_text(), tokenizer_3=t5_tokenizer(), transformer=diffusers_sd3(**changes),
        )
    )  # fmt: skip


def _quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
