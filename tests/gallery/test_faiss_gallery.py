"""The index against an exact search in NumPy, alone and with eight threads at once, exact and approximate."""

from __future__ import annotations

import threading
import time

import faiss
import numpy as np
import psutil
import pytest

from service.domain import IndexEntries
from service.gallery import inverted
from service.gallery.faiss_gallery import FaissGallery
from tests.gallery.people import DIMENSION, Oracle, assert_equal, entries, unit

CODED = 5e-3
"""How far similarities of codes may be from the true ones: eight standard deviations at this D."""

# Exact throughout; and approximate from the 200th template on.
KINDS = pytest.mark.parametrize(("changeover", "within"), [(10**9, 1e-5), (200, CODED)], ids=["exact", "approximate"])


@KINDS
def test_searches_equal_the_oracle_as_templates_come_and_go(changeover: int, within: float) -> None:
    rng = np.random.default_rng(1)
    index, oracle = FaissGallery(DIMENSION, changeover=changeover), Oracle()
    for step in range(45):
        if rng.random() < 0.7 or not oracle.held:
            new = entries(rng, [step * 100 + number for number in range(20)], rng.integers(0, 60, 20).tolist())
            index.add(new)
            oracle.add(new)
        else:
            gone = rng.choice(list(oracle.held), min(15, len(oracle.held)), replace=False)
            index.remove("g", np.append(gone, 999_999))
            for row_id in gone:
                del oracle.held[int(row_id)]
        if step % 3 == 0:
            index.settle()
            assert_equal(index, oracle, rng, within=within)
    assert index.approximate("g") == (within == CODED)


