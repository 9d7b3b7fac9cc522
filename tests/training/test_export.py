"""Exported networks answer as torch does and are loaded as the service loads them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from typer.testing import CliRunner

from service.vision.embedder import Embedder
from service.vision.manifest import load_embedder_manifest
from service.vision.onnx import OnnxModel
from tests.training.test_train import config, learn
from training.augment import views
from training.backbone import Backbone, BackboneConfig, unfolded
from training.cli import app
from training.data import DataError, Layout, Role, Split
from training.export import PARITY, export, largest_angle, write_onnx
from training.prepare import load_prepared
from training.train import ORIGIN, Lesson, load_final, load_network, read_config, save_final
from training.train import test as measure
from training.train import test_exported as measure_exported
from training.validation import embed

MODELS = Path(__file__).resolve().parents[2] / "models"
DLIB = MODELS / "dlib-resnet"


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


@pytest.mark.parametrize(("stem", "head"), [("imagenet", "average"), ("small", "average"), ("dense", "places")])
def test_an_exported_network_is_read_back(stem, head, tmp_path):
    torch.manual_seed(0)
    shape = BackboneConfig(layers=(1, 2, 1, 1), groups=4, group_width=4, stem=stem, head=head, dimension=16)
    network = Backbone(shape, 48)
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            for parameter in (module.weight, module.bias, module.running_mean, module.running_var):
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
    write_onnx(network, 48, tmp_path / "model.onnx")
    stored = onnx.load(tmp_path / "model.onnx").graph.initializer
    again = unfolded(shape, 48, {one.name: onnx.numpy_helper.to_array(one) for one in stored}).eval()
    images = torch.randn(3, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(again(images), network.eval()(images), rtol=1e-4, atol=1e-4)
    with pytest.raises((KeyError, RuntimeError)):
        unfolded(shape.model_copy(update={"layers": (1, 1, 1, 2)}), 48, {})


def test_an_exported_folder_stands_for_its_run(learnable, final, tmp_path):
    folder = tmp_path / "resnext-tiny"
    first = export(final, folder, template=DLIB, crops=learnable)
    again = export(folder, tmp_path / "again", template=DLIB, crops=learnable)
    assert again.angle < PARITY
    assert again.manifest.provenance == first.manifest.provenance.model_copy(
        update={"command": again.manifest.provenance.command}
    )
    assert again.manifest.license == first.manifest.license
    assert (tmp_path / "again" / ORIGIN).read_bytes() == (folder / ORIGIN).read_bytes()
    assert largest_angle(load_final(final).learner.backbone, OnnxModel(tmp_path / "again" / "model.onnx"), 32, None) < (
        PARITY
    )
    with pytest.raises(DataError, match="the model itself"):
        export(folder, folder, template=DLIB)
    # Without the statistics of its normalisations it would not be the same network.
    with pytest.raises(DataError, match="frozen_statistics"):
        learn(config(tmp_path, steps=1), [learnable], tmp_path / "more", init=folder, progress=False)
    settings = config(tmp_path, steps=1, frozen_statistics="true")
    more = load_final(learn(settings, [learnable], tmp_path / "more", init=folder, progress=False))
    assert more.config == read_config(settings)
    assert more.lessons == load_final(final).lessons


def test_an_exported_network_is_tested_as_its_run_was(learnable, final, tmp_path):
    export(final, tmp_path / "resnext-tiny", template=DLIB, crops=learnable)
    before = measure(final.parent, learnable).score
    files = sorted(path.name for path in (tmp_path / "resnext-tiny").iterdir())
    after = measure_exported(tmp_path / "resnext-tiny", learnable)
    assert (after.split, after.photos, after.accuracy) == (Split.TEST, 20, None)
    assert after.centroid_accuracy == pytest.approx(before.centroid_accuracy, abs=0.1)
    assert after.tpr == pytest.approx(before.tpr, abs=0.1)
    done = CliRunner().invoke(app, ["test", str(tmp_path / "resnext-tiny"), "--crops", str(learnable)])
    assert done.exit_code == 0, done.output
    assert f"no classifier; nearest centroid {after.centroid_accuracy:.4f}" in done.output
    assert sorted(path.name for path in (tmp_path / "resnext-tiny").iterdir()) == files


def test_the_shipped_network_can_be_learned_from():
    folder = MODELS / "resnext-26"
    network, origin, source, _ = load_network(folder)
    manifest = load_embedder_manifest(folder)
    run = Path(__file__).resolve().parents[2] / source
    assert origin.config.model_dump_json(indent=2) + "\n" == (run / "config.json").read_text(encoding="utf-8")
    digest = hashlib.sha256(origin.config.model_dump_json().encode()).hexdigest()
    assert digest == manifest.provenance.source_sha256
    assert {lesson.teacher for lesson in origin.lessons} == {None, "dlib-resnet", "dlib-resnet-int8"}
    assert largest_angle(network, OnnxModel(folder / manifest.file), manifest.input.size, None) < PARITY


def test_what_cannot_be_learned_from_is_told(learnable, final, tmp_path):
    for folder in (DLIB, MODELS / "resnext-26-int8"):
        with pytest.raises(DataError, match="not exported, in floats"):
            load_network(folder)
    export(final, tmp_path / "tiny", template=DLIB, crops=learnable)
    (tmp_path / "tiny" / ORIGIN).write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="does not hold an exported network"):
        load_network(tmp_path / "tiny")
    export(final, tmp_path / "tiny", template=DLIB, crops=learnable, int8=True)
    with pytest.raises(DataError, match="not exported, in floats"):
        load_network(tmp_path / "tiny")


def test_what_is_missing_is_told(final, tmp_path):
    with pytest.raises(DataError, match="--crops"):
        export(final, tmp_path / "x", template=DLIB, int8=True)
    with pytest.raises(DataError, match="cannot be read"):
        export(tmp_path / "nothing.pt", tmp_path / "x", template=DLIB)
