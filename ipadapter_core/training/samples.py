"""Which pictures a run was trained on, as digests: what was added, taken away or changed when it goes on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .collection import Sample


def digests(samples: Sequence[Sample]) -> Tensor:
    """Of every picture its name and its content (picture, caption, subject, reference), ``n 2``, in the order of the names."""
    rows = [
        (_digest(one.name), _digest(one.key, one.caption, one.subject, one.reference_key or one.reference))
        for one in samples
    ]
    return torch.tensor(sorted(rows), dtype=torch.int64).reshape(-1, 2)


def changes(before: Tensor, now: Tensor) -> str:
    """The difference of two such tables in words; empty if there is none. Raises CorruptFileError for what is no table."""
    if before.dtype != torch.int64 or before.ndim != 2 or before.shape[1] != 2:
        return "which pictures it was trained on before cannot be told: their digests are of another kind"
    old, new = before.numpy(), now.numpy()
    _, at, other = np.intersect1d(old[:, 0], new[:, 0], return_indices=True)
    kept = len(at)
    counts = {
        "added": len(new) - kept,
        "removed": len(old) - kept,
        "changed": int((old[at, 1] != new[other, 1]).sum()),
    }
    found = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    return found and (
        f"pictures and captions are not those of the state: {found}; the training goes on with what is there now, which an "
        "undisturbed run would not have seen"
    )


def _digest(*texts: str) -> int:
    content = "\0".join(texts).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big", signed=True)
