"""The bundled detector on real photos: at every size, in every orientation, and where nobody is."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from service.domain import Face, Image
from service.vision.alignment import TEMPLATE_112
from service.vision.detector import (
    CLOSE_BATCH,
    CLOSE_SIDE,
    QUICK_BORDER,
    QUICK_SIDE,
    FaceDetector,
)
from service.vision.image import decode_image
from service.vision.manifest import ModelError, load_detector_manifest
from service.vision.onnx import OnnxModel

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "models" / "centerface"
PHOTOS = ["obama.jpg", "obama2.jpg", "obama3.jpg", "biden.jpg", "astronaut.png"]
FACES = {
    "obama.jpg": (374, 88, 613, 448),
    "obama2.jpg": (205, 233, 467, 617),
    "obama3.jpg": (630, 255, 915, 610),
    "biden.jpg": (425, 165, 725, 580),
    "astronaut.png": (175, 62, 268, 168),
}
"""Left, top, right, bottom of the one face in each photo, from hairline to chin, read off a grid by eye."""


class CountingModel(OnnxModel):
    """The real network, with a count of its runs, and how many pictures of which longest side it was shown in each."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.runs = 0
        self.sides: list[int] = []
        self.pictures: list[int] = []

    def run(self, inputs: Mapping[str, NDArray[Any]], *, release: bool = False) -> list[NDArray[np.float32]]:
        self.runs += 1
        self.sides += [max(array.shape[2:]) for array in inputs.values()]
        self.pictures += [len(array) for array in inputs.values()]
        return super().run(inputs, release=release)


@pytest.fixture(scope="module")
def network() -> CountingModel:
    return CountingModel(FOLDER / "model.onnx")


@pytest.fixture(scope="module")
def detector(network: CountingModel) -> FaceDetector:
    return FaceDetector(load_detector_manifest(FOLDER), network)


@pytest.fixture(scope="module")
def photos() -> dict[str, Image]:
    return {name: decode_image((ROOT / "tests" / "images" / name).read_bytes(), 10**7, 4 * 10**7) for name in PHOTOS}


def resized(image: Image, factor: float) -> Image:
    way = cv2.INTER_AREA if factor < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(image, None, fx=factor, fy=factor, interpolation=way), dtype=np.uint8)


def collage(photos: dict[str, Image], side: int = 600) -> Image:
    tiles = []
    for name in ("obama2.jpg", "obama3.jpg", "biden.jpg", "astronaut.png"):
        tiles.append(resized(photos[name], side / photos[name].shape[1])[:side, :side])
    return np.vstack([np.hstack(tiles[:2]), np.hstack(tiles[2:])])


def before_rotation(points: NDArray[np.float32], turns: int, image: Image) -> NDArray[np.float32]:
    """Points of ``np.rot90(image, turns)`` as points of ``image``."""
    height, width = image.shape[:2]
    x, y = points[:, 0], points[:, 1]
    if turns == 1:
        x, y = width - 1 - y, x
    elif turns == 2:
        x, y = width - 1 - x, height - 1 - y
    elif turns == 3:
        x, y = y, height - 1 - x
    return np.stack([x, y], axis=1)


def overlap(face: Face, box: tuple[float, float, float, float]) -> float:
    """Intersection over union with left, top, right, bottom."""
    left, top, right, bottom = box
    width = min(face.box.x + face.box.width, right) - max(face.box.x, left)
    height = min(face.box.y + face.box.height, bottom) - max(face.box.y, top)
    shared = max(width, 0) * max(height, 0)
    return shared / (face.box.area + (right - left) * (bottom - top) - shared)


