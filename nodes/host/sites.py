"""Where image prompts can act in a model that is only a file yet: ComfyUI's own model of its header, without weights."""

from __future__ import annotations

from functools import lru_cache

import comfy.model_detection
import torch

from ...ipadapter_core import InvalidInputError
from ...ipadapter_core.attention.presets import PRESETS, SiteWeights, parse_site_factors
from ...ipadapter_core.errors import quoted, reason
from ...ipadapter_core.files.state_dict import describe_state_dict
from ...ipadapter_core.models import layout_of
from ...ipadapter_core.models.sites import ModelLayout
from . import files


@lru_cache(16)
def layout_of_file(version: files.Version, name: str) -> ModelLayout:
    """The sites of the denoiser in a checkpoint or a diffusion model, as ComfyUI will build it; only the header is read.

    Raises the errors of ``describe_state_dict``, InvalidInputError for a model that ComfyUI does not know, and
    IncompatibleAdapterError for one without sites.
    """
    tensors = dict(describe_state_dict(version[0], name=name).tensors)
    try:
        prefix = comfy.model_detection.unet_prefix_from_state_dict(tensors)
        denoiser = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)} or tensors
        config = comfy.model_detection.model_config_from_unet(denoiser, "")
        model = None if config is None else config.get_model(denoiser, "", device=torch.device("meta"))
    except Exception as error:  # whatever it makes of a stranger's header
        raise InvalidInputError(f"ComfyUI cannot build the model in {quoted(name)} ({reason(error)})") from None
    if model is None:
        raise InvalidInputError(f"ComfyUI does not know the model in {quoted(name)}")
    return layout_of(model.diffusion_model)


def site_table(layout: ModelLayout, sites: str) -> dict[str, object]:
    """What a site table gives every layer (``order``) of a model, its rules one by one, and what each preset gives instead.

    Presets that move the image to the negative prompt at some sites are left out: a table cannot say that.
    """
    rules = parse_site_factors(sites)
    factors: dict[int, list[float]] = {}
    for site, weight in zip(layout.sites, SiteWeights(site_factors=rules).of(layout), strict=True):
        factors.setdefault(site.order, []).append(weight.weight)
    first = {site.order: site for site in reversed(layout.sites)}
    roles = layout.model.roles
    return {
        "base_model": layout.name,
        "layers": [
            {
                "order": order,
                "group": first[order].group,
                "number": first[order].number,
                "sites": len(found),
                "role": "" if roles is None else roles.of(first[order]),
                "low": min(found),
                "high": max(found),
            }
            for order, found in factors.items()
        ],
        "rules": [{"where": rule.where, "factor": rule.factor} for rule in rules],
        "presets": {name: found for name in PRESETS if (found := _preset(name, layout))},
    }


def _preset(name: str, layout: ModelLayout) -> dict[str, float]:
    """Weights of a preset at strength 1 by ``order``; empty for one that the model cannot have or a table cannot say."""
    try:
        weights = SiteWeights(preset=name).of(layout)
    except InvalidInputError:
        return {}
    if any(weight.flipped for weight in weights):
        return {}
    return {f"t{site.order}": round(weight.weight, 4) for site, weight in zip(layout.sites, weights, strict=True)}
