"""Search in this process's memory, with FAISS (Douze et al. 2024): exact while a gallery is small, then approximate."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from service.domain import Hit, IndexEntries, Members
from service.gallery.base import SubjectHits
from service.gallery.cores import on_one_core
from service.gallery.exact import ExactIndex
from service.gallery.inverted import (
    LEAST_AVERAGED,
    PACK_AT,
    PROBED,
    InvertedIndex,
    Layout,
    batches,
    learnt,
    wanted_sample,
)
from service.gallery.readers_writer import ReadersWriter
from service.gallery.snapshot import Head, Snapshot, Templates
from service.int_map import IntMap

CHANGEOVER = 20_000
"""Templates from which on a gallery's index is approximate."""

_BLOCK = 4096
"""Templates that a rebuild moves at once."""

_FEW = 256
"""Changes during a rebuild that the last step, which lets no other change in, makes up for."""

_MUCH = 2048
"""Changes before an index that it takes in at once."""

_PAUSE = 0.02
"""Seconds that changes gather in before an index takes them in."""

_WIDER = 4
"""Factor by which a search is widened that found too few."""


class FaissGallery:
    """Every gallery in an index of its own. See ``GalleryIndex`` for the calls.

    Searches run side by side, and changes do not wait for them: they are kept before the index, which takes in many at
    once, and searches look there too. A gallery of ``changeover`` templates or more
    moves to an approximate index, and to one with more lists each time it has doubled, on a thread of its own: until
    that is done, the old index goes on, and then takes over what has changed. Only approximate indexes have files.
    """

    def __init__(
        self, dimension: int, *, folder: Path | None = None, model_id: str = "", changeover: int = CHANGEOVER
    ) -> None:
        """``dimension``: D. ``folder``: where the files are, this index's alone; without it there are none.

        ``model_id``: whose embeddings they are.
        """
        self._dimension = dimension
        self._folder = folder
        self._model_id = model_id
        self._changeover = changeover
        self._stamp = ""
        self._shelves: dict[str, _Shelf] = {}
        self._lock = threading.Lock()
        self._ended = False
        # One rebuild at a time, whatever the number of galleries.
        self._rebuilding = threading.Lock()

    def restore(self, record: Sequence[Members], stamp: str, renewed: str) -> list[Members]:
        self._stamp = renewed
        missing: list[Members] = []
        for held in record:
            shelf = self._restored(held, stamp)
            if shelf is None:
                missing.append(held)
                continue
            self._shelves[held.gallery] = shelf
            lacking = ~np.isin(held.row_ids, shelf.row_ids())
            if lacking.any():
                missing.append(Members(held.gallery, held.row_ids[lacking], held.subject_ids[lacking]))
        if self._folder is not None and self._folder.is_dir():
            restored = {self._path(gallery) for gallery in self._shelves}
            for path in self._folder.iterdir():
                if path not in restored:
                    path.unlink()
        return missing

    def add(self, entries: IndexEntries) -> None:
        if not len(entries.row_ids):
            return
        while not self._ended:
            with self._lock:
                shelf = self._shelves.get(entries.gallery)
                if shelf is None:
                    shelf = self._shelves[entries.gallery] = _Shelf(self._dimension, ExactIndex(self._dimension))
            if shelf.add(entries):
                break
            # It was emptied, and is being taken away.
        else:
            return
        if shelf.due(self._changeover):
            threading.Thread(target=self._rebuild, args=(entries.gallery, shelf), daemon=True).start()
        shelf.keep_pace()

    def remove(self, gallery: str, row_ids: NDArray[np.int64]) -> None:
        with self._lock:
            shelf = self._shelves.get(gallery)
        if shelf is not None and shelf.remove(row_ids):
            with self._lock:
                if self._shelves.get(gallery) is shelf:
                    del self._shelves[gallery]

    def sizes(self, gallery: str) -> tuple[int, int]:
        shelf = self._shelves.get(gallery)
        return shelf.sizes() if shelf else (0, 0)

    def search_subjects(self, gallery: str, probes: NDArray[np.float32], top_k: int) -> SubjectHits:
        shelf = self._shelves.get(gallery)
        return shelf.search_subjects(probes, top_k) if shelf else SubjectHits([[] for _ in probes], 0, 0)

    def search_faces(self, gallery: str, probes: NDArray[np.float32], top_k: int) -> list[list[Hit]]:
        shelf = self._shelves.get(gallery)
        return shelf.search_faces(probes, top_k) if shelf else [[] for _ in probes]

    def approximate(self, gallery: str) -> bool:
        """Return whether a gallery's index is approximate now."""
        shelf = self._shelves.get(gallery)
        return shelf is not None and shelf.approximate

    def settle(self) -> None:
        """Wait until no index is being rebuilt, and all have taken in what was changed."""
        for shelf in list(self._shelves.values()):
            shelf.settled.wait()
            shelf.flush()

    def close(self) -> None:
        """Let go of the files; rebuilds are given up. Nothing may be asked of the index any more."""
        self._ended = True
        for shelf in list(self._shelves.values()):
            shelf.close()

    def _path(self, gallery: str) -> Path | None:
        # Names may say something about people; a file's name says nothing.
        name = hashlib.sha256(gallery.encode()).hexdigest()[:32]
        return None if self._folder is None else self._folder / f"{name}.index"

    def _restored(self, held: Members, stamp: str) -> _Shelf | None:
        path = self._path(held.gallery)
        opened = Snapshot.open(path, stamp, self._dimension) if path else None
        if opened is None:
            return None
        snapshot, head = opened
        try:
            if str(head["model_id"]) == self._model_id and head["ranges"].shape == (2, self._dimension):
                shelf = _Shelf.restored(self._dimension, _layout(head), snapshot, held)
                snapshot.restamp(self._stamp)
                return shelf
        except OSError:
            pass
        snapshot.close()
        return None

    def _rebuild(self, gallery: str, shelf: _Shelf) -> None:
        path = self._path(gallery)

        def snapshot(layout: Layout) -> Snapshot | None:
            head = {"model_id": np.array(self._model_id)} | {
                key: np.array(value) for key, value in vars(layout).items()
            }
            return Snapshot.create(path.with_suffix(".new"), self._stamp, head, self._dimension) if path else None

        on_one_core()
        with self._rebuilding:
            shelf.rebuild(snapshot, path)


