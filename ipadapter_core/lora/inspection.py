"""What people read about a LoRA file: family, algorithms, ranks, strength by block and layer, trigger words. And a check."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptFileError, quoted
from ..files.state_dict import Source
from ..files.text import as_table, parse_json
from ..models import block_of
from ..models.layers import LayerPart, common_words
from ..models.unet import block_word
from .base_names import by_name, dotted, found_in, text_path, unet_paths
from .formats import describe_lora, load_lora
from .names import part_and_path
from .selector import block_order
from .targets import Target
from .weights import LoRAModule, LoRAWeights, left_out_lines

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

_LETTERS = ("q", "k", "v", "qkv", "out")
COLUMNS = (
    *(f"{stream}{letter}" for stream in ("attn1 ", "attn2 ", "img ", "txt ", "") for letter in _LETTERS),
    *("img ff", "txt ff", "ff", "img mod", "txt mod", "mod", "proj", "resnet", "sampler"),
)
"""Columns of the heat map, in the selector's words, of which those are shown that a file has; all else is ``other``. ``qkv`` is a fused
layer whose change cannot be told apart."""


class ModuleFacts(TypedDict):
    """One module: its name in the file, part, algorithm, rank, alpha, the scale that they make, what decided the alpha."""

    module: str
    component: str
    algorithm: str
    rank: int | None
    alpha: float | None
    scale: float | None
    alpha_from: str
    bias: bool


class LoRAFacts(TypedDict):
    """A file in plain values for JSON; ``spelling`` is the older name of ``key_format``."""

    name: str
    base_model: str
    key_format: str
    spelling: str
    modules: dict[str, int]
    algorithms: dict[str, int]
    ranks: dict[str, int]
    biases: int
    parameters: int
    unknown_keys: list[str]
    left_out: list[dict[str, str]]
    left_out_count: int
    not_applied: list[str]
    notes: list[str]
    alpha_from: dict[str, int]
    module_table: list[ModuleFacts]
    trigger_words: list[str]
    tags: dict[str, int]
    training: dict[str, str]


def lora_facts(source: Source, *, name: str | None = None) -> LoRAFacts:
    """Plain values for JSON; of the numbers only alphas are read."""
    return facts_of(describe_lora(source, name=name))


def facts_of(weights: LoRAWeights) -> LoRAFacts:
    """The same of a parsed LoRA."""
    updates = [m.weight for m in weights.modules if m.weight is not None]
    ranks = Counter(u.rank for u in updates if u.rank is not None)
    components = Counter[str](m.component for m in weights.modules)
    return {
        "name": weights.name,
        "base_model": weights.base_model,
        "key_format": weights.key_format,
        "spelling": weights.key_format,
        "modules": dict(components),
        "algorithms": dict(Counter(u.title for u in updates)),
        "ranks": {str(rank): count for rank, count in sorted(ranks.items())},
        "biases": sum(m.bias is not None for m in weights.modules),
        "parameters": sum(u.numel() for m in weights.modules for u in (m.weight, m.bias) if u is not None),
        "unknown_keys": list(weights.ignored[:20]),
        "left_out": [{"name": item.name, "why": item.why} for item in weights.left_out[:LISTED]],
        "left_out_count": len(weights.left_out),
        "not_applied": left_out_lines(weights.left_out),
        "notes": list(weights.notes),
        "alpha_from": dict(Counter(m.alpha_from for m in weights.modules if m.alpha_from)),
        "module_table": [module_facts(module) for module in weights.modules],
        "trigger_words": trigger_words(weights.metadata),
        "tags": dict(training_tags(weights.metadata, 20)),
        "training": {key: weights.metadata[key] for key in TRAINING_KEYS if key in weights.metadata},
    }


LISTED = 1000
"""Of what is left out, entries that are listed one by one."""


def module_facts(module: LoRAModule) -> ModuleFacts:
    """What is to be said of one module."""
    update = module.weight
    return {
        "module": module.stem,
        "component": module.component,
        "algorithm": "bias" if update is None else update.title,
        "rank": None if update is None else update.rank,
        "alpha": module.alpha,
        "scale": getattr(update, "scale", None),
        "alpha_from": module.alpha_from,
        "bias": module.bias is not None,
    }


TRAINING_KEYS = (
    "modelspec.title", "modelspec.architecture", "ss_base_model_version", "ss_sd_model_name", "ss_network_module",
    "ss_network_dim", "ss_network_alpha", "ss_network_args", "ss_resolution", "ss_learning_rate", "ss_optimizer", "ss_steps",
    "ss_num_epochs", "ss_epoch", "ss_clip_skip", "ss_min_snr_gamma", "ss_noise_offset",
)  # fmt: skip


def trigger_words(metadata: Mapping[str, str]) -> list[str]:
    """What the author says to write in the prompt: modelspec's phrase, else the names of kohya's image folders.

    At most 100, each on one line and at most 200 characters long.
    """
    words = [word.strip() for word in metadata.get("modelspec.trigger_phrase", "").split(",")]
    if not any(words):
        folders = _table(metadata.get("ss_tag_frequency"))
        words = [folder.partition("_")[2] for folder in folders if folder.split("_")[0].isdigit()]
    return [_shown(word, 200) for word in list(dict.fromkeys(filter(None, words)))[:100]]


def training_tags(metadata: Mapping[str, str], count: int) -> list[tuple[str, int]]:
    """The most frequent caption tags of the training, with their counts."""
    tags: Counter[str] = Counter()
    for folder in _table(metadata.get("ss_tag_frequency")).values():
        for tag, number in as_table(folder).items():
            if isinstance(number, int):
                tags[tag.strip()] += number
    return tags.most_common(count)


MAX_TABLE = 16 * 2**20
"""Characters of a table in a header; those of the largest training sets have a tenth of that."""


def _table(text: str | None) -> dict[str, object]:
    try:
        return as_table(parse_json(text, "ss_tag_frequency")) if text and len(text) <= MAX_TABLE else {}
    except CorruptFileError:
        return {}


def describe_facts(facts: LoRAFacts) -> str:
    """The facts as lines of text."""

    def pairs(table: Mapping[str, int]) -> str:
        return ", ".join(f"{name} × {count}" for name, count in table.items()) or "none"

    lines = [
        facts["name"],
        f"  base model     {facts['base_model']}",
        f"  key format     {facts['key_format']}",
        f"  algorithms     {pairs(facts['algorithms'])}",
        f"  ranks          {pairs(facts['ranks'])}",
        f"  modules        {pairs(facts['modules'])}" + (f", {facts['biases']} biases" if facts["biases"] else ""),
        f"  parameters     {facts['parameters']:,}",
        f"  alpha from     {pairs(facts['alpha_from'])}",
    ]
    words = facts["trigger_words"]
    if words:
        lines.append(f"  trigger words  {_shown(', '.join(words))}")
    tags = facts["tags"]
    if tags:
        lines.append(f"  training tags  {', '.join(f'{_shown(tag, 60)} ({n})' for tag, n in list(tags.items())[:12])}")
    lines += [f"  {key:<22} {_shown(value)}" for key, value in facts["training"].items()]
    lines += [f"  not applied    {line}" for line in facts["not_applied"]]
    lines += [f"  note           {line}" for line in facts["notes"]]
    return "\n".join([*lines, *_module_lines(facts["module_table"])])


def _shown(text: str, limit: int = 300) -> str:
    """Somebody's text on one line, not longer than people read."""
    return quoted(text, limit)[1:-1]


