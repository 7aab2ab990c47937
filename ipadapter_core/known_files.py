"""The released files behind the presets of a loader: what they are called, what they hold, where they belong.

A preset is looked up by content first: of the files that fit it, one with a known name wins, else the only one that no
other preset knows by name. Patterns are those under which ComfyUI_IPAdapter_plus found its files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from .checkpoints import AdapterSpec, format_named
from .downloads import DOWNLOADS, Download
from .errors import InvalidInputError, quoted
from .features import ENCODERS
from .models.unet import SD15, SDXL


@dataclass(frozen=True, slots=True)
class KnownFile:
    """One released adapter: its preset, ``sd15`` or ``sdxl``, name patterns (best first) and what it must hold.

    ``release`` is a name in DOWNLOADS, ``lora`` the pattern of the file with its LoRA, nothing where none is published beside it.
    """

    preset: str
    base: str
    patterns: tuple[str, ...]
    release: str
    family: str
    encoder: str = "ViT-H/14"
    lora: str = ""

    @property
    def serves(self) -> tuple[tuple[str, int], ...]:
        """What it is good for, where that is not what its family is: see ``Format.serves``."""
        return SERVES.get(self.preset) or format_named(self.family).serves

    @property
    def download(self) -> Download:
        return DOWNLOADS[self.release]

    def fits(self, spec: AdapterSpec, *, named: bool = False) -> bool:
        """Whether a file's content can be this adapter; one with its name may be trained with an encoder of its own."""
        encoder = spec.encoder == self.encoder or (named and spec.encoder == "custom")
        return spec.family == self.family and encoder and base_of(spec.token_dim) == self.base


def base_of(token_dim: int) -> str:
    """``sdxl`` for text tokens as wide as SDXL's, else ``sd15``."""
    return "sdxl" if token_dim == SDXL.text_width else "sd15"


OLD_MARKS: dict[str, tuple[str, int | None, str]] = {
    "faceidplusv2": ("faceid-plus", 2, "faceid-plusv2"),
    "portraitunnorm": ("faceid-unnorm", None, "portrait-unnorm"),
}
"""Keys by which the old pack marks an adapter that its file's name told: the family, its version, and such a name."""


def old_mark(spec: AdapterSpec) -> str | None:
    """The old pack's key for an adapter, if it has one."""
    told = spec.family, spec.options.get("version")
    return next((mark for mark, (*known, _) in OLD_MARKS.items() if tuple(known) == told), None)


SERVES: dict[str, tuple[tuple[str, int], ...]] = {
    "LIGHT": (("light", 3), ("general", 1)),
    "VIT-G": (("general", 2), ("light", 1), ("style", 1)),
    "PLUS FACE": (("face", 3),),
    "COMPOSITION": (("composition", 3),),
    "FACEID": (("faceid", 2),),
    "FACEID PLUS": (("faceid", 1),),
    "FACEID PLUS V2": (("faceid", 3),),
    "FACEID PORTRAIT": (("portrait", 2),),
}
"""Of files that have the shape of others and were trained for something else."""

