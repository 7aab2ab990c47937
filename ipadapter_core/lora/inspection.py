"""What people read about a LoRA file: family, algorithms, ranks, strength by block and layer, trigger words. And a check."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptFileError, quoted
from ..files.state_dict import Source
from ..files.text import as_table, parse_json
from .base_names import by_name, unet_paths
from .formats import describe_lora, load_lora
from .selector import TYPES
from .targets import Target
from .weights import LoRAModule, LoRAWeights, left_out_lines

if TYPE_CHECKING:
    from PIL import Image

COLUMNS = (
    "attn1 q",
    "attn1 k",
    "attn1 v",
    "attn1 out",
    "attn2 q",
    "attn2 k",
    "attn2 v",
    "attn2 out",
    "ff",
    "proj",
    "resnet",
    "sampler",
)
"""Columns of the heat map, in the selector's words; the last one is all else."""


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
    """What the author says to write in the prompt: modelspec's phrase, else the names of kohya's image folders."""
    phrase = metadata.get("modelspec.trigger_phrase", "").strip()
    if phrase:
        return [word.strip() for word in phrase.split(",") if word.strip()]
    folders = _table(metadata.get("ss_tag_frequency"))
    names = (folder.partition("_")[2] for folder in folders if folder.split("_")[0].isdigit())
    return [name for name in dict.fromkeys(names) if name]


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
        lines.append(f"  trigger words  {_shown(', '.join(words[:50]))}")
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
    pair = by_name(base_model).get(module.name) if module.component == "denoiser" else None
    label = pair[0] if pair else module.name
    block = module.component if module.component != "denoiser" else _block(pair[1] if pair else module.name)
    shape = () if module.weight is None else tuple(size or 1 for size in module.weight.weight_shape)
    return Target(label, module.component, label, block, shape, True)


def _block(ldm: str) -> str:
    parts = ldm.replace(".", "_").split("_")
    kinds = {"input": "in", "middle": "mid", "output": "out", "double": "double", "single": "single", "joint": "joint"}
    if len(parts) > 2 and parts[0] in kinds and parts[2].isdigit():
        return f"{kinds[parts[0]]}{parts[2]}"
    return "base"


@dataclass(frozen=True, slots=True, eq=False)
class HeatMap:
    """Root mean square of ΔW per block (rows) and kind of layer (columns); NaN where there is nothing."""

    blocks: tuple[str, ...]
    columns: tuple[str, ...]
    values: NDArray[np.float64]

    def text(self) -> str:
        """A table of the numbers."""
        head = f"{'':<8}" + "".join(f"{c:>11}" for c in self.columns)
        rows = (
            f"{block:<8}" + "".join(f"{'-' if math.isnan(v) else f'{v:.2e}':>11}" for v in row)
            for block, row in zip(self.blocks, self.values, strict=True)
        )
        return "\n".join((head, *rows))


def heat_map(weights: LoRAWeights) -> HeatMap:
    """How strongly each block and kind of layer is changed, at strength 1. Updates that depend on the weight are left out."""
    base = weights.base_model
    tests = [(column, [TYPES[word] for word in column.split()]) for column in COLUMNS]
    sums: dict[tuple[str, str], list[float]] = {}
    for module in weights.modules:
        norm = None if module.weight is None else module.weight.norm()
        if norm is None or module.weight is None:
            continue
        target = target_of(module, base)
        column = next((name for name, words in tests if all(word(target) for word in words)), "other")
        numel = math.prod(size or 1 for size in module.weight.weight_shape)
        cell = sums.setdefault((target.block, column), [0.0, 0.0])
        cell[0] += norm**2
        cell[1] += numel
    blocks = sorted({block for block, _ in sums}, key=_order)
    rows = {block: row for row, block in enumerate(blocks)}
    columns = [c for c in (*COLUMNS, "other") if any(column == c for _, column in sums)]
    values = np.full((len(blocks), len(columns)), math.nan)
    for (block, column), (square, numel) in sums.items():
        values[rows[block], columns.index(column)] = math.sqrt(square / numel)
    return HeatMap(tuple(blocks), tuple(columns), values)


def _order(block: str) -> tuple[int, int]:
    kinds = ["te1", "te2", "te3", "base", "in", "mid", "out", "joint", "double", "single"]
    if block in kinds:
        return kinds.index(block), 0
    kind = block.rstrip("0123456789")
    return kinds.index(kind) if kind in kinds else len(kinds), int(block[len(kind) :] or 0)


MAX_ROWS = 300
"""Blocks that are drawn; Flux, the deepest model, has 57."""


def draw_heat_map(heat: HeatMap, title: str, cell: tuple[int, int] = (74, 22)) -> Image.Image:
    """The map as a Pillow picture: dark is weak, bright is strong, grey is absent; numbers in 1/1000."""
    from PIL import Image, ImageDraw

    width, height = cell
    left, top = 64, 46
    if len(heat.blocks) > MAX_ROWS:
        heat = HeatMap(heat.blocks[:MAX_ROWS], heat.columns, heat.values[:MAX_ROWS])
    picture = Image.new("RGB", (left + width * len(heat.columns) + 8, top + height * len(heat.blocks) + 8), "white")
    draw = ImageDraw.Draw(picture)
    draw.text((6, 4), f"{title[:200]}: RMS of ΔW × 1000".encode("latin-1", "replace").decode("latin-1"), fill="black")
    top_value = float(np.nanmax(heat.values)) if heat.values.size and not np.isnan(heat.values).all() else 1.0
    for x, column in enumerate(heat.columns):
        draw.text((left + x * width + 4, top - 16), column, fill="black")
    for y, block in enumerate(heat.blocks):
        draw.text((6, top + y * height + 5), block, fill="black")
        for x in range(len(heat.columns)):
            value = float(heat.values[y, x])
            box = (left + x * width, top + y * height, left + (x + 1) * width - 2, top + (y + 1) * height - 2)
            if math.isnan(value):
                draw.rectangle(box, fill=(225, 225, 225))
                continue
            share = value / top_value if top_value > 0 else 0.0
            draw.rectangle(box, fill=(int(30 + 225 * share), int(25 + 190 * share**2), int(90 * (1 - share)) + 20))
            draw.text((box[0] + 5, box[1] + 4), f"{1000 * value:.3g}", fill="black" if share > 0.55 else "white")
    return picture


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
    if unet_paths(base):
        lost = [m.stem for m in weights.modules if m.component == "denoiser" and m.name not in known]
        lost = [stem for stem in lost if not stem.split(".")[0].isdigit() and "ip_adapter" not in stem]
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
