"""Latents, features, token ids and text embeddings on disk, computed once.

``<cache>/<digest of the settings>/`` holds shards of safetensors, each with a JSON file that lists its keys with their checksums
and appears after it: a shard without its list was cut off and is made again. ``samples-<rank>.jsonl`` says which picture (by
name and stamp) has which content, so that nothing is opened twice.

Every tensor is compared with its checksum whenever it is read. Measured on one CPU core: a read by place takes what a mapped
one does (SD1.5 latents of 32 kB 19 us, plus features of 658 kB 68 us), the checksum 10 and 123 us more per picture.
"""

# pyright: reportUnknownArgumentType=false

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..errors import AdapterError, CorruptFileError, quoted
from ..files.text import as_table, parse_json, read_json
from ..files.whole import written_whole
from .collection import Sample, ScannedSample, look
from .config import DataConfig
from .encode import CacheSettings, TargetEncoders
from .pictures import bucket_for, bucket_sizes, cut_target, reference_pixels
from .sources import Source
from .tensor_files import TensorReader, bytes_of, write_tensors

SHARD = 1024
"""Pictures per shard: what a killed caching run has to encode again at most."""

OPEN_SHARDS = 256
"""Shards kept open for reading; systems allow about a thousand files at once."""

NEUTRAL = "neutral.features"
"""The features that stand for no image, kept with the rest so that a full cache needs no encoder."""

LONGEST_ROW = 1 << 20
"""Bytes of a line about a sample; captions are a hundredth of that."""

CHECKSUMS = {"checksums": "crc32"}
"""Part of a cache's settings: caches of older versions have none, and new ones begin beside them."""

Progress = Callable[[int, str], None]


class Cache:
    """A folder of shards for one set of settings."""

    def __init__(self, folder: str | Path, settings: CacheSettings) -> None:
        settings = {**settings, **CHECKSUMS}
        text = json.dumps(settings, sort_keys=True)
        self.root = Path(folder)
        self.folder = self.root / hashlib.sha256(text.encode()).hexdigest()[:16]
        self.settings = settings
        self.keeps_features, self.keeps_text = "feature" in settings, "text_encoders" in settings
        self._shards: list[Path] = []
        self._places: dict[str, tuple[int, int]] = {}  # number of the shard, checksum
        self._open: dict[int, TensorReader] = {}

    def prepare(self) -> str:
        """Make the folder; says in what it differs from the caches of other settings that lie beside it."""
        note = "" if (self.folder / "settings.json").is_file() else self._differences()
        self.folder.mkdir(parents=True, exist_ok=True)
        with written_whole(self.folder / "settings.json") as place:
            place.write_bytes(json.dumps(self.settings, indent=1).encode())
        for unfinished in self.folder.glob("*.tmp"):
            unfinished.unlink(missing_ok=True)
        self.refresh()
        return note

    def refresh(self) -> None:
        """Read the lists of all finished shards."""
        self._close()
        self._shards, self._places = [], {}
        for listing in sorted(self.folder.glob("shard-*.json")):
            shard = listing.with_suffix(".safetensors")
            try:
                checksums = read_json(listing)
            except (AdapterError, OSError):
                continue
            if shard.is_file() and isinstance(checksums, dict):
                entries = as_table(checksums).items()
                self._places.update({key: (len(self._shards), one) for key, one in entries if isinstance(one, int)})
                self._shards.append(shard)

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def read(self, key: str) -> Tensor:
        """One tensor. Raises CorruptFileError if it is not what was written."""
        if key not in self._places:
            raise CorruptFileError(f"{quoted(self.folder)} lacks {key}; start again, the cache fills the gap by itself")
        number, wanted = self._places[key]
        shard = self._shards[number]
        try:
            if number not in self._open:
                if len(self._open) >= OPEN_SHARDS:
                    self._open.pop(next(iter(self._open))).close()
                self._open[number] = TensorReader(shard)
            tensor = self._open[number].read(key)
            if checksum(tensor) != wanted:
                raise CorruptFileError(f"{key} is not what was written")
        except (AdapterError, OSError) as error:
            raise CorruptFileError(
                f"{shard.name} in {quoted(self.folder)} was changed or is damaged ({error}); delete it and its .json, the cache "
                "fills the gap by itself"
            ) from error
        return tensor

    def write(self, tensors: dict[str, Tensor], rank: int) -> None:
        """Add a shard: first the tensors, then the list that makes it count."""
        taken = {path.stem for path in self.folder.glob(f"shard-{rank}-*.json")}
        number = next(i for i in range(10**6) if f"shard-{rank}-{i:06d}" not in taken)
        path = self.folder / f"shard-{rank}-{number:06d}.safetensors"
        with written_whole(path) as place:
            write_tensors(place, tensors)
        checksums = {key: checksum(tensor) for key, tensor in tensors.items()}
        with written_whole(path.with_suffix(".json")) as place:
            place.write_bytes(json.dumps(checksums).encode())
        self._places.update({key: (len(self._shards), one) for key, one in checksums.items()})
        self._shards.append(path)

    def _close(self) -> None:
        for file in self._open.values():
            file.close()
        self._open = {}

    def known(self) -> dict[str, Sample]:
        """Samples seen before whose tensors are all there, by name."""
        return {sample.name: sample for sample in self._rows() if self.holds(sample)}

    def holds(self, sample: Sample) -> bool:
        keys = [f"{sample.key}.latents", f"{sample.key}.sizes", tokens_key(sample.caption)]
        if self.keeps_features:
            keys.append(f"{sample.reference_key or sample.key}.features")
        if self.keeps_text:
            keys.append(text_keys(sample.caption)[0])
        return all(key in self for key in keys)

    def text(self, caption: str) -> tuple[Tensor, ...]:
        """A caption's context ``l d`` and, for SDXL, its pooled embedding ``d``; nothing where text is not kept."""
        return tuple(self.read(key) for key in text_keys(caption) if key in self)

    def _rows(self) -> Iterator[Sample]:
        """What is noted of samples; lines that were cut or changed are left out, and those pictures are opened again."""
        for file in sorted(self.folder.glob("samples-*.jsonl")):
            if not file.is_file():
                continue
            with file.open("rb") as lines:
                while line := lines.readline(LONGEST_ROW):
                    try:
                        row = as_table(parse_json(line, file.name))
                        if row and row.pop("checksum", None) == _row_checksum(row):
                            yield Sample.of(row)
                    except (AdapterError, TypeError, KeyError):
                        continue

    def _differences(self) -> str:
        others = list(self.root.glob("*/settings.json")) if self.root.is_dir() else []
        if not others:
            return ""
        newest = max(others, key=lambda path: path.stat().st_mtime)
        try:
            before = read_json(newest)
        except (AdapterError, OSError):
            return ""
        was = as_table(before)
        if not was:
            return ""
        changed = [f"{k}: {was.get(k)} → {v}" for k, v in self.settings.items() if was.get(k) != v]
        return f"the cache in {newest.parent.name} was made with other settings, a new one begins ({'; '.join(changed)[:300]})"


