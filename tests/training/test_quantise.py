"""The embedder in 8-bit integers embeds as the original does, and says what it is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image as Pillow

from service.domain import Image
from service.vision.embedder import Embedder
from service.vision.manifest import load_embedder_manifest
from training.data import DataError, Layout, Role, folder_photos
from training.prepare import Target, load_prepared, prepare
from training.quantise import quantise

MODELS = Path(__file__).resolve().parents[2] / "models"
DLIB = MODELS / "dlib-resnet"


@pytest.fixture(scope="module")
def crops(portraits: dict[str, list[Image]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """45 crops of three people of role further."""
    folder = tmp_path_factory.mktemp("further")
    for person, photos in portraits.items():
        (folder / "photos" / person).mkdir(parents=True)
        for number, photo in enumerate(photos):
            for light in (0.7, 0.85, 1.0):
                picture = Pillow.fromarray((photo * light).astype(np.uint8))
                picture.save(folder / "photos" / person / f"{number}-{light}.png")
    return prepared(folder / "photos", folder / "crops", Role.FURTHER)


def prepared(photos: Path, out: Path, role: Role) -> Path:
    prepare(
        folder_photos(photos, role),
        photos,
        out,
        layout=Layout.FOLDERS,
        target=Target.of(DLIB),
        detector=MODELS / "centerface",
        progress=False,
    )
    return out


def test_it_is_smaller_close_and_of_the_same_licence(crops: Path, tmp_path: Path) -> None:
    written = quantise(DLIB, tmp_path / "small", crops)
    assert 0.99 < written.similarity[1] <= written.similarity[0] < 0.99999
    assert written.megabytes < 0.3 * (DLIB / "model.onnx").stat().st_size / 1e6
    original, manifest = load_embedder_manifest(DLIB), load_embedder_manifest(tmp_path / "small")
    assert manifest == written.manifest
    assert manifest.model_id == "small"
    assert manifest.license == original.license
    assert (tmp_path / "small" / "LICENSE.txt").read_bytes() == (DLIB / "LICENSE.txt").read_bytes()
    assert manifest.provenance.source_sha256 == original.sha256
    assert original.provenance.source in manifest.provenance.source
    assert (manifest.input, manifest.template, manifest.flip) == (original.input, original.template, original.flip)
    again = quantise(DLIB, tmp_path / "again", crops).manifest
    assert again.sha256 == manifest.sha256


def test_no_two_products_overflow_16_bits(crops: Path, tmp_path: Path) -> None:
    quantise(DLIB, tmp_path / "small", crops)
    graph = onnx.load(tmp_path / "small" / "model.onnx").graph
    weights = [numpy_helper.to_array(tensor) for tensor in graph.initializer]
    quantised = [weight for weight in weights if weight.dtype == np.int8 and weight.ndim > 1]
    assert len(quantised) == 30
    assert max(int(np.abs(weight.astype(int)).max()) for weight in quantised) * 2 * 255 < 2**15


def test_the_bundled_one_embeds_as_the_original(crops: Path) -> None:
    faces = np.asarray(load_prepared(crops).crops)
    similarity = Embedder.load(DLIB).embed(faces) * Embedder.load(MODELS / "dlib-resnet-int8").embed(faces)
    assert similarity.sum(axis=1).min() > 0.995


def test_what_cannot_be_used(crops: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="of its own"):
        quantise(DLIB, DLIB, crops)
    judges = prepared(crops.parent / "photos", tmp_path / "judges", Role.VALIDATION)
    with pytest.raises(DataError, match="0 faces of people of role further or class"):
        quantise(DLIB, tmp_path / "small", judges)
    assert not (tmp_path / "small").exists()
