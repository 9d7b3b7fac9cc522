"""Exported networks answer as torch does and are loaded as the service loads them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from service.vision.embedder import Embedder
from tests.training.test_train import config, learn
from training.augment import views
from training.data import DataError, Layout, Role
from training.export import PARITY, export
from training.prepare import load_prepared
from training.train import Lesson, load_final, save_final
from training.validation import embed

DLIB = Path(__file__).resolve().parents[2] / "models" / "dlib-resnet"


@pytest.fixture(scope="module")
def final(learnable: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    return learn(config(folder, steps=20), [learnable], folder / "tiny", progress=False)


def test_the_service_embeds_as_torch_does(learnable, final, tmp_path):
    written = export(final, tmp_path / "resnext-tiny", template=DLIB, crops=learnable)
    assert written.angle < PARITY
    embedder = Embedder.load(tmp_path / "resnext-tiny")
    embedder.warm_up()
    manifest = embedder.manifest
    assert manifest.model_id == "resnext-tiny"
    assert not manifest.license.commercial_use
    assert "CelebA" in manifest.provenance.trained_on
    assert manifest.template.left_eye[0] == pytest.approx((47.1 + 0.5) * 32 / 150 - 0.5, abs=1e-4)
    prepared = load_prepared(learnable)
    indices = np.arange(7)
    crops = views(torch.from_numpy(prepared.crops[indices].copy()), 32).round().to(torch.uint8).permute(0, 2, 3, 1)
    theirs = embedder.embed(np.ascontiguousarray(crops.numpy()))
    # Through bfloat16, and without rounding the crops to whole grey levels.
    ours = torch.nn.functional.normalize(embed(load_final(final)[0].backbone, prepared, indices, 32)).numpy()
    assert (ours * theirs).sum(axis=1).min() > 0.999


def test_the_manifest_tells_of_every_lesson(final, tmp_path):
    finished = load_final(final)
    more = [
        Lesson(layout=Layout.UTKFACE, role=Role.UNLABELLED, teacher="dlib-resnet"),
        Lesson(layout=Layout.FOLDERS, role=Role.FURTHER, teacher=None),
    ]
    save_final(tmp_path / "final.pt", finished._replace(lessons=(*finished.lessons, *more)))
    manifest = export(tmp_path / "final.pt", tmp_path / "m", template=DLIB).manifest
    told = manifest.provenance.trained_on
    assert told.startswith("CelebA-500's official training split (500 people), four fifths of UTKFace, without names, ")
    assert "photos of its maker's own; the embeddings of dlib-resnet as targets." in told
    assert manifest.license.notice.startswith("Trained on CelebA and UTKFace: for non-commercial research only")


def test_int8_is_smaller_and_close(learnable, final, tmp_path):
    plain = export(final, tmp_path / "plain", template=DLIB, crops=learnable)
    small = export(final, tmp_path / "small", template=DLIB, crops=learnable, int8=True)
    assert small.megabytes < 0.4 * plain.megabytes
    assert PARITY < small.angle < 0.5
    assert Embedder.load(tmp_path / "small").embed(np.zeros((3, 32, 32, 3), np.uint8)).shape == (3, 32)


def test_what_is_missing_is_told(final, tmp_path):
    with pytest.raises(DataError, match="--crops"):
        export(final, tmp_path / "x", template=DLIB, int8=True)
    with pytest.raises(DataError, match="cannot be read"):
        export(tmp_path / "nothing.pt", tmp_path / "x", template=DLIB)
