"""What a config of PEFT says: ``adapter_config.json``, or diffusers' copy of it in the header of a file.

Scales, ranks by module and the algorithms' options; the methods and options that cannot be applied to a plain model are
refused by name. Facts from peft 0.21.2: tuners/*/config.py and layer.py, utils/other.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from ..errors import UnknownFormatError, quoted
from ..files.text import as_table
from ..narrowing import is_list
from .name_patterns import NamePatterns, full_match
from .names import part_and_path

PEFT_ROOT = re.compile(r"^(?:module\.|lora\.)?(?:(?:unet|transformer|text_encoder(?:_[23])?)\.)?base_model\.model\.")
"""What PEFT's names begin with."""

# part of a key → PEFT's method that has such tensors
METHODS: tuple[tuple[str, str], ...] = (
    (".pvera_lambda_", "PVeRA"),
    (".vera_lambda_", "VeRA"),
    (".randlora_", "RandLoRA"),
    (".fourierft_", "FourierFT"),
    (".waveft_", "WaveFT"),
    (".c3a_", "C3A"),
    (".shira_", "SHiRA"),
    (".miss_", "MiSS"),
    (".bone_", "Bone"),
    (".vblora_", "VB-LoRA"),
    ("vblora_vector_bank", "VB-LoRA"),
    (".delora_", "DeLoRA"),
    (".poly_", "Poly"),
    ("xlora_classifier", "X-LoRA"),
    ("ln_tuning", "LN tuning"),
    (".hira_", "HiRA"),
    (".road_", "RoAd"),
    (".osf_", "OSF"),
    (".gralora_", "GraLoRA"),
    (".adamss_", "AdaMSS"),
    (".beft_", "BEFT"),
    (".lily_", "Lily"),
    (".frod_", "FRoD"),
    (".unilora_", "UniLoRA"),
    (".tinylora_", "TinyLoRA"),
    (".psoft_", "PSOFT"),
    (".peanut_", "PEANuT"),
    (".shadow_", "SHADOW"),
    (".supertuning_", "SuperTuning"),
    (".deft_", "DEFT"),
    (".glora_", "GLoRA as PEFT writes it"),
    (".oft_r", "OFT of before 0.14"),
    (".oft_embedding_R", "OFT of embeddings"),
    ("trainable_tokens", "trainable tokens"),
    ("prompt_embeddings", "prompt tuning"),
    ("prompt_encoder", "prompt tuning"),
    ("adaption_prompt", "adaption prompt"),
    (".lora_diag", "KaSA"),
    ("lora_arrow_", "Arrow"),
)

_PRINCIPAL = "begins with parts of the base weights taken out, so it fits only the changed model that was trained"
# option of LoraConfig → what it is, why it cannot be applied
_OPTIONS: tuple[tuple[str, str], ...] = (
    ("use_qalora", "QA-LoRA, which averages the inputs of a quantised model"),
    ("alora_invocation_tokens", "Activated LoRA, which acts on some tokens only"),
    ("arrow_config", "Arrow, which routes between several LoRAs"),
    ("use_bdlora", "BD-LoRA, whose matrices are block-diagonal"),
    ("kasa_config", "KaSA, which takes parts of the base weights away"),
    ("monteclora_config", "MonteCLoRA, which adds random samples"),
    ("layer_replication", "layer replication, which repeats layers of the model"),
    ("target_parameters", "target parameters, which are no layers"),
    ("trainable_token_indices", "trainable tokens beside the LoRA"),
)


@dataclass(frozen=True, slots=True)
class Scale:
    """What a config says about one module."""

    alpha: float
    factor: float


