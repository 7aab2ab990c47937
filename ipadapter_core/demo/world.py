"""The demo world: small trained models and held-out references that ship with the package."""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attention.masks import RegionMask
from ..attention.schedule import WeightSchedule
from ..checkpoints import AdapterWeights, load_adapter
from ..errors import InvalidInputError
from ..generate import generate, load_image_encoder, prepare_patch, read_image
from ..images.encoder import TowerEncoder, TransformersImageEncoder
from ..model_folders import load_pipeline
from ..prompt.options import EncodeOptions

FOLDER = Path(__file__).parent / "world"
REFERENCES = Path(__file__).parent / "references"
GUIDANCE = 2.0


@dataclass(frozen=True, slots=True, eq=False)
class References:
    """Pictures that no training saw: images ``r 3 64 64`` in 0..1, file names and the names of their backgrounds."""

    images: Tensor
    names: tuple[str, ...]
    backgrounds: tuple[str, ...]

    def __getitem__(self, part: slice) -> References:
        return References(self.images[part], self.names[part], self.backgrounds[part])


@dataclass(frozen=True, slots=True, eq=False)
class World:
    """The loaded models: an ordinary diffusers pipeline, an image encoder and adapters by family."""

    pipeline: Any
    encoder: TransformersImageEncoder | TowerEncoder
    adapters: dict[str, AdapterWeights]
    references: References

    def draw(
        self,
        family: str,
        images: Tensor | None,
        schedule: WeightSchedule,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        steps: int,
        mask: Tensor | None = None,
        negative: str = "",
    ) -> Tensor:
        """One picture per prompt, ``b 3 y x`` in 0..1; image i (``b 3 y x``) steers picture i, None: no image."""
        patches = []
        if images is not None:
            references = list(images.permute(0, 2, 3, 1).split(1))
            region = None if mask is None else RegionMask.from_tensor(mask)
            adapter, options = self.adapters[family], EncodeOptions(per_latent=True)
            patches = [prepare_patch(self.pipeline, adapter, self.encoder, references, options, schedule, region)]
        pictures = generate(
            self.pipeline, patches, prompts, negative=negative, steps=steps, guidance=GUIDANCE, seeds=seeds
        )
        return pictures.permute(0, 3, 1, 2)


def load_world(folder: Path = FOLDER, adapters: Mapping[str, Path] | None = None) -> World:
    """Load everything from disk through the ordinary public loaders.

    ``adapters`` are files by family; by default the two in the folder.
    """
    if not (folder / "model_index.json").is_file():
        raise InvalidInputError(
            f"the demo world is missing from {folder}; reinstall the package or clone the repository whole"
        )
    pipeline = load_pipeline(folder)
    files = adapters or {name: folder / "adapters" / f"ip-adapter-{name}.safetensors" for name in ("base", "plus")}
    loaded = {family: load_adapter(file, dtype=torch.float32) for family, file in files.items()}
    encoder = load_image_encoder(folder, None, next(iter(loaded.values())))
    return World(pipeline, encoder, loaded, load_references())


def load_references() -> References:
    """The reference pictures and what their index says of them."""
    index: list[dict[str, str]] = json.loads((REFERENCES / "index.json").read_text(encoding="utf-8"))
    images = torch.cat([read_image(REFERENCES / entry["file"])[..., :3] for entry in index])
    return References(
        images.permute(0, 3, 1, 2),
        tuple(entry["file"] for entry in index),
        tuple(entry["background"] for entry in index),
    )
