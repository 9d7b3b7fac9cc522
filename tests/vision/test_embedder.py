"""The bundled embedder, really run."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from service.vision.embedder import Embedder
from service.vision.manifest import ModelError, load_embedder_manifest
from service.vision.onnx import OnnxModel

FOLDER = Path(__file__).parents[2] / "models" / "dlib-resnet"


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder.load(FOLDER, threads=2)


@pytest.fixture(scope="module")
def crops() -> NDArray[np.uint8]:
    return np.random.default_rng(5).integers(0, 256, (5, 150, 150, 3), dtype=np.uint8)


def raw(crops: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What the network says, with the preparation written out again."""
    prepared = np.stack([(crops[..., i] - mean) / 256 for i, mean in enumerate((122.782, 117.001, 104.298))], 1)
    return OnnxModel(FOLDER / "model.onnx").run({"crops": prepared.astype(np.float32)})[0]


def normalised(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    return vectors / np.sqrt((vectors**2).sum(axis=1, keepdims=True))


def test_it_is_what_its_manifest_says(embedder: Embedder) -> None:
    assert embedder.manifest == load_embedder_manifest(FOLDER)
    assert (embedder.model_id, embedder.dimension) == ("dlib-resnet", 128)


def test_embeddings_have_unit_length(embedder: Embedder, crops: NDArray[np.uint8]) -> None:
    embeddings = embedder.embed(crops)
    assert (embeddings.shape, embeddings.dtype) == ((5, 128), np.float32)
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1, atol=1e-6)


def test_no_crops_give_no_embeddings(embedder: Embedder) -> None:
    embeddings = embedder.embed(np.empty((0, 150, 150, 3), dtype=np.uint8))
    assert (embeddings.shape, embeddings.dtype) == ((0, 128), np.float32)


def test_with_flip_the_two_sides_are_added(embedder: Embedder, crops: NDArray[np.uint8]) -> None:
    both = load_embedder_manifest(FOLDER).model_copy(update={"flip": True})
    flipping = Embedder(both, OnnxModel(FOLDER / "model.onnx"))
    expected = normalised(raw(crops) + raw(crops[:, :, ::-1]))
    np.testing.assert_allclose(flipping.embed(crops), expected, atol=1e-5)
    np.testing.assert_allclose(flipping.embed(crops[:, :, ::-1]), expected, atol=1e-5)


def test_without_flip_the_crop_speaks_alone(crops: NDArray[np.uint8]) -> None:
    one = load_embedder_manifest(FOLDER).model_copy(update={"flip": False})
    plain = Embedder(one, OnnxModel(FOLDER / "model.onnx"))
    np.testing.assert_allclose(plain.embed(crops), normalised(raw(crops)), atol=1e-5)
    assert np.abs(plain.embed(crops) - plain.embed(crops[:, :, ::-1])).max() > 1e-3


def test_an_embedding_does_not_depend_on_its_batch(embedder: Embedder, crops: NDArray[np.uint8]) -> None:
    alone = np.concatenate([embedder.embed(crops[i : i + 1]) for i in range(len(crops))])
    np.testing.assert_allclose(embedder.embed(crops), alone, atol=1e-5)


def test_a_view_of_a_larger_array_is_read_rightly(embedder: Embedder, crops: NDArray[np.uint8]) -> None:
    np.testing.assert_allclose(embedder.embed(crops[::2]), embedder.embed(crops)[::2], atol=1e-5)


def test_the_crops_stay_as_they_are(embedder: Embedder, crops: NDArray[np.uint8]) -> None:
    before = crops.copy()
    embedder.embed(crops)
    np.testing.assert_array_equal(crops, before)


def test_threads_do_not_disturb_each_other(embedder: Embedder, crops: NDArray[np.uint8]) -> None:
    expected = embedder.embed(crops)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(embedder.embed, crops[i % 5 : i % 5 + 1]) for i in range(40)]
    for i, future in enumerate(futures):
        np.testing.assert_allclose(future.result()[0], expected[i % 5], atol=1e-5)


@pytest.mark.parametrize(
    "crops",
    [
        np.zeros((1, 112, 112, 3), dtype=np.uint8),
        np.zeros((150, 150, 3), dtype=np.uint8),
        np.zeros((1, 150, 150, 4), dtype=np.uint8),
        np.zeros((1, 3, 150, 150), dtype=np.uint8),
        np.zeros((1, 150, 150, 3), dtype=np.float32),
    ],
)
def test_crops_of_another_form_are_refused(embedder: Embedder, crops: NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match=r"uint8\[N, 150, 150, 3\]"):
        embedder.embed(crops)


def test_it_warms_up(embedder: Embedder) -> None:
    embedder.warm_up()


class Saying(OnnxModel):
    """The bundled network with its answer replaced by one number throughout."""

    def __init__(self, number: float) -> None:
        super().__init__(FOLDER / "model.onnx")
        self._number = number

    def run(self, inputs: Mapping[str, NDArray[Any]], *, release: bool = False) -> list[NDArray[np.float32]]:
        return [np.full_like(output, self._number) for output in super().run(inputs, release=release)]


def test_a_network_that_gives_no_numbers_does_not_warm_up() -> None:
    with pytest.raises(ModelError, match="finite"):
        Embedder(load_embedder_manifest(FOLDER), Saying(np.nan)).warm_up()


def test_a_zero_vector_stays_zero(crops: NDArray[np.uint8]) -> None:
    assert not Embedder(load_embedder_manifest(FOLDER), Saying(0)).embed(crops).any()


@pytest.mark.parametrize("field", ["dimension", "size", "name"])
def test_a_manifest_that_does_not_fit_the_network_is_refused(field: str) -> None:
    manifest = load_embedder_manifest(FOLDER)
    changes = {
        "dimension": {"dimension": 512},
        "size": {"input": manifest.input.model_copy(update={"size": 112})},
        "name": {"input": manifest.input.model_copy(update={"name": "image"})},
    }
    with pytest.raises(ModelError, match="manifest says otherwise"):
        Embedder(manifest.model_copy(update=changes[field]), OnnxModel(FOLDER / "model.onnx"))


def test_a_detector_is_not_an_embedder() -> None:
    with pytest.raises(ModelError, match="not an embedder"):
        Embedder.load(FOLDER.parent / "centerface", threads=1)


def test_a_file_that_is_no_network_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no network")
    with pytest.raises(ModelError, match="cannot be loaded"):
        OnnxModel(tmp_path / "model.onnx")


def test_a_network_needs_a_thread() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        OnnxModel(FOLDER / "model.onnx", threads=0)
