"""Faces: alignment against its definition, SCRFD's outputs decoded, choice among faces. No face model is downloaded."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from ipadapter_core import EncodeOptions, load_adapter
from ipadapter_core.errors import InvalidInputError
from ipadapter_core.images.faces import (
    Face,
    InsightFaceAnalyzer,
    Nth,
    OnnxFaceAnalyzer,
    align,
    find_faces,
    open_face_model,
    similarity,
    template,
    usable_providers,
)
from ipadapter_core.prompt.faces import encode_face_prompt
from tiny import tiny_state
from tiny_onnx import write_face_models


def turned(points: Tensor, angle: float, scale: float, shift: tuple[float, float]) -> Tensor:
    c, s = np.cos(angle) * scale, np.sin(angle) * scale
    return points.double() @ torch.tensor([[c, s], [-s, c]]) + torch.tensor(shift)


@pytest.mark.parametrize("size", [112, 224, 256, 336])
def test_similarity_finds_the_transform_back(size: int) -> None:
    target = template(size)
    source = turned(target, 0.4, 1.7, (30.0, -12.0))
    matrix = similarity(source, target)
    assert_close(source @ matrix[:, :2].T + matrix[:, 2], target, rtol=0, atol=1e-9)


def test_the_template_has_a_margin_where_112_does_not_divide() -> None:
    assert_close(template(224), 2 * template(112))
    assert_close(template(256), 2 * template(112) + torch.tensor([16.0, 0.0]))


def test_an_aligned_face_is_cut_out_pixel_by_pixel() -> None:
    picture = torch.zeros(300, 400, 3)
    picture[40:264, 70:294] = torch.rand(224, 224, 3, generator=torch.Generator().manual_seed(0))
    points = template(224) + torch.tensor([70.0, 40.0])
    expected = (picture[40:264, 70:294] * 255).round() / 255
    assert_close(align(picture, points, 224), expected, rtol=0, atol=1 / 255 + 1e-6)


# --- SCRFD ------------------------------------------------------------------------------------------------------------


def detector_that_sees(box: tuple[float, ...], points: Tensor, stride: int = 16) -> OnnxFaceAnalyzer:
    """Outputs that encode one face twice (two anchors, the second weaker and a little off)."""
    seen: list[tuple[int, ...]] = []

    def detect(blob: np.ndarray) -> list[np.ndarray]:
        size = blob.shape[-1]
        seen.append(blob.shape)
        outputs: list[list[np.ndarray]] = [[], [], []]
        for s in (8, 16, 32):
            count = (size // s) ** 2 * 2
            score, boxes, five = (np.zeros((count, n), np.float32) for n in (1, 4, 10))
            if s == stride:
                column, row = int(box[0] // s) + 1, int(box[1] // s) + 1
                index, center = (row * (size // s) + column) * 2, np.array([column * s, row * s], np.float32)
                for i, (certainty, off) in enumerate(((0.9, 0.0), (0.7, 2.0))):
                    score[index + i] = certainty
                    boxes[index + i] = np.concatenate([center - box[:2], np.array(box[2:]) - center + off]) / s
                    five[index + i] = ((points.numpy() - center) / s).reshape(-1)
            for group, value in zip(outputs, (score, boxes, five), strict=True):
                group.append(value)
        return [value for group in outputs for value in group]

    def recognise(blob: np.ndarray) -> list[np.ndarray]:
        assert blob.shape == (1, 3, 112, 112)
        return [np.concatenate([blob.mean((2, 3)), np.ones((1, 509), np.float32)], 1)]

    return OnnxFaceAnalyzer(detect, recognise, f"fake {box}")


def test_detections_are_decoded_in_the_pictures_own_pixels() -> None:
    points = template(112) + torch.tensor([100.0, 60.0])
    analyzer = detector_that_sees((100.0, 60.0, 212.0, 172.0), points)
    picture = torch.full((320, 320, 3), 0.25)  # searched at 640, so everything there is twice as large
    (face,) = analyzer.find(picture, 640)
    assert_close(face.box, torch.tensor([50.0, 30.0, 106.0, 86.0]))
    assert_close(face.points.double(), points / 2, rtol=0, atol=1e-4)
    assert face.score == pytest.approx(0.9)
    assert_close(face.embedding[:3], torch.full((3,), (64 - 127.5) / 127.5), rtol=0, atol=1e-2)


# --- choice -----------------------------------------------------------------------------------------------------------


class Known:
    """Finds the given faces, but only in pictures of at most ``largest``."""

    def __init__(self, name: str, *areas: float, largest: int = 640) -> None:
        self.name, self.areas, self.largest, self.calls = name, areas, largest, 0

    def find(self, picture: Tensor, size: int) -> Sequence[Face]:
        self.calls += 1
        if size > self.largest:
            return []
        sides = [area**0.5 for area in self.areas]
        boxes = [torch.tensor([10.0 * i, 0.0, 10.0 * i + side, side]) for i, side in enumerate(sides)]
        return [Face(box, template(112), 0.9 - i / 10, torch.full((512,), float(i + 1))) for i, box in enumerate(boxes)]


def test_the_best_the_largest_the_nth_or_the_one_in_the_mask() -> None:
    picture = torch.zeros(1, 50, 50, 3)
    analyzer = Known("three", 4, 36, 16)
    assert find_faces(analyzer, picture, 224).embeddings[0, 0] == 1
    assert find_faces(analyzer, picture, 224, which="largest").embeddings[0, 0] == 2
    assert find_faces(analyzer, picture, 224, which=Nth(2)).embeddings[0, 0] == 3
    mask = torch.zeros(25, 25)
    mask[:, 10:] = 1
    assert find_faces(analyzer, picture, 224, mask=mask).embeddings[0, 0] == 3
    found = find_faces(analyzer, picture, 256)
    assert found.crops.shape == (1, 256, 256, 3)
    assert float(found.get("normed").norm()) == pytest.approx(1)


def test_all_faces_and_those_from_the_left() -> None:
    picture = torch.zeros(1, 50, 50, 3)
    analyzer = Known("three", 4, 36, 16)
    assert find_faces(analyzer, picture, 224, which="all").embeddings[:, 0].tolist() == [2, 3, 1]
    assert find_faces(analyzer, picture.repeat(2, 1, 1, 1), 224, which="all").crops.shape[0] == 6
    assert [find_faces(analyzer, picture, 224, which=Nth(n, "left")).embeddings[0, 0] for n in (1, 2, 3)] == [1, 2, 3]
    with pytest.raises(InvalidInputError, match="counted from 1"):
        Nth(0)


def test_pictures_with_nan_show_no_face() -> None:
    from ipadapter_core.images.noise import noise_picture
    from ipadapter_core.images.tiles import prepare_square

    picture = torch.zeros(1, 50, 50, 3)
    picture[0, 1, 1, 1] = torch.nan
    for read in (
        lambda: find_faces(Known("three", 4, 36, 16), picture, 224),
        lambda: prepare_square(picture),
        lambda: noise_picture("fade", 0.5, images=picture),
    ):
        with pytest.raises(InvalidInputError, match="NaN or infinite values"):
            read()


def test_every_mask_chooses_its_own_person() -> None:
    picture = torch.zeros(1, 50, 50, 3)
    analyzer = Known("three", 4, 36, 16)
    masks = torch.zeros(2, 50, 50)
    masks[0, :, 18:] = 1  # the third face, at 20
    masks[1, :, :8] = 1  # the first, at 0
    assert find_faces(analyzer, picture, 224, mask=masks).embeddings[:, 0].tolist() == [3, 1]
    pictures = picture.repeat(2, 1, 1, 1)
    assert find_faces(analyzer, pictures, 224, mask=masks).embeddings[:, 0].tolist() == [3, 1]
    assert find_faces(analyzer, pictures, 224, mask=masks[:1]).embeddings[:, 0].tolist() == [3, 3]
    with pytest.raises(InvalidInputError, match="2 masks for 3 images"):
        find_faces(analyzer, picture.repeat(3, 1, 1, 1), 224, mask=masks)
    with pytest.raises(InvalidInputError, match="found 0 faces inside the mask in the image"):
        find_faces(analyzer, picture, 224, mask=torch.zeros(50, 50))


def test_smaller_pictures_are_searched_and_findings_kept() -> None:
    analyzer = Known("small", 4, largest=448)
    picture = torch.rand(1, 20, 20, 3)
    find_faces(analyzer, picture, 224)
    assert analyzer.calls == 4  # 640, 576, 512, 448
    find_faces(analyzer, picture, 256)
    assert analyzer.calls == 4


def test_no_face_names_the_picture() -> None:
    pictures = torch.rand(2, 20, 30, 3)
    with pytest.raises(
        InvalidInputError, match=r"nothing found 0 faces in image 1 of 2 \(30 x 20 pixels\), a face was expected"
    ):
        find_faces(Known("nothing", largest=0), pictures, 224)
    with pytest.raises(InvalidInputError, match=r"found 2 faces in the image.*face number 3"):
        find_faces(Known("two", 4, 4), pictures[:1], 224, which=Nth(3))


def test_a_shared_detector_is_left_as_it_was() -> None:
    sizes: list[object] = []
    detector = SimpleNamespace(input_size=(640, 640))

    def get(image: np.ndarray) -> list[object]:
        sizes.append(detector.input_size)
        assert image.dtype == np.uint8
        assert image[0, 0].tolist() == [51, 127, 255]  # blue first
        return [
            SimpleNamespace(bbox=np.zeros(4), kps=np.zeros((5, 2)), det_score=0.8, embedding=np.ones(512, np.float32))
        ]

    picture = torch.tensor([1.0, 0.5, 0.2]).expand(4, 4, 3)
    (face,) = InsightFaceAnalyzer(SimpleNamespace(det_model=detector, get=get)).find(picture, 320)
    assert (sizes, detector.input_size, face.score) == ([(320, 320)], (640, 640), 0.8)


def test_providers_fall_back_to_the_cpu() -> None:
    assert usable_providers("CUDA", ["CPUExecutionProvider"]) == ["CPUExecutionProvider"]
    assert usable_providers("DirectML", ["DmlExecutionProvider", "CPUExecutionProvider"])[0] == "DmlExecutionProvider"
    with pytest.raises(InvalidInputError, match="choose one of: CPU"):
        usable_providers("TPU", [])


def test_face_models_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "models" / "buffalo_l"
    folder.mkdir(parents=True)

    def refuse(path: str, providers: object) -> None:
        raise RuntimeError(f"[ONNXRuntimeError] : 7 :\n INVALID_PROTOBUF : {path}")

    runtime = SimpleNamespace(get_available_providers=lambda: ["CPUExecutionProvider"], InferenceSession=refuse)
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    monkeypatch.setitem(sys.modules, "insightface", None)
    (folder / "det_10g.onnx").write_bytes(b"<html>")
    (folder / "w600k_r50.onnx").write_bytes(b"")
    with pytest.raises(InvalidInputError, match=r"cannot be opened .*unpack buffalo_l\.zip") as caught:
        open_face_model(tmp_path)
    assert str(caught.value).isprintable()
    (folder / "w600k_r50.onnx").unlink()
    os.mkfifo(folder / "w600k_r50.onnx")
    with pytest.raises(InvalidInputError, match="pipe"):
        open_face_model(tmp_path)


def test_a_missing_package_or_model_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"pip install onnxruntime|det_10g\.onnx.*buffalo_l\.zip"):
        open_face_model(tmp_path)


# --- onnxruntime ------------------------------------------------------------------------------------------------------


def test_models_of_insightfaces_shapes_run_on_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found in the picture's own pixels, cut out, recognised, and read by a FaceID adapter."""
    monkeypatch.setitem(sys.modules, "insightface", None)
    write_face_models(tmp_path)
    analyzer = open_face_model(tmp_path)
    picture = torch.full((1, 320, 320, 3), 0.2)
    for top, left in ((96, 160), (208, 32)):  # the search is at 640: two cells of 32 pixels are 32 here
        picture[0, top : top + 48, left : left + 48] = torch.tensor([1.0, 0.0, 0.0])
    faces = sorted(analyzer.find(picture[0], 640), key=lambda face: float(face.box[0]))
    assert [face.box.tolist() for face in faces] == [[32, 208, 80, 256], [160, 96, 208, 144]]
    assert_close(faces[0].points, faces[0].box[:2] + template(112).float() / 112 * 48, rtol=0, atol=1e-3)
    found = find_faces(analyzer, picture, 224, which=Nth(1, "left"))
    assert_close(
        found.crops[:, 8:216, 8:216], torch.tensor([1.0, 0.0, 0.0]).expand(1, 208, 208, 3), rtol=0, atol=2 / 255
    )
    colour = align(picture[0], faces[0].points, 112).mean((0, 1)) * 2 - 1
    matrix = torch.from_numpy(np.random.default_rng(0).standard_normal((3, 512)).astype(np.float32))
    assert_close(found.embeddings[0], colour @ matrix, rtol=0, atol=1e-4)
    with pytest.raises(InvalidInputError, match="found 0 faces"):
        find_faces(analyzer, torch.zeros(1, 64, 64, 3), 224)
    adapter = load_adapter({k: v.contiguous() for k, v in tiny_state("faceid", face_dim=512).items()}, name="faces")
    prompt, seen = encode_face_prompt(adapter, analyzer, None, picture, EncodeOptions(which="all"))
    assert seen.crops.shape[0] == 2
    assert prompt.cond.shape[1] == 2 * adapter.spec.num_tokens
