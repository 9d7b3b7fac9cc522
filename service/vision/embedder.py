"""From aligned crops to embeddings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.vision.manifest import EmbedderManifest, ModelError, load_embedder_manifest
from service.vision.onnx import OnnxModel

_TINY = np.finfo(np.float32).tiny


class Embedder:
    """A face network with the preparation that its manifest asks for. Safe to use from several threads."""

    def __init__(self, manifest: EmbedderManifest, network: OnnxModel) -> None:
        expected = (None, 3, manifest.input.size, manifest.input.size)
        if network.inputs != {manifest.input.name: expected}:
            raise ModelError(f"{manifest.model_id}: network takes {network.inputs}, manifest says otherwise")
        if list(network.outputs.values()) != [(None, manifest.dimension)]:
            raise ModelError(f"{manifest.model_id}: network gives {network.outputs}, manifest says otherwise")
        self._manifest = manifest
        self._network = network
        self._mean = np.array(manifest.input.mean, dtype=np.float32)[:, None, None]
        self._divisor = np.array(manifest.input.divisor, dtype=np.float32)[:, None, None]

    @classmethod
    def load(cls, folder: Path, threads: int = 1) -> Embedder:
        """The embedder of ``models/<model_id>``, on at most ``threads`` cores.

        Raises :class:`~service.vision.manifest.ModelError` if the folder is not a sound embedder: see
        :func:`~service.vision.manifest.load_manifest`, or input and output do not fit the manifest.
        """
        manifest = load_embedder_manifest(folder)
        return cls(manifest, OnnxModel(folder / manifest.file, threads))

    @property
    def manifest(self) -> EmbedderManifest:
        """What ``manifest.json`` says; alignment takes crop size and template from it."""
        return self._manifest

    @property
    def network(self) -> OnnxModel:
        """The network itself, without preparation."""
        return self._network

    @property
    def model_id(self) -> str:
        """The name under which templates of this network are kept."""
        return self._manifest.model_id

    @property
    def dimension(self) -> int:
        """D, the length of an embedding."""
        return self._manifest.dimension

    def embed(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Embeddings ``float32[N, D]``, L2-normalised, of aligned crops ``uint8[N, S, S, 3]``, RGB.

        All N crops are one batch, and memory grows with N. N = 0 gives ``float32[0, D]``. Raises ValueError
        if the array is of another shape or type.
        """
        batch = self.prepared(crops)
        if len(crops) == 0:
            return np.empty((0, self.dimension), dtype=np.float32)
        (vectors,) = self._network.run({self._manifest.input.name: batch})
        if self._manifest.flip:
            vectors = vectors[: len(crops)] + vectors[len(crops) :]
        norms = np.sqrt((vectors * vectors).sum(axis=1, keepdims=True))
        # A network that answers with nothing gives a zero vector, similar to nobody, rather than NaN.
        embeddings: NDArray[np.float32] = vectors / np.maximum(norms, _TINY)
        return embeddings

    def prepared(self, crops: NDArray[np.uint8]) -> NDArray[np.float32]:
        """What the network is given for crops ``uint8[N, S, S, 3]``: ``float32[N, 3, S, S]``.

        With flip it is ``float32[2 N, 3, S, S]``: after the N crops their mirror images. Raises ValueError if the array
        is of another shape or type.
        """
        size = self._manifest.input.size
        if crops.ndim != 4 or crops.shape[1:] != (size, size, 3) or crops.dtype != np.uint8:
            raise ValueError(f"crops must be uint8[N, {size}, {size}, 3], not {crops.dtype}{list(crops.shape)}")
        count = len(crops)
        batch = np.empty((2 * count if self._manifest.flip else count, 3, size, size), dtype=np.float32)
        plain = batch[:count]
        plain[:] = crops.transpose(0, 3, 1, 2)
        plain -= self._mean
        plain /= self._divisor
        if self._manifest.flip:
            batch[count:] = plain[..., ::-1]
        return batch

    def warm_up(self) -> None:
        """Embed one grey crop, so that the first request does not pay for the runtime's preparations.

        Raises :class:`~service.vision.manifest.ModelError` if the answer is not a finite embedding.
        """
        size = self._manifest.input.size
        embedding = self.embed(np.full((1, size, size, 3), 127, dtype=np.uint8))
        if embedding.shape != (1, self.dimension) or not np.isfinite(embedding).all():
            raise ModelError(f"{self.model_id}: the network does not answer with a finite vector")
