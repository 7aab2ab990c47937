"""The pictures of a run, looked at before any step: what can be used, what is skipped and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from PIL import Image

from ..errors import AdapterError, InvalidInputError, reason
from ..images.files import decode_picture, shown
from .config import DataConfig
from .pictures import Size, bucket_for, bucket_sizes, digest
from .sources import Record, Source


@dataclass(frozen=True, slots=True)
class Sample:
    """A usable picture. ``key`` is a digest of its bytes, ``reference_key`` of its own reference's, if it names one."""

    name: str
    key: str
    caption: str
    size: Size
    subject: str = ""
    reference: str = ""
    reference_key: str = ""
    stamp: str = ""
    captioned: bool = True

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Sample:
        """From the fields' plain values. Raises TypeError and KeyError."""
        sample = cls(**row)
        return replace(sample, size=tuple(sample.size))


@dataclass(slots=True)
class Findings:
    """What the lint pass saw; the first three kinds of pictures are left out."""

    unreadable: list[str] = field(default_factory=list[str])
    captions: list[str] = field(default_factory=list[str])
    tiny: list[str] = field(default_factory=list[str])
    duplicates: list[str] = field(default_factory=list[str])
    uncaptioned: list[str] = field(default_factory=list[str])
    notes: list[str] = field(default_factory=list[str])
    """What lies beside the pictures, from the source."""
    usable: int = 0

    def describe(self) -> str:
        """One line per finding with the first names; each unreadable picture with its reason."""
        lines = [f"{self.usable} usable pictures"]
        kinds = (
            ("unreadable, skipped", self.unreadable),
            ("with a caption that cannot be used, skipped", self.captions),
            ("too small, skipped", self.tiny),
            ("duplicates, kept", self.duplicates),
            ("without a caption, trained with an empty one", self.uncaptioned),
        )
        for what, names in kinds:
            if names:
                rest = f" and {len(names) - 5} more" if len(names) > 5 else ""
                lines.append(f"{len(names)} {what}: {'; '.join(names[:5])}{rest}")
        if any("is not UTF-8" in problem for problem in self.captions):
            lines.append('captions that are all in one code page can be read: data.caption_encoding = "cp1252"')
        return "\n".join(lines + self.notes)


@dataclass(frozen=True, slots=True)
class ScannedSample:
    """One record, looked at. Without ``sample`` there is a ``problem``; without ``image`` it was known from before."""

    sample: Sample | None
    image: Image.Image | None = None
    reference: Image.Image | None = None
    problem: str = ""
    kind: Literal["unreadable", "captions", "tiny"] = "unreadable"

    def let_go(self) -> ScannedSample:
        """The same without the pictures, which take much memory."""
        return replace(self, image=None, reference=None)


@dataclass(frozen=True, slots=True)
class Collection:
    """Usable samples with the bucket of each and the other pictures of its subject."""

    samples: Sequence[Sample]
    findings: Findings
    buckets: Mapping[Size, Sequence[int]]
    subjects: Mapping[str, Sequence[int]]


def look(
    source: Source,
    config: DataConfig,
    known: Mapping[str, Sample] | None = None,
    mine: Callable[[int], bool] = lambda number: True,
) -> Iterator[ScannedSample]:
    """Open every record that is ``mine`` by its number, but for those ``known`` whose stamp has not changed."""
    for number, record in enumerate(source):
        if not mine(number):
            continue
        before = (known or {}).get(record.name)
        if before is not None and _still(before, record, config):
            yield ScannedSample(before)
            continue
        if record.problem:
            yield ScannedSample(None, problem=record.problem, kind="captions")
            continue
        try:
            yield _open(source, record, config)
        except (AdapterError, FileNotFoundError) as error:
            yield ScannedSample(None, problem=str(error))
        except OSError as error:
            yield ScannedSample(None, problem=f"{shown(record.name)} cannot be read ({reason(error)})")


def _still(before: Sample, record: Record, config: DataConfig) -> bool:
    """Whether all that is known of a picture holds; its own reference's file has a part in the stamp."""
    now = (record.stamp, record_caption(record), record.subject, record.reference)
    was = (before.stamp, before.caption, before.subject, before.reference)
    return bool(record.stamp) and now == was and min(before.size) >= config.min_side


def record_caption(record: Record) -> str:
    return record.caption or ""


def _open(source: Source, record: Record, config: DataConfig) -> ScannedSample:
    content = record.content if record.content is not None else source.read(record.name)
    image = decode_picture(content, record.name)
    if min(image.size) < config.min_side:
        problem = f"{shown(record.name)} ({image.width}x{image.height}; data.min_side is {config.min_side})"
        return ScannedSample(None, problem=problem, kind="tiny")
    reference, reference_key = None, ""
    if record.reference:
        content_of_reference = source.read(record.reference)
        reference, reference_key = decode_picture(content_of_reference, record.reference), digest(content_of_reference)
    sample = Sample(
        record.name,
        digest(content),
        record_caption(record),
        (image.height, image.width),
        record.subject,
        record.reference,
        reference_key,
        record.stamp,
        bool(record.caption),
    )
    return ScannedSample(sample, image, reference)


def collect(
    seen: Iterator[ScannedSample] | Sequence[ScannedSample], config: DataConfig, where: str, notes: Sequence[str] = ()
) -> Collection:
    """Group what was seen; ``notes`` are the source's. Raises InvalidInputError if nothing is usable."""
    findings = Findings(notes=list(notes))
    samples: list[Sample] = []
    first_of: dict[str, str] = {}
    for one in seen:
        if one.sample is None:
            getattr(findings, one.kind).append(one.problem)
            continue
        sample = one.sample
        if sample.key in first_of:
            findings.duplicates.append(f"{shown(sample.name)} (as {shown(first_of[sample.key])})")
        first_of.setdefault(sample.key, sample.name)
        if not sample.captioned:
            findings.uncaptioned.append(shown(sample.name))
        samples.append(sample)
    findings.usable = len(samples)
    if not samples:
        why = findings.describe().split("\n", 1)
        detail = f" ({why[1]})".replace("\n", "; ") if len(why) > 1 else ""
        raise InvalidInputError(f"{shown(where)} holds no usable picture{detail}; check data.path and data.kind")
    return group(samples, findings, config)


def group(samples: Sequence[Sample], findings: Findings, config: DataConfig) -> Collection:
    sizes = bucket_sizes(config)
    buckets: dict[Size, list[int]] = {}
    subjects: dict[str, list[int]] = {}
    for index, sample in enumerate(samples):
        buckets.setdefault(bucket_for(sample.size, sizes), []).append(index)
        if sample.subject:
            subjects.setdefault(sample.subject, []).append(index)
    return Collection(samples, findings, buckets, subjects)


def hold_out(collection: Collection, count: int, config: DataConfig) -> tuple[Collection, Sequence[Sample], bool]:
    """Training part, validation samples, and whether the latter are really unseen.

    The choice depends on the pictures' contents alone. Copies of a picture count once, and go together: fewer than four
    times ``count`` different pictures cannot spare any, and validation then looks at pictures that are also trained on.
    """
    different: dict[str, Sample] = {}
    for sample in sorted(collection.samples, key=lambda sample: (sample.key, sample.name)):
        different.setdefault(sample.key, sample)
    chosen = list(different.values())[:count]
    if len(different) < 4 * count or not count:
        return collection, chosen, False
    keys = {sample.key for sample in chosen}
    rest = [sample for sample in collection.samples if sample.key not in keys]
    return group(rest, collection.findings, config), chosen, True