TABLE_ROWS = 40


def _module_lines(modules: Sequence[ModuleFacts]) -> list[str]:
    """Scale, alpha and rank: modules that agree in all of it are one row."""
    groups: dict[tuple[str, str, int | None, float | None, float | None, str], list[str]] = {}
    for m in modules:
        key = (m["component"], m["algorithm"], m["rank"], m["alpha"], m["scale"], m["alpha_from"])
        groups.setdefault(key, []).append(m["module"])
    rows = [f"  {'part':<6}{'algorithm':<14}{'rank':>5}{'alpha':>9}{'scale':>9}  {'alpha from':<20} modules"]
    for (part, algorithm, rank, alpha, scale, origin), names in list(groups.items())[:TABLE_ROWS]:
        numbers = "".join(
            f"{'-' if value is None else format(value, 'g'):>{width}}"
            for value, width in ((rank, 5), (alpha, 9), (scale, 9))
        )
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        rows.append(f"  {part:<6}{algorithm:<14}{numbers}  {origin or '-':<20} {_shown(names[0], 80)}{more}")
    if len(groups) > TABLE_ROWS:
        rows.append(f"  … and {len(groups) - TABLE_ROWS} more rows; --json has every module")
    return rows


# --- strength by block and layer -------------------------------------------------------------------------------------


def target_of(module: LoRAModule, base_model: str) -> Target:
    """The layer that a module stands for, from its name alone, for the selector's words."""
    shape = () if module.weight is None else tuple(size or 1 for size in module.weight.weight_shape)
    if module.component != "denoiser":
        path = text_path(module.name) or dotted(module.name)
        words = common_words(path) - {"attn1", "attn2"}
        return Target(path, module.component, path, module.component, shape, True, words=words)
    found = found_in(module.name, base_model)
    if found is not None:
        parts: tuple[LayerPart, ...] = ()
        if not found.parts and len(found.row.words) > 1 and shape:
            lengths = found.row.lengths(shape)
            starts = accumulate(lengths, initial=0)
            parts = tuple(
                LayerPart(found.original, start, length, found.words_of(words))
                for start, length, words in zip(starts, lengths, found.row.words, strict=False)
            )
        label = found.diffusers[0] if len(found.diffusers) == 1 else found.original
        return Target(label, "denoiser", label, found.block, shape, True, words=found.words, parts=parts)
    pair = by_name(base_model).get(module.name)
    path = part_and_path(module.stem)[1]
    label = pair[0] if pair else path if "." in path else dotted(module.name)
    block = block_word(pair[1]) if pair else block_of(label)
    return Target(label, "denoiser", label, block, shape, True, words=common_words(label))


