"""Pose against a head turned by known angles, sharpness and the verdict against real photos made worse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from service.domain import Box, Face, Image, Landmarks, Quality
from service.errors import FaceTooSmall, LowQuality
from service.vision.detector import FaceDetector
from service.vision.image import decode_image
from service.vision.quality import MIN_SHARPNESS, MIN_SIZE, assess, enrolment_problem, head_pose

ROOT = Path(__file__).parents[2]
PHOTOS = ["obama.jpg", "obama2.jpg", "obama3.jpg", "biden.jpg", "astronaut.png"]
GOOD = Face(
    box=Box(0, 0, 90, 120),
    landmarks=np.zeros((5, 2), dtype=np.float32),
    detection_score=0.9,
    quality=Quality(size=90, sharpness=0.8, yaw=0, pitch=0, roll=0),
)

HEAD = np.array([[-0.5, 0, 0], [0.5, 0, 0], [0, 0.59, -0.44], [-0.43, 1.03, 0], [0.43, 1.03, 0]])
"""x to the right, y down, z away from the viewer; in units of the distance between the eyes."""


@pytest.fixture(scope="module")
def detector() -> FaceDetector:
    return FaceDetector.load(ROOT / "models" / "centerface")


@pytest.fixture(scope="module")
def photos() -> dict[str, Image]:
    return {name: decode_image((ROOT / "tests" / "images" / name).read_bytes(), 10**7, 4 * 10**7) for name in PHOTOS}


def seen(yaw: float, pitch: float, roll: float, scale: float = 60) -> Landmarks:
    """The head's landmarks in a photo: it nods, then turns, then tilts."""
    a, b, c = np.radians([-yaw, -pitch, roll])
    nod = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    turn = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
    tilt = np.array([[np.cos(c), -np.sin(c), 0], [np.sin(c), np.cos(c), 0], [0, 0, 1]])
    head = HEAD @ (tilt @ turn @ nod).T
    return (scale * head[:, :2] + (300, 200)).astype(np.float32)


@pytest.mark.parametrize("roll", [0, 30, -100, 180])
@pytest.mark.parametrize("pitch", [0, 25, -30])
@pytest.mark.parametrize("yaw", [0, 20, -45, 70])
def test_pose_of_the_average_head_is_exact(yaw: float, pitch: float, roll: float) -> None:
    found = head_pose(seen(yaw, pitch, roll))
    assert found[:2] == pytest.approx((yaw, pitch), abs=0.1)
    assert abs((found[2] - roll + 180) % 360 - 180) < 0.1


def test_signs_of_the_angles() -> None:
    right = seen(30, 0, 0)
    assert right[2, 0] > right[:2, 0].mean(), "the nose of a head turned to the viewer's right is on the right"
    up, down = seen(0, 25, 0), seen(0, -25, 0)
    assert up[2, 1] < down[2, 1]
    clockwise = seen(0, 0, 20)
    assert clockwise[1, 1] > clockwise[0, 1]


def test_pose_needs_points() -> None:
    for landmarks in (np.full((5, 2), 3.0), np.full((5, 2), np.nan), np.zeros((4, 2))):
        with pytest.raises(ValueError, match=r"points|landmarks"):
            head_pose(landmarks.astype(np.float32))
    quality = assess(np.zeros((50, 50, 3), dtype=np.uint8), Box(0, 0, 9, 8), np.full((5, 2), 3, np.float32))
    assert (quality.size, quality.sharpness, quality.yaw) == (8, 0, 90)


@pytest.mark.parametrize("name", PHOTOS)
def test_ordinary_photos_are_accepted(detector: FaceDetector, photos: dict[str, Image], name: str) -> None:
    face = detector.detect(photos[name])[0]
    assert enrolment_problem(face) is None
    assert face.quality.size == min(face.box.width, face.box.height)
    assert face.quality.sharpness > 0.7
    assert abs(face.quality.yaw) < 30
    assert abs(face.quality.pitch) < 20
    assert abs(face.quality.roll) < 20


