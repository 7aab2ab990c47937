"""Which adapter, and which image encoders, serve a wish on a model: picked from files by what they hold, names deciding between
those that look alike, or said what is missing and where it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from .bake import check_spec
from .checkpoints import FORMATS, AdapterSpec, Format, format_named
from .downloads import DOWNLOADS, Download
from .errors import IncompatibleAdapterError, InvalidInputError, quoted
from .features import ENCODERS
from .known_files import KNOWN_FILES, KnownFile, choose_encoder, encoder_file, lora_file, recognise
from .models.sites import ModelLayout
from .models.unet import SD15, SDXL

WISHES = {
    "general": "what is in the picture and how it looks",
    "light": "the same, with more room for the text",
    "plus": "the same, closest to the reference",
    "style": "colours and brush; with the presets for style",
    "composition": "what is where, without the look",
    "face": "a face as a picture of it shows it",
    "faceid": "who somebody is, in any picture",
    "portrait": "who somebody is, in the look of several pictures of them",
    "character": "one figure in other places and poses",
}
"""What people want of a reference, and what that means."""

_UNETS = {SD15.name: "sd15", SDXL.name: "sdxl"}


@dataclass(frozen=True, slots=True)
class Picked:
    """An adapter's file, what it is, and the released one that it is known to be."""

    file: str
    spec: AdapterSpec
    known: KnownFile | None

    def rank(self, wish: str) -> int:
        """How well it serves a wish; 0: not at all."""
        return dict((self.known or self.spec.format).serves).get(wish, 0)


def pick(
    wish: str, layout: ModelLayout, files: Iterable[str], describe: Callable[[str], AdapterSpec | None], folder: str
) -> Picked:
    """The strongest of ``files`` that serves a wish on a model; of equals a known one, then the first by name.

    ``describe`` tells what a file holds, None for one that is no adapter. Raises InvalidInputError that names what to put
    into ``folder``.
    """
    check_wish(wish)
    fitting = _fitting(layout, files, describe)
    found = _strongest(wish, fitting)
    if found is None:
        raise InvalidInputError(_missing(wish, layout.name, fitting, folder))
    return found


def check_wish(wish: str) -> None:
    """Raises InvalidInputError for a text that is none of WISHES."""
    if wish not in WISHES:
        raise InvalidInputError(f"the need {quoted(wish)} is none of {', '.join(WISHES)}")


def _fitting(layout: ModelLayout, files: Iterable[str], describe: Callable[[str], AdapterSpec | None]) -> list[Picked]:
    found: list[Picked] = []
    for file in files:
        spec = describe(file)
        if spec is not None and fits(spec, file, layout):
            found.append(Picked(file, spec, recognise(file, spec)))
    return found


def _strongest(wish: str, fitting: Sequence[Picked]) -> Picked | None:
    serving = [one for one in fitting if one.rank(wish)]
    return min(serving, key=lambda one: (-one.rank(wish), one.known is None, one.file), default=None)


def fits(spec: AdapterSpec, name: str, layout: ModelLayout) -> bool:
    """Whether an adapter's layers fit a model."""
    try:
        check_spec(spec, name, layout)
    except IncompatibleAdapterError:
        return False
    return True


def public_files(wish: str, base_model: str) -> list[str]:
    """Names in DOWNLOADS of what serves a wish on a base model (such as ``SDXL``), the best first."""
    base = _UNETS.get(base_model)
    ranked = [(dict(entry.serves).get(wish, 0), entry.release) for entry in KNOWN_FILES if entry.base == base]
    for form in FORMATS:
        if form.public and form.public[0] == base_model:
            ranked.append((dict(form.serves).get(wish, 0), form.public[1]))
    return [name for rank, name in sorted(ranked, key=lambda entry: -entry[0]) if rank]


def _missing(wish: str, base_model: str, fitting: Sequence[Picked], folder: str) -> str:
    there = f"no adapter for {quoted(wish)} on a {base_model} model lies in {folder}"
    best = public_files(wish, base_model)
    if best:
        return f"{there}: put {DOWNLOADS[best[0]].where} there"
    others = [other for other in WISHES if public_files(other, base_model) or any(one.rank(other) for one in fitting)]
    tail = f"for this model there is {', '.join(others)}" if others else "for this model nobody has published one"
    return f"{there}, and none is known that one could download; {tail}"


