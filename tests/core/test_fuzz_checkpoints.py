"""Whatever the bytes and the keys: an adapter, or an error of ours. Never another error, never hours or gigabytes."""

from __future__ import annotations

import io
import json
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from ipadapter_core.checkpoints import AdapterWeights, describe_adapter, load_adapter, trainable_families
from ipadapter_core.checkpoints.format import AdapterSpec
from ipadapter_core.errors import AdapterError
from tiny import TRANSFORMERS, adapter_shapes, nested, tiny_state

FAMILIES = (*trainable_families(), *TRANSFORMERS)
SIZES = {"depth": 1, "channels": (4, 4), "hidden_dim": 8, "inner_dim": 8, "token_dim": 6, "feature_dim": 5}
quick = settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@cache
def file_bytes(family: str, container: str) -> bytes:
    state = tiny_state(family, **SIZES)  # pyright: ignore
    if container == "safetensors":
        return save(state, metadata={"encoder": "x"})
    buffer = io.BytesIO()
    torch.save(nested(state), buffer, _use_new_zipfile_serialization=container == "zip")
    return buffer.getvalue()


def survives(source: object) -> AdapterSpec | None:
    """The spec if source loads; None if it is refused. Any other exception fails the test."""
    specs: list[AdapterSpec | None] = []
    reads: tuple[Callable[..., AdapterWeights | AdapterSpec], ...] = (describe_adapter, load_adapter)
    for read in reads:
        try:
            result = read(source)
            specs.append(result if isinstance(result, AdapterSpec) else result.spec)
        except AdapterError:
            specs.append(None)
    described, loaded = specs
    assert loaded is None or loaded == described
    return loaded


def survives_bytes(raw: bytes, extension: str) -> AdapterSpec | None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"a.{extension}"
        path.write_bytes(raw)
        return survives(path)


def test_the_unchanged_files_load() -> None:
    for family in FAMILIES:
        for container in ("safetensors", "zip", "legacy"):
            spec = survives_bytes(file_bytes(family, container), "bin")
            assert spec is not None
            assert spec.family == family


@quick
@given(
    family=st.sampled_from(FAMILIES),
    container=st.sampled_from(["safetensors", "zip", "legacy"]),
    extension=st.sampled_from(["safetensors", "bin"]),
    edits=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=8)), max_size=4),
    keep=st.floats(0, 1) | st.just(1.0),
)
def test_mutated_bytes(
    family: str, container: str, extension: str, edits: list[tuple[float, bytes]], keep: float
) -> None:
    raw = bytearray(file_bytes(family, container))
    for where, new in edits:
        start = int(where**3 * len(raw))  # more often near the front, where headers are
        raw[start : start + len(new)] = new
    survives_bytes(bytes(raw[: round(keep * len(raw))]), extension)


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 2**70)
    | st.text(max_size=4)
    | st.sampled_from(["F16", "F32", "F8_E4M3"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["dtype", "shape"]), inner, max_size=3),
    max_leaves=6,
)


@quick
@given(
    family=st.sampled_from(FAMILIES),
    choose=st.floats(0, 1, exclude_max=True),
    field=st.sampled_from(["dtype", "shape", "data_offsets", "whole entry", "key", "__metadata__"]),
    value=json_values,
    key=st.text(max_size=12),
)
def test_mutated_safetensors_headers(family: str, choose: float, field: str, value: object, key: str) -> None:
    raw = file_bytes(family, "safetensors")
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    name = sorted(header)[int(choose * len(header))]
    if field == "key":
        header[key] = header.pop(name)
    elif field == "__metadata__" or name == "__metadata__":
        header["__metadata__"] = value
    elif field == "whole entry":
        header[name] = value
    else:
        header[name][field] = value
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    survives_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :], "safetensors")


ALL_KEYS = sorted({key for family in FAMILIES for key in adapter_shapes(family, **SIZES)})  # pyright: ignore
wild_keys = st.builds(
    "{}.{}.{}".format,
    st.sampled_from(["image_proj", "ip_adapter", "image_proj_model", "adapter_modules", "module", "image_proj.layers"]),
    st.sampled_from(["0", "1", "99999", "9999999999999", "01", "-1", "٣", "proj", "layers.9999.0", "latents"]),
    st.sampled_from(["weight", "to_k_ip.weight", "to_v_ip.weight", "0.norm1.weight", "bias", ""]),
)
shapes = st.lists(st.sampled_from([0, 1, 2, 3, 8, 2**31, 2**62]), max_size=4)


def meta_tensor(shape: list[int], dtype: torch.dtype) -> Tensor:
    try:
        return torch.empty(shape, dtype=dtype, device="meta")
    except RuntimeError:  # more than 2^63 numbers: torch itself has no such tensor
        return torch.empty(0, device="meta")


@settings(quick, max_examples=300)
@given(
    family=st.sampled_from(FAMILIES),
    changes=st.lists(
        st.tuples(
            st.sampled_from(ALL_KEYS) | wild_keys,
            st.none() | shapes,
            st.sampled_from([torch.float16, torch.float32, torch.int64, torch.complex64]),
        ),
        max_size=4,
    ),
)
def test_changed_key_sets_and_shapes(family: str, changes: list[tuple[str, list[int] | None, torch.dtype]]) -> None:
    state = tiny_state(family, **SIZES)  # pyright: ignore
    for key, shape, dtype in changes:
        if shape is None:
            state.pop(key, None)
        else:
            state[key] = meta_tensor(shape, dtype)
    spec = survives(state)
    assert changes or spec is not None


@quick
@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=3) | st.just(torch.ones(2, 3)),
        lambda inner: (
            st.lists(inner, max_size=2)
            | st.dictionaries(
                st.sampled_from(ALL_KEYS) | st.integers(0, 3) | st.sampled_from(["image_proj", "ip_adapter"]), inner
            )
        ),
        max_leaves=12,
    )
)
def test_any_mapping(content: object) -> None:
    survives(content if isinstance(content, dict) else {"x": content})
