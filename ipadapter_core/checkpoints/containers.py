"""The wrappings adapter files come in, taken off; and names for the files that are no adapter at all."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import Tensor

from ..files.state_dict import StateDict

WRAPPERS = ("module.", "_orig_mod.", "state_dict.")
"""Prefixes that DistributedDataParallel, torch.compile and training frameworks put before every key."""

GROUPS: tuple[tuple[str, str], ...] = (
    ("image_proj.", "image_proj."),
    ("ip_adapter.", "ip_adapter."),
    ("image_proj_model.", "image_proj."),  # the attribute names of tencent's training scripts
    ("adapter_modules.", "ip_adapter."),
)
"""Groups of keys and what they become. Of two that become the same, the first wins: some files hold both."""

SET_ASIDE = ("unet.", "image_encoder.", "optimizer.")
"""Groups left out beside an adapter: the frozen UNet of raw training dumps, an image encoder trained along, …"""


def normalise(state: StateDict) -> dict[str, Tensor]:
    """The same tensors with every adapter key as `image_proj.…` or `ip_adapter.…`.

    Wrapper prefixes and groups that no adapter needs are gone; keys of other groups stay as they are.
    """
    unwrapped: dict[str, Tensor] = {}
    for key in sorted(state, key=len):  # of a key with and one without wrapper, the latter
        unwrapped.setdefault(_unwrap(key), state[key])
    group_of = {key: next((g for g in GROUPS if key.startswith(g[0])), None) for key in unwrapped}
    chosen: dict[str, str] = {}
    present = {group[0] for group in group_of.values() if group is not None}
    for prefix, target in GROUPS:
        if prefix in present:
            chosen.setdefault(target, prefix)
    tensors: dict[str, Tensor] = {}
    for key in unwrapped:
        group = group_of[key]
        if group is not None and chosen[group[1]] == group[0]:
            tensors[group[1] + key.removeprefix(group[0])] = unwrapped[key]
        elif group is None and not (chosen and key.startswith(SET_ASIDE)):
            tensors[key] = unwrapped[key]
    return tensors


def left_out(state: StateDict) -> dict[str, int]:
    """Groups beside an adapter that normalise() drops, with how many tensors each holds."""
    keys = [_unwrap(key) for key in state]
    counts = {group.rstrip("."): sum(key.startswith(group) for key in keys) for group in SET_ASIDE}
    return {group: count for group, count in counts.items() if count}


def _unwrap(key: str) -> str:
    while key.startswith(WRAPPERS):
        key = key.split(".", 1)[1]
    return key


Test = Callable[[StateDict], bool]


def _has(*keys: str) -> Test:
    return lambda state: all(key in state for key in keys)


def _matches(pattern: str) -> Test:
    search = re.compile(pattern).search
    return lambda state: any(map(search, state))


def _is_face_resampler(state: StateDict) -> bool:
    proj_in = state.get("image_proj.proj_in.weight")
    return "image_proj.latents" in state and proj_in is not None and tuple(proj_in.shape[1:]) == (512,)


def _is_value_only(state: StateDict) -> bool:
    return _matches(r"^ip_adapter\..*to_v_ip")(state) and not _matches(r"^ip_adapter\..*to_k_ip")(state)


_OTHER_FAMILY = "This family is not supported; base, plus, full-face and FaceID adapters of SD1.5, SD2 and SDXL are"
_NO_ADAPTER = "Choose an IP-Adapter file, e.g. ip-adapter-plus_sd15.safetensors"

OTHER_FILES: tuple[tuple[Test, str, str], ...] = (
    # Adapters of other families, the special before the general: reference ip-adapter.md, A.8
    (_matches(r"ip_adapter_double_stream|^ip_adapter_proj_model\."), "a Flux IP-Adapter of XLabs", _OTHER_FAMILY),
    (_has("ip_adapter.0.norm_ip.linear.weight"), "a Stable Diffusion 3.5 IP-Adapter", _OTHER_FAMILY),
    (_matches(r"^ip_adapter\.0\.norm_ip_k\."), "an InstantCharacter adapter for Flux", _OTHER_FAMILY),
    (_matches(r"^ip_gate\.|^ip_centroid$"), "an IP-Adapter for Anima (PE encoder)", _OTHER_FAMILY),
    (_matches(r"^ip_cross_attns\."), "an IP-Adapter for Anima (SigLIP2 encoder)", _OTHER_FAMILY),
    (_has("ip_adapter.0.to_k_ip.weight"), "a Flux IP-Adapter of InstantX", _OTHER_FAMILY),
    (_has("image_proj.proj_new_input.weight"), "an IP-Adapter Instruct", _OTHER_FAMILY),
    (_matches(r"^image_proj\.perceiver_resampler\."), "a FaceID Plus adapter (v1 or v2)", _OTHER_FAMILY),
    (_is_face_resampler, "an InstantID adapter or a FaceID portrait (unnorm) one", _OTHER_FAMILY),
    (_is_value_only, "a Style Components adapter (values only)", _OTHER_FAMILY),
    (_has("image_proj.proj.2.weight", "image_proj.norm.weight"), "a FaceID adapter", _OTHER_FAMILY),
    (_matches(r"^ip_adapter\..*_lora\.(down|up)\.weight$"), "a FaceID adapter (it carries a LoRA)", _OTHER_FAMILY),
    (_matches(r"^encoder_hid_proj\."), "an adapter in diffusers' processor names (IP-Adapter-Art)", _OTHER_FAMILY),
    (_matches(r"^(pulid_ca|pulid_encoder|id_adapter)"), "a PuLID adapter", _OTHER_FAMILY),
    # Files of other kinds
    (
        _matches(r"lora[._](down|up)\.|lora_[AB]\.|hada_w|lokr_w|\.dora_scale$"),
        "a LoRA",
        "Load it with a LoRA loader",
    ),
    (
        _matches(r"controlnet_cond_embedding\.|^control_model\.|input_hint_block\.|controlnet_down_blocks\."),
        "a ControlNet",
        "Load it with a ControlNet loader",
    ),
    (
        _matches(r"^(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\."),
        "a full checkpoint of a diffusion model",
        "Load it as the model that the adapter is applied to. " + _NO_ADAPTER,
    ),
    (
        _matches(r"vision_model\.(embeddings|encoder)\.|^visual\.|^(embeddings|encoder)\..*patch_embed"),
        "an image encoder (CLIP vision or the like)",
        "Load it as the image encoder. " + _NO_ADAPTER,
    ),
    (_matches(r"text_model\.(embeddings|encoder)\.|^shared\.weight$"), "a text encoder", _NO_ADAPTER),
    (
        _matches(r"^(input_blocks|down_blocks|double_blocks|transformer_blocks|joint_blocks)\.[0-9]+\.|^unet\."),
        "a diffusion model (UNet or transformer)",
        "Load it as the model that the adapter is applied to. " + _NO_ADAPTER,
    ),
    (_matches(r"^(decoder|encoder)\.(conv_in|mid|up|down)"), "an image autoencoder (VAE)", _NO_ADAPTER),
    (_matches(r"exp_avg|^optimizer\."), "the optimiser state of a training", "Choose the weights of the same training"),
)
"""What else a file may be: a test, its name and what to do. Asked only when no format claims a file."""


def recognise(state: StateDict) -> tuple[str, str] | None:
    """Name and advice for a normalised state that no format claims; None if it is like nothing known."""
    return next(((name, advice) for test, name, advice in OTHER_FILES if test(state)), None)
