"""Image prompts on disk: the features of their references, which serve every adapter that reads them.

Tokens would serve one adapter; features serve all that were trained with the same feature of the same encoder. The file
is one of embeds (embeds.py) with more texts, so tools that read those read it too.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from ..checkpoints import AdapterWeights
from ..compatibility import CORRECT, Rules
from ..errors import CorruptFileError, IncompatibleEncoderError, InvalidInputError, one_line, quoted
from ..features import FEATURES, ImageEncoder
from ..files.state_dict import LONGEST_NAME
from .embeds import MOST_REFERENCES, SavedEmbeds, load_embeds, save_embeds
from .encode import ENCODED_RULES, negative_branch, unconditional_features
from .image_prompt import ImagePrompt, NegativeBranch, project_features
from .needs import check_encoder, files_of

UNNAMED = "saved embeds"
"""The encoder's name where a file of another tool tells none."""


def save_prompt(path: str | os.PathLike[str], prompt: ImagePrompt) -> Path:
    """Write a prompt's features and those beside them, float32 as they are, whole or not at all; returns the path.

    Raises InvalidInputError for a prompt of unknown make (one that was put together by hand).
    """
    spec = prompt.spec
    if spec is None:
        raise InvalidInputError(
            f"this prompt of {prompt.adapter} does not say what it was encoded for; encode it with encode_image_prompt"
        )
    texts = {
        "feature": spec.format.feature.name, "latents": str(len(prompt.features)), "encoder": prompt.encoder,
        "trained_encoder": spec.encoder, "adapter": prompt.adapter, "family": spec.family, "base_model": spec.base_model,
    }  # fmt: skip
    if prompt.face_scale != 1:
        texts["face_scale"] = repr(float(prompt.face_scale))
    if prompt.negative_branch != "tokens":
        texts["negative_branch"] = prompt.negative_branch
    uncond, neutral = prompt.uncond_features, prompt.neutral_features
    if prompt.negative_branch == "same" and neutral is not None:  # the references themselves are not written twice
        uncond, neutral = neutral, None
    saved = SavedEmbeds(
        prompt.features.flatten(0, 1),
        _distinct(uncond.flatten(0, 1)),
        None if neutral is None else _distinct(neutral.flatten(0, 1)),
        texts,
    )
    return save_embeds(path, saved)


@torch.no_grad()
def load_prompt(
    path: str | os.PathLike[str],
    adapter: AdapterWeights,
    encoder: ImageEncoder | None = None,
    *,
    per_latent: bool = False,
    rules: Rules = CORRECT,
) -> ImagePrompt:
    """Read a prompt that save_prompt() wrote, or the embeds of another tool, and project it for ``adapter``.

    ``encoder`` is asked only where the file does not hold what stands for no image and the adapter needs an encoded
    picture for that; ``rules`` say which. ``per_latent`` gives every reference of the file to a latent of its own; else it is as it was saved.

    Raises IncompatibleEncoderError for features that the adapter does not read, CorruptFileError for a file that
    contradicts itself or whose numbers overflow in the adapter, and what load_embeds() raises.
    """
    name, saved, spec = one_line(Path(path).name, LONGEST_NAME), load_embeds(path), adapter.spec
    embeds = saved.embeds.float()
    _check_feature(name, saved, adapter)
    if (
        encoder is not None and not spec.format.feature.looks
    ):  # of several encoders one is no use here, and none is needed
        check_encoder(spec, encoder)
    latents = len(embeds) if per_latent else int(_number(name, saved, "latents", 1, 1, MOST_REFERENCES))
    if len(embeds) % latents:
        raise CorruptFileError(
            f"{name} holds {len(embeds)} references, which are not the same number for {latents} latents"
        )
    negative, branch = saved.negative, _branch(name, saved)
    if negative is None:
        if encoder is None and spec.unconditional in ENCODED_RULES:
            raise InvalidInputError(
                f"{name} does not hold what stands for no image, which {adapter.name} needs: connect the image encoder "
                f"({spec.encoder}) to clip_vision, or save the references with Save Image Prompt"
            )
        negative = unconditional_features(adapter, encoder, embeds, rules)
        branch = negative_branch(spec.unconditional)
    beside = [
        _beside(name, what, t, embeds, latents) for what, t in (("negative", negative), ("neutral", saved.neutral))
    ]
    assert beside[0] is not None
    prompt = project_features(
        adapter,
        one_line(saved.metadata.get("encoder", UNNAMED if encoder is None else encoder.name)),
        features=embeds.unflatten(0, (latents, -1)),
        uncond=beside[0],
        neutral=beside[1],
        face_scale=_number(name, saved, "face_scale", 1.0, -math.inf, math.inf),
        negative_branch=branch,
    )
    # one look per loaded file: large features, or a large face_scale, overflow in the projector's half precision
    if not all(bool(torch.isfinite(tokens).all()) for tokens in (prompt.cond, prompt.uncond)):
        raise CorruptFileError(
            f"{name} holds numbers that {adapter.name} turns into NaN or infinite tokens (the largest is "
            f"{float(embeds.abs().max()):.3g}); encode the references again"
        )
    return prompt


def _check_feature(name: str, saved: SavedEmbeds, adapter: AdapterWeights) -> None:
    spec, embeds, texts = adapter.spec, saved.embeds, saved.metadata
    wanted, held = spec.format.feature, texts.get("feature")
    fits = embeds.ndim == wanted.rank and embeds.shape[-1] == spec.feature_dim
    if fits and held in (None, wanted.name):
        return
    made = (
        f", made with {one_line(texts['encoder'])} for a {one_line(texts.get('family', ''), 20)} adapter"
        if "encoder" in texts
        else ""
    )
    what = FEATURES[held].what if held in FEATURES else "embeds"
    known = "; and ".join(filter(None, map(files_of, spec.encoders)))
    raise IncompatibleEncoderError(
        f"{name} holds {what} of shape {tuple(embeds.shape)}{made}; {adapter.name} is a {spec.family} adapter, which reads "
        f"{wanted.what}, {spec.feature_dim} wide: load it with an adapter of the kind that it was made for, or encode the "
        f"references for this one, with {known or f'the encoder {spec.encoder}'}"
    )


def _number(name: str, saved: SavedEmbeds, key: str, default: float, least: float, most: float) -> float:
    text = saved.metadata.get(key, str(default))
    try:
        value = float(text) if len(text) <= 40 else math.nan
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and least <= value <= most):
        raise CorruptFileError(f"{name} says {key} is {quoted(text)}, which is no number that it can have")
    return value


def _branch(name: str, saved: SavedEmbeds) -> NegativeBranch:
    text = saved.metadata.get("negative_branch", "tokens")
    for known in get_args(NegativeBranch):
        if known == text:
            return known
    raise CorruptFileError(f"{name} says negative_branch is {quoted(text)}; tokens, same or off were expected")


def _distinct(rows: Tensor) -> Tensor:
    """One row where all are the same."""
    return rows[:1] if bool((rows == rows[:1]).all()) else rows


def _beside(name: str, what: str, rows: Tensor | None, embeds: Tensor, latents: int) -> Tensor | None:
    """What stands beside the references, as ``b|1 k|1 ...``."""
    if rows is None:
        return None
    if rows.shape[1:] != embeds.shape[1:] or len(rows) not in (1, len(embeds)):
        raise CorruptFileError(
            f"{name} holds references of shape {tuple(embeds.shape)} and {what} ones of shape {tuple(rows.shape)}; they must "
            "agree"
        )
    rows = rows.float()
    return rows[None] if len(rows) == 1 else rows.unflatten(0, (latents, -1))
