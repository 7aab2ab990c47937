"""Module paths of full-size base models, with their dots: what a file's underscored names stand for."""

from __future__ import annotations

import re
from functools import cache

from ..models import BASE_MODELS
from ..models.layers import underscored
from ..models.naming import Found, Naming
from ..models.unet import UNETS, full_size_layers
from .weights import families_in


@cache
def unet_paths(family: str) -> tuple[tuple[str, str], ...]:
    """(diffusers, LDM) path of every layer of a full-size UNet; empty for a family that is none."""
    unet = next((unet for unet in UNETS if unet.name == family.split(" or ")[0]), None)
    return () if unet is None else tuple((layer.diffusers, layer.ldm) for layer in full_size_layers(unet))


@cache
def by_name(family: str) -> dict[str, tuple[str, str]]:
    """(diffusers, LDM) path by either underscored name."""
    return {underscored(name): pair for pair in unet_paths(family) for name in pair}


def _namings() -> tuple[Naming, ...]:
    return tuple(base.naming for base in BASE_MODELS if base.naming)


def found_in(name: str, base_model: str) -> Found | None:
    """What an underscored name stands for in the tables of these families (``Flux or Chroma``); None if in none of them."""
    families = families_in(base_model)
    found = (naming.find(name) for naming in _namings() if naming.family in families)
    return next((one for one in found if one is not None), None)


def in_any_table(name: str) -> bool:
    """Whether some family of transformers has a layer of this underscored name."""
    return any(naming.find(name) is not None for naming in _namings())


_TEXT = re.compile(r"^(?:text_model_)?encoder_layers_(\d+)_(self_attn_(?:[qkv]|out)_proj|mlp_fc[12])$")


def text_path(name: str) -> str | None:
    """``text_model.encoder.layers.0.self_attn.q_proj`` of a CLIP text encoder from its underscored name."""
    match = _TEXT.match(name)
    if match is None:
        return "text_projection" if name == "text_projection" else None
    inner = match[2].replace("self_attn_", "self_attn.").replace("mlp_", "mlp.")
    return f"text_model.encoder.layers.{match[1]}.{inner}"


@cache
def _word() -> re.Pattern[str]:
    """Words with an underscore inside; all other underscores of a name stand for dots."""
    words = {word for unet in UNETS for pair in unet_paths(unet.name) for path in pair for word in path.split(".")}
    words |= {word for naming in _namings() for path in naming.paths() for word in path.split(".")}
    inside = sorted((word for word in words if "_" in word), key=len, reverse=True)
    return re.compile("(?:^|(?<=_))(" + "|".join(inside) + ")(?=_|$)")


def dotted(name: str) -> str:
    """The path of a layer from its underscored name, for models that are in no table."""
    return _word().sub(lambda word: word[0].replace("_", "\0"), name).replace("_", ".").replace("\0", "_")


@cache
def _ldm_starts() -> tuple[str, ...]:
    return tuple({f"{ldm.split('.')[0]}_" for unet in UNETS for _, ldm in unet_paths(unet.name)})


def is_ldm(name: str) -> bool:
    """Whether an underscored name is of the LDM kind, as ComfyUI's, and not of diffusers'."""
    return name.startswith(_ldm_starts())
