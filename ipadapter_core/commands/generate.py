"""``ipadapter generate``: pictures from a prompt, reference images and LoRAs."""

# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from .. import __version__
from ..attention.presets import PRESETS, parse_site_factors
from ..attention.schedule import SCALINGS, WeightSchedule, parse_curve, parse_numbers
from ..console import complain, file_argument, progress_bar
from ..entries import number
from ..errors import InvalidInputError, one_line, quoted
from ..features import Crop
from ..prompt.combine import Combine
from ..prompt.options import EncodeOptions, Unconditional
from . import ANY, Commands, Grouped, Parser, folder_for, usage, whole, within

if TYPE_CHECKING:
    from ..attention.patch import AdapterPatch
    from ..attention.recording import Recorder
    from ..generate import Beginning
    from ..lora import LoRAWeights
    from ..lora.selector import Selector

WORLD = Path(__file__).parents[1] / "demo" / "world"
LARGEST = 8192
"""Pixels of a side: more is a slip of the finger, and takes all memory."""

OF_ADAPTER: dict[str, Any] = {
    "adapter": None, "image": [], "image_strengths": "", "combine": "concat", "crop": "auto", "unconditional": "auto",
    "negative_image": None, "image_encoder": [], "face_models": None, "strength": None, "preset": "linear",
    "scaling": "V only", "start": 0.0, "end": 1.0, "curve": "", "sites": "", "mask": None,
}  # fmt: skip
"""The options that belong to one adapter, and what holds where they are not given."""

OF_RUN: dict[str, Any] = {
    "model": None, "config": None, "lora": [], "prompt": "", "negative": "", "steps": None, "guidance": None,
    "true_guidance": 1.0, "seed": [0], "batch": None, "at_once": None, "height": None, "width": None, "init": None,
    "denoise": None, "inpaint_mask": None, "dtype": "auto", "device": "auto",
}  # fmt: skip
"""The other options that decide how a picture looks."""

FILES = (
    "adapter",
    "image",
    "image_encoder",
    "negative_image",
    "mask",
    "face_models",
    "model",
    "config",
    "init",
    "inpaint_mask",
)
"""Options that name files and folders."""

EPILOG = f"""
options of an adapter belong to the --adapter before them; those before the first --adapter hold for all:
  ipadapter generate --adapter plus.safetensors --image cat.png --strength 0.8 \\
                     --adapter style.safetensors --image ink.png --preset "style transfer" --mask left.png
  ipadapter generate --model sdxl.safetensors --lora ink.safetensors:0.8 --lora "detail.safetensors:0.5:out3-5: 1"
  ipadapter generate --model stable-diffusion-v1-5/stable-diffusion-v1-5 \\
                     --adapter h94/IP-Adapter:models/ip-adapter_sd15.safetensors --image cat.png
  ipadapter generate --from picture.png --seed 7        the same settings, another seed

what is named owner/name (a model) or owner/name:path (a file or folder) comes from the Hugging Face Hub's cache, or from there.

presets: {", ".join(PRESETS)}
"""


class _NextAdapter(argparse.Action):
    """``--adapter`` begins the options of another adapter."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        namespace.adapters = [*getattr(namespace, "adapters", ()), {"adapter": values}]


class _OfAdapter(argparse.Action):
    """An option of the adapter before it, or of all; one with several values may be repeated."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        adapters: list[dict[str, Any]] = getattr(namespace, "adapters", [])
        if not adapters and not hasattr(namespace, "shared"):
            namespace.shared = {}
        own = adapters[-1] if adapters else namespace.shared
        own[self.dest] = [*own.get(self.dest, ()), *values] if isinstance(values, list) else values


def add_generate(commands: Commands) -> None:
    """Add it to the parser of ``ipadapter``."""
    p = commands.add_parser(
        "generate",
        help="pictures from a prompt, reference images and LoRAs",
        description="Pictures from a prompt, reference images and LoRAs.",
        usage="ipadapter generate [--model MODEL] [--adapter FILE --image PICTURE … [options of this adapter]] … [--prompt TEXT] [options]",
        epilog=EPILOG,
        formatter_class=Grouped,
        argument_default=argparse.SUPPRESS,
    )
    p.set_defaults(run=run_generate, json=False)
    add_settings(p)
    p.set_defaults(out=Path("ipadapter-out"))