def check_sound(faces: list[Face], image: Image) -> None:
    height, width = image.shape[:2]
    assert [face.box.area for face in faces] == sorted((face.box.area for face in faces), reverse=True)
    for face in faces:
        numbers = [face.box.x, face.box.y, face.box.width, face.box.height, *vars(face.quality).values()]
        assert np.isfinite(numbers).all()
        assert np.isfinite(face.landmarks).all()
        assert face.landmarks.shape == (5, 2)
        assert face.landmarks.dtype == np.float32
        assert face.box.width > 0
        assert face.box.height > 0
        assert 0 <= face.box.x + face.box.width / 2 <= width
        assert 0 <= face.box.y + face.box.height / 2 <= height
        assert 0.5 <= face.detection_score <= 1
        slack = np.array([face.box.width, face.box.height]) * 0.5 + 1
        corner = np.array([face.box.x, face.box.y])
        assert (face.landmarks >= corner - slack).all()
        extent = np.array([face.box.width, face.box.height])
        assert (face.landmarks <= corner + extent + slack).all()


@pytest.mark.parametrize("name", PHOTOS)
def test_one_face_in_two_runs(
    detector: FaceDetector, network: CountingModel, photos: dict[str, Image], name: str
) -> None:
    before = network.runs
    faces = detector.detect(photos[name])
    assert network.sides[before:] == [480 if max(photos[name].shape) > 900 else 256, CLOSE_SIDE]
    assert len(faces) == 1
    check_sound(faces, photos[name])
    assert overlap(faces[0], FACES[name]) > 0.7
    assert faces[0].detection_score > 0.8
    left_eye, right_eye, nose, mouth_left, mouth_right = faces[0].landmarks
    assert left_eye[0] < nose[0] < right_eye[0]
    assert mouth_left[0] < mouth_right[0]
    assert max(left_eye[1], right_eye[1]) < nose[1] < min(mouth_left[1], mouth_right[1])


@pytest.mark.parametrize("turns", [1, 2, 3])
@pytest.mark.parametrize("name", [*PHOTOS, "collage"])
def test_rotated_photo_has_the_same_faces(
    detector: FaceDetector, photos: dict[str, Image], name: str, turns: int
) -> None:
    image = collage(photos) if name == "collage" else photos[name]
    upright = detector.detect(image)
    rotated_image = np.ascontiguousarray(np.rot90(image, turns))
    rotated = detector.detect(rotated_image)
    check_sound(rotated, rotated_image)
    assert len(upright) == len(rotated) == (4 if name == "collage" else 1)
    for face in rotated:
        landmarks = before_rotation(face.landmarks, turns, image)
        errors = [np.abs(landmarks - other.landmarks).max() / other.box.width for other in upright]
        other = upright[int(np.argmin(errors))]
        assert min(errors) < 0.03
        assert face.detection_score == pytest.approx(other.detection_score, abs=0.05)
        assert face.box.area == pytest.approx(other.box.area, rel=0.1)


def test_an_orientation_without_an_upright_face_costs_one_quick_look(
    detector: FaceDetector, network: CountingModel, photos: dict[str, Image]
) -> None:
    looks = []
    # The face in the whole photo would be too small for a quick look.
    for image in (photos["biden.jpg"][:900, 150:950], photos["obama.jpg"]):
        start = network.runs
        detector.detect(np.ascontiguousarray(np.rot90(image, 2)))
        assert network.sides[-1] == CLOSE_SIDE
        looks.append([side > QUICK_SIDE + 2 * QUICK_BORDER for side in network.sides[start:-1]])
    assert looks == [[True, True, False, False, False, True], [True] * 7]


def test_people_who_are_turned_differently(detector: FaceDetector, photos: dict[str, Image]) -> None:
    upright = resized(photos["obama.jpg"], 600 / 910)[:600, :600]
    for turns in (1, 2, 3):
        lying = np.rot90(resized(photos["biden.jpg"], 600 / 970)[:600, :600], turns)
        image = np.ascontiguousarray(np.hstack([upright, lying]))
        faces = sorted(detector.detect(image), key=lambda face: face.box.x)
        assert len(faces) == 2
        assert abs(faces[0].quality.roll) < 20
        expected = {1: -77, 2: -167, 3: 103}[turns]
        assert abs((faces[1].quality.roll - expected + 180) % 360 - 180) < 15


