"""The index against an exact search in NumPy, alone and with eight threads at once."""

from __future__ import annotations

import threading

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

    def subjects(self, probe: NDArray[np.float32], top_k: int) -> list[tuple[int, int, float]]:
        best: dict[int, tuple[int, int, float]] = {}
        for row_id, subject_id, similarity in self.faces(probe, len(self.held)):
            best.setdefault(subject_id, (row_id, subject_id, similarity))
        return list(best.values())[:top_k]

    def faces(self, probe: NDArray[np.float32], top_k: int) -> list[tuple[int, int, float]]:
        scored = [(row_id, subject_id, float(vector @ probe)) for row_id, (subject_id, vector) in self.held.items()]
        return sorted(scored, key=lambda hit: -hit[2])[:top_k]


def unit(rng: np.random.Generator, count: int) -> NDArray[np.float32]:
    vectors = rng.normal(size=(count, DIMENSION)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def entries(rng: np.random.Generator, row_ids: list[int], subjects: list[int], gallery: str = "g") -> IndexEntries:
    return IndexEntries(gallery, np.array(row_ids, np.int64), np.array(subjects, np.int64), unit(rng, len(row_ids)))


def assert_equal(index: FaissGallery, oracle: Oracle, rng: np.random.Generator, gallery: str = "g") -> None:
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
                assert [hit.similarity for hit in hits] == pytest.approx([item[2] for item in expected], abs=1e-5)
                assert len({hit.row_id for hit in hits}) == len(hits)
                for hit in hits:
                    assert hit.subject_id == oracle.held[hit.row_id][0]
                    assert hit.similarity == pytest.approx(everything[hit.row_id], abs=1e-5)
            assert len({hit.subject_id for hit in by_subject.hits[number]}) == min(top_k, len(subjects))


def test_searches_equal_the_oracle_as_templates_come_and_go() -> None:
    rng = np.random.default_rng(1)
    index, oracle = FaissGallery(DIMENSION), Oracle()
    for step in range(40):
        if rng.random() < 0.7 or not oracle.held:
            new = entries(rng, [step * 100 + number for number in range(20)], rng.integers(0, 30, 20).tolist())
            index.add(new)
            for row_id, subject_id, vector in zip(new.row_ids, new.subject_ids, new.embeddings, strict=True):
                oracle.held[int(row_id)] = (int(subject_id), vector)
        else:
            gone = rng.choice(list(oracle.held), min(15, len(oracle.held)), replace=False)
            index.remove("g", np.append(gone, 999_999))
            for row_id in gone:
                del oracle.held[int(row_id)]
        assert_equal(index, oracle, rng)


def test_one_subject_with_many_templates_hides_nobody() -> None:
    rng = np.random.default_rng(2)
    probe = unit(rng, 1)
    index = FaissGallery(DIMENSION)
    crowd = entries(rng, list(range(500)), [1] * 500)
    near = np.repeat(probe, 500, axis=0) + 0.01 * crowd.embeddings
    index.add(IndexEntries("g", crowd.row_ids, crowd.subject_ids, near / np.linalg.norm(near, axis=1, keepdims=True)))
    index.add(entries(rng, [1000, 1001], [2, 3]))
    (hits,) = index.search_subjects("g", probe, 3).hits
    assert hits[0].subject_id == 1
    assert {hit.subject_id for hit in hits} == {1, 2, 3}


def test_galleries_know_nothing_of_one_another() -> None:
    rng = np.random.default_rng(3)
    index = FaissGallery(DIMENSION)
    index.add(entries(rng, [1, 2], [1, 2], "a"))
    index.add(entries(rng, [3], [3], "b"))
    probes = unit(rng, 1)
    assert {hit.row_id for hit in index.search_faces("a", probes, 10)[0]} == {1, 2}
    assert {hit.row_id for hit in index.search_faces("b", probes, 10)[0]} == {3}
    index.remove("a", np.array([3], np.int64))
    assert index.sizes("b") == (1, 1)
    assert index.search_faces("c", probes, 10) == [[]]
    assert index.search_subjects("c", probes, 10).hits == [[]]


def test_adding_a_template_again_replaces_it() -> None:
    rng = np.random.default_rng(4)
    index = FaissGallery(DIMENSION)
    index.add(entries(rng, [1], [1]))
    second = entries(rng, [1], [1])
    index.add(second)
    assert index.sizes("g") == (1, 1)
    assert index.search_faces("g", second.embeddings, 5)[0][0].similarity == pytest.approx(1.0, abs=1e-5)


def test_eight_threads_add_and_remove_while_others_search() -> None:
    index, oracle = FaissGallery(DIMENSION), Oracle()
    changing, failures = threading.Event(), []
    changing.set()

    def change(thread: int) -> dict[int, tuple[int, NDArray[np.float32]]]:
        rng = np.random.default_rng(100 + thread)
        mine: dict[int, tuple[int, NDArray[np.float32]]] = {}
        for step in range(150):
            row_ids = [thread * 1_000_000 + step * 10 + number for number in range(5)]
            # Threads share subjects, so that their counts are changed from several sides.
            new = entries(rng, row_ids, rng.integers(0, 40, 5).tolist())
            index.add(new)
            for row_id, subject_id, vector in zip(new.row_ids, new.subject_ids, new.embeddings, strict=True):
                mine[int(row_id)] = (int(subject_id), vector)
            if step % 3 == 2:
                gone = rng.choice(list(mine), 6, replace=False)
                index.remove("g", gone)
                for row_id in gone:
                    del mine[int(row_id)]
        return mine

    def search() -> None:
        rng = np.random.default_rng(7)
        while changing.is_set():
            for hits in index.search_subjects("g", unit(rng, 3), 5).hits:
                similarities = [hit.similarity for hit in hits]
                if similarities != sorted(similarities, reverse=True):
                    failures.append("not sorted")
                if len({hit.subject_id for hit in hits}) != len(hits):
                    failures.append("a subject twice")

    def guarded(work, *arguments):  # type: ignore[no-untyped-def]
        try:
            result = work(*arguments)
            if result is not None:
                oracle.held.update(result)
        except Exception as exc:
            failures.append(exc)

    searchers = [threading.Thread(target=guarded, args=(search,)) for _ in range(2)]
    changers = [threading.Thread(target=guarded, args=(change, number)) for number in range(8)]
    for thread in searchers + changers:
        thread.start()
    for thread in changers:
        thread.join()
    changing.clear()
    for thread in searchers:
        thread.join()
    assert failures == []
    assert_equal(index, oracle, np.random.default_rng(8))