def add_settings(p: argparse.ArgumentParser) -> None:
    """The options, in groups; none has a default, so that it shows which were given."""
    group = p.add_argument_group("what is drawn")
    group.add_argument("--prompt", metavar="TEXT", help="text prompt")
    group.add_argument("--negative", metavar="TEXT", help="negative text prompt")
    group.add_argument(
        "--seed",
        type=whole(0, 2**63 - 1),
        nargs="+",
        action="extend",
        metavar="N",
        help="seed of the first picture, others count up; or one for each; default: 0",
    )
    group.add_argument(
        "--batch", type=whole(1, 999_999), metavar="N", help="number of pictures; default: 4, or as many as seeds"
    )
    group.add_argument("--height", type=whole(8, LARGEST), metavar="PIXELS", help="default: the model's own size")
    group.add_argument("--width", type=whole(8, LARGEST), metavar="PIXELS", help="default: the model's own size")
    group.add_argument(
        "--from",
        dest="repeat",
        type=file_argument,
        metavar="PICTURE",
        help="take all settings from a picture that this command made; what else is given replaces them",
    )
    group.add_argument(
        "--look-in",
        type=file_argument,
        nargs="+",
        metavar="FOLDER",
        help="with --from: where files are that are not where they were",
    )

    group = p.add_argument_group("models")
    group.add_argument(
        "--model",
        type=file_argument,
        metavar="MODEL",
        help="diffusers folder, .safetensors file or owner/name of the Hub (SD1.5, SD2, SDXL, FLUX.1, Chroma, SD3.5); default: the demo world",
    )
    group.add_argument(
        "--config",
        type=file_argument,
        metavar="FOLDER",
        help="for a model in one file: diffusers folder, or owner/name, of the same kind of model; default: the folder beside it, of its name, else for SD1.5, SD2 and SDXL the published one",
    )
    group.add_argument(
        "--lora",
        type=Lora.read,
        action="append",
        metavar="FILE[:STRENGTH[:WHERE]]",
        help="a LoRA, at a strength (1), in blocks or layers ('all: 0, out3-5: 0.8', a block vector, a preset); may be repeated",
    )

    group = p.add_argument_group("reference images, for each adapter")
    own: dict[str, Any] = {"action": _OfAdapter}
    group.add_argument(
        "--adapter",
        type=file_argument,
        action=_NextAdapter,
        metavar="FILE",
        help="IP-Adapter file or owner/name:path; default: the demo world's plus adapter; may be repeated",
    )
    group.add_argument("--image", type=file_argument, nargs="+", metavar="PICTURE", help="reference image(s)", **own)
    group.add_argument(
        "--image-strengths", metavar="NUMBERS", help="strength of each reference, such as '1,0.5'", **own
    )
    group.add_argument(
        "--combine",
        choices=get_args(Combine),
        metavar="HOW",
        help=f"how several references become one: {', '.join(get_args(Combine))}; default: concat",
        **own,
    )
    crops = (*get_args(Crop), "tiles", "auto")
    group.add_argument(
        "--crop",
        choices=crops,
        metavar="HOW",
        help=f"which square of a reference is seen ({', '.join(crops)}); tiles: all of it; default: auto, as the adapter was trained",
        **own,
    )
    group.add_argument(
        "--negative-image", type=file_argument, metavar="PICTURE", help="a picture to steer away from", **own
    )
    group.add_argument(
        "--unconditional",
        choices=get_args(Unconditional),
        metavar="WHAT",
        help=f"what the negative prompt sees: {', '.join(get_args(Unconditional))}; default: auto",
        **own,
    )
    group.add_argument(
        "--image-encoder",
        type=file_argument,
        nargs="+",
        metavar="ENCODER",
        help="folder, file or owner/name of the image encoder, two for an adapter that reads two; default: in the model folder, near the adapter, or fetched before",
        **own,
    )
    group.add_argument(
        "--face-models",
        type=file_argument,
        metavar="FOLDER",
        help="for FaceID: where the face models are, such as insightface/models/buffalo_l",
        **own,
    )

    group = p.add_argument_group("where, when and how strongly the image acts, for each adapter")
    group.add_argument(
        "--strength",
        type=within(-ANY, ANY),
        metavar="X",
        help="0: text only, 1: as trained; default: what people begin with, 1 for most adapters",
        **own,
    )
    group.add_argument(
        "--preset",
        choices=list(PRESETS),
        metavar="PRESET",
        help="where in the model the image acts, see below; default: linear",
        **own,
    )
    group.add_argument("--sites", metavar="TEXT", help="factor per place, such as 'all: 0.2, output: 1'", **own)
    group.add_argument(
        "--scaling",
        choices=SCALINGS,
        metavar="HOW",
        help=f"what the strength multiplies: {', '.join(SCALINGS)}; default: V only",
        **own,
    )
    group.add_argument(
        "--start",
        type=within(0, 1),
        metavar="X",
        help="sampling progress, 0 to 1, at which the image begins to act; default: 0",
        **own,
    )
    group.add_argument(
        "--end",
        type=within(0, 1),
        metavar="X",
        help="sampling progress after which it no longer acts; default: 1",
        **own,
    )
    group.add_argument("--curve", metavar="TEXT", help="strength over progress, such as '0: 1, 1: 0.3'", **own)
    group.add_argument("--mask", type=file_argument, metavar="PICTURE", help="white is where the image acts", **own)

    group = p.add_argument_group("sampling")
    group.add_argument(
        "--steps", type=whole(1, 999_999), metavar="N", help="default: 25, or what is usual for a transformer"
    )
    group.add_argument(
        "--guidance",
        type=within(-ANY, ANY),
        metavar="X",
        help="guidance scale; default: 2 for the demo world, else 7.5 or what is usual for a transformer",
    )
    group.add_argument(
        "--true-guidance",
        type=within(-ANY, ANY),
        metavar="X",
        help="of distilled models (FLUX.1): guidance away from the negative prompt, at twice the time; 1: none",
    )
    group.add_argument("--init", type=file_argument, metavar="PICTURE", help="begin with this picture")
    group.add_argument(
        "--denoise",
        type=within(0, 1),
        metavar="X",
        help="with --init: how much of it is drawn anew, 0 to 1; default: 0.75",
    )
    group.add_argument(
        "--inpaint-mask", type=file_argument, metavar="PICTURE", help="with --init: white is drawn anew, the rest stays"
    )

    group = p.add_argument_group("machine")
    group.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda, cuda:1, mps, xpu; default: auto, the accelerator if there is one"
    )
    group.add_argument(
        "--dtype",
        choices=("auto", "float32", "float16", "bfloat16"),
        metavar="TYPE",
        help="float32, float16 or bfloat16; default: auto, 16 bits beside an accelerator",
    )
    group.add_argument(
        "--at-once", type=whole(1, 999_999), metavar="N", help="pictures that are sampled together; default: all"
    )
    group.add_argument(
        "--out",
        type=file_argument,
        metavar="FOLDER",
        help="for pictures, grid.png and facts.json; default: ipadapter-out",
    )
    group.add_argument(
        "--maps",
        type=file_argument,
        nargs="?",
        const=None,
        metavar="PLACE",
        help="also draw where each reference acted: heat maps over the pictures, and a bar for every layer; into this folder, or for one picture this .png; alone: into --out",
    )
    group.add_argument("--json", action="store_true", help="print the facts as JSON instead of text")


