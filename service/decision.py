"""Candidates and an operating point make a decision. Pure arithmetic, no I/O."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform

from service.domain import Candidate, Decision, OperatingPoint


def decide(candidates: Sequence[Candidate], point: OperatingPoint) -> Decision:
    """Answer one probe.

    ``candidates``: subjects, most similar first; none for an empty gallery, and two at least where there are two,
    or the margin is not known. The best one is a match if its similarity reaches the threshold; otherwise the person
    is unknown.
    """
    if not candidates:
        return Decision("unknown", None, None, None, None)
    best = candidates[0]
    margin = best.similarity - candidates[1].similarity if len(candidates) > 1 else None
    if best.similarity >= point.threshold:
        return Decision("match", best.subject, best.similarity, margin, best.probability)
    return Decision("unknown", None, best.similarity, margin, best.probability)


def group(embeddings: NDArray[np.float32], threshold: float) -> NDArray[np.int64]:
    """Group faces by person: any two faces of one group are at least ``threshold`` similar.

    Agglomerative clustering with complete linkage on the cosine. ``embeddings``: ``float32[N, D]``,
    L2-normalised. Returns ``int64[N]``, the group of each face; groups are numbered from 0 in the order
    of their first face.
    """
    return _clusters(embeddings, threshold, "complete")


def siblings(embeddings: NDArray[np.float32], threshold: float) -> NDArray[np.bool_]:
    """Say which of the faces that somebody enrols as one person are one.

    ``embeddings``: ``float32[N, D]``, L2-normalised, N ≥ 1. Returns ``bool[N]``: the largest set in which every face
    is at least ``threshold`` similar to some other, directly or through a chain; of several equally large ones the
    one with the first face.
    """
    labels = _clusters(embeddings, threshold, "single")
    return np.asarray(labels == np.bincount(labels).argmax())


def _clusters(embeddings: NDArray[np.float32], threshold: float, method: str) -> NDArray[np.int64]:
    count = len(embeddings)
    if count < 2:
        return np.zeros(count, dtype=np.int64)
    distances = 1.0 - np.clip(embeddings @ embeddings.T, -1.0, 1.0).astype(np.float64)
    condensed = squareform((distances + distances.T) / 2, checks=False)
    labels = fcluster(linkage(condensed, method=method), t=1.0 - threshold, criterion="distance")
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    order = np.empty(len(first), dtype=np.int64)
    order[np.argsort(first)] = np.arange(len(first))
    return np.asarray(order[inverse], dtype=np.int64)
