from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
import filelock
import numpy as np
import pytest
from PIL import Image as Pillow

from service.domain import Box, Face, Image, Quality
from service.vision.alignment import align, least_squares_transform
from service.vision.detector import FaceDetector
from service.vision.image import decode_image
from service.vision.manifest import load_embedder_manifest
from training.data import DataError, Layout, Photo, Role, celeba_photos, folder_photos
from training.prepare import (
    CROPS,
    FALLBACK,
    INDEX,
    PROGRESS,
    SUMMARY,
    TRAINING_SIZE,
    TRAINING_VIEW,
    Acquired,
    Alignment,
    Counts,
    Summary,
    Target,
    load_prepared,
    pick_face,
    prepare,
)

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "models"
FILES = (CROPS, INDEX, SUMMARY)


def cut(
    photos: Sequence[Photo],
    data: Path,
    out: Path,
    *,
    layout: Layout = Layout.CELEBA,
    alignment: Alignment = Alignment.EYE_LINE,
    like_queries: bool = False,
    jobs: int = 1,
    target: Target | None = None,
) -> Summary:
    return prepare(
        photos,
        data,
        out,
        layout=layout,
        target=target or Target.of(MODELS / "dlib-resnet"),
        detector=MODELS / "centerface",
        alignment=alignment,
        like_queries=like_queries,
        jobs=jobs,
        progress=False,
    )


@pytest.fixture(scope="module")
def detector() -> FaceDetector:
    return FaceDetector.load(MODELS / "centerface")


def image_of(data: Path, photo: Photo) -> Image:
    return decode_image((data / photo.file).read_bytes(), 10**7, 10**7)


def test_a_crop_is_what_the_service_would_cut(celeba: Path, prepared: Path, detector: FaceDetector) -> None:
    done = load_prepared(prepared)
    manifest = load_embedder_manifest(MODELS / "dlib-resnet")
    assert done.crops.shape == (len(celeba_photos(celeba)), 150, 150, 3)
    assert [row.photo for row in done.rows] == celeba_photos(celeba)
    indices = done.where(Role.CLASS, Role.VALIDATION)
    assert len(indices) == 10
    for index in indices:
        image = image_of(celeba, done.rows[index].photo)
        (face,) = detector.detect(image)
        expected = align(image, face.landmarks, manifest.template.points, 150)
        np.testing.assert_array_equal(done.crops[index], expected)
        assert done.rows[index].score == pytest.approx(face.detection_score, abs=1e-6)


def test_tight_photos_are_padded_and_without_a_face_they_get_the_fixed_landmarks(
    celeba: Path, prepared: Path, detector: FaceDetector
) -> None:
    done = load_prepared(prepared)
    template = load_embedder_manifest(MODELS / "dlib-resnet").template.points
    ways = []
    for index in done.where(Role.QUERY, Role.DISTRACTOR):
        row = done.rows[index]
        wide = np.pad(image_of(celeba, row.photo), ((40, 40), (40, 40), (0, 0)), mode="edge")
        faces = detector.detect(wide)
        landmarks = faces[0].landmarks if faces else FALLBACK + 40
        np.testing.assert_array_equal(done.crops[index], align(wide, landmarks, template, 150))
        assert row.acquired == (Acquired.DETECTOR if faces else Acquired.FALLBACK)
        ways.append(row.acquired)
    assert Acquired.FALLBACK in ways
    assert Acquired.DETECTOR in ways


def test_a_photo_without_a_face_is_counted_and_left_out(prepared: Path) -> None:
    done = load_prepared(prepared)
    assert done.counts(Role.FURTHER) == Counts(detector=1, none=1)
    assert len(done.where(Role.FURTHER)) == 1
    (missed,) = [i for i, row in enumerate(done.rows) if row.acquired is Acquired.NONE]
    assert not done.crops[missed].any()
    assert done.counts(*Role).photos == len(done.rows)
    assert not (prepared / PROGRESS).exists()


def test_training_crops_have_the_embedders_crop_in_their_middle(celeba: Path, prepared: Path, tmp_path: Path) -> None:
    photos = celeba_photos(celeba, [Role.VALIDATION])
    cut(photos, celeba, tmp_path / "wide", target=Target.for_training(MODELS / "dlib-resnet"))
    margin = (TRAINING_SIZE - TRAINING_VIEW) // 2
    whole = load_prepared(prepared)
    crops = {row.photo: crop for row, crop in zip(whole.rows, whole.crops, strict=True)}
    wide = load_prepared(tmp_path / "wide")
    assert wide.crops.shape[1:] == (TRAINING_SIZE, TRAINING_SIZE, 3)
    for row, crop in zip(wide.rows, wide.crops, strict=True):
        small = cv2.resize(crops[row.photo], (TRAINING_VIEW, TRAINING_VIEW), interpolation=cv2.INTER_AREA)
        difference = crop[margin:-margin, margin:-margin].astype(float) - small
        # A shift by half a pixel would be seen here.
        assert np.abs(difference).mean() < 2.5


def test_the_other_alignment_and_tight_cuts_of_large_photos(
    celeba: Path, tmp_path: Path, detector: FaceDetector
) -> None:
    photos = celeba_photos(celeba, [Role.VALIDATION])
    template = load_embedder_manifest(MODELS / "dlib-resnet").template.points
    cut(photos, celeba, tmp_path / "a", alignment=Alignment.LEAST_SQUARES)
    image = image_of(celeba, photos[0])
    landmarks = detector.detect(image)[0].landmarks
    expected = align(image, landmarks, template, 150, transform=least_squares_transform)
    np.testing.assert_array_equal(load_prepared(tmp_path / "a").crops[0], expected)

    cut(photos, celeba, tmp_path / "b", like_queries=True)
    wide = np.pad(image[75:175, 44:127], ((40, 40), (40, 40), (0, 0)), mode="edge")
    faces = detector.detect(wide)
    expected = align(wide, faces[0].landmarks if faces else FALLBACK + 40, template, 150)
    np.testing.assert_array_equal(load_prepared(tmp_path / "b").crops[0], expected)