@dataclass(frozen=True, slots=True, eq=False)
class HeatMap:
    """Root mean square of ΔW per block (rows) and kind of layer (columns); NaN where there is nothing."""

    blocks: tuple[str, ...]
    columns: tuple[str, ...]
    values: NDArray[np.float64]

    def text(self) -> str:
        """A table of the numbers."""
        width = max((len(block) for block in self.blocks), default=0) + 1
        width = max(width, 8)
        head = f"{'':<{width}}" + "".join(f"{c:>11}" for c in self.columns)
        rows = (
            f"{block:<{width}}" + "".join(f"{'-' if math.isnan(v) else f'{v:.2e}':>11}" for v in row)
            for block, row in zip(self.blocks, self.values, strict=True)
        )
        return "\n".join((head, *rows))


def heat_map(weights: LoRAWeights) -> HeatMap:
    """How strongly each block and kind of layer is changed, at strength 1. Updates that depend on the weight are left out."""
    base = weights.base_model
    sums: dict[tuple[str, str], list[float]] = {}
    for module in weights.modules:
        for place, norm, numel in _norms(module, base):
            cell = sums.setdefault(place, [0.0, 0.0])
            cell[0] += norm**2
            cell[1] += numel
    blocks = sorted({block for block, _ in sums}, key=block_order)
    rows = {block: row for row, block in enumerate(blocks)}
    columns = [c for c in (*COLUMNS, "other") if any(column == c for _, column in sums)]
    values = np.full((len(blocks), len(columns)), math.nan)
    for (block, column), (square, numel) in sums.items():
        values[rows[block], columns.index(column)] = math.sqrt(square / numel)
    return HeatMap(tuple(blocks), tuple(columns), values)


def _norms(module: LoRAModule, base_model: str) -> list[tuple[tuple[str, str], float, int]]:
    """Block and column, norm and numbers of a module, of every part of a fused layer where they can be told apart."""
    norm = None if module.weight is None else module.weight.norm()
    if norm is None or module.weight is None:
        return []
    target = target_of(module, base_model)
    found = found_in(module.name, base_model)
    around = (
        set[str]() if found is None or found.blocks is None else {*found.blocks.words.split()}
    )  # the map's row says it
    if target.parts:
        parts = [
            (part.words - around, part.length, module.weight.rows(part.start, part.length).norm())
            for part in target.parts
        ]
        if all(own is not None for _, _, own in parts):
            columns = math.prod(target.shape[1:])
            return [((target.block, _column(words)), own or 0.0, rows * columns) for words, rows, own in parts]
    return [((target.block, _column(target.words - around)), norm, math.prod(target.shape))]


_COLUMNS = tuple((column, frozenset(column.split())) for column in COLUMNS)


def _column(words: frozenset[str]) -> str:
    """The first column whose words a layer has."""
    if len(words & {"q", "k", "v"}) > 1:
        words = words - {"q", "k", "v", "out", "ff"} | {"qkv"}
    return next((column for column, needed in _COLUMNS if needed <= words), "other")


MAX_ROWS = 300
"""Blocks that are drawn; Flux, the deepest model, has 57."""


def draw_heat_map(heat: HeatMap, title: str, cell: tuple[int, int] = (74, 22)) -> Image.Image:
    """The map as a Pillow picture: dark is weak, bright is strong, grey is absent; numbers in 1/1000."""
    from PIL import Image, ImageDraw

    width, height = cell
    if len(heat.blocks) > MAX_ROWS:
        heat = HeatMap(heat.blocks[:MAX_ROWS], heat.columns, heat.values[:MAX_ROWS])
    text = f"{title[:200]}: RMS of ΔW × 1000"
    left = 18 + max((_text_width(block) for block in heat.blocks), default=0)
    top, right = 46, max(left + width * len(heat.columns), 6 + _text_width(text)) + 8
    picture = Image.new("RGB", (right, top + height * len(heat.blocks) + 8), "white")
    draw = ImageDraw.Draw(picture)
    _write(draw, (6, 6), text, "black")
    top_value = float(np.nanmax(heat.values)) if heat.values.size and not np.isnan(heat.values).all() else 1.0
    for x, column in enumerate(heat.columns):
        _write(draw, (left + x * width + 4, top - 18), column, "black")
    for y, block in enumerate(heat.blocks):
        _write(draw, (6, top + y * height + 4), block, "black")
        for x in range(len(heat.columns)):
            value = float(heat.values[y, x])
            box = (left + x * width, top + y * height, left + (x + 1) * width - 2, top + (y + 1) * height - 2)
            if math.isnan(value):
                draw.rectangle(box, fill=(225, 225, 225))
                continue
            share = value / top_value if top_value > 0 else 0.0
            draw.rectangle(box, fill=(int(30 + 225 * share), int(25 + 190 * share**2), int(90 * (1 - share)) + 20))
            _write(draw, (box[0] + 5, box[1] + 4), f"{1000 * value:.3g}", "black" if share > 0.55 else "white")
    return picture


