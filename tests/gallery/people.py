"""Made-up embeddings that lie as those of a face network do, and the plain way to search them."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from service.domain import IndexEntries
from service.gallery.faiss_gallery import FaissGallery

DIMENSION = 64


class Oracle:
    """What the index should hold, and the plain way to search it."""

    def __init__(self) -> None:
        self.held: dict[int, tuple[int, NDArray[np.float32]]] = {}

    def add(self, new: IndexEntries) -> None:
        for row_id, subject_id, vector in zip(new.row_ids, new.subject_ids, new.embeddings, strict=True):
            self.held[int(row_id)] = (int(subject_id), vector)

    def subjects(self, probe: NDArray[np.float32], top_k: int) -> list[tuple[int, int, float]]:
        best: dict[int, tuple[int, int, float]] = {}
        for row_id, subject_id, similarity in self.faces(probe, len(self.held)):
            best.setdefault(subject_id, (row_id, subject_id, similarity))
        return list(best.values())[:top_k]

    def faces(self, probe: NDArray[np.float32], top_k: int) -> list[tuple[int, int, float]]:
        if not self.held:
            return []
        rows = list(self.held)
        similarities = np.stack([self.held[row][1] for row in rows]) @ probe
        order = np.argsort(-similarities, kind="stable")[:top_k]
        return [(rows[i], self.held[rows[i]][0], float(similarities[i])) for i in order]


def unit(rng: np.random.Generator, count: int) -> NDArray[np.float32]:
    """Embeddings ``float32[N, D]`` of people who are about 0.8 alike."""
    vectors = (2.0 + rng.normal(size=(count, DIMENSION))).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def entries(rng: np.random.Generator, row_ids: list[int], subjects: list[int], gallery: str = "g") -> IndexEntries:
    return IndexEntries(gallery, np.array(row_ids, np.int64), np.array(subjects, np.int64), unit(rng, len(row_ids)))


def assert_equal(
    index: FaissGallery, oracle: Oracle, rng: np.random.Generator, gallery: str = "g", within: float = 1e-5
) -> None:
    """Fail unless searches find what the oracle finds, with similarities that differ by ``within`` at most."""
    subjects = {subject_id for subject_id, _ in oracle.held.values()}
    assert index.sizes(gallery) == (len(subjects), len(oracle.held))
    probes = unit(rng, 5)
    for top_k in (1, 3, 10_000):
        by_subject = index.search_subjects(gallery, probes, top_k)
        assert (by_subject.subjects, by_subject.templates) == (len(subjects), len(oracle.held))
        by_face = index.search_faces(gallery, probes, top_k)
        for number, probe in enumerate(probes):
            everything = {row_id: similarity for row_id, _, similarity in oracle.faces(probe, len(oracle.held))}
            for hits, expected in (
                (by_subject.hits[number], oracle.subjects(probe, top_k)),
                (by_face[number], oracle.faces(probe, top_k)),
            ):
                # Rounding may exchange two that are equally similar, so ranks are compared by similarity.
                assert [hit.similarity for hit in hits] == pytest.approx([item[2] for item in expected], abs=within)
                assert len({hit.row_id for hit in hits}) == len(hits)
                for hit in hits:
                    assert hit.subject_id == oracle.held[hit.row_id][0]
                    assert hit.similarity == pytest.approx(everything[hit.row_id], abs=within)
            assert len({hit.subject_id for hit in by_subject.hits[number]}) == min(top_k, len(subjects))