@KINDS
def test_one_subject_with_many_templates_hides_nobody(
    changeover: int, within: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So few that what is wanted is in other lists than the nearest.
    monkeypatch.setattr(inverted, "PER_LIST", 8)
    monkeypatch.setattr("service.gallery.faiss_gallery.PROBED", 1)
    rng = np.random.default_rng(2)
    probe = unit(rng, 1)
    index, oracle = FaissGallery(DIMENSION, changeover=changeover), Oracle()
    others = entries(rng, list(range(1000, 1400)), list(range(1000, 1400)))
    crowd = entries(rng, list(range(500)), [1] * 500)
    near = probe + 0.02 * crowd.embeddings
    near = IndexEntries("g", crowd.row_ids, crowd.subject_ids, near / np.linalg.norm(near, axis=1, keepdims=True))
    for new in (others, near):
        index.add(new)
        oracle.add(new)
        index.settle()
    (hits,) = index.search_subjects("g", probe, 300).hits
    assert hits[0].subject_id == 1
    assert len({hit.subject_id for hit in hits}) == 300
    (hits,) = index.search_subjects("g", probe, 401).hits
    expected = oracle.subjects(probe[0], 401)
    assert [hit.similarity for hit in hits] == pytest.approx([item[2] for item in expected], abs=within)


def test_an_approximate_search_finds_the_same_person(monkeypatch: pytest.MonkeyPatch) -> None:
    """With as few lists probed, of as many, as in a gallery of half a million."""
    monkeypatch.setattr(inverted, "PER_LIST", 16)
    monkeypatch.setattr("service.gallery.faiss_gallery.PROBED", 16)
    rng = np.random.default_rng(9)
    index = FaissGallery(DIMENSION, changeover=8000)
    people = entries(rng, list(range(8000)), list(range(8000)))
    index.add(people)
    index.settle()
    assert index.approximate("g")
    probes = people.embeddings[:500] + 0.2 * (unit(rng, 500) - unit(rng, 500).mean(axis=0))
    probes /= np.linalg.norm(probes, axis=1, keepdims=True)
    found = index.search_subjects("g", probes, 1).hits
    assert np.mean([hits[0].subject_id == person for person, hits in enumerate(found)]) > 0.98


@KINDS
def test_a_gallery_that_was_emptied_begins_anew(changeover: int, within: float) -> None:
    rng = np.random.default_rng(5)
    index, oracle = FaissGallery(DIMENSION, changeover=changeover), Oracle()
    new = entries(rng, list(range(300)), list(range(300)))
    index.add(new)
    index.settle()
    index.remove("g", new.row_ids)
    assert index.sizes("g") == (0, 0)
    assert index.search_faces("g", unit(rng, 2), 3) == [[], []]
    second = entries(rng, [7, 5, 6], [1, 2, 2])
    index.add(second)
    oracle.add(second)
    assert_equal(index, oracle, rng)


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


@KINDS
def test_adding_a_template_again_replaces_it(changeover: int, within: float) -> None:
    rng = np.random.default_rng(4)
    index = FaissGallery(DIMENSION, changeover=changeover)
    index.add(entries(rng, list(range(300)), list(range(300))))
    index.settle()
    second = entries(rng, [1, 301], [1, 1])
    index.add(second)
    assert index.sizes("g") == (300, 301)
    for vector, row_id in zip(second.embeddings, (1, 301), strict=True):
        best = index.search_faces("g", vector[None], 5)[0][0]
        assert (best.row_id, best.subject_id) == (row_id, 1)
        assert best.similarity == pytest.approx(1.0, abs=within)


@pytest.mark.parametrize("changeover", [10**9, 300], ids=["exact", "changing over"])
def test_eight_threads_add_and_remove_while_others_search(changeover: int) -> None:
    index, oracle = FaissGallery(DIMENSION, changeover=changeover), Oracle()
    changing, failures = threading.Event(), []
    changing.set()
    # Nobody touches these: every search must find them, whatever is going on.
    fixed = entries(np.random.default_rng(6), list(range(1, 51)), list(range(1000, 1050)))
    index.add(fixed)
    oracle.add(fixed)

    def change(thread: int) -> Oracle:
        rng = np.random.default_rng(100 + thread)
        mine = Oracle()
        for step in range(150):
            row_ids = [(thread + 1) * 1_000_000 + step * 10 + number for number in range(5)]
            # Threads share subjects, so that their counts are changed from several sides.
            new = entries(rng, row_ids, rng.integers(0, 40, 5).tolist())
            index.add(new)
            mine.add(new)
            if step % 3 == 2:
                gone = rng.choice(list(mine.held), 6, replace=False)
                index.remove("g", gone)
                for row_id in gone:
                    del mine.held[int(row_id)]
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
                if len(hits) != 5:
                    failures.append("too few")
            place = int(rng.integers(50))
            (hits,) = index.search_faces("g", fixed.embeddings[place : place + 1], 1)
            if hits[0].row_id != fixed.row_ids[place]:
                failures.append("missed")

    def guarded(work, *arguments):  # type: ignore[no-untyped-def]
        try:
            result = work(*arguments)
            if result is not None:
                oracle.held.update(result.held)
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
    index.settle()
    assert index.approximate("g") == (changeover == 300)
    assert_equal(index, oracle, np.random.default_rng(8), within=CODED)


@pytest.mark.parametrize("changeover", [10**9, 200], ids=["exact", "approximate"])
def test_one_change_and_one_search_take_one_core(changeover: int) -> None:
    """Threads that help FAISS wait busily when they are done: beside other work that costs more than it saves."""
    rng = np.random.default_rng(3)
    index = FaissGallery(DIMENSION, changeover=changeover)
    index.add(entries(rng, list(range(400)), list(range(400))))
    index.settle()
    assert index.approximate("g") == (changeover == 200)
    helpers: list[int] = []

    def work() -> None:
        # Helpers belong to the thread that called, and this one is new.
        faiss.omp_set_num_threads(4)
        before = threads()
        for number in range(400, 410):
            index.add(entries(rng, [number], [number]))
            index.settle()
            index.search_subjects("g", unit(rng, 3), 5)
            index.search_faces("g", unit(rng, 1), 5)
            index.remove("g", np.array([number]))
            index.settle()
        # The system lets go of a thread a little later than Python.
        end = time.monotonic() + 10
        while threads() > before and time.monotonic() < end:
            time.sleep(0.01)
        helpers.append(max(threads() - before, 0))

    def threads() -> int:
        # The index's own come and go.
        return psutil.Process().num_threads() - threading.active_count()

    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert helpers == [0]
