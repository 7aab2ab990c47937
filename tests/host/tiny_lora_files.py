"""LoRA files for the shrunk models, in kohya's spelling by LDM names, which every loader reads."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from host.shrunk import UNETS, unet_shapes

WHERE = ("attn1.", "attn2.", "ff.net.", "in_layers.2", "out_layers.3", "emb_layers.1", "proj_in", "op.weight")


def build_lora(unet: str, folder: Path, *, seed: int = 0, rank: int = 4, size: float = 1.0) -> Path:
    """A LoRA on linears and convolutions of a shrunk UNet, alpha half the rank."""
    path = folder / f"lora_{unet}_s{seed}_r{rank}_{size:g}.safetensors"
    if not path.exists():
        save_file(lora_tensors(unet, seed, rank, size), path, metadata={"ss_network_dim": str(rank)})
    return path


def lora_tensors(unet: str, seed: int = 0, rank: int = 4, size: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for key, shape in unet_shapes(UNETS[unet]):
        if key.endswith(".weight") and len(shape) > 1 and any(part in key for part in WHERE):
            out, *rest = shape
            stem = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
            columns = torch.Size(rest).numel()
            down = torch.randn(rank, *rest, generator=generator) / columns**0.5
            up = torch.randn(out, rank, *[1] * (len(rest) - 1), generator=generator) * size / rank**0.5
            tensors |= {
                f"{stem}.lora_down.weight": down,
                f"{stem}.lora_up.weight": up,
                f"{stem}.alpha": torch.tensor(rank / 2),
            }
    return tensors
