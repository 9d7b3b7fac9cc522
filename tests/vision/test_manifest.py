"""What ends start-up: a manifest or a network that is not what it should be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from service.domain import LANDMARK_NAMES
from service.vision.manifest import (
    DetectorManifest,
    EmbedderManifest,
    ModelError,
    load_detector_manifest,
    load_embedder_manifest,
    load_manifest,
    sha256_of,
    write_manifest,
)

MODELS = Path(__file__).parents[2] / "models"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound embedder's folder, but for the network itself, which is any file here."""
    (tmp_path / "model.onnx").write_bytes(b"some network")
    (tmp_path / "LICENSE.txt").write_text("some licence")
    manifest = json.loads((MODELS / "dlib-resnet" / "manifest.json").read_text())
    manifest["sha256"] = sha256_of(tmp_path / "model.onnx")
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    return tmp_path


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_the_bundled_embedder() -> None:
    manifest = load_embedder_manifest(MODELS / "dlib-resnet")
    assert (manifest.model_id, manifest.dimension, manifest.input.size) == ("dlib-resnet", 128, 150)
    assert manifest.input.mean == (122.782, 117.001, 104.298)
    assert manifest.input.divisor == (256, 256, 256)
    assert (manifest.license.spdx, manifest.license.commercial_use) == ("CC0-1.0", True)
    assert "7485" in manifest.provenance.trained_on


def test_the_bundled_detector() -> None:
    manifest = load_detector_manifest(MODELS / "centerface")
    assert (manifest.model_id, manifest.input.multiple, manifest.output.stride) == ("centerface", 32, 4)
    assert (manifest.license.spdx, manifest.license.commercial_use) == ("MIT", True)
    assert "Copyright (c) 2019 Star-Clouds" in (MODELS / "centerface" / manifest.license.file).read_text()


@pytest.mark.parametrize("model_id", ["centerface", "dlib-resnet"])
def test_a_manifest_is_written_as_it_was_read(model_id: str, tmp_path: Path) -> None:
    write_manifest(load_manifest(MODELS / model_id), tmp_path)
    assert (tmp_path / "manifest.json").read_bytes() == (MODELS / model_id / "manifest.json").read_bytes()


def test_template_points_are_in_the_order_of_the_domain(folder: Path) -> None:
    template = {name: [number, number + 0.5] for number, name in enumerate(LANDMARK_NAMES)}
    edit(folder, lambda manifest: manifest.update(template=dict(sorted(template.items(), reverse=True))))
    points = load_embedder_manifest(folder).template.points
    assert points.dtype == np.float32
    np.testing.assert_array_equal(points, [[number, number + 0.5] for number in range(5)])


def test_a_folder_that_is_sound_loads(folder: Path) -> None:
    assert isinstance(load_manifest(folder), EmbedderManifest)


def test_one_changed_byte_is_noticed(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(b"some netw0rk")
    with pytest.raises(ModelError, match=r"model\.onnx has SHA-256 [0-9a-f]{64}, but"):
        load_manifest(folder)


@pytest.mark.parametrize("name", ["manifest.json", "model.onnx", "LICENSE.txt"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ModelError, match=name):
        load_manifest(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest.update(surprise=1),
        lambda manifest: manifest["license"].update(surprise=1),
        lambda manifest: manifest.pop("flip"),
        lambda manifest: manifest.pop("kind"),
        lambda manifest: manifest.update(kind="oracle"),
        lambda manifest: manifest.update(kind="detector"),
        lambda manifest: manifest.update(model_id="../other"),
        lambda manifest: manifest.update(file="../other.onnx"),
        lambda manifest: manifest.update(sha256="F" * 64),
        lambda manifest: manifest.update(dimension=0),
        lambda manifest: manifest["input"].update(divisor=[256, 0, 256]),
        lambda manifest: manifest["input"].update(mean=[1, 2]),
        lambda manifest: manifest["input"].update(size=0),
        lambda manifest: manifest["template"].pop("nose"),
        lambda manifest: manifest["template"].update(nose=[float("nan"), 1]),
    ],
)
def test_a_malformed_manifest_is_refused(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    edit(folder, change)
    with pytest.raises(ModelError, match="is not a manifest"):
        load_manifest(folder)


def test_text_that_is_not_json_is_refused(folder: Path) -> None:
    (folder / "manifest.json").write_bytes(b"\xff{")
    with pytest.raises(ModelError, match="is not a manifest"):
        load_manifest(folder)


def test_each_kind_is_asked_for_by_name() -> None:
    with pytest.raises(ModelError, match="holds a detector, not an embedder"):
        load_embedder_manifest(MODELS / "centerface")
    with pytest.raises(ModelError, match="holds an embedder, not a detector"):
        load_detector_manifest(MODELS / "dlib-resnet")
    assert isinstance(load_manifest(MODELS / "centerface"), DetectorManifest)


def test_a_manifest_does_not_change(folder: Path) -> None:
    manifest = load_embedder_manifest(folder)
    with pytest.raises(ValidationError, match="frozen"):
        manifest.flip = False  # type: ignore[misc]
