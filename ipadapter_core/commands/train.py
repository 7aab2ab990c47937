"""The training commands of ``ipadapter``: train, cache, export."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path

from ..console import complain, file_argument
from ..errors import InvalidInputError, quoted, reason
from ..lora.convert import KEY_FORMATS
from ..lora.formats import load_lora
from ..lora.saving import save_lora
from . import Commands, WrongUsage, usage

OVERRIDES = "changes to the config, such as train.steps=2000 data.cache=/fast/cache"


def add_training(commands: Commands) -> None:
    """Add them to the parser of ``ipadapter``."""
    p = commands.add_parser("train", help="train an IP-Adapter or a LoRA")
    p.set_defaults(run=run_train)
    p.add_argument(
        "config", type=file_argument, help="TOML file; ipadapter train --example FAMILY prints one", nargs="?"
    )
    p.add_argument("overrides", nargs="*", default=[], metavar="SECTION.KEY=VALUE", help=OVERRIDES)
    p.add_argument(
        "--dry-run",
        action="store_true",
        help="lint, memory, trained parameters and the speed of three steps; no training",
    )
    p.add_argument("--example", choices=EXAMPLES, default=None, help="print a commented config of this kind and end")
    p.add_argument(
        "--out", type=file_argument, default=None, help="with --example: the new file to write it to, as UTF-8"
    )
    p.add_argument("--json", action="store_true", help="progress as JSON lines on stdout")

    p = commands.add_parser("cache", help="encode a training's pictures once, without training")
    p.set_defaults(run=run_cache)
    p.add_argument("config", type=file_argument, help="the training's TOML file")
    p.add_argument("overrides", nargs="*", default=[], metavar="SECTION.KEY=VALUE", help=OVERRIDES)
    p.add_argument("--json", action="store_true", help="progress as JSON lines on stdout")

    p = commands.add_parser("export", help="an adapter or LoRA in another layout, key format or precision")
    p.set_defaults(run=run_export)
    p.add_argument("source", type=file_argument, help="adapter file, or LoRA with --key-format")
    p.add_argument("target", type=file_argument, help=".bin: nested as the first released files; .safetensors: flat")
    p.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default=None, help="default: as in the source"
    )
    p.add_argument(
        "--key-format", "--spelling", choices=KEY_FORMATS, default=None, help="write the keys of a LoRA in this way"
    )
    p.add_argument(
        "--for",
        dest="reader",
        choices=("diffusers",),
        default=None,
        help="a plus adapter as diffusers' own load_ip_adapter reads it: with 4 layers, added ones doing nothing",
    )
    p.add_argument(
        "--card", action="store_true", help="write a model card (README.md) beside it, of the facts in the file"
    )
    p.add_argument(
        "--push",
        metavar="OWNER/NAME",
        default="",
        help="put it into this repository of the Hugging Face Hub, with a card",
    )
    p.add_argument("--public", action="store_true", help="with --push: a new repository is public; default: private")
    p.add_argument("--base-model", metavar="OWNER/NAME", default="", help="for the card: the base model's repository")
    p.add_argument("--license", default="", help="for the card, such as apache-2.0")
    p.add_argument("--json", action="store_true", help="print the result as JSON")


PACKAGES = ("diffusers", "transformers", "accelerate", "datasets", "webdataset", "matplotlib", "psutil", "tqdm")
EXAMPLES = ("sd15-base", "sd15-plus", "sd15-full-face", "sdxl-base", "sdxl-plus", "sd15-lora")


def run_train(args: argparse.Namespace) -> None:
    if args.example is not None:
        _give_example(args.example, args.out)
        return
    if args.out is not None:
        raise WrongUsage("--out belongs to --example; a training writes to output.folder")
    from ..training import dry_run, load_config, train
    from ..training.rendezvous import part

    if args.config is None:
        raise WrongUsage("give a config file; ipadapter train --example sd15-base prints one to start from")
    _check_packages()
    config = load_config(args.config, args.overrides)
    if args.dry_run:
        text = dry_run(config)
        print(json.dumps({"dry_run": text.splitlines()}) if args.json else text)
        return
    outcome = train(config, as_json=args.json)
    part()
    if outcome.stopped:
        complain(f"stopped after step {outcome.step}; the same command goes on from there")
        if outcome.by_file and "TORCHELASTIC_RUN_ID" in os.environ:
            return  # torchrun would take any other end for a failure and start it again
        raise KeyboardInterrupt
    if not args.json and os.environ.get("RANK", "0") == "0":
        print(outcome.file)


def _give_example(name: str, out: Path | None) -> None:
    file = Path(__file__).parents[1] / "training" / "examples" / f"{name}.toml"
    text = file.read_text(encoding="utf-8")
    if out is None:
        print(text, end="")
        return
    try:
        with out.open("x", encoding="utf-8") as target:
            target.write(text)
    except FileExistsError:
        raise InvalidInputError(f"{out} exists and is left as it is; choose another name") from None
    except OSError as error:
        raise InvalidInputError(f"{out} cannot be written ({reason(error)}); choose a folder that exists") from None
    print(out)


def _check_packages() -> None:
    """Say all that is missing at once, with the command that installs it into this Python."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InvalidInputError(
            f"training needs packages that this Python lacks: {', '.join(missing)}; run: "
            f"{sys.executable} -m pip install {' '.join(missing)} tensorboard"
        )


