"""A gallery belongs to the model that it was enrolled with, until `vultus reembed` moves it over."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from service.settings import BUNDLED_MODELS
from tests.support import Server, photo, vultus

SIZE, DIMENSION = 112, 48
NOTICE = "For these tests alone."


def tiny_embedder(folder: Path) -> None:
    """A real embedder of a few kilobytes: the crop averaged to 8×8, its mean taken off, projected at random."""
    folder.mkdir()
    weights = np.random.default_rng(0).normal(size=(3 * 8 * 8, DIMENSION)).astype(np.float32)
    weights -= weights.mean(axis=0)
    graph = helper.make_graph(
        [
            helper.make_node("AveragePool", ["crop"], ["small"], kernel_shape=[14, 14], strides=[14, 14]),
            helper.make_node("Flatten", ["small"], ["flat"]),
            helper.make_node("MatMul", ["flat", "weights"], ["embedding"]),
        ],
        "tiny",
        [helper.make_tensor_value_info("crop", TensorProto.FLOAT, ["n", 3, SIZE, SIZE])],
        [helper.make_tensor_value_info("embedding", TensorProto.FLOAT, ["n", DIMENSION])],
        [numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "model.onnx")
    sha256 = hashlib.sha256((folder / "model.onnx").read_bytes()).hexdigest()
    (folder / "LICENSE.txt").write_text("none needed\n")
    points = [[38.3, 51.7], [73.5, 51.7], [56.0, 71.7], [41.5, 92.4], [70.7, 92.4]]
    names = ("left_eye", "right_eye", "nose", "mouth_left", "mouth_right")
    manifest: dict[str, Any] = {
        "model_id": "tiny",
        "kind": "embedder",
        "sha256": sha256,
        "license": {"spdx": "LicenseRef-tests", "file": "LICENSE.txt", "commercial_use": False, "notice": NOTICE},
        "provenance": {
            "author": "the tests",
            "source": "made here",
            "source_sha256": "0" * 64,
            "trained_on": "nothing",
            "command": "pytest",
        },
        "input": {"name": "crop", "size": SIZE, "mean": [127.5] * 3, "divisor": [127.5] * 3},
        "template": dict(zip(names, points, strict=True)),
        "dimension": DIMENSION,
        "flip": False,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    calibration = {
        "model_id": "tiny",
        "model_sha256": sha256,
        "source": "none",
        "terms": "none",
        "identities": 2,
        "images": 2,
        "genuine_pairs": 1,
        "impostor_pairs": 1000,
        "supported_fmr": 0.001,
        "smallest_fmr": 0.0001,
        "smallest_fpir": 0.001,
        "fmr": [1.0, 0.1, 0.001],
        "threshold": [-1.0, 0.5, 0.97],
        "low": [-1.0, 0.5, 0.97],
        "high": [-1.0, 0.5, 0.97],
        "templates": [1],
        "effective": [1.0],
        "spread": 1.0,
        "slope": 10.0,
        "intercept": -5.0,
    }
    (folder / "calibration.json").write_text(json.dumps(calibration))


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    shutil.copytree(BUNDLED_MODELS, folder)
    tiny_embedder(folder / "tiny")
    return folder


def test_reembed_moves_a_gallery_to_another_model_and_back(tmp_path: Path, models: Path) -> None:
    data, where = tmp_path / "data", {"VULTUS_MODELS_DIR": str(models)}
    other = where | {"VULTUS_MODEL": "tiny"}
    with Server(data, **where) as server:
        server.enroll("A", "obama.jpg", "obama2.jpg", metadata='{"n": 1}')
        server.enroll("B", "biden.jpg")
        face_ids = [face["face_id"] for face in server.client.get("/subjects/A").json()["faces"]]
        before = server.identify("obama3.jpg")

    image = {"image": ("photo", photo("obama3.jpg"))}
    with Server(data, **other) as server:
        told = server.client.get("/model").json()
        assert (told["commercial_use"], told["notice"], told["trained_on"]) == (False, NOTICE, "nothing")
        assert [NOTICE in line and "nothing" in line for line in server.log.read_text().splitlines()].count(True) == 1
        for call in (
            {"url": "/identify", "files": image},
            {"url": "/enroll", "data": {"subject": "C"}, "files": {"images": ("photo", photo("astronaut.png"))}},
            {"url": "/search-similar", "files": image},
            {"url": "/search-similar", "json": {"face_id": face_ids[0]}},
            {"url": "/search-unknown", "files": {"images": ("photo", photo("obama3.jpg"))}},
            {"url": "/verify", "data": {"subject": "A"}, "files": {"image_a": ("photo", photo("obama3.jpg"))}},
            {"url": "/operating-points", "method": "GET"},
        ):
            answer = server.client.request(**{"method": "POST"} | call)
            assert (answer.status_code, answer.json()["code"]) == (409, "model_mismatch"), call["url"]
        # What needs no comparison still works, other galleries do too.
        assert server.client.get("/subjects/A").status_code == 200
        server.client.post("/galleries", json={"gallery": "new"}).raise_for_status()
        assert server.enroll("A", "obama.jpg", gallery="new")["model_id"] == "tiny"

    moved = vultus("reembed", data_dir=data, **other)
    assert moved.returncode == 0, moved.stderr
    assert "3 faces moved to tiny" in moved.stdout
    with Server(data, **other) as server:
        body = server.identify("obama.jpg")
        assert body["model_id"] == "tiny" and body["gallery_size"] == 2
        candidate = body["faces"][0]["candidates"][0]
        # The kept crop gives nearly the vector that the photo gives.
        assert candidate["subject"] == "A" and candidate["similarity"] > 0.99
        subject = server.client.get("/subjects/A").json()
        assert [face["face_id"] for face in subject["faces"]] == face_ids
        assert subject["metadata"] == {"n": 1}

    assert vultus("reembed", data_dir=data, **where).returncode == 0
    with Server(data, **where) as server:
        after = server.identify("obama3.jpg")["faces"][0]
    assert after["subject"] == "A"
    assert after["candidates"][0]["similarity"] == pytest.approx(
        before["faces"][0]["candidates"][0]["similarity"], abs=0.01
    )


def test_faces_without_a_kept_crop_stay_and_are_counted(tmp_path: Path, models: Path) -> None:
    data, where = tmp_path / "data", {"VULTUS_MODELS_DIR": str(models)}
    other = where | {"VULTUS_MODEL": "tiny"}
    with Server(data, VULTUS_KEEP_CROPS="false", **where) as server:
        server.enroll("A", "obama.jpg")
    moved = vultus("reembed", data_dir=data, **other)
    assert moved.returncode == 1
    assert "1 faces were enrolled without keeping crops" in moved.stderr
    with Server(data, **other) as server:
        assert server.client.get("/operating-points").json()["code"] == "model_mismatch"
        assert server.client.delete("/subjects/A").status_code == 204
        server.enroll("A", "obama.jpg")


@pytest.mark.parametrize(
    ("name", "damage", "said"),
    [
        ("model.onnx", b"changed", "sha-256"),
        ("manifest.json", b"{}", "manifest.json"),
        ("calibration.json", b"{}", "calibration.json"),
    ],
)
def test_damaged_models_are_not_served(tmp_path: Path, models: Path, name: str, damage: bytes, said: str) -> None:
    (models / "dlib-resnet" / name).write_bytes(damage)
    done = vultus("serve", data_dir=tmp_path / "data", VULTUS_MODELS_DIR=str(models), VULTUS_PORT="0")
    assert done.returncode == 2
    assert said in done.stderr.lower()


def test_an_unknown_model_is_said_with_those_there_are(tmp_path: Path) -> None:
    done = vultus("serve", data_dir=tmp_path / "data", VULTUS_MODEL="nothing", VULTUS_PORT="0")
    assert done.returncode == 2 and "dlib-resnet" in done.stderr