def test_mirrored_photos_have_mirrored_landmarks(detector: FaceDetector, photos: dict[str, Image]) -> None:
    shifts = []
    for image in photos.values():
        (face,), (mirrored,) = detector.detect(image), detector.detect(np.ascontiguousarray(image[:, ::-1]))
        back = mirrored.landmarks[[1, 0, 2, 4, 3]] * (-1, 1) + (image.shape[1] - 1, 0)
        eyes = np.linalg.norm(face.landmarks[1] - face.landmarks[0])
        shifts.append((back - face.landmarks).mean(axis=0) / eyes)
    # Half a pixel in the look at the face alone would add 0.03.
    assert np.abs(np.mean(shifts, axis=0)).max() < 0.04


def test_a_dark_face_that_half_the_size_leaves_in_doubt(detector: FaceDetector, photos: dict[str, Image]) -> None:
    image = photos["obama.jpg"]
    image = resized(image, 56 / detector.detect(image)[0].box.width)
    (face,) = detector.detect(image)
    (dark,) = detector.detect((cv2.GaussianBlur(image, (0, 0), 1) * 0.03).astype(np.uint8))
    assert dark.detection_score > 0.7
    assert overlap(dark, (face.box.x, face.box.y, face.box.x + face.box.width, face.box.y + face.box.height)) > 0.6


@pytest.mark.parametrize("width", [32, 64, 100, 160, 240])
def test_landmarks_are_as_good_in_every_size_of_photo(
    detector: FaceDetector, photos: dict[str, Image], width: int
) -> None:
    errors = []
    for name in PHOTOS:
        (face,) = detector.detect(photos[name])
        factor = width / face.box.width
        (other,) = detector.detect(resized(photos[name], factor))
        shift = np.linalg.norm((other.landmarks + 0.5) / factor - 0.5 - face.landmarks, axis=1).mean()
        errors.append(shift / np.linalg.norm(face.landmarks[1] - face.landmarks[0]))
    # Of the look at the whole photo alone it is 0.053 to 0.073.
    assert np.mean(errors) < 0.045


def test_faces_are_looked_at_alone_a_few_at_a_time(
    detector: FaceDetector, network: CountingModel, photos: dict[str, Image]
) -> None:
    left, top, right, bottom = FACES["obama.jpg"]
    head = cv2.resize(photos["obama.jpg"][top - 80 : bottom + 80, left - 80 : right + 80], (95, 120))
    image = np.tile(head, (4, 5, 1))
    before = network.runs
    faces = detector.detect(np.ascontiguousarray(image))
    assert len(faces) == 20
    alone = [n for n, side in zip(network.pictures[before:], network.sides[before:], strict=True) if side == CLOSE_SIDE]
    assert alone == [CLOSE_BATCH, 20 - CLOSE_BATCH]
    for face in faces:
        # Every face gets its own landmarks back.
        middle = np.array([face.box.x + face.box.width / 2, face.box.y + face.box.height / 2])
        assert np.abs(face.landmarks[2] - middle).max() < 0.25 * face.box.width


class ForgetfulModel(OnnxModel):
    """Sees in a face alone what the test says, and everything else as it is."""

    def __init__(self, path: Path, score: float, landmark: float) -> None:
        super().__init__(path)
        self.score, self.landmark = score, landmark

    def run(self, inputs: Mapping[str, NDArray[Any]], *, release: bool = False) -> list[NDArray[np.float32]]:
        outputs = dict(zip(self.outputs, super().run(inputs, release=release), strict=True))
        if all(array.shape[2:] == (CLOSE_SIDE, CLOSE_SIDE) for array in inputs.values()):
            outputs["heatmap"][:] = self.score
            outputs["landmarks"][:] += self.landmark
        return list(outputs.values())