def run_cache(args: argparse.Namespace) -> None:
    from ..training import build_cache, load_config
    from ..training.rendezvous import part

    _check_packages()
    build_cache(load_config(args.config, args.overrides), as_json=args.json)
    part()


def run_export(args: argparse.Namespace) -> None:
    from ..sharing import CARD, Card, model_card, push_to_hub

    with usage():
        _check_target(args)
    if args.key_format is not None:
        facts = save_lora(
            load_lora(args.source), args.target, key_format=args.key_format, dtype=args.dtype or "keep", overwrite=True
        )
        text = f"{facts['modules']} modules, {facts['bytes']:,} bytes in {facts['file']}"
    else:
        try:
            path = _export_adapter(args)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise InvalidInputError(f"{quoted(args.target)} cannot be written ({error.strerror or error})") from error
        size = path.stat().st_size
        facts, text = {"file": str(path), "bytes": size}, f"{path} ({size / 1e6:.1f} MB)"
    told = Card(args.base_model, args.license)
    if args.card:
        card = args.target.with_name(CARD)
        card.write_text(model_card(args.target, args.push, told), encoding="utf-8")
        facts, text = {**facts, "card": str(card)}, f"{text}\n{card}"
    if args.push:
        address = push_to_hub(args.target, args.push, told=told, private=not args.public)
        facts, text = {**facts, "address": address}, f"{text}\n{address}"
    print(json.dumps(facts) if args.json else text)


def _check_target(args: argparse.Namespace) -> None:
    """What can be said before a file is read."""
    from ..sharing import CARD

    if args.target.is_dir():
        raise InvalidInputError(f"{quoted(args.target)} is a folder: name the file to write")
    if args.target.exists() and args.source.exists() and args.target.samefile(args.source):
        raise InvalidInputError(f"{quoted(args.target)} is the source itself: name another file")
    if args.card and args.target.with_name(CARD).exists():
        raise InvalidInputError(f"{quoted(args.target.with_name(CARD))} is there already, and is left as it is")


def _export_adapter(args: argparse.Namespace) -> Path:
    import torch

    from ..checkpoints import EXTENSIONS, load_adapter, save_adapter
    from ..checkpoints.plus import deepened

    dtype = None if args.dtype is None else getattr(torch, args.dtype)
    layout = "nested" if args.target.suffix.lower() in EXTENSIONS["nested"] else "flat"
    adapter = load_adapter(args.source, dtype=dtype)
    if args.reader is None:
        return save_adapter(adapter, args.target, layout=layout)
    made = load_adapter(deepened(adapter, DIFFUSERS_DEPTH), name=adapter.name)
    return save_adapter(made, args.target, layout=layout, metadata=adapter.metadata)


DIFFUSERS_DEPTH = 4
"""Layers of every resampler that diffusers makes for a plus adapter."""
