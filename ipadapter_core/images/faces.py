"""Faces for FaceID adapters: found, aligned, cropped and embedded, behind one small protocol.

``InsightFaceAnalyzer`` uses the insightface package; ``OnnxFaceAnalyzer`` runs the same two networks (SCRFD finds faces,
ArcFace embeds them) on onnxruntime alone, so that nothing has to be compiled. Neither package is imported before use.

Pictures are ``h w 3`` RGB in 0..1 (``b h w 3`` for batches), points are x, y in pixels.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ..device_cache import DeviceCache
from ..errors import InvalidInputError, quoted, reason
from ..features import Embedding
from ..files.text import regular_file
from .preprocess import check_finite


@dataclass(frozen=True, slots=True)
class Nth:
    """The n-th face of a picture, from 1: by size (1 is the largest), or from the left.

    Raises InvalidInputError for a number below 1.
    """

    number: int
    order: Literal["size", "left"] = "size"

    def __post_init__(self) -> None:
        if self.number < 1:
            raise InvalidInputError(f"the number of a face is {self.number}; faces are counted from 1")


Which = Literal["best", "largest", "all"] | Nth

# https://github.com/deepinsight/insightface, python-package/insightface/utils/face_align.py
ARCFACE_POINTS = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))
"""Where both eyes, the nose and the corners of the mouth lie in an aligned face of 112 pixels."""

DETECTION_SIZES = tuple(range(640, 128, -64))
"""Sides at which a picture is searched, until there is a face: a face that fills the picture is found in a small one."""


@dataclass(frozen=True, eq=False)
class Face:
    """One face: ``box`` x0 y0 x1 y1, five ``points`` ``5 2``, detection ``score`` and raw ``embedding`` of 512 numbers."""

    box: Tensor
    points: Tensor
    score: float
    embedding: Tensor

    @property
    def area(self) -> float:
        x0, y0, x1, y1 = self.box.tolist()
        return max(0.0, x1 - x0) * max(0.0, y1 - y0)

    @property
    def normed_embedding(self) -> Tensor:
        return self.embedding / torch.linalg.vector_norm(self.embedding)


class FaceAnalyzer(Protocol):
    """What FaceID asks of a face model."""

    @property
    def name(self) -> str: ...

    def find(self, picture: Tensor, size: int) -> Sequence[Face]:
        """Faces of ``h w 3``, searched in a picture of ``size`` on its longer side, the best first."""
        ...


@dataclass(frozen=True)
class FoundFaces:
    """The chosen faces: embeddings ``f 512`` (raw) and aligned crops ``f s s 3``."""

    embeddings: Tensor
    crops: Tensor

    def get(self, embedding: Embedding) -> Tensor:
        if embedding == "raw":
            return self.embeddings
        return self.embeddings / torch.linalg.vector_norm(self.embeddings, dim=-1, keepdim=True)


def find_faces(
    analyzer: FaceAnalyzer, pictures: Tensor, crop_size: int, *, which: Which = "best", mask: Tensor | None = None
) -> FoundFaces:
    """Chosen faces of the pictures ``b h w c``, one after another.

    ``which`` chooses in every picture: the "best" detection, the "largest" face, "all" of them (the largest first), or a
    Nth. With a ``mask`` only faces whose centre lies inside (above 0.5) count: ``h w`` for all pictures, or ``m h w``,
    one per picture; of one picture and several masks every mask chooses its own face.

    Raises InvalidInputError that names the picture without such a face, or NaN, or masks that do not fit the pictures.
    """
    embeddings: list[Tensor] = []
    crops: list[Tensor] = []
    check_finite(pictures)
    eight_bits = pictures[..., :3].detach().cpu().mul(255).clamp(0, 255).byte().float() / 255  # as face models see them
    for index, region in _paired(len(pictures), mask):
        picture = eight_bits[index]
        found = all_faces(analyzer, picture)
        inside = found if region is None else [face for face in found if _lies_in(face, region, picture)]
        chosen = _chosen(inside, which)
        if not chosen:
            where = f"image {index + 1} of {len(pictures)}" if len(pictures) > 1 else "the image"
            wanted = f"face number {which.number}" if isinstance(which, Nth) and which.number > 1 else "a face"
            inner = " inside the mask" if region is not None else ""
            raise InvalidInputError(
                f"{analyzer.name} found {len(inside)} faces{inner} in {where} ({picture.shape[1]} x {picture.shape[0]} "
                f"pixels), {wanted} was expected; use a picture with a clear face, with some room around it"
            )
        for face in chosen:
            embeddings.append(face.embedding)
            crops.append(align(picture, face.points, crop_size))
    return FoundFaces(torch.stack(embeddings), torch.stack(crops))


def _paired(count: int, mask: Tensor | None) -> list[tuple[int, Tensor | None]]:
    """Pictures by number, each with its mask."""
    if mask is None:
        return [(index, None) for index in range(count)]
    masks = list(mask.reshape(-1, *mask.shape[-2:]))
    if count == 1:
        return [(0, region) for region in masks]
    if len(masks) not in (1, count):
        raise InvalidInputError(
            f"got {len(masks)} masks for {count} images; give one for all, one per image, or one image with several masks"
        )
    return [(index, masks[index % len(masks)]) for index in range(count)]


def _chosen(faces: list[Face], which: Which) -> list[Face]:
    if which == "best":
        return faces[:1]
    by_size = sorted(faces, key=lambda face: -face.area)
    match which:
        case "largest":
            return by_size[:1]
        case "all":
            return by_size
        case Nth(number, order):
            ordered = by_size if order == "size" else sorted(faces, key=lambda face: float(face.box[0] + face.box[2]))
            return ordered[number - 1 : number]


_FOUND: DeviceCache[list[Face]] = DeviceCache()


def all_faces(analyzer: FaceAnalyzer, picture: Tensor) -> list[Face]:
    """All faces of ``h w 3`` at the largest size that shows one; remembered for the last pictures."""
    eight_bits = picture.detach().cpu().mul(255).clamp(0, 255).byte()
    key = (analyzer.name, tuple(eight_bits.shape), eight_bits.numpy().tobytes())
    return _FOUND.made(
        key, lambda: next((faces for size in DETECTION_SIZES if (faces := list(analyzer.find(picture, size)))), [])
    )


def _lies_in(face: Face, mask: Tensor, picture: Tensor) -> bool:
    x0, y0, x1, y1 = face.box.tolist()
    h, w = picture.shape[:2]
    column = min(max(int((x0 + x1) / 2 / w * mask.shape[-1]), 0), mask.shape[-1] - 1)
    row = min(max(int((y0 + y1) / 2 / h * mask.shape[-2]), 0), mask.shape[-2] - 1)
    return float(mask[row, column]) > 0.5


# --- alignment --------------------------------------------------------------------------------------------------------


def template(size: int) -> Tensor:
    """The five points in an aligned face of ``size`` pixels: a multiple of 112 as it is, else with a margin for 128."""
    points = torch.tensor(ARCFACE_POINTS, dtype=torch.float64)
    if size % 112 == 0:
        return points * (size / 112)
    return points * (size / 128) + torch.tensor([8.0 * size / 128, 0.0], dtype=torch.float64)


def similarity(source: Tensor, target: Tensor) -> Tensor:
    """The turn, scale and shift ``2 3`` that brings points ``n 2`` closest to others (Umeyama 1991, least squares)."""
    source, target = source.double(), target.double()
    mean_source, mean_target = source.mean(0), target.mean(0)
    a, b = source - mean_source, target - mean_target
    # in the plane, the best turn and scale are one complex number: sum(conj(a) b) / sum |a|^2
    norm = (a**2).sum()
    real = (a * b).sum() / norm
    imaginary = (a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]).sum() / norm
    turn = torch.stack([torch.stack([real, -imaginary]), torch.stack([imaginary, real])])
    return torch.cat([turn, (mean_target - turn @ mean_source)[:, None]], 1)


def align(picture: Tensor, points: Tensor, size: int) -> Tensor:
    """The face ``size size 3`` of ``h w 3`` with its five points where networks expect them; black outside."""
    matrix = similarity(points, template(size))
    turn, shift = matrix[:, :2], matrix[:, 2]
    grid = torch.stack(torch.meshgrid(torch.arange(size), torch.arange(size), indexing="xy"), -1).double()
    places = (grid - shift) @ torch.linalg.inv(turn).T  # where in the picture every pixel comes from
    h, w = picture.shape[:2]
    normalised = (places + 0.5) / torch.tensor([w, h], dtype=torch.float64) * 2 - 1
    pixels = picture.detach().to("cpu", torch.float32).movedim(-1, 0)[None]
    cut = F.grid_sample(pixels, normalised.float()[None], mode="bilinear", padding_mode="zeros", align_corners=False)
    return (cut[0].movedim(0, -1).clamp(0, 1) * 255).round() / 255


# --- the insightface package ------------------------------------------------------------------------------------------


class InsightFaceAnalyzer:
    """A ``FaceAnalysis`` of the insightface package (our own, or one that another pack made)."""

    def __init__(self, app: Any, name: str = "InsightFace") -> None:
        self.app = app
        self.name = name

    def find(self, picture: Tensor, size: int) -> list[Face]:
        detector = self.app.det_model
        before = getattr(detector, "input_size", None)
        detector.input_size = (size, size)
        try:
            faces: list[Any] = self.app.get(_bgr(picture))
        finally:
            if before is not None:  # the detector is shared with other nodes
                detector.input_size = before
        return [
            Face(torch.as_tensor(f.bbox), torch.as_tensor(f.kps), float(f.det_score), torch.as_tensor(f.embedding))
            for f in faces
        ]


def _bgr(picture: Tensor) -> NDArray[np.uint8]:
    return picture.detach().cpu().mul(255).clamp(0, 255).byte().flip(-1).contiguous().numpy()


# --- the same networks on onnxruntime ---------------------------------------------------------------------------------

Session = Callable[[NDArray[np.float32]], list[NDArray[np.float32]]]
"""One network: a blob ``1 3 h w`` in, its outputs out."""


class OnnxFaceAnalyzer:
    """SCRFD and ArcFace of a model pack (``det_10g.onnx``, ``w600k_r50.onnx``; ``glintr100.onnx`` for antelopev2)."""

    STRIDES = (8, 16, 32)
    ANCHORS = 2

    def __init__(self, detector: Session, recogniser: Session, name: str = "InsightFace (onnxruntime)") -> None:
        self.detector, self.recogniser, self.name = detector, recogniser, name

    def find(self, picture: Tensor, size: int) -> list[Face]:
        blob, scale = _letterbox(picture, size)
        boxes, points, scores = self._decode(self.detector(((blob * 255 - 127.5) / 128).astype(np.float32)), size)
        kept = _suppress(boxes, scores)
        faces: list[Face] = []
        for i in kept:
            face_points = points[i] / scale
            crop = align(picture, face_points, 112).movedim(-1, 0)[None]
            (embedding,) = self.recogniser(((crop * 255 - 127.5) / 127.5).numpy().astype(np.float32))
            faces.append(Face(boxes[i] / scale, face_points, float(scores[i]), torch.from_numpy(embedding[0].copy())))
        return faces

    def _decode(self, outputs: list[NDArray[np.float32]], size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Boxes ``n 4``, points ``n 5 2`` and scores ``n`` above 0.5: distances from anchor points, in strides."""
        levels = len(self.STRIDES)
        boxes: list[Tensor] = []
        points: list[Tensor] = []
        scores: list[Tensor] = []
        for level, stride in enumerate(self.STRIDES):
            score, box, five = (
                torch.from_numpy(np.ascontiguousarray(outputs[level + levels * k])).reshape(-1, width)
                for k, width in enumerate((1, 4, 10))
            )
            side = size // stride
            grid = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="xy"), -1)
            centers = (grid.reshape(-1, 2) * stride).repeat_interleave(self.ANCHORS, 0).float()
            good = score[:, 0] >= 0.5
            centers, box, five = centers[good], box[good] * stride, five[good] * stride
            boxes.append(torch.cat([centers - box[:, :2], centers + box[:, 2:]], 1))
            points.append(centers[:, None] + five.view(-1, 5, 2))
            scores.append(score[good, 0])
        return torch.cat(boxes), torch.cat(points), torch.cat(scores)