def pick_encoders(
    spec: AdapterSpec, adapter: str, files: Sequence[str], widths: Callable[[str], tuple[int, int] | None], folder: str
) -> list[str]:
    """The files of the image encoders that an adapter reads, in its order; none for one that reads no pictures.

    ``widths`` as in ``choose_encoder``. Raises InvalidInputError that names what to put into ``folder``.
    """
    found: list[str] = []
    for encoder in spec.encoders if spec.format.feature.encoded is not None else ():
        file = choose_encoder(replace(spec, encoder=encoder), files, widths)
        if file is None:
            known = ENCODERS.get(encoder)
            public = DOWNLOADS.get(known.public) if known else None
            wanted = public.where if public else " or ".join(known.files) if known else "the one of its training"
            raise InvalidInputError(
                f"{quoted(adapter)} reads the image encoder {encoder}, which {folder} does not hold: put {wanted} there"
            )
        found.append(file)
    return found


@dataclass(frozen=True, slots=True)
class Needed:
    """One file that serving a wish takes.

    ``part`` says what it is, as ``image encoder ViT-H/14``, and ``folder`` where it belongs below ``models``. ``file`` is the one
    that is there, nothing where it is missing; ``public`` then is what to download, None where none is known.
    """

    part: str
    folder: str
    file: str
    public: Download | None


def needed(
    wish: str,
    base_model: str,
    layout: ModelLayout | None,
    there: Mapping[str, Sequence[str]],
    describe: Callable[[str], AdapterSpec | None],
    widths: Callable[[str], tuple[int, int] | None],
) -> list[Needed]:
    """The files that a wish takes on a base model, whether they are there or not; the adapter is the first.

    ``there`` are the files of each folder (``ipadapter``, ``clip_vision``, ``loras``) and the packs of ``insightface/models``;
    ``describe`` and ``widths`` as in ``pick`` and ``pick_encoders``. Without ``layout``, as long as the model itself is not there,
    the adapter is known by its name. Raises InvalidInputError where nobody has published one and none is there.
    """
    check_wish(wish)
    fitting = _fitting(layout, there["ipadapter"], describe) if layout else []
    picked = _strongest(wish, fitting)
    if picked is not None:
        form, known, spec, file = picked.spec.format, picked.known, picked.spec, picked.file
        release = known.release if known else ""
    else:
        release = next(iter(public_files(wish, base_model)), "")
        if not release:
            raise InvalidInputError(_missing(wish, base_model, fitting, "models/ipadapter"))
        known = next((entry for entry in KNOWN_FILES if entry.release == release), None)
        form, spec = _format_of(release, known), None
        names = there["ipadapter"] if layout is None else ()
        file = next((name for name in names if name.replace("\\", "/").rsplit("/", 1)[-1] == release), "")
    found = [Needed("adapter", "ipadapter", file, DOWNLOADS.get(release))]
    if form.feature.encoded is not None:
        found += _encoders(form, known, spec, there["clip_vision"], widths)
    lora = next((one for name, one in DOWNLOADS.items() if one.folder == "loras" and lora_file(known, [name])), None)
    if lora is not None and not (spec and spec.lora_layers):
        found.append(Needed("LoRA", "loras", lora_file(known, there["loras"]) or "", lora))
    if form.feature.embedding is not None:
        pack, folder = spec.face_model if spec else "buffalo_l", "insightface/models"
        found.append(Needed("face model", folder, pack if pack in there[folder] else "", DOWNLOADS[f"{pack}.zip"]))
    return found


def _format_of(release: str, known: KnownFile | None) -> Format:
    if known:
        return format_named(known.family)
    return next(form for form in FORMATS if form.public and form.public[1] == release)


def _encoders(
    form: Format,
    known: KnownFile | None,
    spec: AdapterSpec | None,
    files: Sequence[str],
    widths: Callable[[str], tuple[int, int] | None],
) -> list[Needed]:
    """The encoders of an adapter; of a released one that is not there and whose width alone tells, none yet."""
    if spec is not None:
        names = spec.encoders
        there = [choose_encoder(replace(spec, encoder=name), files, widths) for name in names]
    else:
        told = (known.encoder,) if known else (form.encoder,) if form.encoder else ()
        names = tuple(look.encoder for look in form.feature.looks) or told
        there = [encoder_file(name, files, widths) for name in names]
    public = [DOWNLOADS.get(ENCODERS[name].public) if name in ENCODERS else None for name in names]
    return [
        Needed(f"image encoder {name}", "clip_vision", file or "", download)
        for name, file, download in zip(names, there, public, strict=True)
    ]
