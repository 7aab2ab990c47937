"""The command ``ipadapter``: generate, inspect, demo, lora, train, cache, export, migrate.

Exit codes: 0 done, 1 an error (one line on stderr says the cause), 2 wrong usage, a value that cannot be used or a file that is not
there, 130 interrupted or asked to end by a signal, 141 the reader of the output went away (``| head``).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path

from .. import __version__
from ..checkpoints import AdapterWeights, describe_adapter
from ..checkpoints.format import BARE, empty_module
from ..console import complain, file_argument, forget_output, show_everything
from ..errors import AdapterError, out_of_memory, reason
from ..report import describe_fit, describe_layout, describe_spec, layout_facts, spec_facts
from . import Commands, Grouped, Parser, WrongUsage, folder_for, usage, whole
from .completion import add_completion
from .generate import add_generate
from .lora import add_lora
from .migrate import add_migrate
from .train import add_training

TRACEBACK = "IPADAPTER_TRACEBACK"
"""The variable of the environment with which errors show their way through the code."""

CLOSED_PIPE = 141
"""What shells show of a program that wrote to a closed pipe: 128 + SIGPIPE."""
WORLD = Path(__file__).parents[1] / "demo" / "world"


DESCRIPTION = """Image prompts (IP-Adapter) and LoRA for diffusion models, without ComfyUI.

  ipadapter demo                              what it does, with the models that come along
  ipadapter generate --image cat.png          a picture like another, with those models
  ipadapter COMMAND --help                    the options of a command
"""

PACKAGES = ("torch", "diffusers", "transformers", "huggingface-hub", "safetensors")
"""Whose versions ``--version`` says too."""


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        found = {name: _version_of(name) for name in PACKAGES}
        others = ", ".join(f"{name} {version}" for name, version in found.items() if version)
        print(f"ipadapter {__version__} (Python {platform.python_version()}, {others})")
        parser.exit()


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


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
    if not (sys.argv[1:] if argv is None else argv):
        parser.print_help()
        raise SystemExit(2)
    args, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(args, "overrides") or any(one.startswith("-") for one in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _run(args: argparse.Namespace) -> int:
    if os.environ.get(TRACEBACK):
        args.run(args)
        return 0
    try:
        args.run(args)
    except ModuleNotFoundError as error:
        return _fail(args, f"{error.name} is not installed; run in the folder of this pack: pip install -e '.[train]'")
    except BrokenPipeError:
        raise
    except (WrongUsage, FileNotFoundError) as error:
        return _fail(args, str(error), 2)
    except (AdapterError, OSError) as error:
        return _fail(args, str(error))
    except KeyboardInterrupt as error:
        complain(str(error) or "interrupted")
        return 130
    except Exception as error:
        if out_of_memory(error):
            return _fail(args, f"memory ran out ({reason(error)}); close other programs, or use smaller sizes")
        return _fail(
            args,
            f"{reason(error)}: this is a mistake of ours; {TRACEBACK}=1 in the environment shows where, please report that",
        )
    return 0


def _fail(args: argparse.Namespace, message: str, code: int = 1) -> int:
    if args.json:
        print(json.dumps({"error": message}))
    complain(f"ipadapter: {message}")
    return code


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="ipadapter", description=DESCRIPTION, formatter_class=Grouped, usage="ipadapter COMMAND [options]"
    )
    parser.add_argument(
        "--version", action=_Version, nargs=0, help="versions of this package and of those that it uses"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", prog="ipadapter")
    add_generate(commands)
    _add_inspect(commands)
    _add_demo(commands)
    add_lora(commands)
    add_training(commands)
    add_migrate(commands)
    add_completion(commands, parser)
    return parser


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
    p.add_argument(
        "file", type=file_argument, help="IP-Adapter file, or owner/name:path of the Hub, or a diffusers model folder"
    )
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
    p.add_argument("--steps", type=whole(1, 1000), default=20, help="sampling steps")
    p.add_argument("--no-figures", action="store_true", help="draw the sheet only")
    p.add_argument("--json", action="store_true", help="print the figures as JSON")


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, "", [], False) else super()._get_help_string(action)


def run_inspect(args: argparse.Namespace) -> None:
    from ..hub import file_on_disk

    if args.config is not None and args.model is None:
        raise WrongUsage("--config describes a model in one file: give that with --model")
    args.file = file_on_disk(args.file)
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

    with ExitStack() as stack:
        with usage():
            stack.enter_context(folder_for(args.out, "the sheet"))
        run(args.out, family=args.adapter, steps=args.steps, figures=not args.no_figures, as_json=args.json)


if __name__ == "__main__":
    sys.exit(main())