@pytest.mark.parametrize(("score", "landmark"), [(0.0, 0.0), (0.3, 0.0), (0.9, 1.5), (np.nan, 0.0), (0.9, np.nan)])
def test_a_face_that_is_not_seen_again_keeps_its_landmarks(
    photos: dict[str, Image], score: float, landmark: float
) -> None:
    network = ForgetfulModel(FOLDER / "model.onnx", score, landmark)
    detector = FaceDetector(load_detector_manifest(FOLDER), network)
    (face,) = detector.detect(photos["obama.jpg"])
    whole, close = FaceDetector.load(FOLDER).detect(photos["obama.jpg"]), face.landmarks
    eyes = np.linalg.norm(close[1] - close[0])
    shift = np.linalg.norm(close - whole[0].landmarks, axis=1).mean()
    assert face.box == whole[0].box
    assert 0 < shift < 0.15 * eyes


@pytest.mark.parametrize("factor", [0.3, 0.5, 2.0, 3.5])
def test_coordinates_follow_the_size_of_the_photo(
    detector: FaceDetector, photos: dict[str, Image], factor: float
) -> None:
    image = photos["obama.jpg"]
    face = detector.detect(image)[0]
    other = detector.detect(resized(image, factor))[0]
    landmarks = (other.landmarks + 0.5) / factor - 0.5
    assert np.abs(landmarks - face.landmarks).max() < 0.06 * face.box.width
    assert other.box.width / factor == pytest.approx(face.box.width, rel=0.12)


@pytest.mark.parametrize("width", [300, 900, 2400])
@pytest.mark.parametrize("name", PHOTOS)
def test_face_that_overfills_the_photo(
    detector: FaceDetector, network: CountingModel, photos: dict[str, Image], name: str, width: int
) -> None:
    face = detector.detect(photos[name])[0]
    inset = 0.03
    left, top = face.box.x + inset * face.box.width, face.box.y + inset * face.box.height
    right, bottom = (
        face.box.x + (1 - inset) * face.box.width,
        face.box.y + (1 - inset) * face.box.height,
    )
    left, top = round(left), round(top)
    tight = photos[name][top : round(bottom), left : round(right)]
    factor = width / tight.shape[1]
    before = network.runs
    faces = detector.detect(resized(tight, factor))
    assert network.runs - before <= 3
    assert len(faces) == 1
    landmarks = (faces[0].landmarks + 0.5) / factor - 0.5 + (left, top)
    error = np.linalg.norm(landmarks - face.landmarks, axis=1).mean()
    assert error < 0.14 * np.linalg.norm(face.landmarks[1] - face.landmarks[0])


