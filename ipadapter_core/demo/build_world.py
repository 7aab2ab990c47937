"""From the trained parts of a world to its model folder and back, and the reference pictures that no training saw."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from ..checkpoints import load_adapter, save_adapter
from ..generate import to_pillow
from .learner import PART, load_parts, save_parts
from .pictures import BACKGROUNDS, Pictures, colour_table, on_background, place
from .train_base import Base
from .train_parts import TEXT_LENGTH, build_autoencoder, build_image_encoder, build_text_encoder, save_preprocessor

STUDIO_ORDER = ("fluent", "noto", "twemoji")
SHARED: dict[str, Any] = {
    "vae": AutoencoderTiny,
    "text_encoder": CLIPTextModel,
    "image_encoder": CLIPVisionModelWithProjection,
}
"""What worlds of all base models can share, and how it is read."""


def join(work: Path, folder: Path, base: type[Base]) -> None:
    """Write the model folder of finished parts in fp16, with its adapters. Raises FileNotFoundError for a part that is missing."""
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer", model_max_length=TEXT_LENGTH)
    kind = base(torch.device("cpu"))
    made: dict[str, nn.Module] = {
        "vae": build_autoencoder(torch.zeros(48), torch.zeros(16, 48)),
        "text_encoder": build_text_encoder(tokenizer),
        "image_encoder": build_image_encoder(),
        kind.part: kind.build(),
    }
    for name, model in made.items():
        model.load_state_dict(_part(work, name))
        model.half()
    kind.pipeline(made.pop(kind.part), tokenizer=tokenizer, **made).save_pretrained(folder, max_shard_size=PART)
    for texts in folder.glob("text_encoder*"):
        name_text_weights(texts / "model.safetensors")
    for tokens in folder.glob("tokenizer*"):
        shutil.copytree(work / "tokenizer", tokens, dirs_exist_ok=True)  # in the files of both transformers
    save_preprocessor(folder / "image_encoder")
    for part in (kind.part, "vae"):  # where a part lay on the machine that built it is nobody's business
        change_config(folder / part, _name_or_path=None)
    # diffusers loads its own parts in float32 unless told otherwise; transformers 5 does what this says
    for part in (*folder.glob("text_encoder*"), folder / "image_encoder"):
        change_config(part, dtype="float32")
    (folder / "adapters").mkdir(exist_ok=True)
    for name in kind.adapters:
        file = folder / "adapters" / f"ip-adapter-{name}.safetensors"
        adapter = load_adapter(_part(work, name), name=file.stem, dtype=torch.float16)
        save_adapter(adapter, file, metadata={"trained_by": "ipadapter_core.demo.train_world"})


def _part(work: Path, name: str) -> dict[str, torch.Tensor]:
    found = load_parts(work / "parts" / name)
    if found is None:
        raise FileNotFoundError(f"{work / 'parts' / name} is missing; run `all` with the same --work to its end")
    return found[0]


def take(world: Path, work: Path) -> None:
    """Let a training begin with what a finished world shares with others, where it has not made its own."""
    shutil.copytree(world / "tokenizer", work / "tokenizer", dirs_exist_ok=True)
    for name, kind in SHARED.items():
        if load_parts(work / "parts" / name) is None:
            save_parts(work / "parts" / name, kind.from_pretrained(world / name).half().state_dict())


def change_config(part: Path, **changes: str | None) -> None:
    """Write settings into a part's ``config.json``; None takes one out. The weights stay as they are."""
    file = part / "config.json"
    config = {**json.loads(file.read_text(encoding="utf-8")), **changes}
    kept = {key: value for key, value in config.items() if key not in changes or value is not None}
    file.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def name_text_weights(file: Path) -> None:
    """Give a CLIP text model's weights the names of transformers 4, which 5 reads too; what 5 writes leaves 4 with random ones."""
    prefix = "text_model."
    named = {key if key.startswith(prefix) else prefix + key: tensor for key, tensor in load_file(file).items()}
    save_file(named, file, metadata={"format": "pt"})


def write_references(pictures: Pictures, folder: Path) -> None:
    """One picture of every held-out emoji, studios and named backgrounds in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    held_out = pictures.where(held_out=True).tolist()
    names = sorted({pictures.names[i] for i in held_out})
    colours = list(BACKGROUNDS)
    index: list[dict[str, str]] = []
    for position, name in enumerate(names):
        studio = STUDIO_ORDER[position % len(STUDIO_ORDER)]
        picture = next(i for i in held_out if pictures.names[i] == name and pictures.studios[i] == studio)
        background = colours[(position * 5) % len(colours)]
        colour = colour_table()[colours.index(background)][None]
        image = on_background(place(pictures.rgba[picture][None], None), colour)[0]
        file = f"{name.replace(' ', '-')}.png"
        to_pillow(image.clamp(0, 1).permute(1, 2, 0)).save(folder / file)
        index.append({"file": file, "name": name, "studio": studio, "background": background})
    (folder / "index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
