"""Tiny ONNX models, written byte by byte (onnx.proto3): a face model that takes pure red for a face, in the shapes of InsightFace's.

The detector has SCRFD's nine outputs at strides 8, 16 and 32, of which the last one sees; the recogniser is a matrix on the mean colour.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32] | NDArray[np.int64]
TYPES = {"float32": 1, "int64": 7}
FACE = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))
"""Eyes, nose and corners of the mouth in 112 pixels, as ArcFace was trained on them."""


def _number(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _field(number: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return _number(number << 3) + _number(value)
    content = value.encode() if isinstance(value, str) else value
    return _number(number << 3 | 2) + _number(len(content)) + content


def _message(*fields: tuple[int, int | str | bytes]) -> bytes:
    return b"".join(_field(number, value) for number, value in fields)


def node(kind: str, inputs: Sequence[str], output: str, **attributes: Sequence[int]) -> bytes:
    """A NodeProto; attributes are lists of numbers, or one number."""
    told = [
        (5, _message((1, name), *((8, n) for n in values), (20, 7)) if not isinstance(values, int) else _message((1, name), (3, values), (20, 2)))
        for name, values in attributes.items()
    ]  # fmt: skip
    return _message(*((1, name) for name in inputs), (2, output), (4, kind), *told)


def _value(name: str, shape: Sequence[int | str]) -> bytes:
    sides = [(1, _message((2, side) if isinstance(side, str) else (1, side))) for side in shape]
    return _message((1, name), (2, _message((1, _message((1, 1), (2, _message(*sides)))))))


def model(nodes: Sequence[bytes], constants: Mapping[str, Array], given: tuple[str, Sequence[int | str]], made: Sequence[tuple[str, Sequence[int | str]]]) -> bytes:  # fmt: skip
    """A ModelProto of one input and some outputs, each with its shape."""
    kept = [
        (5, _message(*((1, side) for side in array.shape), (2, TYPES[array.dtype.name]), (8, name), (9, array.tobytes())))
        for name, array in constants.items()
    ]  # fmt: skip
    graph = _message(*((1, one) for one in nodes), (2, "tiny"), *kept, (11, _value(*given)), *((12, _value(*out)) for out in made))  # fmt: skip
    return _message((1, 8), (7, graph), (8, _message((1, ""), (2, 17))))


def detector() -> bytes:
    """Finds 3 by 3 cells of 32 pixels that are red enough; the face fills them."""
    nodes = [node("Conv", ["input", "colours"], "red")]
    constants: dict[str, Array] = {"colours": np.array([[[[1.0]], [[-0.5]], [[-0.5]]]], np.float32)}
    constants |= {"column": np.array([-1, 1]), "anchors": np.array([[1.0, 0.5]], np.float32), "none": np.float32([0.0])}
    constants |= {"box": np.array([[1, 1, 2, 2]], np.float32), "five": (np.float32(FACE) / 112 * 3 - 1).reshape(1, 10)}
    made: dict[str, list[tuple[str, Sequence[int | str]]]] = {"score": [], "boxes": [], "points": []}
    for stride in (8, 16, 32):
        steep, edge = (20.0, -32.0) if stride == 32 else (0.0, -10.0)
        constants |= {f"steep{stride}": np.float32([steep]), f"edge{stride}": np.float32([edge])}
        steps = (
            ("AveragePool", ["red"], {"kernel_shape": [stride, stride], "strides": [stride, stride]}),
            ("AveragePool", ["@"], {"kernel_shape": [3, 3], "pads": [1, 1, 1, 1], "count_include_pad": 1}),
            ("Mul", ["@", f"steep{stride}"], {}),
            ("Add", ["@", f"edge{stride}"], {}),
            ("Sigmoid", ["@"], {}),
            ("Reshape", ["@", "column"], {}),
            ("Mul", ["@", "anchors"], {}),
            ("Reshape", ["@", "column"], {}),
        )
        last = ""
        for number, (kind, inputs, attributes) in enumerate(steps):
            name = f"score{stride}" if number == len(steps) - 1 else f"step{stride}-{number}"
            nodes.append(node(kind, [last if one == "@" else one for one in inputs], name, **attributes))  # type: ignore[arg-type]
            last = name
        nodes.append(node("Mul", [last, "none"], f"zero{stride}"))
        for name, constant in (("boxes", "box"), ("points", "five")):
            nodes.append(node("Add", [f"zero{stride}", constant], f"{name}{stride}"))
        for (name, outputs), width in zip(made.items(), (1, 4, 10), strict=True):
            outputs.append((f"{name}{stride}", (f"n{stride}", width)))
    outputs = [one for group in made.values() for one in group]
    return model(nodes, constants, ("input", (1, 3, "h", "w")), outputs)


def recogniser() -> bytes:
    """512 numbers of the mean colour."""
    matrix = np.random.default_rng(0).standard_normal((3, 512)).astype(np.float32)
    nodes = [node("GlobalAveragePool", ["data"], "mean"), node("Reshape", ["mean", "row"], "colour")]
    nodes.append(node("MatMul", ["colour", "matrix"], "embedding"))
    constants: dict[str, Array] = {"row": np.array([1, 3]), "matrix": matrix}
    return model(nodes, constants, ("data", (1, 3, 112, 112)), [("embedding", (1, 512))])


def write_face_models(folder: Path) -> Path:
    """``buffalo_l`` below a root as ComfyUI and the command have it; returns the pack's folder."""
    pack = folder / "models" / "buffalo_l"
    pack.mkdir(parents=True)
    (pack / "det_10g.onnx").write_bytes(detector())
    (pack / "w600k_r50.onnx").write_bytes(recogniser())
    return pack
