"""The LoRA inside FaceID files: taken out, and named as LoRA loaders know it.

A file numbers every attention of the UNet in the order down, up, mid: even numbers self-, odd ones cross-attention.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor

from ..errors import CorruptFileError
from ..files.state_dict import StateDict
from ..models.unet import UNETS, attention_paths
from .format import AdapterSpec, Format

LORA_KEY = re.compile(r"ip_adapter\.(0|[1-9][0-9]{0,4})\.to_(q|k|v|out)_lora\.(down|up)\.weight")
LAYERS_AND_LORA = re.compile(
    r"ip_adapter\.(0|[1-9][0-9]{0,4})\.(to_[kv]_ip\.weight|to_(q|k|v|out)_lora\.(down|up)\.weight)"
)


class CarriesLoRA(Format):
    """A family of UNet adapters whose files may hold a LoRA of every attention."""

    layer_keys = LAYERS_AND_LORA
    lora_keys = LORA_KEY

    def check_lora(self, lora: StateDict, spec: AdapterSpec) -> None:
        check_lora(lora, spec.layer_channels, spec.token_dim)

    def loadable_lora(self, lora: StateDict, spec: AdapterSpec) -> dict[str, Tensor]:
        return kohya_lora(lora, len(spec.layer_channels))


def check_lora(lora: StateDict, channels: Sequence[int], token_dim: int) -> None:
    """Raise CorruptFileError unless every down has an up of the same rank and both fit their layer.

    ``channels`` are the widths of the adapter's cross-attentions by number, which the self-attentions before them share;
    ``token_dim`` is the width of the text. No number is read here; ``format.check_finite`` does that.
    """
    for key, tensor in lora.items():
        other = key.replace(".down.", ".up.") if ".down." in key else key.replace(".up.", ".down.")
        axis = 0 if ".down." in key else 1
        if (
            other not in lora
            or tensor.ndim != 2
            or lora[other].ndim != 2
            or lora[other].shape[1 - axis] != tensor.shape[axis]
        ):
            raise CorruptFileError(
                f"the LoRA inside has '{key}' without a '{other}' that fits: the file is incomplete."
            )
        if not tensor.is_floating_point():
            raise CorruptFileError(
                f"the LoRA inside has '{key}' stored as {tensor.dtype}; use a file in float16 or float32."
            )
        match = LORA_KEY.fullmatch(key)
        assert match is not None
        number, part = int(match[1]), match[2]
        if number // 2 >= len(channels):
            continue  # kohya_lora says so by the number of layers
        wanted = channels[number // 2]
        if axis == 0 and number % 2 and part in ("k", "v"):
            wanted = token_dim
        found = int(tensor.shape[1 - axis])
        if found != wanted:
            raise CorruptFileError(
                f"the LoRA inside has '{key}' of the shape {list(tensor.shape)} for a layer of {wanted}: the file is damaged, or "
                "its parts are of different adapters."
            )


def kohya_lora(lora: StateDict, layers: int) -> dict[str, Tensor]:
    """The LoRA of a FaceID file under kohya's keys (``lora_unet_…_attn2_to_k.lora_down.weight``), scale 1 (no alpha).

    ``layers`` counts the adapter's cross-attentions. Raises CorruptFileError for a UNet whose names are not known.
    """
    paths = attention_paths(layers)
    if paths is None:
        known = " and ".join(str(n) for n in sorted({unet.attentions for unet in UNETS}))
        raise CorruptFileError(f"the LoRA inside belongs to a UNet with {layers} cross-attentions; {known} are known")
    named: dict[str, Tensor] = {}
    for key, tensor in lora.items():
        match = LORA_KEY.fullmatch(key)
        assert match is not None
        number, part, direction = int(match[1]), match[2], match[3]
        if number // 2 >= len(paths):
            raise CorruptFileError(f"'{key}' numbers an attention that a UNet with {layers} cross-attentions has not")
        module = f"{paths[number // 2]}.attn{1 + number % 2}.to_{'out.0' if part == 'out' else part}"
        named[f"lora_unet_{module.replace('.', '_')}.lora_{direction}.weight"] = tensor
    return named
