"""The command ``ipadapter``: generate, inspect, demo, lora, train, cache, export, migrate.

Exit codes: 0 done, 1 an error of ours (one line on stderr says the cause), 2 wrong usage, 130 interrupted or asked to end by a
signal, 141 the reader of the output went away (``| head``).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from .. import __version__
from ..attention.patch import AdapterPatch
from ..attention.presets import PRESETS, parse_site_factors
from ..attention.schedule import SCALINGS, WeightSchedule, parse_curve, parse_numbers
from ..checkpoints import AdapterWeights, describe_adapter, load_adapter
from ..checkpoints.format import BARE, empty_module
from ..console import complain, file_argument, forget_output, progress_bar, show_everything
from ..errors import AdapterError, InvalidInputError, out_of_memory, reason
from ..features import Crop
from ..prompt.combine import Combine
from ..prompt.options import EncodeOptions, Unconditional
from ..report import describe_fit, describe_layout, describe_spec, layout_facts, spec_facts
from . import Commands
from .lora import add_lora
from .migrate import add_migrate
from .train import add_training

CLOSED_PIPE = 141
"""What shells show of a program that wrote to a closed pipe: 128 + SIGPIPE."""
WORLD = Path(__file__).parents[1] / "demo" / "world"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    show_everything()
    try:
        try:
            return _run(_parse(argv))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        forget_output()
        return CLOSED_PIPE
    except OSError as error:  # the disk that the output goes to is full
        forget_output()
        complain(f"ipadapter: the output cannot be written ({reason(error)})")
        return 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with ``section.key=value`` also behind options, where argparse looks for none."""
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(args, "overrides") or any(one.startswith("-") for one in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


def _run(args: argparse.Namespace) -> int:
    try:
        args.run(args)
    except ModuleNotFoundError as error:
        return _fail(args, f"{error.name} is not installed; run: pip install 'ipadapter-studio[demo]'")
    except BrokenPipeError:
        raise
    except (AdapterError, OSError) as error:
        return _fail(args, str(error))
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return _fail(args, f"memory ran out ({reason(error)}); close other programs, or use smaller sizes")
    except KeyboardInterrupt as error:
        complain(str(error) or "interrupted")
        return 130
    return 0


def _fail(args: argparse.Namespace, message: str) -> int:
    if args.json:
        print(json.dumps({"error": message}))
    complain(f"ipadapter: {message}")
    return 1


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ipadapter", description="Image prompts for diffusion models.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_generate(commands)
    _add_inspect(commands)
    _add_demo(commands)
    add_lora(commands)
    add_training(commands)
    add_migrate(commands)
    return parser


def _add_generate(commands: Commands) -> None:
    p = commands.add_parser("generate", help="pictures from a prompt and reference images", formatter_class=_Defaults)
    p.set_defaults(run=run_generate)
    p.add_argument(
        "--model",
        type=file_argument,
        default=WORLD,
        help="diffusers model folder or .safetensors file (SD1.5, SD2, SDXL, FLUX.1, Chroma, SD3.5); default: demo world",
    )
    _add_config(p)
    p.add_argument(
        "--adapter", type=file_argument, default=None, help="IP-Adapter file; default: the demo world's plus adapter"
    )
    p.add_argument(
        "--image-encoder",
        type=file_argument,
        nargs="+",
        default=[],
        help="folder or file of the image encoder, two for an adapter that reads two; default: in the model folder",
    )
    p.add_argument("--image", type=file_argument, nargs="+", default=[], help="reference image(s)")
    p.add_argument("--image-strengths", default="", help="strength of each reference, such as '1,0.5'")
    p.add_argument("--combine", choices=get_args(Combine), default="concat", help="how several references become one")
    p.add_argument(
        "--crop",
        choices=(*get_args(Crop), "tiles", "auto"),
        default="auto",
        help="which square of a reference is seen; tiles: all of it; auto: as the adapter was trained",
    )
    p.add_argument(
        "--unconditional", choices=get_args(Unconditional), default="auto", help="what the negative prompt sees"
    )
    p.add_argument("--prompt", default="", help="text prompt")
    p.add_argument("--negative", default="", help="negative text prompt")
    p.add_argument(
        "--strength",
        type=float,
        default=None,
        help="0: text only, 1: as trained; default: what people begin with, 1 for most adapters",
    )
    p.add_argument("--preset", choices=list(PRESETS), default="linear", help="where in the model the image acts")
    p.add_argument("--scaling", choices=SCALINGS, default="V only", help="what the strength multiplies")
    p.add_argument("--start", type=float, default=0.0, help="sampling progress at which the image begins to act")
    p.add_argument("--end", type=float, default=1.0, help="sampling progress after which it no longer acts")
    p.add_argument("--curve", default="", help="strength over progress, such as '0: 1, 1: 0.3'")
    p.add_argument("--sites", default="", help="factor per place, such as 'all: 0.2, output: 1'")
    p.add_argument("--mask", type=file_argument, default=None, help="picture: white is where the image acts")
    p.add_argument(
        "--steps", type=int, default=None, help="sampling steps; default: 25, or what is usual for a transformer"
    )
    p.add_argument(
        "--guidance",
        type=float,
        default=None,
        help="guidance scale; default: 2 for the demo world, else 7.5 or what is usual for a transformer",
    )
    p.add_argument(
        "--true-guidance",
        type=float,
        default=1.0,
        help="of distilled models (FLUX.1): guidance away from the negative prompt, at twice the time; 1: none",
    )
    p.add_argument("--seed", type=int, default=0, help="seed of the first picture; the others count up")
    p.add_argument("--batch", type=int, default=4, help="number of pictures")
    p.add_argument("--height", type=int, default=None, help="in pixels; default: the model's own size")
    p.add_argument("--width", type=int, default=None, help="in pixels; default: the model's own size")
    p.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    p.add_argument("--device", default="cpu", help="torch device")
    p.add_argument(
        "--out", type=file_argument, default=Path("ipadapter-out"), help="folder for pictures, grid.png and facts.json"
    )
    p.add_argument("--json", action="store_true", help="print the facts as JSON instead of text")


def _add_config(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--config",
        type=file_argument,
        default=None,
        help="for a model in one file: diffusers folder of the same kind of model; default: the one beside it, of its name",
    )


def _add_inspect(commands: Commands) -> None:
    p = commands.add_parser(
        "inspect",
        help="what an adapter file is and needs, and whether it fits a model; where image prompts act in a model folder",
    )
    p.set_defaults(run=run_inspect)
    p.add_argument("file", type=file_argument, help="IP-Adapter file, or a diffusers model folder")
    p.add_argument(
        "--model",
        type=file_argument,
        default=None,
        help="diffusers model folder or .safetensors file that it shall fit",
    )
    _add_config(p)
    p.add_argument("--json", action="store_true", help="print as JSON")


def _add_demo(commands: Commands) -> None:
    p = commands.add_parser(
        "demo", help="draw a sheet with the shipped demo world and measure it", formatter_class=_Defaults
    )
    p.set_defaults(run=run_demo)
    p.add_argument("--out", type=file_argument, default=Path("ipadapter-out"), help="folder for demo.png and demo.json")
    p.add_argument("--adapter", choices=("base", "plus"), default="plus", help="which shipped adapter draws the sheet")
    p.add_argument("--steps", type=int, default=20, help="sampling steps")
    p.add_argument("--no-figures", action="store_true", help="draw the sheet only")
    p.add_argument("--json", action="store_true", help="print the figures as JSON")


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, "", [], False) else super()._get_help_string(action)