@dataclass(slots=True, eq=False)
class PeftConfig:
    """One config. ``origin`` is where it was found, for people."""

    table: Mapping[str, object]
    origin: str
    file: str
    _patterns: dict[str, NamePatterns] = field(default_factory=dict[str, NamePatterns])

    @property
    def method(self) -> str:
        """PEFT's name of the method; headers of diffusers do not say it, they are LoRAs."""
        return str(self.table.get("peft_type") or "LORA").upper()

    def number(self, key: str) -> float | None:
        """A number among the options; None if it is none."""
        return _number(self.table.get(key))

    def on(self, key: str, default: bool = False) -> bool:
        """A switch among the options."""
        value = self.table.get(key)
        return default if value is None else value is True

    def alpha_of(self, path: str) -> float | None:
        """``lora_alpha`` (LoHa and LoKr: ``alpha``) of a module by its path in the model."""
        return self._of(path, "alpha_pattern", "alpha" if self.method in ("LOHA", "LOKR") else "lora_alpha")

    def rank_of(self, path: str) -> int | None:
        """The rank that the config gives a module."""
        rank = self._of(path, "rank_pattern", "init_r" if self.method == "ADALORA" else "r")
        return int(rank) if rank is not None and rank >= 1 else None

    def scale_of(self, path: str, rank: int) -> Scale | None:
        """Alpha of a module of this rank, and the factor it makes; None if the config names no alpha."""
        alpha = self.alpha_of(path)
        if alpha is None:
            return None
        if self.method == "ADALORA":  # tuners/adalora/layer.py: the rank is kept as a float with a little added
            first = self.rank_of(path) or rank
            alpha = alpha if alpha > 0 else float(first)
            return Scale(alpha, alpha / (first + 1e-5))
        return Scale(alpha, alpha / (math.sqrt(rank) if self.on("use_rslora") else rank))

    def is_feedforward(self, path: str) -> bool | None:
        """Whether IA3 scales a module's inputs; None if the config does not say."""
        wanted = self.table.get("feedforward_modules")
        if isinstance(wanted, str):
            return full_match(wanted, path, self.file)
        if is_list(wanted):
            return any(isinstance(end, str) and path.endswith(end) for end in wanted[:1000])
        return None

    def check(self, methods: Sequence[str]) -> None:
        """Raise UnknownFormatError, in one sentence, for what cannot be applied to a plain model. ``methods`` can be read."""
        if self.method not in map(str.upper, methods):
            refuse_method(self.file, quoted(self.method), methods)
        for option, what in _OPTIONS:
            if self.table.get(option) not in (None, False, [], {}, ""):
                raise UnknownFormatError(
                    f"{self.file} is a PEFT LoRA with {what} ({option} in {self.origin}), which cannot be applied to a plain "
                    "model; merge it with PEFT, or train a plain LoRA"
                )
        start = self.table.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(("pissa", "olora", "corda", "loftq", "lora_ga")):
            raise UnknownFormatError(
                f"{self.file} is a PEFT LoRA with the start {quoted(start)}: it {_PRINCIPAL}; save it with PEFT's "
                "path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
            )
        if self.method == "OFT":
            self._check_oft()

    def _check_oft(self) -> None:
        version = re.match(r"0\.(\d{1,4})\b", str(self.table.get("peft_version") or "0.0")[:20])
        old_series = self.on("use_cayley_neumann") and version is not None and int(version[1]) < 18
        if "oft_block_size" not in self.table or old_series:
            raise UnknownFormatError(
                f"{self.file} is a PEFT OFT file of before {'0.18' if old_series else '0.14'}, whose numbers mean another "
                "rotation, which newer PEFT refuses too; merge it with that version"
            )

    def _of(self, path: str, table: str, default: str) -> float | None:
        value = self.table.get(default)
        named = as_table(self.table.get(table))
        if named:
            keys = list(named)
            if table not in self._patterns:
                self._patterns[table] = NamePatterns(keys, self.file)
            place = self._patterns[table].first(path)
            if place is not None:
                value = named[keys[place]]
        return _number(value)


def refuse_method(file: str, method: str, methods: Sequence[str]) -> NoReturn:
    """Raise for a method of PEFT that is none of the ``methods`` that are read."""
    raise UnknownFormatError(
        f"{file} is a PEFT {method} file; of PEFT's methods {', '.join(methods[:-1])} and {methods[-1]} can be read. "
        "Merge it into the model with PEFT, or train one of these"
    )


def path_of(stem: str) -> str:
    """A module's path as PEFT knows it, from its name in a file."""
    return part_and_path(stem)[1]


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
