"""What the service asks of an index, whichever engine keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from service.domain import Hit, IndexEntries, Members


@dataclass(frozen=True)
class SubjectHits:
    """The answer to a search, all from one state of the gallery.

    ``hits``: for each probe its subjects, each once and with its best template, most similar first.
    ``subjects``, ``templates``: how many the gallery held.
    """

    hits: list[list[Hit]]
    subjects: int
    templates: int


class GalleryIndex(Protocol):
    """A copy of the templates that answers which are most similar. It can always be rebuilt from SQL.

    An index may be used from many threads; each call sees the galleries before or after any other call,
    never between. A gallery that holds nothing need not be announced. An approximate index may miss a neighbour, and
    its similarities are as exact as its copies; how many there are it knows exactly.
    """

    def restore(self, record: Sequence[Members], stamp: str, renewed: str) -> list[Members]:
        """Begin with what an earlier process left on the disk of these templates, and return those to be added.

        What it left of others is deleted before this returns. ``stamp``: says which state of the database that must
        belong to; ``renewed``: the stamp from now on.
        """

    def add(self, entries: IndexEntries) -> None:
        """Add templates; one whose row id is there already is replaced."""

    def remove(self, gallery: str, row_ids: NDArray[np.int64]) -> None:
        """Take templates out, from the disk too; row ids that are not there are passed over."""

    def sizes(self, gallery: str) -> tuple[int, int]:
        """Return how many subjects and how many templates a gallery holds."""

    def search_subjects(self, gallery: str, probes: NDArray[np.float32], top_k: int) -> SubjectHits:
        """Return for each probe the ``top_k`` most similar subjects; a subject's score is its best template's.

        ``probes``: ``float32[N, D]``, L2-normalised.
        """

    def search_faces(self, gallery: str, probes: NDArray[np.float32], top_k: int) -> list[list[Hit]]:
        """Return for each probe the ``top_k`` most similar templates, most similar first.

        ``probes``: ``float32[N, D]``, L2-normalised.
        """