@dataclass(frozen=True, slots=True)
class Lora:
    """``file[:strength[:where]]``; the file ends with its extension, as its path may have colons itself."""

    file: Path
    strength: float = 1.0
    where: str = ""

    @classmethod
    def read(cls, text: str) -> Lora:
        """Raises ArgumentTypeError for a strength that is no number."""
        found = re.fullmatch(
            r"(.+?\.(?:safetensors|sft|bin|ckpt|pth?))(?::([^:]*)(?::(.*))?)?", text, re.IGNORECASE | re.DOTALL
        )
        file, strength, where = found.groups() if found else (text, None, None)
        value = number(strength) if strength else 1.0
        if value is None:
            raise argparse.ArgumentTypeError(
                f"cannot read the strength {quoted(strength)}; write file.safetensors:0.8, or with places "
                "'file.safetensors:0.8:out3-5: 1'"
            )
        return cls(file_argument(file), value, where or "")

    def told(self) -> str:
        """As it is written in pictures."""
        return f"{name_of(self.file)}:{self.strength:g}{':' if self.where else ''}{self.where}"


# --- settings ---------------------------------------------------------------------------------------------------------


def settled(args: argparse.Namespace) -> dict[str, Any]:
    """All settings: those given, those of a picture that is repeated, and for the rest what holds without."""
    given = vars(args)
    found, repeated = OF_RUN | {name: given[name] for name in OF_RUN if name in given}, None
    if "repeat" in given:
        repeated = _repeated(args.repeat, given.get("look_in", []), given)
        found = OF_RUN | {name: value for name, value in repeated.items() if name in OF_RUN}
        found |= {name: given[name] for name in OF_RUN if name in given}
        found["only"] = None if {"seed", "batch", "at_once"} & given.keys() else repeated.get("only")
    shared: dict[str, Any] = given.get("shared", {})
    if "adapters" in given:
        found["adapters"] = [OF_ADAPTER | shared | own for own in given["adapters"]]
    else:
        told = {} if repeated is None else repeated
        found["adapters"] = [OF_ADAPTER | own | shared for own in told.get("adapters", [told.get("shared", {})])]
    return found


