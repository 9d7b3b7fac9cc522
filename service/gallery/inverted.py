"""Approximate search: vectors of 8 bits a value in lists of neighbours, of which only the nearest are compared.

An inverted file (Sivic and Zisserman 2003; Jégou et al. 2011) with scalar quantisation, as FAISS has it (Douze et al.
2024). Embeddings of faces lie around a common mean and vary in few directions, so the lists are k-means cells (squared
distance, for which the mean does not matter) of their first principal components.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import faiss
import numpy as np
from faiss.contrib.inspect_tools import get_invlist
from numpy.typing import NDArray

from service.gallery.cores import cores_for

PER_LIST = 128
"""Templates for each list when the lists are made; twice as many before they are made anew."""

PROBED = 256
"""Lists that a search looks into. Of a million people's own photos, with 128, one in 25 has another nearest than exact
search; with 256, one in 77, in 1.8 times the time: 3.4 ms at D = 512."""

LEAST_AVERAGED = 8
"""People of whom a list's centre is the average, at least: what is kept of somebody there tells nothing of one."""

_COMPONENTS = 32
_SAMPLED = 32
"""People for each list of whom the centres are made."""
_LEAST_SAMPLED = 2000
_STEPS = 6
_DEVIATIONS = 5.0
"""Standard deviations to either side of each coordinate's mean that 256 codes cover; beyond it they end."""
_SEED = 4711
_ROOM = 1 / 16
"""Room in each list beyond what it holds; without it FAISS would give a full list twice its room."""

PACK_AT = 1 + _ROOM / 2
"""Growth after which the room of the lists is made anew."""


@dataclass(frozen=True)
class Layout:
    """What was learnt of a gallery's people: all averages.

    ``rotation``: ``float32[C, D]`` and ``shift``: ``float32[C]``, a vector's coordinates are ``rotation @ x + shift``.
    ``centres``: ``float32[L, C]``. ``ranges``: ``float32[2, D]``, the lowest value of each coordinate and the width of
    its range, which 256 codes divide evenly. ``templates``: how many the gallery had.
    """

    rotation: NDArray[np.float32]
    shift: NDArray[np.float32]
    centres: NDArray[np.float32]
    ranges: NDArray[np.float32]
    templates: int


