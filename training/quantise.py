"""An embedder in 8-bit integers: a quarter of the size, and faster where the CPU multiplies them (VNNI and like it)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from service.vision.embedder import Embedder
from service.vision.manifest import EmbedderManifest, sha256_of, write_manifest
from training.calibrate import embed, require_crops_of
from training.data import DataError, Role
from training.prepare import load_prepared

NETWORK = "model.onnx"

SEEN = 256
"""Crops on which the ranges of the activations are seen."""

COMPARED = 256
"""Other crops on which the result is compared with the original."""

_BATCH = 16
_SEED = 0


@dataclass(frozen=True)
class Quantised:
    """What was written. ``similarity``: mean and smallest cosine of both networks' embeddings of one crop."""

    manifest: EmbedderManifest
    megabytes: float
    similarity: tuple[float, float]


def require_own_folder(out: Path, model: Path) -> None:
    """Raise :class:`~training.data.DataError` if what goes to ``out`` would replace the ``model`` it is made of."""
    if out.resolve() == model.resolve():
        raise DataError(f"{out} is the model itself: the new one needs a folder, and a name, of its own")


def quantise(model: Path, out: Path, crops: Path) -> Quantised:
    """Write the folder ``out``, the embedder ``model`` in 8-bit integers. Its name is the new ``model_id``.

    ``crops``: folder that :func:`training.prepare.prepare` has filled for ``model``, with people of role ``further`` or
    ``class``: the ranges must not be seen on those who calibrate or judge the result. The licence goes along, for the
    weights are the same work. The same files give the same bytes.

    Raises :class:`~training.data.DataError` if the crops are another embedder's or too few, or if ``out`` is ``model``;
    :class:`~service.vision.manifest.ModelError` if a model is unsound.
    """
    require_own_folder(out, model)
    embedder = Embedder.load(model)
    prepared = load_prepared(crops)
    require_crops_of(prepared, embedder)
    usable = prepared.where(Role.CLASS, Role.FURTHER)
    if len(usable) < 2 * _BATCH:
        raise DataError(f"{crops} has {len(usable)} faces of people of role further or class; it takes {2 * _BATCH}")
    chosen = np.random.default_rng(_SEED).permutation(usable)[: SEEN + COMPARED]
    seen, compared = np.sort(chosen[: min(SEEN, len(chosen) // 2)]), np.sort(chosen[min(SEEN, len(chosen) // 2) :])
    out.mkdir(parents=True, exist_ok=True)
    manifest = embedder.manifest
    with TemporaryDirectory(dir=out) as work:
        small = Path(work) / NETWORK
        inputs = (
            embedder.prepared(np.asarray(prepared.crops[part]))
            for part in np.array_split(seen, -(-len(seen) // _BATCH))
        )
        quantise_network(model / manifest.file, small, manifest.input.name, inputs)
        small.replace(out / NETWORK)
    shutil.copyfile(model / manifest.license.file, out / manifest.license.file)
    provenance = manifest.provenance.model_copy(
        update={
            "source": f"{manifest.model_id} ({manifest.provenance.source}), quantised",
            "source_sha256": manifest.sha256,
            "command": f"vultus-train quantise --model models/{manifest.model_id} --out models/{out.name}",
        }
    )
    quantised = manifest.model_copy(
        update={
            "model_id": out.name,
            "file": NETWORK,
            "sha256": sha256_of(out / NETWORK),
            "provenance": provenance,
        }
    )
    write_manifest(quantised, out)
    similarity = (
        embed(embedder, prepared, compared, progress=False)
        * embed(Embedder.load(out), prepared, compared, progress=False)
    ).sum(axis=1)
    return Quantised(
        quantised, (out / NETWORK).stat().st_size / 1e6, (float(similarity.mean()), float(similarity.min()))
    )


def quantise_network(network: Path, out: Path, name: str, inputs: Iterator[NDArray[np.float32]]) -> None:
    """Write ``network`` with static ranges, weights by channel, activations by tensor, to ``out``.

    ``name``: of its one input. ``inputs``: batches of it, on which the ranges are seen.

    Unsigned activations and signed weights are what ONNX Runtime has fast kernels for, and a zero point of 0 swallows
    the ReLUs. Smallest and largest value as range: percentile and entropy gave the bundled embedder no better TPR.
    Weights use 7 of the 8 bits: x86 processors without VNNI add two products in 16 bits, which 8 would overflow, and a
    calibration must hold on every processor.
    """
    with TemporaryDirectory(dir=out.parent) as work:
        plain = Path(work) / "plain.onnx"
        quant_pre_process(str(network), str(plain), skip_symbolic_shape=True)
        quantize_static(
            str(plain),
            str(out),
            _Reader(name, inputs),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            reduce_range=True,
        )


class _Reader(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, name: str, inputs: Iterator[NDArray[np.float32]]) -> None:
        self._name = name
        self._inputs = inputs

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        batch = next(self._inputs, None)
        return None if batch is None else {self._name: np.ascontiguousarray(batch)}
