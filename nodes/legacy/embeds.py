"""Encoded references as values of their own: encode, combine, apply, save, load."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from ...ipadapter_core import (
    EncodeOptions,
    InvalidInputError,
    combine_features,
    prompt_from_features,
    rules_for,
    unconditional_features,
)
from ...ipadapter_core.attention.schedule import Scaling
from ...ipadapter_core.legacy.settings import LegacySettings
from ...ipadapter_core.prompt.combine import Combine, at_strength
from ...ipadapter_core.prompt.embeds import EXTENSION, SavedEmbeds, combine_embeds, load_embeds, save_embeds
from ...ipadapter_core.prompt.encode import negative_branch
from .. import host
from .encode import encode_pictures, vision
from .first_encoder import encode_first
from .pipeline import Pipeline, understand
from .sockets import (
    ADAPTER,
    CLIP_VISION,
    EMBEDS,
    IMAGE,
    MASK,
    MODEL,
    Inputs,
    LegacyNode,
    choice,
    compatibility,
    former,
    number,
    scaling,
    weight,
    weight_type,
    window,
)

FIRST = "Only for graphs from before March 2024, with image_1 and its like."


class IPAdapterEncoder(LegacyNode):
    """One class type with two sets of inputs: today's, and those of before 2024-03-23 (``image_1`` and its like).

    A saved graph gives widgets by position, so the old ones stand behind ``weight``, whose place the old node's
    ``ipadapter_plus`` had. Nothing can be required of both; encode() asks for what is missing.
    """

    REPLACEMENT = "Encode Image Prompt"
    RETURN_TYPES = ("EMBEDS", "EMBEDS")
    RETURN_NAMES = ("pos_embed", "neg_embed")
    FUNCTION = "encode"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        first = {"noise": number(0.0, 0.0, 1.0, 0.01, tooltip=FIRST)}
        first |= {f"weight_{i}": number(1.0, 0.0, 1.0, 0.01, tooltip=FIRST) for i in range(1, 5)}
        sockets = {"ipadapter": ADAPTER, "image": IMAGE, "mask": MASK, "clip_vision": CLIP_VISION}
        pictures = {f"image_{i}": IMAGE for i in range(1, 5)}
        plus = dict.fromkeys(("plus", "ipadapter_plus"), former("BOOLEAN", "whether the adapter is of the plus family"))
        return {
            "required": {},
            "optional": sockets | {"weight": number(1.0, -1.0, 3.0, 0.01)} | first | pictures | plus | compatibility(),
        }

    def encode(
        self, ipadapter: Any = None, image: Tensor | None = None, weight: float = 1.0, mask: Tensor | None = None,
        clip_vision: Any = None, compatibility: str = "IPAdapter_plus", **first: Any,
    ) -> tuple[Any, ...]:  # fmt: skip
        if ipadapter is None and image is not None and clip_vision is not None:
            first["image_1"] = image  # as in the first two weeks
        plus = [first.pop(name, None) for name in ("plus", "ipadapter_plus")]
        if first.get("image_1") is not None:
            told = next((value for value in plus if value is not None), weight)
            return encode_first(clip_vision, plus=bool(told), compatibility=compatibility, **first)
        if ipadapter is None or image is None:
            raise InvalidInputError(
                f"IPAdapter Encoder has no {'ipadapter' if ipadapter is None else 'image'}: connect it (or, in a graph from "
                "before March 2024, image_1 and clip_vision)"
            )
        rules = rules_for(compatibility)
        found = understand(ipadapter)
        encoder = vision(Pipeline(found.adapter, found.clip_vision if clip_vision is None else clip_vision))
        adapter = found.adapter.weights
        options = EncodeOptions(rules=rules, progress=host.frontend.progress_bar())
        features, neutral = encode_pictures(adapter, encoder, image, None, options, mask)
        features = at_strength(features, neutral, weight, rules)
        count = len(features) if adapter.spec.format.feature.encoded == "image_embeds" else 1
        return features, neutral.expand(count, *neutral.shape[1:])


class IPAdapterCombineEmbeds(LegacyNode):
    REPLACEMENT = "Combine Image Prompts"
    RETURN_TYPES = ("EMBEDS",)
    FUNCTION = "batch"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {"embed1": EMBEDS, "method": choice(get_args(Combine))},
            "optional": {f"embed{i}": EMBEDS for i in range(2, 6)} | compatibility(),
        }

    def batch(
        self, embed1: Tensor, method: Combine, embed2: Tensor | None = None, embed3: Tensor | None = None,
        embed4: Tensor | None = None, embed5: Tensor | None = None, compatibility: str = "IPAdapter_plus",
    ) -> tuple[Any, ...]:  # fmt: skip
        joined = combine_embeds([e for e in (embed1, embed2, embed3, embed4, embed5) if e is not None])
        if method == "concat":
            return (joined,)
        return (combine_features(torch.split(joined, 1), method, rules_for(compatibility)),)


class IPAdapterEmbeds(LegacyNode):
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "apply_ipadapter"
    UNFOLD = False

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {
            "required": {"model": MODEL, "ipadapter": ADAPTER, "pos_embed": EMBEDS}
            | weight(3.0)
            | weight_type()
            | window(),
            "optional": scaling()
            | {"neg_embed": EMBEDS, "attn_mask": MASK, "clip_vision": CLIP_VISION}
            | compatibility(),
        }

    def apply_ipadapter(
        self, model: Any, ipadapter: Any, pos_embed: Tensor, weight: Any, weight_type: str, start_at: float, end_at: float,
        neg_embed: Tensor | None = None, attn_mask: Tensor | None = None, clip_vision: Any = None,
        embeds_scaling: Scaling = "V only", compatibility: str = "IPAdapter_plus",
    ) -> tuple[Any, ...]:  # fmt: skip
        found = understand(ipadapter)
        rules = rules_for(compatibility)
        settings = LegacySettings(
            weight,
            weight_type,
            start_at=start_at,
            end_at=end_at,
            embeds_scaling=embeds_scaling,
            unfold_batch=self.UNFOLD,
        )
        adapter = found.adapter.to_device()
        branch = negative_branch(adapter.spec.unconditional) if neg_embed is None else "tokens"
        if neg_embed is None:
            clip_vision = found.clip_vision if clip_vision is None else clip_vision
            encoder = None if clip_vision is None else host.clip_vision.encoder_of(clip_vision)
            neg_embed = unconditional_features(adapter, encoder, pos_embed, rules)
        options = EncodeOptions(per_latent=self.UNFOLD, rules=rules)
        prompt = prompt_from_features(adapter, pos_embed, neg_embed, options, negative_branch=branch)
        model, _ = host.adapters.apply(model, found.adapter, prompt, settings.schedule(), attn_mask, rules)
        return model, None  # the place of the faces, which other packs unpack


class IPAdapterEmbedsBatch(IPAdapterEmbeds):
    UNFOLD = True


class IPAdapterSaveEmbeds(LegacyNode):
    REPLACEMENT = "Save Image Prompt"
    RETURN_TYPES = ()
    FUNCTION = "save"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"embeds": EMBEDS, "filename_prefix": ("STRING", {"default": "IP_embeds"})}}

    def save(self, embeds: Tensor, filename_prefix: str) -> tuple[Any, ...]:
        save_embeds(host.access.free_path(filename_prefix, "", EXTENSION), SavedEmbeds(embeds))
        return (None,)


class IPAdapterLoadEmbeds(LegacyNode):
    REPLACEMENT = "Load Image Prompt"
    RETURN_TYPES = ("EMBEDS",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        return {"required": {"embeds": (host.files.input_names((".ipadpt", EXTENSION)),)}}

    def load(self, embeds: str) -> tuple[Any, ...]:
        return (load_embeds(host.access.readable(embeds, "file")).embeds,)