def run_inspect(args: argparse.Namespace) -> None:
    if (args.file / "model_index.json").is_file():
        from ..model_folders import layout_in

        layout = layout_in(args.file)
        print(json.dumps(layout_facts(layout)) if args.json else describe_layout(layout, args.file.name))
        return
    spec = describe_adapter(args.file)
    facts, text = spec_facts(spec), describe_spec(spec, args.file.name)
    if args.model is not None:
        from ..model_folders import layout_in

        layout, adapter = (
            layout_in(args.model, args.config),
            AdapterWeights(spec, empty_module(spec, BARE), args.file.name),
        )
        text = f"{text}\n\n{describe_fit(adapter, layout, None)}"
        facts |= {"fits": layout.name}
    print(json.dumps(facts) if args.json else text)


def run_demo(args: argparse.Namespace) -> None:
    from ..demo.sheet import run

    run(args.out, family=args.adapter, steps=args.steps, figures=not args.no_figures, as_json=args.json)


def run_generate(args: argparse.Namespace) -> None:
    import torch

    from ..generate import (
        generate,
        grid_of,
        load_image_encoders,
        prepare_patch,
        read_image,
        read_mask,
        save_picture,
        to_pillow,
        usual_sampling,
    )
    from ..model_folders import config_folder, hold_in_memory, load_pipeline

    for name in ("steps", "batch"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InvalidInputError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    options = EncodeOptions(
        crop=args.crop,
        combine=args.combine,
        unconditional=args.unconditional,
        strengths=parse_numbers(args.image_strengths) or None,
    )
    schedule = WeightSchedule(
        strength=1.0 if args.strength is None else args.strength,
        preset=args.preset,
        start_percent=args.start,
        end_percent=args.end,
        scaling=args.scaling,
        site_factors=parse_site_factors(args.sites),
        curve=parse_curve(args.curve),
    )
    images = [read_image(path) for path in args.image]
    mask = read_mask(args.mask) if args.mask else None
    dtype = getattr(torch, args.dtype)
    started = time.perf_counter()
    pipeline = load_pipeline(args.model, config=args.config, dtype=dtype)
    adapter_file = args.adapter or (WORLD / "adapters" / "ip-adapter-plus.safetensors" if args.model == WORLD else None)

    def steered_by(file: Path | None) -> AdapterPatch:
        """The image prompt; the adapter's weights go with the end of this, unless sampling needs them."""
        if file is None:
            raise InvalidInputError("--image needs --adapter with an IP-Adapter file for this model")
        adapter = load_adapter(file, name=Path(file).name, dtype=dtype)
        plan = schedule if args.strength is not None else replace(schedule, strength=adapter.spec.format.strength)
        encoders = load_image_encoders(config_folder(args.model, args.config), args.image_encoder, adapter)
        for part in (adapter.module, *(encoder.model for encoder in encoders)):
            part.to(args.device)
        return prepare_patch(pipeline, adapter, encoders, images, options, plan, mask)

    patches = [steered_by(adapter_file)] if images else []
    pipeline.to(args.device)  # after the adapter and its encoders left it
    for part in (part for part in pipeline.components.values() if isinstance(part, torch.nn.Module)):
        hold_in_memory(part)
    steps, guidance = usual_sampling(pipeline)
    if args.model == WORLD:
        from ..demo.world import GUIDANCE as guidance
    steps = steps if args.steps is None else args.steps
    guidance = guidance if args.guidance is None else args.guidance
    seeds = [args.seed + i for i in range(args.batch)]
    args.out.mkdir(parents=True, exist_ok=True)
    with progress_bar("sampling", steps) as progress:
        pictures = generate(
            pipeline,
            patches,
            [args.prompt] * args.batch,
            negative=args.negative,
            steps=steps,
            guidance=guidance,
            true_guidance=args.true_guidance,
            seeds=seeds,
            height=args.height,
            width=args.width,
            progress=progress,
        )
    facts = {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items() if key != "run"}
    facts |= {name: [str(path) for path in getattr(args, name)] for name in ("image", "image_encoder")}
    facts |= {"adapter": str(adapter_file), "guidance": guidance}
    facts |= {"steps": steps, "strength": patches[0].schedule.strength if patches else args.strength}
    files: list[str] = []
    for seed, picture in zip(seeds, pictures, strict=True):
        path = args.out / f"seed-{seed:06d}.png"
        save_picture(to_pillow(picture), path, {**facts, "seed": seed})
        files.append(str(path))
    save_picture(grid_of([to_pillow(p) for p in pictures]), args.out / "grid.png", facts)
    facts |= {"files": files, "grid": str(args.out / "grid.png"), "seconds": round(time.perf_counter() - started, 1)}
    (args.out / "facts.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(
        json.dumps(facts) if args.json else f"{len(files)} pictures and grid.png in {args.out} ({facts['seconds']} s)"
    )


if __name__ == "__main__":
    sys.exit(main())
