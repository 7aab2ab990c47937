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
    """The same tensors with every adapter key as ``image_proj.…`` or ``ip_adapter.…``.

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


def is_value_only(state: StateDict) -> bool:
    """Whether an adapter has value layers and no key layers (Style Components)."""
    return _matches(r"^ip_adapter\..*to_v_ip")(state) and not _matches(r"^ip_adapter\..*to_k_ip")(state)


_LAYER = re.compile(r"ip_adapter\.([0-9]{1,5})\.to_[kv]_ip\.weight")


def numbers_every_layer(state: StateDict) -> bool:
    """Whether an adapter's layers are numbered 0, 1, 2, … and not 1, 3, 5, …, even if one of them is missing or strange."""
    numbers = {int(match[1]) for match in map(_LAYER.fullmatch, state) if match}
    return 3 * sum(number % 2 == 0 for number in numbers) >= max(1, len(numbers))


OTHER_FAMILIES: tuple[tuple[Test, str], ...] = (
    # the special before the general: reference ip-adapter.md, A.8
    (_matches(r"^ip_cross_attns\."), "an IP-Adapter for Anima (SigLIP2 encoder)"),
    (_has("image_proj.proj_new_input.weight"), "an IP-Adapter Instruct"),
    (is_value_only, "a Style Components adapter (values only)"),
    (_matches(r"^encoder_hid_proj\."), "an adapter in diffusers' processor names (IP-Adapter-Art)"),
    (_matches(r"^(pulid_ca|pulid_encoder|id_adapter)"), "a PuLID adapter"),
)
"""Adapters of families that are not supported: a test and a name. Asked only when no format claims a file."""

_NO_ADAPTER = "Choose an IP-Adapter file, e.g. ip-adapter-plus_sd15.safetensors"

OTHER_FILES: tuple[tuple[Test, str, str], ...] = (
    (
        _matches(r"lora[0-9]?[._](down|up)\.|lora_[AB]\.|hada_w|lokr_w|\.dora_scale$"),
        "a LoRA",
        "Load it with a LoRA loader",
    ),
    (
        _matches(
            r"controlnet_cond_embedding\.|^control_model\.|input_hint_block\.|controlnet_(down_|single_)?blocks\."
        ),
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
        _matches(
            r"^(input_blocks|down_blocks|(double_|single_|joint_|(single_)?transformer_)blocks)\.[0-9]+\.|^unet\.|"
            r"^(net\.)?blocks\.[0-9]+\.(self_attn|cross_attn|mlp|adaln_)"
        ),
        "a diffusion model (UNet or transformer)",
        "Load it as the model that the adapter is applied to. " + _NO_ADAPTER,
    ),
    (_matches(r"^(decoder|encoder)\.(conv_in|mid|up|down)"), "an image autoencoder (VAE)", _NO_ADAPTER),
    (_matches(r"exp_avg|^optimizer\."), "the optimiser state of a training", "Choose the weights of the same training"),
)
"""What else a file may be: a test, its name and what to do. Asked only when it resembles no format."""


def other_family(state: StateDict) -> str | None:
    """The name of an unsupported family that a normalised state is of; None if it is of none known."""
    return next((name for test, name in OTHER_FAMILIES if test(state)), None)


def other_file(state: StateDict) -> tuple[str, str] | None:
    """Name and advice for a normalised state of another kind of file; None if it is like nothing known."""
    return next(((name, advice) for test, name, advice in OTHER_FILES if test(state)), None)