def _letterbox(picture: Tensor, size: int) -> tuple[NDArray[np.float32], float]:
    """The picture in the top left corner of a black square, ``1 3 size size`` in 0..1, and its scale."""
    h, w = picture.shape[:2]
    scale = size / max(h, w)
    inner = (max(1, int(h * scale)), max(1, int(w * scale)))
    pixels = picture.detach().to("cpu", torch.float32).movedim(-1, 0)[None]
    resized = F.interpolate(pixels, inner, mode="bilinear", align_corners=False)
    return F.pad(resized, (0, size - inner[1], 0, size - inner[0])).numpy(), inner[0] / h


def _suppress(boxes: Tensor, scores: Tensor, overlap: float = 0.4) -> list[int]:
    """Indices of the boxes to keep, the best first: others that overlap a better one are dropped."""
    kept: list[int] = []
    areas = (boxes[:, 2:] - boxes[:, :2] + 1).clamp(min=0).prod(1)
    for i in scores.argsort(descending=True).tolist():
        if all(_overlap(boxes[i], boxes[j], areas[i], areas[j]) <= overlap for j in kept):
            kept.append(i)
    return kept


def _overlap(a: Tensor, b: Tensor, area_a: Tensor, area_b: Tensor) -> float:
    sides = (torch.minimum(a[2:], b[2:]) - torch.maximum(a[:2], b[:2]) + 1).clamp(min=0)
    shared = sides.prod()
    return float(shared / (area_a + area_b - shared))


