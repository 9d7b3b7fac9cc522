"""Crops that are cut as the service would, and what is counted on them; e2e/test_own_photos.py compares the counts."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from service.domain import Image
from service.evaluation import Plan
from service.vision.point_maps import SCORE_THRESHOLD
from training.data import DataError, Layout, Role, celeba_photos, folder_photos
from training.identification import identification
from training.prepare import INDEX, Acquired, Target, load_prepared, prepare

MODELS = Path(__file__).resolve().parents[2] / "models"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, portraits: dict[str, list[Image]]) -> Path:
    """Two people and a stranger; one photo is empty, one shows two people, one is too small to be enrolled."""
    data = tmp_path_factory.mktemp("photos")
    obama, biden, astronaut = portraits["obama"], portraits["biden"], portraits["astronaut"]
    photos = {
        "obama/1.png": obama[0],
        "obama/2.png": obama[3],
        "obama/3.png": np.concatenate([obama[0], biden[0]], axis=1),
        "biden/1.png": biden[0][::4, ::4],
        "biden/2.png": biden[0],
        "biden/3.png": np.full_like(biden[0], 90),
        "strangers/astronaut.png": astronaut[0],
    }
    for name, image in photos.items():
        (data / name).parent.mkdir(exist_ok=True)
        Pillow.fromarray(image).save(data / name)
    return data


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    out = tmp_path_factory.mktemp("crops")
    prepare(
        folder_photos(folder, Role.VALIDATION),
        folder,
        out,
        layout=Layout.FOLDERS,
        target=Target.of(MODELS / "dlib-resnet"),
        detector=MODELS / "centerface",
        like_service=True,
        progress=False,
    )
    return out


def test_each_photo_says_why_the_service_would_refuse_it(crops: Path) -> None:
    prepared = load_prepared(crops)
    settings = prepared.summary.settings
    assert (settings.like_service, settings.least_score) == (True, SCORE_THRESHOLD)
    assert {row.photo.file: (row.problem, row.acquired) for row in prepared.rows} == {
        "obama/1.png": ("", Acquired.DETECTOR),
        "obama/2.png": ("", Acquired.DETECTOR),
        "obama/3.png": ("several_faces", Acquired.NONE),
        "biden/1.png": ("face_too_small", Acquired.DETECTOR),
        "biden/2.png": ("", Acquired.DETECTOR),
        "biden/3.png": ("no_face", Acquired.NONE),
        "strangers/astronaut.png": ("", Acquired.DETECTOR),
    }


def test_what_was_prepared_is_counted(crops: Path) -> None:
    found = identification(MODELS / "dlib-resnet", crops, Plan(fprs=(0.1,)), progress=False)
    assert (found.people, found.gallery_size, found.stranger_people) == (2, 1, 1)
    assert (found.enrolled.codes, found.probes.codes) == ({"face_too_small": 1}, {"no_face": 1, "several_faces": 1})
    assert found.points[0].fnir.trials == 4
    both = identification(MODELS / "dlib-resnet", crops, Plan(fprs=(0.1,), enrol=2), progress=False)
    assert (both.gallery_size, both.templates) == (2, 3)
    others = identification(MODELS / "dlib-resnet", crops, Plan(fprs=(0.1,)), strangers="biden", progress=False)
    assert (others.people, others.stranger_people) == (2, 3)


def test_a_folder_from_before_there_were_reasons_can_be_read(crops: Path, tmp_path: Path) -> None:
    for path in crops.iterdir():
        if path.name != ".lock":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    rows = [row[:-1] for row in csv.reader((crops / INDEX).open(newline=""))]
    with (tmp_path / INDEX).open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    assert {row.problem for row in load_prepared(tmp_path).rows} == {""}


def test_tight_photos_have_no_fallback_then(celeba: Path, tmp_path: Path) -> None:
    summary = prepare(
        celeba_photos(celeba, [Role.QUERY, Role.DISTRACTOR]),
        celeba,
        tmp_path,
        layout=Layout.CELEBA,
        target=Target.of(MODELS / "dlib-resnet"),
        detector=MODELS / "centerface",
        like_service=True,
        progress=False,
    )
    assert summary.acquired[Role.DISTRACTOR].none >= 1
    assert all(counts.fallback == 0 for counts in summary.acquired.values())
    with pytest.raises(DataError, match="--layout folders --like-service"):
        identification(MODELS / "dlib-resnet", tmp_path, Plan(), progress=False)


def test_crops_of_other_faces_are_refused(prepared: Path) -> None:
    with pytest.raises(DataError, match="--layout folders --like-service"):
        identification(MODELS / "dlib-resnet", prepared, Plan(), progress=False)
