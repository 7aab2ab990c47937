"""The demo world: small trained models and held-out references that ship with the package."""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..attention.masks import RegionMask
from ..attention.schedule import WeightSchedule
from ..backends.diffusers.pipelines import model_of
from ..checkpoints import AdapterWeights, load_adapter
from ..errors import InvalidInputError
from ..generate import generate, load_image_encoder, prepare_patch, read_image
from ..images.encoder import TowerEncoder, TransformersImageEncoder
from ..model_folders import load_pipeline
from ..models import family_of
from ..prompt.options import EncodeOptions
from .pictures import SIZE

FOLDER = Path(__file__).parent / "world"
REFERENCES = Path(__file__).parent / "references"
STYLE = FOLDER / "loras" / "demo-world-style.safetensors"
"""The shipped LoRA, a poster in blue ink, made by ``train_lora``."""
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
    """The loaded models: an ordinary diffusers pipeline, an image encoder and adapters by name."""

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
        model = family_of(model_of(self.pipeline))
        apart = model.negative == "apart"  # such models are told a number beside, always the same here
        pictures = generate(
            self.pipeline,
            patches,
            prompts,
            negative=negative,
            steps=steps,
            guidance=model.guidance if apart else GUIDANCE,
            true_guidance=GUIDANCE if apart else 1.0,
            seeds=seeds,
            height=SIZE,
            width=SIZE,
        )
        return pictures.permute(0, 3, 1, 2)


def load_world(folder: Path = FOLDER) -> World:
    """Load everything from disk through the ordinary public loaders; ``adapters/ip-adapter-plus.safetensors`` is named ``plus``."""
    if not (folder / "model_index.json").is_file():
        raise InvalidInputError(
            f"the demo world is missing from {folder}; reinstall the package or clone the repository whole"
        )
    pipeline = load_pipeline(folder)
    files = sorted((folder / "adapters").glob("ip-adapter-*.safetensors"))
    loaded = {file.stem.removeprefix("ip-adapter-"): load_adapter(file, dtype=torch.float32) for file in files}
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