_FONT_SIZE = 12
_DRAWN = {"Δ": (11, ((1, 10, 5, 1), (5, 1, 9, 10), (9, 10, 1, 10))), "×": (7, ((1, 4, 6, 9), (6, 4, 1, 9)))}
"""Width and lines of the letters that Pillow's own font, the only one on every machine, does not have."""


def _write(draw: ImageDraw.ImageDraw, at: tuple[int, int], text: str, fill: str) -> None:
    """Text in Pillow's own font; letters that it does not have as lines or question marks."""
    from PIL import ImageFont

    font = ImageFont.load_default(_FONT_SIZE)
    x, y = at
    for run in _runs(text):
        if run in _DRAWN:
            wide, lines = _DRAWN[run]
            for x0, y0, x1, y1 in lines:
                draw.line((x + x0, y + y0, x + x1, y + y1), fill=fill, width=1)
            x += wide
        else:
            draw.text((x, y), run, fill=fill, font=font)
            x += round(font.getlength(run))


def _text_width(text: str) -> int:
    from PIL import ImageFont

    font = ImageFont.load_default(_FONT_SIZE)
    return sum(_DRAWN[run][0] if run in _DRAWN else round(font.getlength(run)) for run in _runs(text))


def _runs(text: str) -> list[str]:
    """A text as letters that are drawn and what is between them, in letters that the font has."""
    pieces = re.split(f"([{''.join(_DRAWN)}])", text)
    plain = (piece if piece in _DRAWN else piece.encode("ascii", "replace").decode("ascii") for piece in pieces)
    return [piece for piece in plain if piece]


# --- verify ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a check found: problems make the file unusable or half-usable, remarks are worth knowing."""

    problems: tuple[str, ...]
    remarks: tuple[str, ...]

    def text(self) -> str:
        lines = [*(f"problem: {p}" for p in self.problems), *(f"remark: {r}" for r in self.remarks)]
        return "\n".join(lines) or "nothing to complain about"


def verify(source: Source) -> Verdict:
    """Read every number of a file and check names, ranks and sizes. Raises as ``load_lora`` for files that cannot be read."""
    weights = load_lora(source, name=Path(source).name if isinstance(source, (str, Path)) else None)
    problems: list[str] = []
    remarks: list[str] = []
    base = weights.base_model
    known = by_name(base)
    lost: list[str] = []
    if unet_paths(base):
        lost = [m.stem for m in weights.modules if m.component == "denoiser" and m.name not in known]
        lost = [stem for stem in lost if not stem.split(".")[0].isdigit() and "ip_adapter" not in stem]
    elif base != "unknown":
        named = (m for m in weights.modules if m.component == "denoiser")
        lost = [m.stem for m in named if found_in(m.name, base) is None]
    if lost:
        problems.append(f"{len(lost)} modules are no layers of {base}, such as {quoted(lost[0])}")
    if base == "unknown":
        remarks.append("the base model cannot be told from the names")
    remarks += [f"not applied: {line}" for line in left_out_lines(weights.left_out)]
    remarks += weights.notes
    norms = {m.stem: norm for m in weights.modules if m.weight is not None and (norm := m.weight.norm()) is not None}
    zero = [stem for stem, norm in norms.items() if norm == 0]
    if zero and len(zero) == len(norms):
        problems.append("all its updates are zero: it changes nothing")
    elif zero:
        remarks.append(f"{len(zero)} of {len(norms)} updates are zero, such as {quoted(zero[0])}")
    for module in weights.modules:
        rank = None if module.weight is None else module.weight.rank
        if module.weight is None or rank is None:
            continue
        rows, *columns = module.weight.weight_shape
        if rows is not None and None not in columns and rank > min(rows, math.prod(size or 1 for size in columns)):
            remarks.append(f"{quoted(module.stem)} has rank {rank}, more than its layer can use; resize it")
            break
    return Verdict(tuple(problems), tuple(remarks))
