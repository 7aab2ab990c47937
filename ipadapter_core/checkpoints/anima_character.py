"""The Character Reference adapter for Anima, with the LoRA that was trained along (LuciferTC/Anima-IP-Adapter).

The encoder's tokens go straight to the layers. The query is that of the attention to the text, after its norm; the result joins
the residual stream behind the whole block, times a gate that each layer makes of the block's conditioning.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import Tensor, nn

from ..errors import CorruptFileError, UnknownFormatError, one_line
from ..features import LAST, find_encoder
from ..files.state_dict import StateDict, TensorFile
from ..models.reach import Reach, every
from .anima_layers import AnimaFormat
from .format import AdapterModule, AdapterSpec, linear_layers, shape_of
from .keys import Keys
from .projectors import Operations

NUMBER = r"(?:0|[1-9][0-9]{0,4})"
LORA_KEY = re.compile(
    rf"lora\.base_model\.model\.blocks\.(?P<number>{NUMBER})\."
    r"(?P<layer>(?:self|cross)_attn\.(?:q|k|v|output)_proj|mlp\.layer[12])\.lora_(?P<side>[AB])\.weight"
)
LAYER_KEYS = rf"blocks\.{NUMBER}\.(ip_[kv]_proj|adaln_ip\.1)\.(weight|bias)"

UNPUBLISHED = (
    (r"shared_ip_", "projections that all blocks share"),
    (r"ip_self_attn\.", "an attention of the image tokens to themselves"),
    (r"siglip_norm\.", "a norm of the encoder's tokens"),
    (r"siglip_compressor\.", "a compressor of the encoder's tokens"),
    (r"null_tokens$", "learned tokens for no image"),
    (r"lora\..*\.lora_[AB]\.default\.", "a LoRA under PEFT's key for an adapter's name"),
)
"""What the author's code also reads, in files that nobody has published: keys, and what they are."""

METADATA = {
    "ip_norm_keys": "normed keys",
    "ip_inject_before_mlp": "a result that is added before the MLP",
}