KNOWN_FILES: tuple[KnownFile, ...] = (
    KnownFile("LIGHT", "sd15", (r"sd15.light.v11", r"sd15.light"), "ip-adapter_sd15_light_v11.bin", "base"),
    KnownFile("STANDARD", "sd15", (r"ip.adapter.sd15",), "ip-adapter_sd15.safetensors", "base"),
    KnownFile("STANDARD", "sdxl", (r"ip.adapter.sdxl.vit.h",), "ip-adapter_sdxl_vit-h.safetensors", "base"),
    KnownFile(
        "VIT-G", "sd15", (r"sd15.vit.g",), "ip-adapter_sd15_vit-G.safetensors", "base", "ViT-bigG/14"
    ),
    KnownFile("VIT-G", "sdxl", (r"ip.adapter.sdxl",), "ip-adapter_sdxl.safetensors", "base", "ViT-bigG/14"),
    KnownFile("PLUS", "sd15", (r"ip.adapter.plus.sd15",), "ip-adapter-plus_sd15.safetensors", "plus"),
    KnownFile("PLUS", "sdxl", (r"plus.sdxl.vit.h",), "ip-adapter-plus_sdxl_vit-h.safetensors", "plus"),
    KnownFile("PLUS FACE", "sd15", (r"plus.face.sd15",), "ip-adapter-plus-face_sd15.safetensors", "plus"),
    KnownFile(
        "PLUS FACE", "sdxl", (r"plus.face.sdxl.vit.h",), "ip-adapter-plus-face_sdxl_vit-h.safetensors", "plus"
    ),
    KnownFile(
        "FULL FACE", "sd15", (r"full.face.sd15",), "ip-adapter-full-face_sd15.safetensors", "full-face"
    ),
    KnownFile(
        "COMPOSITION", "sd15", (r"plus.composition.sd15",),
        "ip_plus_composition_sd15.safetensors", "plus",
    ),
    KnownFile(
        "COMPOSITION", "sdxl", (r"plus.composition.sdxl",),
        "ip_plus_composition_sdxl.safetensors", "plus",
    ),
    *(
        KnownFile(preset, base, patterns, release, family, encoder, lora)
        for preset, base, patterns, release, family, encoder, lora in (
            ("FACEID", "sd15", ("faceid.sd15",), "ip-adapter-faceid_sd15.bin", "faceid", "InsightFace", "faceid.sd15.lora"),
            ("FACEID", "sdxl", ("faceid.sdxl",), "ip-adapter-faceid_sdxl.bin", "faceid", "InsightFace", "faceid.sdxl.lora"),
            ("FACEID PLUS", "sd15", ("faceid.plus.sd15",), "ip-adapter-faceid-plus_sd15.bin", "faceid-plus", "ViT-H/14", "faceid.plus.sd15.lora"),
            ("FACEID PLUS V2", "sd15", ("faceid.plusv2.sd15",), "ip-adapter-faceid-plusv2_sd15.bin", "faceid-plus", "ViT-H/14", "faceid.plusv2.sd15.lora"),
            ("FACEID PLUS V2", "sdxl", ("faceid.plusv2.sdxl",), "ip-adapter-faceid-plusv2_sdxl.bin", "faceid-plus", "ViT-H/14", "faceid.plusv2.sdxl.lora"),
            ("FACEID PORTRAIT", "sd15", ("portrait.v11.sd15", "portrait.sd15"), "ip-adapter-faceid-portrait-v11_sd15.bin", "faceid", "InsightFace", ""),
            ("FACEID PORTRAIT", "sdxl", ("portrait.sdxl",), "ip-adapter-faceid-portrait_sdxl.bin", "faceid", "InsightFace", ""),
            ("FACEID PORTRAIT UNNORM", "sdxl", ("portrait.sdxl.unnorm",), "ip-adapter-faceid-portrait_sdxl_unnorm.bin", "faceid-unnorm", "InsightFace", ""),
        )
    ),
    KnownFile(
        "KOLORS", "sdxl", (r"ip_adapter_plus_general|kolors.ip.adapter.plus",),
        "ip_adapter_plus_general.bin", "plus", "ViT-L/14-336",
    ),
)  # fmt: skip

CLIP_VISION_PATTERNS: dict[str, str] = {
    "ViT-bigG/14": r"(ViT.bigG.14.*39B.b160k|ipadapter.*sdxl|sdxl.*model)\.(bin|safetensors)",
    "ViT-L/14-336": r"clip.vit.large.patch14.336\.(bin|safetensors)",
    "SigLIP so400m/14-384": r"(sigclip.vision.patch14.384|siglip.so400m.patch14.384).*\.(bin|safetensors)",
    "ViT-H/14": r"(ViT.H.14.*s32B.b79K|ipadapter.*sd15|sd1.?5.*model)\.(bin|safetensors)",
}
"""Names under which people have an encoder, by its name in ENCODERS."""