def test_mirror_image_turns_the_other_way(detector: FaceDetector, photos: dict[str, Image]) -> None:
    image = photos["obama2.jpg"]
    face = detector.detect(image)[0].quality
    mirrored = detector.detect(np.ascontiguousarray(image[:, ::-1]))[0].quality
    assert face.yaw < -10, "he looks to the viewer's left"
    assert mirrored.yaw == pytest.approx(-face.yaw, abs=12)
    assert mirrored.roll == pytest.approx(-face.roll, abs=6)
    assert mirrored.pitch == pytest.approx(face.pitch, abs=10)


@pytest.mark.parametrize("name", PHOTOS)
def test_blur_lowers_sharpness_until_refusal(detector: FaceDetector, photos: dict[str, Image], name: str) -> None:
    face = detector.detect(photos[name])[0]
    sharpness = []
    for share in (0.0, 0.02, 0.05, 0.1):
        # Blur as a share of the face's width: at a tenth, eyes and mouth are smears.
        sigma = share * face.box.width
        blurred = cv2.GaussianBlur(photos[name], (0, 0), sigma) if sigma else photos[name]
        sharpness.append(assess(np.asarray(blurred, dtype=np.uint8), face.box, face.landmarks).sharpness)
    assert sharpness == sorted(sharpness, reverse=True)
    assert sharpness[1] > 2 * MIN_SHARPNESS
    assert sharpness[-1] < MIN_SHARPNESS
    problem = enrolment_problem(replace(face, quality=replace(face.quality, sharpness=sharpness[-1])))
    assert isinstance(problem, LowQuality)
    assert "blurred" in problem.detail


def test_sharpness_does_not_depend_on_the_size_of_the_photo(detector: FaceDetector, photos: dict[str, Image]) -> None:
    image = photos["obama.jpg"]
    large = detector.detect(image)[0].quality.sharpness
    half = cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
    assert detector.detect(np.asarray(half, dtype=np.uint8))[0].quality.sharpness == pytest.approx(large, abs=0.1)


def test_small_face_is_refused(detector: FaceDetector, photos: dict[str, Image]) -> None:
    image = photos["astronaut.png"]
    for width, accepted in ((26, False), (40, True)):
        factor = width / 93
        small = cv2.resize(image, None, fx=factor, fy=factor, interpolation=cv2.INTER_AREA)
        face = detector.detect(np.asarray(small, dtype=np.uint8))[0]
        problem = enrolment_problem(face)
        assert (problem is None) is accepted
        if problem:
            assert isinstance(problem, FaceTooSmall)
            assert f"{face.quality.size:.0f} pixels" in problem.detail
            assert f"{MIN_SIZE:.0f}" in problem.detail


@pytest.mark.parametrize(
    ("face", "words"),
    [
        (replace(GOOD, quality=replace(GOOD.quality, yaw=-71.0)), "71 degrees to the side"),
        (replace(GOOD, quality=replace(GOOD.quality, pitch=-62.0)), "62 degrees down"),
        (replace(GOOD, quality=replace(GOOD.quality, pitch=62.0)), "62 degrees up"),
        (replace(GOOD, quality=replace(GOOD.quality, sharpness=0.03)), "sharpness 0.03"),
        (replace(GOOD, detection_score=0.41), "score 0.41"),
    ],
)
def test_low_quality_is_told_with_its_number(face: Face, words: str) -> None:
    assert enrolment_problem(GOOD) is None
    problem = enrolment_problem(face)
    assert isinstance(problem, LowQuality)
    assert words in problem.detail


def test_size_is_told_first() -> None:
    bad = replace(GOOD, quality=Quality(size=12, sharpness=0, yaw=90, pitch=80, roll=0))
    assert isinstance(enrolment_problem(bad), FaceTooSmall)