def test_every_face_of_a_group(detector: FaceDetector, photos: dict[str, Image]) -> None:
    heads = []
    for name, (left, top, right, bottom) in FACES.items():
        margin = (right - left) // 2
        head = photos[name][max(0, top - margin) : bottom + margin, max(0, left - margin) : right + margin]
        heads.append(np.asarray(cv2.resize(head, (150, 190), interpolation=cv2.INTER_AREA), dtype=np.uint8))
    # Faces are about 75 pixels wide in a photo of 3000: 12 in what the network sees first.
    rows = [np.hstack([heads[(row + column) % 5] for column in range(20)]) for row in range(6)]
    image = np.vstack(rows)
    faces = detector.detect(image)
    check_sound(faces, image)
    assert len(faces) == 120
    middles = {(int(f.landmarks[2, 0] // 150), int(f.landmarks[2, 1] // 190)) for f in faces}
    assert len(middles) == 120


def test_nobody(detector: FaceDetector, photos: dict[str, Image]) -> None:
    random = np.random.default_rng(6)
    empty = {
        "black": np.zeros((300, 400, 3), dtype=np.uint8),
        "white": np.full((1000, 700, 3), 255, dtype=np.uint8),
        "noise": random.integers(0, 256, (500, 500, 3), dtype=np.uint8),
        "suit": photos["biden.jpg"][1200:, :700],
        "rocket": photos["astronaut.png"][:200, 330:],
    }
    for name, image in empty.items():
        assert detector.detect(np.ascontiguousarray(image)) == [], name


@pytest.mark.parametrize("shape", [(1, 1), (1, 900), (900, 1), (7, 5), (33, 31), (3, 40_000), (20_000, 2)])
def test_odd_shapes(detector: FaceDetector, shape: tuple[int, int]) -> None:
    assert detector.detect(np.full((*shape, 3), 120, dtype=np.uint8)) == []


def test_views_and_read_only_images(detector: FaceDetector, photos: dict[str, Image]) -> None:
    image = photos["astronaut.png"]
    view = np.ascontiguousarray(image[:, ::-1])[:, ::-1]
    view.setflags(write=False)
    assert detector.detect(view)[0].box == detector.detect(image)[0].box


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((10, 10), dtype=np.uint8),
        np.zeros((10, 10, 4), dtype=np.uint8),
        np.zeros((10, 10, 3), dtype=np.float32),
        np.zeros((0, 10, 3), dtype=np.uint8),
    ],
)
def test_what_is_no_image(detector: FaceDetector, image: Any) -> None:
    with pytest.raises(ValueError, match="uint8"):
        detector.detect(image)


def test_threads_share_a_detector(detector: FaceDetector, photos: dict[str, Image]) -> None:
    alone = [detector.detect(photos[name]) for name in PHOTOS]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda name: detector.detect(photos[name]), PHOTOS * 3))
    for index, faces in enumerate(together):
        assert [face.box for face in faces] == [face.box for face in alone[index % 5]]


class InventedModel(OnnxModel):
    """A face in every cell: numbers that no trained network would give."""

    def __init__(self, path: Path, scale: float, offset: float, landmarks: float) -> None:
        super().__init__(path)
        self.scale, self.offset, self.landmarks = scale, offset, landmarks

    def run(self, inputs: Mapping[str, NDArray[Any]], *, release: bool = False) -> list[NDArray[np.float32]]:
        outputs = dict(zip(self.outputs, super().run(inputs, release=release), strict=True))
        outputs["heatmap"][:] = 0.9
        outputs["scale"][:] = self.scale
        outputs["offset"][:] = self.offset
        shape = (TEMPLATE_112[:, ::-1] / 112).reshape(10)
        outputs["landmarks"][:] = self.landmarks * shape[:, None, None]
        return list(outputs.values())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("absurd", [np.nan, np.inf, -np.inf, 1e30, 50.0, -50.0, 0.0])
@pytest.mark.parametrize("where", ["scale", "offset", "landmarks"])
def test_absurd_numbers_of_the_network_stay_inside(where: str, absurd: float) -> None:
    numbers = {"scale": 1.5, "offset": 0.0, "landmarks": 1.0} | {where: absurd}
    detector = FaceDetector(load_detector_manifest(FOLDER), InventedModel(FOLDER / "model.onnx", **numbers))
    image = np.zeros((64, 96, 3), dtype=np.uint8)
    check_sound(detector.detect(image), image)


def test_overlapping_boxes_are_one_face() -> None:
    network = InventedModel(FOLDER / "model.onnx", scale=1.5, offset=0.0, landmarks=1.0)
    faces = FaceDetector(load_detector_manifest(FOLDER), network).detect(np.zeros((64, 96, 3), dtype=np.uint8))
    assert len(faces) > 10
    for index, face in enumerate(faces):
        box = (face.box.x, face.box.y, face.box.x + face.box.width, face.box.y + face.box.height)
        assert max((overlap(other, box) for other in faces[:index]), default=0) <= 0.4


def test_load_refuses_another_kind_of_model() -> None:
    assert FaceDetector.load(FOLDER, threads=2)
    with pytest.raises(ModelError):
        FaceDetector.load(ROOT / "models" / "dlib-resnet")