def checksum(tensor: Tensor) -> int:
    """CRC-32 of a tensor on the CPU: its type, its shape and its numbers."""
    kind = f"{tensor.dtype} {list(tensor.shape)}".encode()
    return zlib.crc32(bytes_of(tensor.contiguous()), zlib.crc32(kind))


def _row_checksum(row: dict[str, object]) -> int:
    return zlib.crc32(json.dumps(row, sort_keys=True).encode())


def tokens_key(caption: str) -> str:
    return _caption_key(caption) + ".tokens"


def text_keys(caption: str) -> tuple[str, str]:
    """Where a caption's context and pooled embedding are kept."""
    return _caption_key(caption) + ".context", _caption_key(caption) + ".pooled"


def _caption_key(caption: str) -> str:
    return hashlib.sha256(caption.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def fill(
    cache: Cache,
    source: Source,
    config: DataConfig,
    encoders: Callable[[], TargetEncoders],
    *,
    rank: int = 0,
    world: int = 1,
    progress: Progress = lambda done, name: None,
) -> list[ScannedSample]:
    """Encode what is missing and return all that was seen (of this rank's share), pictures let go.

    ``encoders`` is asked only if there is something to encode. Killed and started again, it goes on after the last shard.
    """
    writer = _Writer(cache, config, encoders, rank)
    results: list[ScannedSample] = []
    if rank == 0 and NEUTRAL not in cache:
        cache.write({NEUTRAL: writer.encoders.neutral()}, rank)
    if rank == 0 and cache.keeps_text:
        writer.add_caption("")  # what a dropped caption becomes
    known = cache.known()
    for number, seen in enumerate(look(source, config, known, lambda n: n % world == rank)):
        if seen.sample is not None and seen.image is not None:
            writer.add(seen.sample, seen.image, seen.reference)
        results.append(seen.let_go())
        progress(number + 1, "" if seen.sample is None else seen.sample.name)
        if writer.full:
            writer.flush()
            _write_samples(cache, results, rank)
    writer.flush()
    _write_samples(cache, results, rank)
    return results


def _write_samples(cache: Cache, results: Sequence[ScannedSample], rank: int) -> None:
    rows = [
        json.dumps({**row, "checksum": _row_checksum(row)})
        for row in (asdict(one.sample) for one in results if one.sample is not None and cache.holds(one.sample))
    ]
    with written_whole(cache.folder / f"samples-{rank}.jsonl") as place:
        place.write_bytes("".join(row + "\n" for row in rows).encode())


class _Writer:
    """Collects pictures into batches for the encoders, and results into shards."""

    def __init__(self, cache: Cache, config: DataConfig, encoders: Callable[[], TargetEncoders], rank: int) -> None:
        self.cache, self.config, self.rank = cache, config, rank
        self._load, self._loaded = encoders, None
        self._sizes = bucket_sizes(config)
        self._targets: list[tuple[str, Tensor]] = []
        self._references: list[tuple[str, Tensor]] = []
        self._captions: list[tuple[str, tuple[Tensor, ...]]] = []
        self._tensors: dict[str, Tensor] = {}
        self._queued: set[str] = set()

    @property
    def encoders(self) -> TargetEncoders:
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    @property
    def full(self) -> bool:
        return sum(key.endswith(".latents") for key in self._tensors) >= SHARD

    def add(self, sample: Sample, image: Image.Image, reference: Image.Image | None) -> None:
        if self._new(f"{sample.key}.latents"):
            pixels, cut = cut_target(image, bucket_for(sample.size, self._sizes))
            self._tensors[f"{sample.key}.sizes"] = torch.tensor(cut.time_ids(), dtype=torch.float32)
            self._targets.append((f"{sample.key}.latents", pixels))
        # the target's own features too: it may become another picture's reference
        for key, picture in ((sample.key, image), (sample.reference_key, reference)):
            if self.cache.keeps_features and picture is not None and self._new(f"{key}.features"):
                self._references.append((f"{key}.features", reference_views(picture, key, self.config, self.encoders)))
        self.add_caption(sample.caption)
        if len(self._targets) >= self.config.encode_batch or len(self._references) >= self.config.encode_batch:
            self._encode()

    def add_caption(self, caption: str) -> None:
        if self._new(tokens_key(caption)):
            ids = self.encoders.base.tokenize([caption])
            self._tensors[tokens_key(caption)] = torch.stack([one[0] for one in _padded(ids)]).int()
            if self.cache.keeps_text:
                self._captions.append((caption, ids))

    def _new(self, key: str) -> bool:
        if key in self.cache or key in self._queued:
            return False
        self._queued.add(key)
        return True

    def _encode(self) -> None:
        by_shape: dict[tuple[int, ...], list[tuple[str, Tensor]]] = {}
        for key, pixels in self._targets:
            by_shape.setdefault(tuple(pixels.shape), []).append((key, pixels))
        for group in by_shape.values():
            latents = self.encoders.latents([pixels for _, pixels in group])
            self._tensors.update({key: one.clone() for (key, _), one in zip(group, latents, strict=True)})
        for key, views in self._references:
            self._tensors[key] = self.encoders.features(views)
        if self._captions:
            ids = [torch.cat(one) for one in zip(*(ids for _, ids in self._captions), strict=True)]
            found = self.encoders.text(ids)
            for number, (caption, _) in enumerate(self._captions):
                self._tensors.update(zip(text_keys(caption), (one[number].clone() for one in found), strict=False))
        self._targets, self._references, self._captions = [], [], []

    def flush(self) -> None:
        self._encode()
        if self._tensors:
            self.cache.write(self._tensors, self.rank)
        self._tensors, self._queued = {}, set()


def reference_views(image: Image.Image, key: str, config: DataConfig, encoders: TargetEncoders) -> Tensor:
    """All versions of a reference, ``v 3 y x``."""
    spec = encoders.pixels
    assert spec is not None
    views = [reference_pixels(image, spec, config.augment, f"{key} {v}") for v in range(config.variants)]
    return torch.stack(views)


def _padded(ids: Sequence[Tensor]) -> list[Tensor]:
    """Two tokenizers of one length, as SDXL's are, make one tensor; others are filled up."""
    longest = max(one.shape[1] for one in ids)
    return [torch.nn.functional.pad(one, (0, longest - one.shape[1])) for one in ids]
