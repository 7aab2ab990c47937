"""Which adapter, and which image encoders, serve a wish on a model: picked from files by what they hold, names deciding between
those that look alike, or said what is missing and where it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from .bake import check_spec
from .checkpoints import FORMATS, AdapterSpec
from .downloads import DOWNLOADS
from .errors import IncompatibleAdapterError, InvalidInputError, quoted
from .features import ENCODERS
from .known_files import KNOWN_FILES, KnownFile, choose_encoder, recognise
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
    if wish not in WISHES:
        raise InvalidInputError(f"the need {quoted(wish)} is none of {', '.join(WISHES)}")
    fitting: list[Picked] = []
    for file in files:
        spec = describe(file)
        if spec is not None and fits(spec, file, layout):
            fitting.append(Picked(file, spec, recognise(file, spec)))
    serving = [one for one in fitting if one.rank(wish)]
    if not serving:
        raise InvalidInputError(_missing(wish, layout, fitting, folder))
    return min(serving, key=lambda one: (-one.rank(wish), one.known is None, one.file))


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


def _missing(wish: str, layout: ModelLayout, fitting: Sequence[Picked], folder: str) -> str:
    there = f"no adapter for {quoted(wish)} on a {layout.name} model lies in {folder}"
    best = public_files(wish, layout.name)
    if best:
        return f"{there}: put {DOWNLOADS[best[0]].where} there"
    others = [other for other in WISHES if public_files(other, layout.name) or any(one.rank(other) for one in fitting)]
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
