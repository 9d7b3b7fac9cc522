"""How many cores FAISS may use for a call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import faiss

MANY = 256
"""Vectors from which on a call may use several cores."""


def on_one_core() -> None:
    """Let FAISS use one core for this thread's calls."""
    faiss.omp_set_num_threads(1)


@contextmanager
def cores_for(vectors: int) -> Iterator[None]:
    """Let FAISS use one core for this thread's calls within, unless they are about many vectors.

    When a call is over, the threads that helped wait busily for the next one, on the cores that others need.
    """
    before = faiss.omp_get_max_threads()
    if vectors < MANY:
        faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)