def preset_of(title: str) -> str:
    """The preset behind a loader's option: ``PLUS`` of ``PLUS (high strength)``."""
    # without what the old pack wrote behind it: " (high strength)", " - SDXL only"
    return " ".join(takewhile(lambda word: word != "-", title.split("(", 1)[0].split())).upper()


def known_file(preset: str, base: str) -> KnownFile:
    """The entry for a loader's preset such as ``PLUS (high strength)``.

    Raises InvalidInputError for a preset that does not exist for this base model.
    """
    wanted = preset_of(preset)
    found = [entry for entry in KNOWN_FILES if entry.preset == wanted]
    if not found:
        names = ", ".join(dict.fromkeys(entry.preset for entry in KNOWN_FILES))
        raise InvalidInputError(f"unknown preset {quoted(preset)}; choose one of: {names}")
    chosen = next((entry for entry in found if entry.base == base), None)
    if chosen is None:
        titles = {"sd15": SD15.name, "sdxl": SDXL.name}
        raise InvalidInputError(
            f"there is no {quoted(preset)} adapter for {titles[base]} models, only for "
            f"{' and '.join(titles[entry.base] for entry in found)}; choose another preset or model"
        )
    return chosen


def recognise(name: str, spec: AdapterSpec) -> KnownFile | None:
    """The released adapter that a file is by its name and its content; None for another."""
    for entry in KNOWN_FILES:
        if entry.fits(spec, named=True) and any(_named([name], pattern) for pattern in entry.patterns):
            return entry
    return None


def choose_file(entry: KnownFile, files: Sequence[str], describe: Callable[[str], AdapterSpec | None]) -> str | None:
    """The file among ``files`` that a preset means; None if there is none.

    ``describe`` tells what a file holds, None for one that is no adapter; it is asked only where names do not decide.
    """
    for pattern in entry.patterns:
        for name in _named(files, pattern):
            spec = describe(name)
            if spec is not None and entry.fits(spec, named=True):
                return name
    others = [p for other in KNOWN_FILES if other != entry for p in other.patterns]
    anonymous = [name for name in files if not any(_named([name], pattern) for pattern in others)]
    fitting = [name for name in anonymous if (spec := describe(name)) is not None and entry.fits(spec)]
    return fitting[0] if len(fitting) == 1 else None


def _named(files: Sequence[str], pattern: str) -> list[str]:
    full = re.compile(rf"({pattern})\.(safetensors|bin)$", re.IGNORECASE)
    return [name for name in files if full.search(name)]


def choose_encoder(
    spec: AdapterSpec, files: Sequence[str], widths: Callable[[str], tuple[int, int] | None]
) -> str | None:
    """The image encoder's file that an adapter needs; None if there is none.

    ``widths`` tells the hidden size and the projection width of a file, None if it is no image encoder.
    """
    if spec.encoder in ENCODERS:
        return encoder_file(spec.encoder, files, widths)
    for name in files:
        found = widths(name)
        if found and spec.feature_dim == found[spec.format.feature.encoded == "image_embeds"]:
            return name
    return None


def encoder_file(encoder: str, files: Sequence[str], widths: Callable[[str], tuple[int, int] | None]) -> str | None:
    """The file of a published encoder (its name in ENCODERS), those with its name first; None if there is none."""
    known = ENCODERS[encoder]
    pattern = CLIP_VISION_PATTERNS.get(encoder)
    named = [name for name in files if pattern is not None and re.search(pattern, name, re.IGNORECASE)]
    others = [name for name in files if name not in named]
    fitting = (name for name in [*named, *others] if widths(name) == (known.hidden_size, known.projection_dim))
    return next(fitting, None)


def lora_file(entry: KnownFile | None, files: Sequence[str]) -> str | None:
    """The file of the LoRA that is published beside an adapter; None if there is none."""
    pattern = entry.lora if entry else ""
    found = (name for name in files if re.search(rf"({pattern})\.safetensors$", name, re.IGNORECASE))
    return next(found, None) if pattern else None