class _Told(Parser):
    """Reads what a picture says: its complaints are not the user's."""

    def error(self, message: str) -> NoReturn:
        raise argparse.ArgumentTypeError(message)


def _repeated(picture: Path, places: Sequence[Path], given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a picture, as if they were given; files that moved are looked for, but those in whose place others are given."""
    from ..recipe import arguments, read_settings, sha256

    said = read_settings(picture)
    parser = _Told(prog="ipadapter generate", argument_default=argparse.SUPPRESS, add_help=False)
    add_settings(parser)
    line = arguments(said, [name for name in OF_RUN if name in said])
    adapters = said.get("adapters")
    for adapter in adapters if isinstance(adapters, list) else []:
        if isinstance(adapter, Mapping):
            line += arguments(adapter, [name for name in OF_ADAPTER if name in adapter])
    try:
        found: dict[str, Any] = vars(parser.parse_args(line))
    except argparse.ArgumentTypeError as error:
        raise InvalidInputError(
            f"{quoted(picture)} holds settings that this version of ipadapter does not know ({one_line(str(error), 200)})"
        ) from None
    prints = said.get("sha256")
    known: Mapping[str, Any] = prints if isinstance(prints, Mapping) else {}

    def here(file: Path) -> Path:
        place = _look_for(file, picture, places)
        wanted = known.get(file.as_posix())
        if wanted is not None and place.is_file() and not sha256(place).startswith(str(wanted)):
            complain(
                f"ipadapter: {quoted(place)} is not what it was when {picture.name} was made: the picture will differ"
            )
        return place

    replaced = {*given, *given.get("shared", ())}
    for settings in (found, *([] if "adapters" in given else (found.get("shared", {}), *found.get("adapters", ())))):
        for name in FILES:
            if name in settings and name not in replaced:
                settings[name] = (
                    [here(one) for one in settings[name]] if isinstance(settings[name], list) else here(settings[name])
                )
    if "lora" in found and "lora" not in given:
        found["lora"] = [replace(lora, file=here(lora.file)) for lora in found["lora"]]
    only = said.get("only")
    return {**found, "only": only if isinstance(only, int) and 0 <= only < len(found.get("seed", ())) else None}


def _look_for(file: Path, picture: Path, places: Sequence[Path]) -> Path:
    """A file where it was, else beside the picture or in one of the places; a name of the Hub as it is."""
    from ..hub import is_on_hub

    beside = [folder / name for folder in (picture.parent, *places) for name in (file, file.name)]
    for place in (file, *beside):
        if place.exists():
            return place
    if is_on_hub(file):
        return file
    raise InvalidInputError(
        f"{quoted(picture)} was made with {quoted(file)}, which is not there: name its folder with --look-in, or give another file"
    )


# --- the run ----------------------------------------------------------------------------------------------------------


def run_generate(args: argparse.Namespace) -> None:
    from ..generate import generate, grid_of, maps_files, save_map, save_picture, to_pillow, usual_sampling
    from ..hub import nothing_fetched
    from ..recipe import sampler_name

    started = time.perf_counter()
    with ExitStack() as stack:
        if "repeat" in args:
            stack.enter_context(nothing_fetched())  # a stranger's picture may name anything
        with usage():
            if "look_in" in args and "repeat" not in args:
                raise InvalidInputError("--look-in says where files of a picture are: name the picture with --from")
            settings = settled(args)
            run = _Run(settings)
            run.check()
            recorder = run.recorder(args)
            stack.enter_context(folder_for(args.out, "pictures"))
            if recorder is not None and args.maps is not None:
                stack.enter_context(folder_for(maps_files(args.maps, [""])[0][0].parent, "maps", "--maps"))
            run.look()
        pipeline = run.load(stack)
        steps, guidance = usual_sampling(pipeline)
        if settings["model"] is None:
            from ..demo.world import GUIDANCE as guidance
        steps = settings["steps"] or steps
        guidance = guidance if settings["guidance"] is None else settings["guidance"]
        settings |= {"steps": steps, "guidance": guidance, "dtype": run.dtype_name, "device": run.device}
        sampler, pictures = sampler_name(pipeline.scheduler), []
        beginning, maps = run.beginning(), []
        for seeds in run.chunks():
            if recorder is not None:
                recorder.start()
            with progress_bar("sampling", steps) as progress:
                made = generate(
                    pipeline, run.patches, [settings["prompt"]] * len(seeds), negative=settings["negative"], steps=steps,
                    guidance=guidance, true_guidance=settings["true_guidance"], seeds=seeds, height=settings["height"],
                    width=settings["width"], beginning=beginning, recorder=recorder, progress=progress,
                )  # fmt: skip
            wanted = [i for i in range(len(seeds)) if run.only in (None, i)]
            pictures += [(seeds, i, to_pillow(made[i])) for i in wanted]
            if recorder is not None:
                maps += [(recorder.maps(), i) for i in wanted]
        files: list[str] = []
        for seeds, i, picture in pictures:
            path = args.out / f"seed-{seeds[i]:06d}.png"
            facts = run.told({"seed": list(seeds), "only": i, "batch": len(seeds)})
            save_picture(picture, path, facts, run.parameters(seeds[i], sampler, picture.size))
            files.append(str(path))
        whole = run.told({"seed": run.seeds, "batch": len(run.seeds), "at_once": settings["at_once"]})
        facts = {**whole, "strength": run.patches[0].schedule.strength if run.patches else None, "files": files}
        if run.only is None:
            grid = args.out / "grid.png"
            save_picture(grid_of([picture for _, _, picture in pictures]), grid, whole)
            facts["grid"] = str(grid)
        if recorder is not None:
            names = [f"seed-{seeds[i]:06d}" for seeds, i, _ in pictures]
            places = maps_files(args.maps or args.out, names)
            for (_, _, picture), (recorded, i), files_of in zip(pictures, maps, places, strict=True):
                save_map(recorded, i, picture, files_of, run.references())
            facts["maps"] = [str(file) for both in places for file in both]
        facts["seconds"] = round(time.perf_counter() - started, 1)
        _write_facts(args.out / "facts.json", facts)
        many = f"{len(files)} picture{'s' if len(files) > 1 else ''}"
        made_of = f"{many} and grid.png in {args.out}" if run.only is None else files[0]
        print(json.dumps(facts) if args.json else f"{made_of} ({facts['seconds']} s)")


def _write_facts(path: Path, facts: Mapping[str, object]) -> None:
    try:
        path.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InvalidInputError(
            f"{quoted(path)} cannot be written ({error.strerror or error}): choose another place, or make room"
        ) from error


class _Run:
    """One call of the command: its settings, and what was read for them."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.adapters: list[dict[str, Any]] = [one for one in settings["adapters"] if one["image"]]
        self.patches: list[AdapterPatch] = []
        self.only: int | None = settings.get("only")
        self.device = self.dtype_name = ""
        seeds: list[int] = settings["seed"]
        many = settings["batch"] or (4 if len(seeds) == 1 else len(seeds))
        if len(seeds) > 1 and many != len(seeds):
            raise InvalidInputError(
                f"got {len(seeds)} seeds for {many} pictures: give one, from which others count up, or as many"
            )
        self.seeds = seeds if len(seeds) > 1 else [seeds[0] + i for i in range(many)]
        self.used: list[Path] = []
        self.loras: list[tuple[Lora, Path]] = []
        self.weights: list[tuple[LoRAWeights, Selector]] = []
        """Of the LoRAs, and where they act."""
        self.model = self.home = WORLD
        self.config: Path | None = None

    def check(self) -> None:
        """Everything that the values and pictures say, before any model is looked at. Raises InvalidInputError."""
        from ..devices import usable_device
        from ..images.pictures import as_mask, as_picture
        from ..prompt.combine import check_strengths

        settings = self.settings
        self.device = usable_device(settings["device"])
        for one in settings["adapters"]:
            if one["adapter"] is not None and not one["image"]:
                raise InvalidInputError(f"--adapter {one['adapter']} has no picture: give --image behind it")
            if one["image"] and one["adapter"] is None and settings["model"] is not None:
                raise InvalidInputError("--image needs --adapter with an IP-Adapter file for this model")
            if one["start"] > one["end"]:
                raise InvalidInputError(
                    f"--end {one['end']:g} lies before --start {one['start']:g}: the image would never act"
                )
            one["schedule"] = WeightSchedule(
                strength=1.0 if one["strength"] is None else one["strength"], preset=one["preset"],
                start_percent=one["start"], end_percent=one["end"], scaling=one["scaling"],
                site_factors=parse_site_factors(one["sites"]), curve=parse_curve(one["curve"]),
            )  # fmt: skip
            one["options"] = EncodeOptions(
                crop=one["crop"], combine=one["combine"], unconditional=one["unconditional"],
                strengths=parse_numbers(one["image_strengths"]) or None,
            )  # fmt: skip
            if one["image"]:
                check_strengths(one["options"].strengths, len(one["image"]))
            one["pictures"] = [as_picture(path) for path in one["image"]]
            one["region"] = None if one["mask"] is None else as_mask(one["mask"])
            one["away"] = None if one["negative_image"] is None else as_picture(one["negative_image"])
            self.used += [*one["image"], *(one[name] for name in ("mask", "negative_image") if one[name] is not None)]
        idle = [name for name in OF_ADAPTER if any(one[name] != OF_ADAPTER[name] for one in settings["adapters"])]
        if idle and not self.adapters:
            raise InvalidInputError(
                f"--{idle[0].replace('_', '-')} says how a reference image acts: give one with --image"
            )
        if settings["init"] is None and (settings["denoise"] is not None or settings["inpaint_mask"] is not None):
            raise InvalidInputError("--denoise and --inpaint-mask say what becomes of a picture: give it with --init")
        self.beginning()
        self.used += [settings[name] for name in ("init", "inpaint_mask") if settings[name] is not None]
        for lora in settings["lora"]:
            self.loras.append((lora, _file(lora.file)))

    def recorder(self, args: argparse.Namespace) -> Recorder | None:
        """Who hears where the images act, where that is asked. Raises InvalidInputError where no image does."""
        from ..attention.recording import Recorder

        if not hasattr(args, "maps"):
            return None
        if not self.adapters:
            raise InvalidInputError("--maps shows where reference images acted: give one with --image")
        return Recorder()

    def references(self) -> list[Any]:
        """The reference pictures in order, as they are shown beside their maps."""
        from ..generate import to_pillow

        return [to_pillow(picture[..., :3]) for one in self.adapters for picture in one["pictures"]]

    def beginning(self) -> Beginning | None:
        """The picture to begin with."""
        from ..generate import Beginning
        from ..images.pictures import as_mask, as_picture

        settings = self.settings
        if settings["init"] is None:
            return None
        region = None if settings["inpaint_mask"] is None else as_mask(settings["inpaint_mask"])
        return Beginning(
            as_picture(settings["init"]), 0.75 if settings["denoise"] is None else settings["denoise"], region
        )

    def look(self) -> None:
        """Everything that files say without the base model's weights: whether adapters, places and LoRAs fit it, and what is missing.

        Image encoders are loaded here, as their sizes tell whether an adapter reads them. Raises InvalidInputError.
        """
        import diffusers

        from ..checkpoints import AdapterWeights, describe_adapter
        from ..checkpoints.format import BARE, empty_module
        from ..generate import check_guidance
        from ..hub import folder_on_disk, model_on_disk
        from ..images.encoder import load_image_encoder
        from ..lora import load_lora, parse_where
        from ..model_folders import config_folder, layout_in, read_table
        from ..quiet import quietly
        from ..steering import check_fit, face_analyzer, find_encoders

        settings = self.settings
        self.model = WORLD if settings["model"] is None else model_on_disk(settings["model"])
        self.config = _config(self.model, settings["config"])
        self.home = config_folder(self.model, self.config)
        layout = layout_in(self.model, self.config)
        with quietly("diffusers", "transformers"):
            kind = getattr(diffusers, str(read_table(self.home / "model_index.json").get("_class_name")), None)
        beginning = self.beginning()
        if beginning is not None:
            beginning.sampled(settings["steps"] or layout.model.steps)
        if isinstance(kind, type):
            check_guidance(kind, settings["negative"], settings["true_guidance"])
        for one in self.adapters:
            source = one["adapter"]
            one["file"] = WORLD / "adapters" / "ip-adapter-plus.safetensors" if source is None else _file(source)
            spec = describe_adapter(one["file"])
            adapter = AdapterWeights(spec, empty_module(spec, BARE), one["file"].name)
            check_fit(adapter, layout, one["schedule"], one["face_models"])
            if one["face_models"] is not None and spec.format.feature.embedding is not None:
                one["faces"] = face_analyzer(one["face_models"])
            if one["image_encoder"]:
                one["encoder"] = tuple(load_image_encoder(folder_on_disk(place)) for place in one["image_encoder"])
            elif spec.format.feature.encoded is not None:
                one["encoder"] = find_encoders(adapter, source=source or one["file"], home=self.home)
            if source is not None:
                self.used.append(one["file"])
        for lora, file in self.loras:
            weights = load_lora(file)
            self.weights.append((weights, parse_where(lora.where, weights.base_model)))
            self.used.append(file)

    def load(self, stack: ExitStack) -> Any:
        """The pipeline with its LoRAs, on the device; the image prompts are in ``patches`` then."""
        import torch

        from ..model_folders import denoiser_of, hold_in_memory, load_pipeline
        from ..steering import prompt_patch, usual_strength

        name: str = self.settings["dtype"]
        if name == "auto":
            name = "float32" if self.device == "cpu" else "float16" if denoiser_of(self.home) == "unet" else "bfloat16"
        self.dtype_name = name
        if self.model.is_file():
            self.used.append(self.model)
        pipeline = load_pipeline(self.model, config=self.config, dtype=getattr(torch, name))
        self._add_loras(pipeline, stack)
        for one in self.adapters:
            patch = prompt_patch(
                pipeline, one["file"], one["pictures"],
                one["schedule"] if one["strength"] is not None else usual_strength(one["schedule"]), mask=one["region"],
                negative=one["away"], encoder=one.pop("encoder", None),
                faces=one.pop("faces", None), options=one["options"], home=self.home, device=torch.device(self.device),
            )  # fmt: skip
            one["strength"] = patch.schedule.strength
            self.patches.append(patch)
        pipeline.to(self.device)  # after the adapters and their encoders left it
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                hold_in_memory(part)
        return pipeline

    def _add_loras(self, pipeline: Any, stack: ExitStack) -> None:
        """Merge them where weights are plain numbers, else let them run beside the layers."""
        import torch

        from ..backends.diffusers import lora as on_pipeline
        from ..lora import choose_mode

        placed = [
            replace(on_pipeline.place(pipeline, weights), strength=lora.strength, selector=selector)
            for (lora, _), (weights, selector) in zip(self.loras, self.weights, strict=True)
        ]
        if not placed:
            return
        plain = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        parts = on_pipeline.parts_of(pipeline).values()
        quantised = any(parameter.dtype not in plain for part in parts for parameter in part.parameters())
        if choose_mode(placed, quantised=quantised).mode == "merged":
            on_pipeline.merge(pipeline, *placed)
        else:
            stack.enter_context(on_pipeline.apply(pipeline, *placed))

    def chunks(self) -> Iterator[list[int]]:
        """The seeds of what is sampled together."""
        step = self.settings["at_once"] or len(self.seeds)
        for start in range(0, len(self.seeds), step):
            yield self.seeds[start : start + step]

    def told(self, changes: Mapping[str, object]) -> dict[str, object]:
        """The settings as a picture holds them."""
        from ..recipe import VERSION, fingerprints

        settings = {**self.settings, **changes}
        said: dict[str, object] = {"program": f"ipadapter {__version__}", "settings": VERSION}
        said |= {name: _portable(settings[name]) for name in OF_RUN if settings[name] not in (None, [], "")}
        said["adapters"] = [
            {name: _portable(one[name]) for name in OF_ADAPTER if one[name] not in (None, [], "")}
            for one in self.adapters
        ]
        if "only" in changes:
            said["only"] = changes["only"]
        return {**said, "sha256": fingerprints(self.used)}

    def parameters(self, seed: int, sampler: str, size: tuple[int, int]) -> str:
        """The text for web UIs' readers."""
        from ..recipe import lora_hash, parameters_text, sha256

        settings, model = self.settings, self.settings["model"]
        facts: dict[str, object] = {
            "Steps": settings["steps"], "Sampler": sampler, "CFG scale": float(settings["guidance"]), "Seed": seed,
            "Size": f"{size[0]}x{size[1]}",
            "Model hash": sha256(model)[:10] if model is not None and model.is_file() else None,
            "Model": "demo world" if model is None else _title(model),
            "Denoising strength": None if settings["init"] is None else (settings["denoise"] or 0.75),
            **{f"IP-Adapter {i}": _in_words(one) for i, one in enumerate(self.adapters, 1)},
            "Version": f"ipadapter {__version__}",
        }  # fmt: skip
        hashes = {file.stem: lora_hash(file) for _, file in self.loras}
        tags = "".join(f"<lora:{file.stem}:{lora.strength:g}>" for lora, file in self.loras)
        return parameters_text(f"{settings['prompt']} {tags}".strip(), settings["negative"], facts, hashes)


def _title(file: Path) -> str:
    """What people call a model or adapter: its file's name without extension, or its folder's."""
    name = Path(file.name.rpartition(":")[2])
    return name.stem if name.suffix.lower() in (".safetensors", ".sft", ".bin", ".ckpt", ".pt") else name.name


def _in_words(adapter: Mapping[str, Any]) -> str:
    name = "ip-adapter-plus" if adapter["adapter"] is None else _title(adapter["adapter"])
    return f"{name}, strength {adapter['strength']:g}, {adapter['preset']}"


def _portable(value: Any) -> Any:
    if isinstance(value, Lora):
        return value.told()
    if isinstance(value, Path):
        return name_of(value)
    return [_portable(one) for one in value] if isinstance(value, list) else value


def name_of(path: Path) -> str:
    """A file's name in pictures: the Hub's as it is, others without an absolute path."""
    from ..hub import is_on_hub
    from ..recipe import portable

    return path.as_posix() if is_on_hub(path) else portable(path)


def _file(path: Path) -> Path:
    from ..hub import file_on_disk

    return file_on_disk(path)


def _config(model: Path, config: Path | None) -> Path | None:
    """The folder that describes a model in one file; None where it lies beside it, and for folders."""
    from ..hub import described
    from ..model_folders import published_as

    if config is not None:
        if not model.is_file():
            raise InvalidInputError(
                f"--config describes a model in one file, and {quoted(model)} is a folder: leave it out"
            )
        return described(config)
    if not model.is_file() or (model.with_suffix("") / "model_index.json").is_file():
        return None
    known = published_as(model)
    if known is None:
        return None
    return described(known)
