"""``ipadapter lora``: inspect, heatmap, resize, merge, extract, convert, verify."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from ..attention.schedule import parse_numbers
from ..console import file_argument
from ..errors import InvalidInputError, quoted, reason
from ..files.whole import written_whole
from ..lora.convert import KEY_FORMATS
from ..lora.extract import extract
from ..lora.factors import Smaller, combine, resize
from ..lora.formats import load_lora
from ..lora.inspection import describe_facts, draw_heat_map, heat_map, lora_facts, verify
from ..lora.saving import DTYPES, check_target, save_lora
from ..lora.weights import LoRAWeights, left_out_lines
from . import Commands, usage, whole, within

_log = logging.getLogger(__name__)


def add_lora(commands: Commands) -> None:
    """The subcommand ``lora`` with its own subcommands."""
    parser = commands.add_parser("lora", help="look at, convert, resize, merge and extract LoRA files")
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    p = _action(
        actions,
        "inspect",
        "what a file is: names, algorithms, ranks, alphas and scales, and what of it is not applied",
        run_inspect,
    )
    p.add_argument("file", type=file_argument, help="LoRA file")

    p = _action(actions, "heatmap", "how strongly each block and layer is changed, as a PNG", run_heatmap)
    p.add_argument("file", type=file_argument, help="LoRA file")
    p.add_argument("--out", type=file_argument, default=None, help="PNG to write; default: beside the file")

    p = _action(actions, "verify", "read every number and check names, ranks and sizes", run_verify)
    p.add_argument("file", type=file_argument, help="LoRA file")

    p = _action(actions, "resize", "smaller ranks, exactly the best ones", run_resize)
    p.add_argument("file", type=file_argument, help="LoRA file")
    _add_sizes(p)
    _add_output(p)

    p = _action(actions, "merge", "one file that is the weighted sum of several", run_merge)
    p.add_argument("files", type=file_argument, nargs="+", help="LoRA files")
    p.add_argument("--strengths", default="", help="one per file, such as '1,0.5'; default: all 1")
    _add_sizes(p)
    _add_output(p)

    p = _action(actions, "convert", "another key format of the same numbers", run_convert)
    p.add_argument("file", type=file_argument, help="LoRA file")
    _add_output(p)

    p = _action(actions, "extract", "a LoRA out of two checkpoints", run_extract)
    p.add_argument("tuned", type=file_argument, help="the fine-tuned checkpoint")
    p.add_argument("base", type=file_argument, help="the checkpoint that it was tuned from")
    _add_sizes(p, rank=32)
    _add_output(p)


def _action(
    actions: Commands, name: str, text: str, run: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    p = actions.add_parser(name, help=text, description=text)
    p.set_defaults(run=run)
    p.add_argument("--json", action="store_true", help="print as JSON")
    return p


def _add_sizes(p: argparse.ArgumentParser, rank: int | None = None) -> None:
    p.add_argument(
        "--rank", type=whole(1, 1_000_000), default=rank, help="largest rank; default: as many as are needed"
    )
    p.add_argument("--energy", type=within(0, 1), default=1.0, help="share of every layer's squared norm to keep, 0..1")


def _add_output(p: argparse.ArgumentParser) -> None:
    p.add_argument("--out", type=file_argument, required=True, help="file to write (.safetensors)")
    p.add_argument("--key-format", "--spelling", choices=KEY_FORMATS, default="kohya", help="how names are written")
    p.add_argument("--dtype", choices=DTYPES, default="keep", help="type of the numbers")
    p.add_argument("--overwrite", action="store_true", help="replace an existing file")


def _loaded(file: Path) -> LoRAWeights:
    """A LoRA, with a warning about everything in its file that is no part of it."""
    weights = load_lora(file)
    if weights.left_out:
        _log.warning("%s: not taken: %s", quoted(weights.name), "; ".join(left_out_lines(weights.left_out)))
    return weights


def _saved(args: argparse.Namespace, weights: LoRAWeights, errors: Mapping[str, float] | None = None) -> None:
    facts = save_lora(weights, args.out, key_format=args.key_format, dtype=args.dtype, overwrite=args.overwrite)
    text = f"{facts['modules']} modules, {facts['bytes']:,} bytes in {facts['file']}"
    if errors:
        worst = max(errors, key=lambda stem: errors[stem])
        mean = sum(errors.values()) / len(errors)
        facts |= {"mean_relative_error": mean, "largest_relative_error": errors[worst], "in": worst}
        text += f"; relative error {mean:.2g} on average, {errors[worst]:.2g} at most ({worst})"
    print(json.dumps(facts) if args.json else text)


def run_inspect(args: argparse.Namespace) -> None:
    facts = lora_facts(args.file)
    print(json.dumps(facts) if args.json else describe_facts(facts))


def run_heatmap(args: argparse.Namespace) -> None:
    with usage():
        _check_picture(args.out)
    heat = heat_map(_loaded(args.file))
    out = args.out or _beside(args.file)
    try:
        with written_whole(out) as place:
            draw_heat_map(heat, args.file.name).save(place, format="PNG")
    except OSError as error:
        raise InvalidInputError(
            f"{quoted(out)} cannot be written ({error.strerror or reason(error)}): name another place with --out"
        ) from error
    if args.json:
        print(
            json.dumps({"file": str(out), "blocks": heat.blocks, "columns": heat.columns, "rms": _plain(heat.values)})
        )
    else:
        print(f"{heat.text()}\n{out}")


def _check_picture(out: Path | None) -> None:
    if out is None:
        return
    if out.suffix.lower() != ".png":
        raise InvalidInputError(f"{quoted(out)} does not end in .png, the only kind of picture that is written")
    if out.is_dir() or not out.parent.is_dir():
        raise InvalidInputError(f"{quoted(out)} cannot be written: it is a folder, or in none that exists")


def _beside(file: Path) -> Path:
    """The picture beside a file; of one that this package came with, in the current folder."""
    own = Path(__file__).resolve().parents[1]
    beside = file.with_suffix(".heatmap.png")
    return Path(beside.name) if beside.resolve().is_relative_to(own) else beside


def _plain(values: Iterable[Iterable[float]]) -> list[list[float | None]]:
    return [[None if v != v else float(v) for v in row] for row in values]


def run_verify(args: argparse.Namespace) -> None:
    verdict = verify(args.file)
    print(json.dumps({"problems": verdict.problems, "remarks": verdict.remarks}) if args.json else verdict.text())
    if verdict.problems:
        sys.stdout.flush()
        raise InvalidInputError(f"{args.file.name} has {len(verdict.problems)} problem(s)")


def _checked(args: argparse.Namespace) -> Smaller:
    """The sizes, and whether the file may be written: before anything is computed, which may take minutes."""
    with usage():
        check_target(args.out, args.overwrite)
        return Smaller(args.rank, args.energy)


def run_resize(args: argparse.Namespace) -> None:
    smaller = _checked(args)
    _saved(args, *resize(_loaded(args.file), smaller))


def run_merge(args: argparse.Namespace) -> None:
    smaller = _checked(args)
    with usage():
        strengths = parse_numbers(args.strengths) or [1.0] * len(args.files)
    whole_rank = args.rank is None and args.energy == 1.0
    _saved(args, *combine([_loaded(file) for file in args.files], strengths, None if whole_rank else smaller))


def run_convert(args: argparse.Namespace) -> None:
    with usage():
        check_target(args.out, args.overwrite)
    _saved(args, _loaded(args.file))


def run_extract(args: argparse.Namespace) -> None:
    smaller = _checked(args)
    _saved(args, *extract(args.tuned, args.base, smaller, name=args.out.stem))
