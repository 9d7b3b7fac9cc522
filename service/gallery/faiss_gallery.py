"""Exact search in this process's memory, with FAISS (Douze et al. 2024)."""

from __future__ import annotations

import threading
from collections import Counter

import faiss
import numpy as np
from numpy.typing import NDArray

from service.domain import Hit, IndexEntries
from service.gallery.base import SubjectHits


class FaissGallery:
    """Every gallery's templates in a flat inner-product index of its own.

    The inner product of L2-normalised vectors is the cosine. See ``GalleryIndex`` for the calls.
    """

    def __init__(self, dimension: int) -> None:
        """``dimension``: D, the length of every embedding."""
        self._dimension = dimension
        self._shelves: dict[str, _Shelf] = {}
        self._lock = threading.Lock()

    def add(self, entries: IndexEntries) -> None:
        if not len(entries.row_ids):
            return
        with self._lock:
            shelf = self._shelves.setdefault(entries.gallery, _Shelf(self._dimension))
            shelf.remove(entries.row_ids)
            shelf.add(entries)

    def remove(self, gallery: str, row_ids: NDArray[np.int64]) -> None:
        with self._lock:
            shelf = self._shelves.get(gallery)
            if shelf is None:
                return
            shelf.remove(row_ids)
            if not shelf.subject_of:
                del self._shelves[gallery]

    def sizes(self, gallery: str) -> tuple[int, int]:
        with self._lock:
            shelf = self._shelves.get(gallery)
            return (len(shelf.held), len(shelf.subject_of)) if shelf else (0, 0)

    def search_subjects(self, gallery: str, probes: NDArray[np.float32], top_k: int) -> SubjectHits:
        with self._lock:
            shelf = self._shelves.get(gallery)
            if shelf is None:
                return SubjectHits([[] for _ in probes], 0, 0)
            return SubjectHits(shelf.subjects(probes, top_k), len(shelf.held), len(shelf.subject_of))

    def search_faces(self, gallery: str, probes: NDArray[np.float32], top_k: int) -> list[list[Hit]]:
        with self._lock:
            shelf = self._shelves.get(gallery)
            return shelf.faces(probes, top_k) if shelf else [[] for _ in probes]


class _Shelf:
    """One gallery. The caller holds the lock: FAISS allows no change beside a search."""

    def __init__(self, dimension: int) -> None:
        self._index = faiss.IndexIDMap(faiss.IndexFlatIP(dimension))
        self.subject_of: dict[int, int] = {}
        self.held: Counter[int] = Counter()

    def add(self, entries: IndexEntries) -> None:
        self._index.add_with_ids(np.ascontiguousarray(entries.embeddings, np.float32), entries.row_ids)
        for row_id, subject_id in zip(entries.row_ids.tolist(), entries.subject_ids.tolist(), strict=True):
            self.subject_of[row_id] = subject_id
            self.held[subject_id] += 1

    def remove(self, row_ids: NDArray[np.int64]) -> None:
        present = [row_id for row_id in row_ids.tolist() if row_id in self.subject_of]
        if not present:
            return
        self._index.remove_ids(faiss.IDSelectorBatch(np.array(present, np.int64)))
        for row_id in present:
            subject_id = self.subject_of.pop(row_id)
            self.held[subject_id] -= 1
            if not self.held[subject_id]:
                del self.held[subject_id]

    def faces(self, probes: NDArray[np.float32], top_k: int) -> list[list[Hit]]:
        if not len(probes):
            return []
        count = min(top_k, len(self.subject_of))
        similarities, row_ids = self._index.search(np.ascontiguousarray(probes, np.float32), count)
        return [
            [Hit(row_id, self.subject_of[row_id], similarity) for row_id, similarity in zip(ids, scores, strict=True)]
            for ids, scores in zip(row_ids.tolist(), similarities.tolist(), strict=True)
        ]

    def subjects(self, probes: NDArray[np.float32], top_k: int) -> list[list[Hit]]:
        wanted = min(top_k, len(self.held))
        answers: list[list[Hit]] = [[] for _ in probes]
        open_probes = list(range(len(probes)))
        # Several templates of one subject can crowd the others out: fetch more until enough subjects are seen.
        fetch = 4 * wanted
        while open_probes:
            complete = fetch >= len(self.subject_of)
            for probe, hits in zip(open_probes, self.faces(probes[open_probes], fetch), strict=True):
                best: dict[int, Hit] = {}
                for hit in hits:
                    best.setdefault(hit.subject_id, hit)
                answers[probe] = list(best.values())[:wanted]
            open_probes = [] if complete else [p for p in open_probes if len(answers[p]) < wanted]
            fetch *= 4
        return answers