def wanted_sample(templates: int) -> int:
    """Return how many people :func:`learnt` wants to see of a gallery of so many templates."""
    return max(_SAMPLED * (templates // PER_LIST), _LEAST_SAMPLED)


def learnt(sample: NDArray[np.float32], templates: int, ranges: NDArray[np.float32] | None) -> Layout:
    """Learn a layout for so many templates from ``float32[S, D]``, one vector each of S people, S ≥ LEAST_AVERAGED.

    ``ranges``: those of the codes that are there already, so that they stay as they are.
    """
    mean = sample.mean(axis=0)
    centred = sample - mean
    if ranges is None:
        deviation = np.maximum(centred.std(axis=0), np.finfo(np.float32).eps)
        ranges = np.stack([mean - _DEVIATIONS * deviation, 2 * _DEVIATIONS * deviation]).astype(np.float32)
    _, vectors = np.linalg.eigh((centred.T @ centred).astype(np.float64))
    rotation = np.ascontiguousarray(vectors[:, ::-1].T[:_COMPONENTS], np.float32)
    points = centred @ rotation.T
    lists = max(min(templates // PER_LIST, len(sample) // (2 * LEAST_AVERAGED)), 1)
    means = faiss.Kmeans(
        points.shape[1], lists, niter=_STEPS, seed=_SEED, min_points_per_centroid=1, max_points_per_centroid=_SAMPLED
    )
    means.train(points)
    _, nearest = means.index.search(points, 1)
    sizes = np.bincount(nearest[:, 0], minlength=lists)
    sums = np.stack([np.bincount(nearest[:, 0], column, lists) for column in points.T], axis=1)
    kept = sizes >= LEAST_AVERAGED
    centres = (sums[kept] / sizes[kept, None]).astype(np.float32)
    return Layout(rotation, (-rotation @ mean).astype(np.float32), centres, ranges, templates)


class InvertedIndex:
    """Vectors in 1 byte a value. Searches may run at once; a change must be alone, but for :meth:`places`.

    Similarities are of the decoded vectors. For the bundled embedder they differ from the true ones by 4e-4 (one
    standard deviation) at D = 128 and by half of that at 512, as the coordinates that are rounded are smaller.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        components, dimension = layout.rotation.shape
        rotation = faiss.LinearTransform(dimension, components, True)
        faiss.copy_array_to_vector(layout.rotation.ravel(), rotation.A)
        faiss.copy_array_to_vector(layout.shift, rotation.b)
        rotation.is_trained = True
        centres = faiss.IndexFlatL2(components)
        centres.add(layout.centres)
        self._quantizer = faiss.IndexPreTransform(rotation, centres)
        self._index = faiss.IndexIVFScalarQuantizer(
            self._quantizer,
            dimension,
            len(layout.centres),
            faiss.ScalarQuantizer.QT_8bit,
            faiss.METRIC_INNER_PRODUCT,
            False,
        )
        faiss.copy_array_to_vector(layout.ranges.ravel(), self._index.sq.trained)
        self._index.is_trained = True
        self._lists: faiss.InvertedLists = self._index.invlists  # type: ignore[assignment]
        self._map()

    def _map(self) -> None:
        self._index.set_direct_map_type(faiss.DirectMap.Hashtable)  # type: ignore[attr-defined]

    def __len__(self) -> int:
        return int(self._index.ntotal)

    @property
    def lists(self) -> int:
        """How many lists there are."""
        return len(self.layout.centres)

    def emptied(self) -> InvertedIndex:
        """Return an empty index of the same layout with room for what this one holds."""
        empty = InvertedIndex(self.layout)
        empty.reserve(np.array([self._lists.list_size(place) for place in range(self.lists)], np.int64))
        return empty

    def reserve(self, sizes: NDArray[np.int64]) -> None:
        """Make room for so many templates, ``int64[L]``, in each list; only while all are empty."""
        for place, size in enumerate(sizes.tolist()):
            # Both: the first allocates exactly so much, the second keeps it.
            self._lists.resize(place, size + int(size * _ROOM) + 1)
            self._lists.resize(place, 0)

    def fill(self, lists: Iterator[tuple[int, NDArray[np.int64], NDArray[np.uint8]]]) -> None:
        """Take in whole lists: their number, ids ``int64[N]`` and codes ``uint8[N, D]`` as :meth:`of_list` has them."""
        self._index.set_direct_map_type(faiss.DirectMap.NoMap)  # type: ignore[attr-defined]
        for place, row_ids, codes in lists:
            self._lists.add_entries(place, len(row_ids), faiss.swig_ptr(row_ids), faiss.swig_ptr(codes))
            self._index.ntotal += len(row_ids)
        self._map()

    def places(self, vectors: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return the list ``int64[N]`` that each of ``float32[N, D]`` belongs to; may run beside anything."""
        with cores_for(len(vectors)):
            _, nearest = self._quantizer.search(vectors, 1)
        return np.ascontiguousarray(nearest[:, 0])

    def add(
        self, row_ids: NDArray[np.int64], vectors: NDArray[np.float32], places: NDArray[np.int64] | None = None
    ) -> None:
        """Add ``float32[N, D]`` under ids that are not there. ``places``: what :meth:`places` returned for them."""
        vectors, row_ids = np.ascontiguousarray(vectors, np.float32), np.ascontiguousarray(row_ids, np.int64)
        places = self.places(vectors) if places is None else places
        with cores_for(len(row_ids)):
            self._index.add_core(len(row_ids), faiss.swig_ptr(vectors), faiss.swig_ptr(row_ids), faiss.swig_ptr(places))

    def remove(self, row_ids: NDArray[np.int64]) -> None:
        """Take ids out; those that are not there are passed over."""
        with cores_for(len(row_ids)):
            self._index.remove_ids(row_ids)  # type: ignore[arg-type]

    def vectors(self, row_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the decoded vectors, ``float32[N, D]``, of ids that are there."""
        found: NDArray[np.float32] = self._index.reconstruct_batch(row_ids)
        return found

    def codes(self, vectors: NDArray[np.float32]) -> NDArray[np.uint8]:
        """Return the codes ``uint8[N, D]`` of vectors ``float32[N, D]``; those of decoded ones stay the same."""
        with cores_for(len(vectors)):
            found: NDArray[np.uint8] = self._index.sq.compute_codes(np.ascontiguousarray(vectors, np.float32))
        return found

    def decoded(self, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Return the vectors ``float32[N, D]`` of codes ``uint8[N, D]``."""
        found: NDArray[np.float32] = self._index.sq.decode(np.ascontiguousarray(codes))
        return found

    def of_list(self, place: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Return copies of the ids ``int64[N]`` and codes ``uint8[N, D]`` of one list."""
        row_ids, codes = get_invlist(self._lists, place)  # type: ignore[no-untyped-call]
        return row_ids, codes

    def search(
        self, probes: NDArray[np.float32], count: int, probed: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Return the similarities and ids ``[N, count]`` of the most similar in ``probed`` lists, best first.

        Where the lists hold fewer than ``count``, the last ids are -1.
        """
        parameters = faiss.SearchParametersIVF(nprobe=probed)  # type: ignore[call-arg]
        with cores_for(len(probes)):
            similarities, row_ids = self._index.search(probes, count, params=parameters)
        return similarities, row_ids


def batches(index: InvertedIndex, size: int) -> Iterator[range]:
    """Yield the lists of an index in runs that together hold about ``size`` templates each."""
    step = max(1, size * index.lists // max(len(index), 1))
    for start in range(0, index.lists, step):
        yield range(start, min(start + step, index.lists))