class AnimaCharacter(AnimaFormat):
    name = "anima-character"
    label = "Anima Character Reference (all tokens of SigLIP2, gates, a LoRA for the whole model)"
    serves = (("general", 3), ("character", 3), ("style", 1))
    public = ("Anima", "ip_adapter-Character_Reference-10.safetensors")
    feature = LAST
    unconditional = "off"
    framing = "fit"
    keys = Keys(
        "projector.",
        {
            "to_k_ip": "blocks.{}.ip_k_proj",
            "to_v_ip": "blocks.{}.ip_v_proj",
            "adaln_ip": "blocks.{}.adaln_ip",
        },
        first=0,
        step=1,
    )
    released = ("ip_adapter-Character_Reference-10.safetensors of LuciferTC/Anima-IP-Adapter",)
    anchor = "blocks.0.ip_k_proj.weight"
    allowed = re.compile(r"(?!)")
    layer_keys = re.compile(rf"{LAYER_KEYS}|{LORA_KEY.pattern}")
    lora_keys = LORA_KEY
    reach = Reach(every, query="normed", join="residual", text_wide=False, gated=True)
    advice = (
        "1 for characters, 0.5 for a style; load the LoRA inside the file at the same strength, plain backgrounds help. Only the "
        "positive branch sees the picture, so cfg amplifies it"
    )

    def resembles(self, state: StateDict) -> bool:
        return self.keys.any_layer(state)

    def likeness(self, state: StateDict) -> tuple[int, int]:
        matching = sum(self.layer_keys.fullmatch(key) is not None for key in state)
        return (matching if self.keys.any_layer(state) else 0), len(state)

    def variant(self, file: TensorFile) -> str | None:
        found = [what for pattern, what in UNPUBLISHED if any(re.match(pattern, key) for key in file.tensors)]
        found += [what for name, what in METADATA.items() if file.metadata.get(name, "").lower() == "true"]
        return " and ".join(found) or None

    def parse(self, file: TensorFile) -> AdapterSpec:
        told = self.variant(file)
        if told is not None:
            raise UnknownFormatError(f"has {told}, which no published file has: this pack does not read it.")
        state, first = file.tensors, self.keys.layer("to_k_ip", 0)
        _, width = shape_of(state, first, rank=2)
        _, embedding_dim = shape_of(state, self.keys.layer("adaln_ip", 0, "1.weight"), rank=2)
        encoder = find_encoder("last", width)
        spec = self.spec(
            state,
            first,
            num_tokens=0 if encoder is None else encoder.tokens,
            feature_dim=width,
            token_dim=width,
            options={"embedding_dim": embedding_dim},
        )
        alpha = one_line(file.metadata.get("lora_alpha", ""))
        if alpha.isascii() and alpha.isdigit() and 0 < len(alpha) < 6:
            spec = replace(spec, options={**spec.options, "lora_alpha": int(alpha)})
        return spec

    def projector(self, spec: AdapterSpec, operations: Operations) -> nn.Module:
        return nn.Identity()

    def layers(self, spec: AdapterSpec, operations: Operations) -> Mapping[str, nn.Module]:
        width = spec.options["embedding_dim"]
        gates = (nn.Sequential(nn.SiLU(), operations.Linear(width, c)) for c in spec.layer_channels)
        return {**linear_layers(spec, operations, bias=True), "adaln_ip": nn.ModuleList(gates)}

    def gate(self, module: AdapterModule, index: int) -> Callable[[Tensor], Tensor]:
        return module.layer("adaln_ip", index)

    def check_lora(self, lora: StateDict, spec: AdapterSpec) -> None:
        widths: dict[str, tuple[int, str]] = {}
        for key, tensor in lora.items():
            match = LORA_KEY.fullmatch(key)
            assert match is not None
            down = match["side"] == "A"
            other = key.replace(".lora_A.", ".lora_B.") if down else key.replace(".lora_B.", ".lora_A.")
            axis = 0 if down else 1
            fits = other in lora and tensor.ndim == 2 == lora[other].ndim
            if not fits or tensor.shape[axis] != lora[other].shape[1 - axis] or not tensor.shape[axis]:
                raise CorruptFileError(
                    f"the LoRA inside has '{key}' without a '{other}' that fits: the file is incomplete."
                )
            if not tensor.is_floating_point():
                raise CorruptFileError(
                    f"the LoRA inside has '{key}' stored as {tensor.dtype}; use a file in float16 or float32."
                )
            number = int(match["number"])
            if number >= len(spec.layer_channels):
                raise CorruptFileError(
                    f"the LoRA inside has '{key}' for a block that has no layer: its parts are of different adapters."
                )
            found = int(tensor.shape[1 - axis])
            free = _other_width(match["layer"], down)
            wanted, by = widths.setdefault(free, (found, key)) if free else (spec.layer_channels[number], "the layer")
            if found != wanted:
                raise CorruptFileError(
                    f"the LoRA inside has '{key}' of the shape {list(tensor.shape)} where {by} says {wanted}: the file is damaged, or "
                    "its parts are of different adapters."
                )

    def loadable_lora(self, lora: StateDict, spec: AdapterSpec) -> dict[str, Tensor]:
        """ComfyUI's keys; a file that says another alpha than its rank has it multiplied in."""
        named: dict[str, Tensor] = {}
        for key, tensor in lora.items():
            if key.endswith(".lora_B.weight") and "lora_alpha" in spec.options:
                tensor = tensor * (spec.options["lora_alpha"] / tensor.shape[1])
            named[key.replace("lora.base_model.model.", "diffusion_model.")] = tensor
        return named

    def is_cross_attention(self, key: str) -> bool:
        return ".cross_attn." in key


def _other_width(layer: str, down: bool) -> str:
    """What a side of a layer is as wide as where that is not the model: the text, or the middle of the MLP."""
    if layer in ("cross_attn.k_proj", "cross_attn.v_proj"):
        return "text" if down else ""
    return "mlp" if (layer, down) in (("mlp.layer1", False), ("mlp.layer2", True)) else ""


FORMAT = AnimaCharacter()