@dataclass(frozen=True)
class _Front:
    """Changes that a shelf's index has not taken in yet, and what the gallery holds with them.

    ``row_ids``, ``subject_ids``, ``places``: ``int64[N]`` and ``vectors``: ``float32[N, D]``, new templates and
    their lists. ``gone``: ``int64[M]``, row ids of the index that count no more.
    """

    row_ids: NDArray[np.int64]
    subject_ids: NDArray[np.int64]
    places: NDArray[np.int64]
    vectors: NDArray[np.float32]
    gone: NDArray[np.int64]
    subjects: int
    templates: int

    def __len__(self) -> int:
        return len(self.row_ids) + len(self.gone)

    def subjects_of(self, row_ids: NDArray[np.int64], indexed: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the subjects of row ids, -1 where there is none; ``indexed``: those that the index has."""
        found = np.where(np.isin(row_ids, self.gone), -1, indexed)
        if len(self.row_ids):
            order = np.argsort(self.row_ids)
            place = order[np.minimum(np.searchsorted(self.row_ids, row_ids, sorter=order), len(order) - 1)]
            found = np.where(self.row_ids[place] == row_ids, self.subject_ids[place], found)
        return found

    def emptied(self) -> _Front:
        none = np.empty(0, np.int64)
        return replace(self, row_ids=none, subject_ids=none, places=none, vectors=self.vectors[:0], gone=none)


class _Shelf:
    """One gallery: an index, and before it the latest changes, so that a change need not wait for searches.

    Locks are taken in this order: ``_changing``, ``_lock``, ``_state``.
    """

    def __init__(self, dimension: int, index: ExactIndex | InvertedIndex, snapshot: Snapshot | None = None) -> None:
        # One change at a time, files included.
        self._changing = threading.Lock()
        # Searches against changes of the index. Whoever holds it writes to no disk.
        self._lock = ReadersWriter()
        # The index and the front, which is replaced and never changed, belong together.
        self._state = threading.Lock()
        self._index = index
        self._subject_of = IntMap()
        none = np.empty(0, np.int64)
        self._front = _Front(none, none, none, np.empty((0, dimension), np.float32), none, 0, 0)
        # How many templates each subject has, front included.
        self._held = IntMap()
        self._flushing = False
        self._snapshot = snapshot
        # While a rebuild moves templates: the row ids that came or went, and its file.
        self._moving = False
        self._changed: set[int] = set()
        self._next_snapshot: Snapshot | None = None
        self._closed = False
        # Templates from which on lists are learnt anew, and from which on they get new room.
        self._learn_at = 0
        self._pack_at = 0
        self._learning = False
        self.settled = threading.Event()
        self.settled.set()

    @classmethod
    def restored(cls, dimension: int, layout: Layout, snapshot: Snapshot, held: Members) -> _Shelf:
        """Take what a snapshot has of these templates, and overwrite the rest of it. Raises ``OSError``."""
        index = InvertedIndex(layout)
        shelf = cls(dimension, index, snapshot)
        wanted = IntMap()
        wanted.put(held.row_ids, held.subject_ids)
        foreign = [np.empty(0, np.int64)]
        index.reserve(snapshot.sizes(index.lists))
        for block in snapshot.read():
            known = (wanted.get(block.row_ids) == block.subject_ids) & (block.places < index.lists)
            known &= shelf._subject_of.get(block.row_ids) < 0
            foreign.append(block.row_ids[~known])
            block = block.only(known)
            index.add(block.row_ids, index.decoded(block.codes), block.places)
            shelf._subject_of.put(block.row_ids, block.subject_ids)
            shelf._count(block.subject_ids, 1)
        snapshot.forget(np.concatenate(foreign))
        shelf._front = replace(shelf._front, subjects=len(shelf._held), templates=len(shelf._subject_of))
        shelf._learn_at = 2 * layout.templates
        shelf._pack_at = int(PACK_AT * len(index))
        return shelf

    @property
    def approximate(self) -> bool:
        return isinstance(self._index, InvertedIndex)

    def sizes(self) -> tuple[int, int]:
        front = self._front
        return front.subjects, front.templates

    def row_ids(self) -> NDArray[np.int64]:
        """Return the row ids of a shelf that is still."""
        return self._subject_of.items()[0]

    # --- changes

    def add(self, entries: IndexEntries) -> bool:
        """Add templates, and return True; or return False if the shelf was closed."""
        row_ids, subject_ids = entries.row_ids, entries.subject_ids
        vectors = np.ascontiguousarray(entries.embeddings, np.float32)
        with self._changing:
            if self._closed:
                return False
            self._take_out(row_ids)
            index = self._index
            places = index.places(vectors)
            self._count(subject_ids, 1)
            with self._state:
                front = self._front
                self._front = _Front(
                    np.concatenate([front.row_ids, row_ids]),
                    np.concatenate([front.subject_ids, subject_ids]),
                    np.concatenate([front.places, places]),
                    np.concatenate([front.vectors, vectors]),
                    front.gone,
                    len(self._held),
                    front.templates + len(row_ids),
                )
            if self._moving:
                self._changed.update(row_ids.tolist())
            if self._snapshot is not None and isinstance(index, InvertedIndex):
                self._snapshot.append(Templates(row_ids, subject_ids, places, index.codes(vectors)))
        self._flush_soon()
        return True

    def remove(self, row_ids: NDArray[np.int64]) -> bool:
        """Take templates out. Returns whether that left nothing; the shelf is closed then."""
        with self._changing:
            if self._closed or not self._take_out(row_ids, for_good=True):
                return False
            self._closed = not self._front.templates
        self._flush_soon()
        return self._closed

    def close(self) -> None:
        with self._changing:
            self._closed = True
            for snapshot in self._snapshots():
                snapshot.close()

    def flush(self) -> None:
        """Let the index take in the front."""
        with self._lock.writing(), self._state:
            front, index = self._front, self._index
            if len(front.gone):
                index.remove(front.gone)
                self._subject_of.drop(front.gone)
            if len(front.row_ids):
                index.add(front.row_ids, front.vectors, front.places)
                self._subject_of.put(front.row_ids, front.subject_ids)
            self._front = front.emptied()

    def _flush_soon(self) -> None:
        if len(self._front) >= _MUCH:
            self.flush()
        with self._state:
            if self._flushing or not len(self._front):
                return
            self._flushing = True
        threading.Thread(target=self._flush_later, daemon=True).start()

    def _flush_later(self) -> None:
        while True:
            time.sleep(_PAUSE)
            self.flush()
            with self._state:
                if not len(self._front):
                    self._flushing = False
                    return

    def _take_out(self, row_ids: NDArray[np.int64], *, for_good: bool = False) -> bool:
        """Let go of what is there of these, from the files first, and return whether anything was."""
        row_ids = np.unique(row_ids)
        subject_ids = self._subjects_of(row_ids)
        present = subject_ids >= 0
        row_ids, subject_ids = row_ids[present], subject_ids[present]
        if not len(row_ids):
            return False
        if for_good and len(row_ids) == self._front.templates:
            for snapshot in self._snapshots():
                snapshot.delete()
        for snapshot in self._snapshots():
            snapshot.forget(row_ids)
        self._count(subject_ids, -1)
        with self._state:
            front = self._front
            stay = ~np.isin(front.row_ids, row_ids)
            indexed = row_ids[(self._subject_of.get(row_ids) >= 0) & ~np.isin(row_ids, front.gone)]
            self._front = _Front(
                front.row_ids[stay],
                front.subject_ids[stay],
                front.places[stay],
                front.vectors[stay],
                np.concatenate([front.gone, indexed]),
                len(self._held),
                front.templates - len(row_ids),
            )
        if self._moving:
            self._changed.update(row_ids.tolist())
        return True

    def _subjects_of(self, row_ids: NDArray[np.int64]) -> NDArray[np.int64]:
        with self._state:
            return self._front.subjects_of(row_ids, self._subject_of.get(row_ids))

    def _count(self, subject_ids: NDArray[np.int64], step: int) -> None:
        subjects, counts = np.unique(subject_ids, return_counts=True)
        left = np.maximum(self._held.get(subjects), 0) + step * counts
        self._held.put(subjects, left)
        self._held.drop(subjects[left == 0])

    def _snapshots(self) -> list[Snapshot]:
        return [snapshot for snapshot in (self._snapshot, self._next_snapshot) if snapshot is not None]

    # --- rebuilding

    def due(self, changeover: int) -> bool:
        """Return whether a rebuild should begin now; whoever is told so must begin it."""
        with self._changing:
            subjects, templates = self.sizes()
            if (
                self._closed
                or not self.settled.is_set()
                or subjects < 2 * LEAST_AVERAGED
                or templates < max(changeover, min(self._learn_at, self._pack_at))
            ):
                return False
            self._learning = templates >= self._learn_at
            if self._learning:
                self._learn_at = 2 * templates
            self._pack_at = int(PACK_AT * templates)
            self.settled.clear()
            return True

    def keep_pace(self) -> None:
        """Wait for a rebuild if the gallery has doubled since it began: the old index must not grow without bounds."""
        if not self.settled.is_set() and self.sizes()[1] >= self._learn_at:
            self.settled.wait()

    def rebuild(self, snapshot: Callable[[Layout], Snapshot | None], path: Path | None) -> None:
        """Go over to an index of new lists and its file, where it is time for that, and to one of lists with room."""
        try:
            if self._learning:
                self.flush()
                built = InvertedIndex(self._learnt())
                if self._begin(snapshot, built.layout):
                    for row_ids, vectors in self._parts():
                        self._move(built, row_ids, vectors)
                    self._finish(built, path)
            if isinstance(self._index, InvertedIndex) and self._begin(None, self._index.layout):
                built = self._index.emptied()
                built.fill(self._lists(self._index))
                self._finish(built, None)
        finally:
            with self._changing:
                self._moving = False
                self._changed = set()
                if self._next_snapshot is not None:
                    self._next_snapshot.delete()
                    self._next_snapshot = None
            self.settled.set()

    def _begin(self, snapshot: Callable[[Layout], Snapshot | None] | None, layout: Layout) -> bool:
        with self._changing:
            if self._closed:
                return False
            self.flush()
            self._moving = True
            self._changed = set()
            if snapshot is not None:
                self._next_snapshot = snapshot(layout)
            return True

    def _finish(self, built: InvertedIndex, path: Path | None) -> None:
        while not self._caught_up(built, path):
            pass

    def _learnt(self) -> Layout:
        with self._lock.reading():
            row_ids, subject_ids = self._subject_of.items()
        # One template of each person: no list's centre is to be one person's.
        _, first = np.unique(subject_ids, return_index=True)
        wanted = np.random.default_rng(0).permutation(row_ids[first])[: wanted_sample(len(row_ids))]
        sample = []
        for start in range(0, len(wanted), _BLOCK):
            some = wanted[start : start + _BLOCK]
            with self._lock.reading():
                sample.append(self._index.vectors(some[self._subject_of.get(some) >= 0]))
        index = self._index
        ranges = index.layout.ranges if isinstance(index, InvertedIndex) else None
        return learnt(np.concatenate(sample), len(row_ids), ranges)

    def _parts(self) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        index = self._index
        if isinstance(index, ExactIndex):
            # At once: an exact index moves a vector to where another was removed.
            with self._lock.reading():
                row_ids, vectors = index.everything()
            for start in range(0, len(row_ids), _BLOCK):
                yield row_ids[start : start + _BLOCK], vectors[start : start + _BLOCK]
            return
        for places in batches(index, _BLOCK):
            with self._lock.reading():
                held = [index.of_list(place) for place in places]
            yield np.concatenate([ids for ids, _ in held]), index.decoded(np.concatenate([codes for _, codes in held]))

    def _lists(self, index: InvertedIndex) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.uint8]]]:
        for place in range(index.lists):
            with self._lock.reading():
                row_ids, codes = index.of_list(place)
            yield place, row_ids, codes

    def _move(self, built: InvertedIndex, row_ids: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
        codes, places = built.codes(vectors), built.places(vectors)
        built.add(row_ids, vectors, places)
        with self._changing:
            if self._next_snapshot is not None:
                # Of what was removed in the meantime nothing may come to the file.
                same = np.array([row_id not in self._changed for row_id in row_ids.tolist()], bool)
                moved = Templates(row_ids, self._subjects_of(row_ids), places, codes)
                self._next_snapshot.append(moved.only(same))

    def _caught_up(self, built: InvertedIndex, path: Path | None) -> bool:
        """Bring a new index nearer to the old one; once they hold the same, go over to it and return True."""
        with self._changing:
            if self._closed:
                return True
            self.flush()
            row_ids = np.array(sorted(self._changed), np.int64)
            subject_ids = self._subject_of.get(row_ids)
            present = row_ids[subject_ids >= 0]
            vectors = self._index.vectors(present)
            last = len(row_ids) <= _FEW
            self._changed = set()
            if last:
                built.remove(row_ids)
                places = built.places(vectors)
                built.add(present, vectors, places)
                if self._next_snapshot is not None:
                    came = Templates(present, subject_ids[subject_ids >= 0], places, built.codes(vectors))
                    self._next_snapshot.append(came)
                self._go_over(built, path)
                return True
        built.remove(row_ids)
        self._move(built, present, vectors)
        return False

    def _go_over(self, built: InvertedIndex, path: Path | None) -> None:
        with self._lock.writing(), self._state:
            learnt_anew = built.layout is not getattr(self._index, "layout", None)
            self._index = built
        self._moving = False
        if not learnt_anew:
            return
        # The old file's codes are of the old lists.
        old, self._snapshot = self._snapshot, None
        if old is not None:
            old.close()
        if self._next_snapshot is not None and path is not None:
            try:
                self._next_snapshot.publish(path)
            except OSError:
                self._next_snapshot.delete()
            else:
                self._snapshot = self._next_snapshot
            self._next_snapshot = None

    # --- searches

    def search_faces(self, probes: NDArray[np.float32], top_k: int) -> list[list[Hit]]:
        with self._lock.reading():
            front = self._front
            return self._search(front, probes, min(top_k, front.templates), lambda hits: hits, 1)

    def search_subjects(self, probes: NDArray[np.float32], top_k: int) -> SubjectHits:
        with self._lock.reading():
            front = self._front
            # Several templates of one subject can crowd the others out: more are fetched from the start.
            hits = self._search(front, probes, min(top_k, front.subjects), _best_of_each, _WIDER)
            return SubjectHits(hits, front.subjects, front.templates)

    def _search(
        self,
        front: _Front,
        probes: NDArray[np.float32],
        wanted: int,
        chosen: Callable[[list[Hit]], list[Hit]],
        ahead: int,
    ) -> list[list[Hit]]:
        answers: list[list[Hit]] = [[] for _ in probes]
        probes = np.ascontiguousarray(probes, np.float32)
        waiting = list(range(len(probes))) if wanted else []
        fetch, probed = ahead * wanted, PROBED
        while waiting:
            fetch = min(fetch, front.templates)
            found, everything = self._neighbours(front, probes[waiting], fetch, probed)
            for probe, hits in zip(waiting, found, strict=True):
                answers[probe] = chosen(hits)[:wanted]
            waiting = [] if everything else [probe for probe in waiting if len(answers[probe]) < wanted]
            fetch, probed = fetch * _WIDER, probed * _WIDER
        return answers

    def _neighbours(
        self, front: _Front, probes: NDArray[np.float32], count: int, probed: int
    ) -> tuple[list[list[Hit]], bool]:
        """Return the nearest, and whether that is everything that could be found."""
        index = self._index
        everything = count == front.templates and probed >= index.lists
        similarities, row_ids = np.empty((len(probes), 0), np.float32), np.empty((len(probes), 0), np.int64)
        # Those that are gone may be found first.
        fetch = min(count + len(front.gone), len(index))
        if fetch:
            similarities, row_ids = index.search(probes, fetch, min(probed, index.lists))
        subject_ids = self._subject_of.get(row_ids)
        if len(front):
            subject_ids = np.where(np.isin(row_ids, front.gone), -1, subject_ids)
            similarities = np.concatenate([similarities, probes @ front.vectors.T], axis=1)
            row_ids, subject_ids = (
                np.concatenate([held, np.tile(new, (len(probes), 1))], axis=1)
                for held, new in ((row_ids, front.row_ids), (subject_ids, front.subject_ids))
            )
            order = np.argsort(-similarities, axis=1, kind="stable")
            similarities = np.take_along_axis(similarities, order, axis=1)
            row_ids, subject_ids = (
                np.take_along_axis(row_ids, order, axis=1),
                np.take_along_axis(subject_ids, order, axis=1),
            )
        return [
            [Hit(*hit) for hit in zip(ids, subjects, scores, strict=True) if hit[1] >= 0][:count]
            for ids, subjects, scores in zip(row_ids.tolist(), subject_ids.tolist(), similarities.tolist(), strict=True)
        ], everything


def _layout(head: Head) -> Layout:
    rotation, shift, centres, ranges = (
        head[name].astype(np.float32) for name in ("rotation", "shift", "centres", "ranges")
    )
    return Layout(rotation, shift, centres, ranges, int(head["templates"].item()))


def _best_of_each(hits: list[Hit]) -> list[Hit]:
    best: dict[int, Hit] = {}
    for hit in hits:
        best.setdefault(hit.subject_id, hit)
    return list(best.values())
