"""Put trained parts together as the model folder that ships: ``python -m ipadapter_core.demo.build_world --work …``."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer, CLIPVisionModelWithProjection

from ..generate import to_pillow
from .pictures import BACKGROUNDS, Pictures, colour_table, load_pictures, on_background, place
from .train_parts import TEXT_LENGTH, build_sampler
from .world import FOLDER, REFERENCES

STUDIO_ORDER = ("fluent", "noto", "twemoji")


def build(work: Path, folder: Path) -> None:
    """Write the pipeline in fp16 safetensors; adapters are trained into it afterwards."""
    tokenizer = CLIPTokenizer.from_pretrained(work / "tokenizer", model_max_length=TEXT_LENGTH)
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderTiny.from_pretrained(work / "vae").half(),
        text_encoder=CLIPTextModel.from_pretrained(work / "text_encoder").half(),
        tokenizer=tokenizer,
        unet=UNet2DConditionModel.from_pretrained(work / "unet").half(),
        scheduler=build_sampler(),
        safety_checker=None,
        feature_extractor=None,  # its class has another name in every major version of transformers
        image_encoder=CLIPVisionModelWithProjection.from_pretrained(work / "image_encoder").half(),
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    name_text_weights(folder / "text_encoder" / "model.safetensors")
    shutil.copytree(work / "tokenizer", folder / "tokenizer", dirs_exist_ok=True)  # in the files of both transformers
    shutil.copy(work / "image_encoder" / "preprocessor_config.json", folder / "image_encoder")
    for part in ("unet", "vae"):  # where a part lay on the machine that built it is nobody's business
        change_config(folder / part, _name_or_path=None)
    # diffusers loads its own parts in float32 unless told otherwise; transformers 5 does what this says
    for part in ("text_encoder", "image_encoder"):
        change_config(folder / part, dtype="float32")


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


def main(argv: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="the --work folder of train_world")
    parser.add_argument(
        "--pictures", type=Path, required=True, help="node_modules folder with the three emoji packages"
    )
    parser.add_argument("--out", type=Path, default=FOLDER)
    args = parser.parse_args(argv if argv is None else list(argv))
    torch.set_grad_enabled(False)
    build(args.work, args.out)
    write_references(load_pictures(args.pictures), REFERENCES)


if __name__ == "__main__":
    main()