# --- opening a face model ---------------------------------------------------------------------------------------------

PROVIDERS = {
    "CPU": "CPUExecutionProvider",
    "CUDA": "CUDAExecutionProvider",
    "ROCM": "ROCMExecutionProvider",
    "DirectML": "DmlExecutionProvider",
    "OpenVINO": "OpenVINOExecutionProvider",
    "CoreML": "CoreMLExecutionProvider",
}
RECOGNISERS = ("w600k_r50.onnx", "glintr100.onnx", "w600k_mbf.onnx")
DETECTORS = ("det_10g.onnx", "scrfd_10g_bnkps.onnx", "det_500m.onnx", "det_2.5g.onnx")


def usable_providers(wanted: str, available: Iterable[str]) -> list[str]:
    """onnxruntime's name of a provider if this installation has it, and the CPU's to fall back on."""
    if wanted not in PROVIDERS:
        raise InvalidInputError(f"provider is {wanted!r}; choose one of: {', '.join(PROVIDERS)}")
    known = set(available)
    return [name for name in dict.fromkeys((PROVIDERS[wanted], PROVIDERS["CPU"])) if name in known]


def open_face_model(root: Path, pack: str = "buffalo_l", provider: str = "CPU") -> FaceAnalyzer:
    """The model pack in ``root/models/pack`` by the insightface package, or without it on onnxruntime.

    Raises InvalidInputError that says what is missing and where it belongs.
    """
    name = f"InsightFace {pack}"
    folder = root / "models" / pack
    try:
        import onnxruntime  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InvalidInputError(
            "FaceID adapters need the package onnxruntime to find faces: run pip install onnxruntime (or onnxruntime-gpu) "
            "in ComfyUI's Python; the package insightface is not needed"
        ) from None
    runtime: Any = onnxruntime
    providers = usable_providers(provider, runtime.get_available_providers())
    try:
        from insightface.app import FaceAnalysis  # pyright: ignore[reportMissingImports]
    except Exception:  # not there, or built for another numpy: its ONNX files alone will do
        app = None
    else:
        for path in folder.glob("*.onnx"):
            regular_file(path)
        try:
            app = FaceAnalysis(name=pack, root=str(root), providers=providers)
            app.prepare(ctx_id=0, det_size=(640, 640))
        except Exception as error:  # insightface and onnxruntime each raise their own kinds
            raise InvalidInputError(_unreadable(folder, pack, error)) from error
    if app is not None:
        return InsightFaceAnalyzer(app, name)
    files = {path.name: path for path in folder.rglob("*.onnx")} if folder.is_dir() else {}
    found = [next((files[n] for n in names if n in files), None) for names in (DETECTORS, RECOGNISERS)]
    if None in found:
        raise InvalidInputError(
            f"{folder} holds no face detector and recogniser ({DETECTORS[0]} and {RECOGNISERS[0]}, for antelopev2 "
            f"{RECOGNISERS[1]}; found: {', '.join(sorted(files)) or 'nothing'}): unpack {pack}.zip of "
            "https://github.com/deepinsight/insightface/releases there"
        )
    paths = [regular_file(path) for path in found if path is not None]
    try:
        detector, recogniser = (_session(runtime.InferenceSession(str(path), providers=providers)) for path in paths)
    except Exception as error:  # onnxruntime has kinds of its own
        raise InvalidInputError(_unreadable(folder, pack, error)) from error
    return OnnxFaceAnalyzer(detector, recogniser, name)


def _unreadable(folder: Path, pack: str, error: Exception) -> str:
    return (
        f"the face models in {quoted(folder)} cannot be opened ({reason(error)}): they are damaged or were not downloaded "
        f"completely; unpack {pack}.zip of https://github.com/deepinsight/insightface/releases there again"
    )


def _session(network: Any) -> Session:
    name: str = network.get_inputs()[0].name
    return lambda blob: network.run(None, {name: blob})
