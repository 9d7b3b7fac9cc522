"""Exact search: every vector is compared."""

from __future__ import annotations

import faiss
import numpy as np
from numpy.typing import NDArray

from service.gallery.cores import cores_for

_LEAST_ROOM = 64


class ExactIndex:
    """Vectors as they are, 4 bytes a value, all in one list. Searches may run at once; a change must be alone."""

    lists = 1

    def __init__(self, dimension: int) -> None:
        self._vectors = np.empty((0, dimension), np.float32)
        self._row_ids = np.empty(0, np.int64)
        self._slots: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._slots)

    def places(self, vectors: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return the list ``int64[N]`` that each of ``float32[N, D]`` belongs to."""
        return np.zeros(len(vectors), np.int64)

    def add(self, row_ids: NDArray[np.int64], vectors: NDArray[np.float32], places: NDArray[np.int64]) -> None:
        """Add ``float32[N, D]`` under ids that are not there. ``places``: what :meth:`places` returned for them."""
        start, end = len(self), len(self) + len(row_ids)
        if end > len(self._row_ids):
            room = max(end, 2 * start, _LEAST_ROOM)
            larger = np.empty((room, self._vectors.shape[1]), np.float32)
            larger[:start] = self._vectors[:start]
            self._vectors = larger
            self._row_ids = np.resize(self._row_ids, room)
        self._vectors[start:end] = vectors
        self._row_ids[start:end] = row_ids
        self._slots.update(zip(row_ids.tolist(), range(start, end), strict=True))

    def remove(self, row_ids: NDArray[np.int64]) -> None:
        """Take out ids that are there."""
        for row_id in row_ids.tolist():
            slot, last = self._slots.pop(row_id), len(self._slots)
            if slot != last:
                self._vectors[slot] = self._vectors[last]
                self._row_ids[slot] = self._row_ids[last]
                self._slots[int(self._row_ids[slot])] = slot
            self._vectors[last] = 0

    def vectors(self, row_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return a copy of the vectors, ``float32[N, D]``, of ids that are there."""
        return self._vectors[[self._slots[row_id] for row_id in row_ids.tolist()]]

    def everything(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return copies of ids ``int64[N]`` and vectors ``float32[N, D]``."""
        return self._row_ids[: len(self)].copy(), self._vectors[: len(self)].copy()

    def search(
        self, probes: NDArray[np.float32], count: int, probed: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return the similarities and ids ``[N, count]`` of the most similar, best first; ``count`` is 1…len.

        ``probed``: lists to look into, of which there is one.
        """
        with cores_for(len(probes)):
            similarities, slots = faiss.knn(probes, self._vectors[: len(self)], count, faiss.METRIC_INNER_PRODUCT)
        return similarities, self._row_ids[slots]