@pytest.fixture
def people(tmp_path: Path, portraits: dict[str, list[Image]]) -> Path:
    """120 photos of three people, one folder each, a file that is no photo among them."""
    data = tmp_path / "people"
    for person, images in portraits.items():
        (data / person).mkdir(parents=True)
        for number in range(40):
            Pillow.fromarray(images[number % len(images)]).save(data / person / f"{number:02}.png")
    (data / "biden" / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    return data


def test_killed_at_any_time_it_goes_on_and_ends_with_the_same_bytes(people: Path, tmp_path: Path) -> None:
    photos = folder_photos(people, Role.FURTHER)
    summary = cut(photos, people, tmp_path / "whole", layout=Layout.FOLDERS, jobs=2)
    assert summary.acquired == {Role.FURTHER: Counts(detector=120, none=1)}

    broken = tmp_path / "broken"
    command = f"""
import training.prepare
training.prepare._BATCH = 3
from training.cli import app
app(["prepare", "--data", {str(people)!r}, "--out", {str(broken)!r}, "--layout", "folders", "--role", "further",
     "--model", {str(MODELS / "dlib-resnet")!r}, "--detector", {str(MODELS / "centerface")!r}])
"""
    for lines in (3, 8):
        process = subprocess.Popen([sys.executable, "-c", command], cwd=ROOT, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            if (broken / PROGRESS).exists() and (broken / PROGRESS).read_bytes().count(b"\n") >= lines:
                os.kill(process.pid, signal.SIGKILL)
                break
            time.sleep(0.001)
        assert process.wait(60) == -signal.SIGKILL
        with pytest.raises(DataError, match="unfinished"):
            load_prepared(broken)
        # What a loss of power may leave: a line half written, crops of a batch that was not recorded.
        with (broken / PROGRESS).open("a") as file:
            file.write('[["detector", 0.9')
        np.load(broken / CROPS, mmap_mode="r+")[-4:] = 77

    finished = len((broken / PROGRESS).read_text().splitlines()) - 2
    assert 0 < finished * 3 < len(photos)
    cut(photos, people, broken, layout=Layout.FOLDERS)
    for name in FILES:
        assert (broken / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not (broken / PROGRESS).exists()


def test_what_is_finished_is_not_done_again(celeba: Path, tmp_path: Path) -> None:
    photos = celeba_photos(celeba, [Role.FURTHER])
    first = cut(photos, celeba, tmp_path)
    stamps = [(tmp_path / name).stat().st_mtime_ns for name in FILES]
    assert cut(photos, celeba, tmp_path) == first
    assert [(tmp_path / name).stat().st_mtime_ns for name in FILES] == stamps


def test_a_folder_that_was_begun_with_other_settings_is_left_alone(celeba: Path, tmp_path: Path) -> None:
    photos = celeba_photos(celeba, [Role.FURTHER])
    cut(photos, celeba, tmp_path)
    with pytest.raises(DataError, match="other settings"):
        cut(photos, celeba, tmp_path, alignment=Alignment.LEAST_SQUARES)
    with pytest.raises(DataError, match="other settings"):
        cut(photos[:1], celeba, tmp_path)
    heading = json.loads((tmp_path / SUMMARY).read_text())["settings"] | {"photos": 7}
    (tmp_path / SUMMARY).unlink()
    (tmp_path / PROGRESS).write_text(json.dumps(heading) + "\n")
    with pytest.raises(DataError, match="other settings"):
        cut(photos, celeba, tmp_path)


def test_two_cannot_work_in_one_folder(celeba: Path, tmp_path: Path) -> None:
    with filelock.FileLock(tmp_path / ".lock"), pytest.raises(DataError, match="another process"):
        cut(celeba_photos(celeba, [Role.FURTHER]), celeba, tmp_path)


def test_a_missing_photo_is_named(celeba: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jpg cannot be read"):
        cut([Photo("gone.jpg", "1", Role.FURTHER)], celeba, tmp_path)


def test_damage_is_noticed(celeba: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no crops"):
        load_prepared(tmp_path)
    cut(celeba_photos(celeba, [Role.FURTHER]), celeba, tmp_path)
    index = (tmp_path / INDEX).read_text()
    (tmp_path / INDEX).write_text(index.replace("further", "calibration"))
    with pytest.raises(DataError, match="does not hold"):
        load_prepared(tmp_path)
    (tmp_path / INDEX).write_text(index.replace("further", "nobody"))
    with pytest.raises(DataError, match="damaged"):
        load_prepared(tmp_path)
    (tmp_path / INDEX).write_text(index)
    np.save(tmp_path / CROPS, np.zeros((2, 112, 112, 3), np.uint8))
    with pytest.raises(DataError, match="does not hold"):
        load_prepared(tmp_path)


def face(x: float, y: float, side: float) -> Face:
    box = Box(x - side / 2, y - side / 2, side, side)
    return Face(box, np.zeros((5, 2), np.float32), 0.9, Quality(side, 1.0, 0.0, 0.0, 0.0))


def test_of_several_faces_the_central_one_of_those_that_are_large_enough() -> None:
    large, central, small = face(30, 100, 60), face(95, 110, 40), face(89, 109, 20)
    assert pick_face([large, central, small], 178, 218) is central
    assert pick_face([large, small], 178, 218) is large
    assert pick_face([], 178, 218) is None
