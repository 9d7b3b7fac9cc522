"""Transforms against their definitions, crops against slow exact ones."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from service.domain import Crop, Face, Image, Landmarks
from service.vision.alignment import (
    PORTRAIT_SIDE,
    TEMPLATE_112,
    Transform,
    align,
    cut_portrait,
    eye_line_transform,
    least_squares_transform,
    warp,
)
from service.vision.detector import FaceDetector
from service.vision.image import decode_image
from tests.support import supersampled

ROOT = Path(__file__).parents[2]
PHOTOS = ["obama.jpg", "obama2.jpg", "obama3.jpg", "biden.jpg", "astronaut.png"]
DLIB_CHIP = np.array([[47.1, 46.8], [102.9, 46.8], [75, 79.2], [51, 104.3], [99, 104.3]], dtype=np.float32)


def apply(transform: Transform, points: NDArray[np.floating]) -> NDArray[np.float64]:
    return np.asarray(points @ transform[:, :2].T + transform[:, 2], dtype=np.float64)


def moved(points: Landmarks, degrees: float, scale: float, shift: tuple[float, float]) -> Landmarks:
    angle = np.radians(degrees)
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return (points @ turn.T + shift).astype(np.float32)


def psnr(crop: Crop, other: Crop) -> float:
    """Peak signal to noise ratio in decibels."""
    error = np.mean((crop.astype(float) - other.astype(float)) ** 2)
    return float(10 * np.log10(255**2 / max(error, 1e-9)))


@pytest.fixture(scope="module")
def faces() -> dict[str, tuple[Image, Face]]:
    detector = FaceDetector.load(ROOT / "models" / "centerface")
    found = {}
    for name in PHOTOS:
        image = decode_image((ROOT / "tests" / "images" / name).read_bytes(), 10**7, 4 * 10**7)
        found[name] = (image, detector.detect(image)[0])
    return found


@pytest.mark.parametrize("transform", [eye_line_transform, least_squares_transform])
@pytest.mark.parametrize("degrees", [0, 17, 90, -120, 180])
def test_exact_landmarks_are_mapped_exactly(transform, degrees: float) -> None:  # type: ignore[no-untyped-def]
    found = transform(moved(TEMPLATE_112, degrees, 2.7, (300, -40)), TEMPLATE_112)
    assert found.shape == (2, 3)
    assert found.dtype == np.float64
    assert np.allclose(apply(found, moved(TEMPLATE_112, degrees, 2.7, (300, -40))), TEMPLATE_112, atol=1e-3)
    assert np.hypot(found[0, 0], found[1, 0]) == pytest.approx(1 / 2.7, rel=1e-4)


@pytest.mark.parametrize("template", [TEMPLATE_112, DLIB_CHIP])
def test_both_eyes_lie_on_the_templates_eye_line(template: Landmarks) -> None:
    random = np.random.default_rng(1)
    start, end = template[0].astype(float), template[1].astype(float)
    normal = np.array([start[1] - end[1], end[0] - start[0]]) / np.linalg.norm(end - start)
    for _ in range(200):
        landmarks = moved(TEMPLATE_112 + random.normal(0, 8, (5, 2)), random.uniform(-180, 180), 3, (500, 400))
        found = eye_line_transform(landmarks.astype(np.float32), template)
        eyes = apply(found, landmarks[:2].astype(float))
        assert np.abs((eyes - start) @ normal).max() < 1e-6
        assert (eyes[1] - eyes[0]) @ (end - start) > 0
        assert np.linalg.det(found[:, :2]) > 0


def test_scale_and_shift_along_the_line_are_the_best() -> None:
    random = np.random.default_rng(2)
    template = DLIB_CHIP.astype(float)
    for _ in range(30):
        landmarks = (TEMPLATE_112 + random.normal(0, 4, (5, 2))).astype(np.float32)
        found = eye_line_transform(landmarks, DLIB_CHIP)
        points = apply(found, landmarks.astype(float))
        best = np.sum((points - template) ** 2)
        middle = points[:2].mean(axis=0)
        for grow in (0.99, 1.0, 1.01):
            for shift in (-0.5, 0.0, 0.5):
                # The template's eye line is level: along it is x.
                other = middle + grow * (points - middle) + (shift, 0)
                assert np.sum((other - template) ** 2) >= best - 1e-9


def test_least_squares_is_the_best_of_all_similarities() -> None:
    random = np.random.default_rng(3)
    for _ in range(30):
        landmarks = (TEMPLATE_112 + random.normal(0, 5, (5, 2))).astype(np.float32)
        found = least_squares_transform(landmarks, TEMPLATE_112)

        def error(transform: Transform, points: Landmarks = landmarks) -> float:
            return float(np.sum((apply(transform, points) - TEMPLATE_112) ** 2))

        for change in random.normal(0, 0.01, (20, 4)):
            a, b = found[0, 0] + change[0], found[1, 0] + change[1]
            other = np.array([[a, -b, found[0, 2] + change[2]], [b, a, found[1, 2] + change[3]]])
            assert error(other) >= error(found) - 1e-9
        assert error(eye_line_transform(landmarks, TEMPLATE_112)) >= error(found) - 1e-9


def test_contorted_landmarks_still_give_a_proper_transform() -> None:
    upside_down = TEMPLATE_112.copy()
    upside_down[2:, 1] = 103.2 - 3 * upside_down[2:, 1]
    same_eyes = TEMPLATE_112.copy()
    same_eyes[1] = same_eyes[0]
    for landmarks in (upside_down, same_eyes):
        found = eye_line_transform(landmarks, TEMPLATE_112)
        assert np.isfinite(found).all()
        assert np.linalg.det(found[:, :2]) > 0
        eyes = apply(found, landmarks[:2].astype(float))
        assert eyes[1, 0] >= eyes[0, 0], "not turned by 180 degrees"


@pytest.mark.parametrize("transform", [eye_line_transform, least_squares_transform])
@pytest.mark.parametrize(
    "landmarks",
    [np.full((5, 2), 7.0), np.full((5, 2), np.nan), np.zeros((4, 2)), np.where(TEMPLATE_112 > 92.3, np.inf, 1)],
)
def test_no_transform_from_nothing(transform, landmarks) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match=r"landmark|points"):
        transform(landmarks.astype(np.float32), TEMPLATE_112)


def test_template_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="read-only"):
        TEMPLATE_112[0, 0] = 1


@pytest.mark.parametrize("name", PHOTOS)
def test_large_faces_do_not_alias(faces: dict[str, tuple[Image, Face]], name: str) -> None:
    image, face = faces[name]
    image = cv2.resize(image, None, fx=1.5, fy=1.5)
    noisy = np.clip(image + np.random.default_rng(4).normal(0, 25, image.shape), 0, 255).astype(np.uint8)
    transform = eye_line_transform((face.landmarks + 0.5) * 1.5 - 0.5, TEMPLATE_112)
    exact = supersampled(noisy, transform, 112)
    plain = cv2.warpAffine(noisy, transform, (112, 112), flags=cv2.INTER_LINEAR)
    crop = warp(noisy, transform, 112)
    assert crop.shape == (112, 112, 3)
    assert crop.dtype == np.uint8
    assert psnr(crop, exact) > psnr(np.asarray(plain, dtype=np.uint8), exact) + 6


@pytest.mark.parametrize("scale", [0.1, 0.23, 0.3, 0.37, 0.5])
@pytest.mark.parametrize("axis", [0, 1])
def test_shrinking_moves_nothing(axis: int, scale: float) -> None:
    ramp = np.tile(np.arange(256, dtype=np.uint8)[:, None, None], (1, 256, 3))
    ramp = ramp if axis == 0 else ramp.transpose(1, 0, 2).copy()
    size = round(320 * scale)
    crop = warp(ramp, np.array([[scale, 0, 3.0], [0, scale, 3.0]]), size)
    line = crop[:, size // 2, 0] if axis == 0 else crop[size // 2, :, 0]
    expected = (np.arange(size) - 3) / scale
    seen = slice(4, round(253 * scale))
    assert np.abs(line[seen].astype(float) - expected[seen]).max() < 1.5


@pytest.mark.parametrize("height", [1, 7, 15, 16, 29])
def test_a_strip_of_a_photo_is_seen_in_the_crop(height: int) -> None:
    """Scaled down by 20, whatever its height, also where it is narrower than a block of pixels; no more than one is lost."""
    strip = np.full((height, 3000, 3), 200, dtype=np.uint8)
    crop = warp(strip, np.array([[0.05, 0, 0], [0, 0.05, 20]]), 40)
    assert crop[15:25, 5:35].max() > 50
    assert crop[15:25, 5:35].mean(axis=(1, 2)).sum() / 200 == pytest.approx(height * 0.05, abs=1)


def test_outside_of_the_photo_is_black() -> None:
    photo = np.full((40, 40, 3), 200, dtype=np.uint8)
    identity = np.array([[1.0, 0, 0], [0, 1, 0]])
    assert warp(photo, identity, 80)[45:].max() == 0
    far = np.array([[1.0, 0, 500], [0, 1, 0]])
    assert warp(photo, far, 80).max() == 0


def test_panorama_wider_than_opencv_warps() -> None:
    panorama = np.zeros((60, 40_000, 3), dtype=np.uint8)
    panorama[:, 39_000:] = 255
    crop = warp(panorama, np.array([[1.0, 0, -39_000], [0, 1, 0]]), 50)
    assert crop.min() == 255


@pytest.mark.parametrize("name", PHOTOS)
def test_aligned_eyes_are_dark_and_level(faces: dict[str, tuple[Image, Face]], name: str) -> None:
    image, face = faces[name]
    crop = align(image, face.landmarks, TEMPLATE_112, 112)
    grey = crop.astype(float).mean(axis=2)

    def patch(point: NDArray[np.floating], half: int = 3) -> float:
        x, y = np.round(point).astype(int)
        return float(grey[y - half : y + half + 1, x - half : x + half + 1].mean())

    for eye in TEMPLATE_112[:2]:
        assert patch(eye) < patch(eye + np.array([0, 16])) - 10, "an eye is darker than the cheek below it"


@pytest.mark.parametrize("turns", range(4))
@pytest.mark.parametrize("name", PHOTOS)
def test_portrait_gives_nearly_the_crop_of_the_photo(
    faces: dict[str, tuple[Image, Face]], name: str, turns: int
) -> None:
    image, face = faces[name]
    # A face on its side, or upside down, is cut as well as an upright one.
    height, width = image.shape[:2]
    points = face.landmarks
    for _ in range(turns):
        points = np.stack([points[:, 1], width - 1 - points[:, 0]], axis=1)
        image, height, width = np.ascontiguousarray(np.rot90(image)), width, height
    low, high = points.min(axis=0), points.max(axis=0)
    box = type(face.box)(*(float(v) for v in (*low, *(high - low))))
    portrait = cut_portrait(image, Face(box, points.astype(np.float32), 1.0, face.quality))
    kept = decode_image(portrait.data, 10**7, 10**7)
    assert max(kept.shape[:2]) <= PORTRAIT_SIDE
    assert len(portrait.data) < 150_000
    for template, size in ((TEMPLATE_112, 112), (DLIB_CHIP, 150)):
        assert psnr(align(kept, portrait.landmarks, template, size), align(image, points, template, size)) > 30


@pytest.mark.parametrize("degrees", [20, 45, -70])
def test_portrait_of_a_tilted_face_holds_the_whole_crop(faces: dict[str, tuple[Image, Face]], degrees: float) -> None:
    image, face = faces["obama.jpg"]
    x, y = (float(value) for value in face.landmarks.mean(axis=0))
    turn = cv2.getRotationMatrix2D((x, y), degrees, 1.0)
    tilted = np.asarray(cv2.warpAffine(image, turn, image.shape[1::-1], borderValue=(90, 90, 90)), dtype=np.uint8)
    points = apply(turn, face.landmarks).astype(np.float32)
    portrait = cut_portrait(tilted, Face(face.box, points, 1.0, face.quality))
    kept = decode_image(portrait.data, 10**7, 10**7)
    assert psnr(align(kept, portrait.landmarks, DLIB_CHIP, 150), align(tilted, points, DLIB_CHIP, 150)) > 30


def test_portrait_of_a_small_photo_is_not_enlarged(faces: dict[str, tuple[Image, Face]]) -> None:
    image, face = faces["astronaut.png"]
    portrait = cut_portrait(image, face)
    kept = decode_image(portrait.data, 10**7, 10**7)
    assert max(kept.shape[:2]) < 300
    eyes = np.linalg.norm(portrait.landmarks[1] - portrait.landmarks[0])
    assert eyes == pytest.approx(np.linalg.norm(face.landmarks[1] - face.landmarks[0]), rel=1e-4)


def test_no_portrait_of_a_face_outside_the_photo(faces: dict[str, tuple[Image, Face]]) -> None:
    image, face = faces["astronaut.png"]
    box = type(face.box)(5000, 5000, 80, 100)
    with pytest.raises(ValueError, match="outside"):
        cut_portrait(image, Face(box, face.landmarks + 5000, 1.0, face.quality))
