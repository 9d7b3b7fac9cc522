"""Candidates and an operating point make a decision. Pure arithmetic, no I/O."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

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

    The two most similar groups are joined until none are similar enough, where two groups are as similar as their least
    similar faces. To follow nearest neighbours until two groups are each other's finds the same groups in O(N²)
    (Murtagh 1983, "A survey of recent advances in hierarchical clustering algorithms"); a group whose nearest
    neighbour is below ``threshold`` is done.
    """
    count = len(embeddings)
    similarity = _similarity(embeddings)
    np.fill_diagonal(similarity, -np.inf)
    # The group of each face, by the number of one of its faces, in whose row the group's similarities stand.
    labels = np.arange(count)
    waiting = np.ones(count, dtype=bool)
    chain: list[int] = []
    while chain or waiting.any():
        if not chain:
            chain.append(int(waiting.argmax()))
        last = chain[-1]
        nearest = int(similarity[last].argmax())
        # Of equally near ones the one that the chain comes from, or it would go in circles.
        if len(chain) > 1 and similarity[last, chain[-2]] >= similarity[last, nearest]:
            nearest = chain[-2]
        if similarity[last, nearest] < threshold:
            # Whoever led here is nearer to it than to anybody else, and yet not near enough.
            waiting[chain] = False
            chain.clear()
        elif len(chain) > 1 and nearest == chain[-2]:
            del chain[-2:]
            similarity[nearest] = similarity[:, nearest] = np.minimum(similarity[nearest], similarity[last])
            similarity[last] = similarity[:, last] = -np.inf
            waiting[last] = False
            labels[labels == last] = nearest
        else:
            chain.append(nearest)
    return _numbered(labels)


def siblings(embeddings: NDArray[np.float32], threshold: float) -> NDArray[np.bool_]:
    """Say which of the faces that somebody enrols as one person are one.

    ``embeddings``: ``float32[N, D]``, L2-normalised, N ≥ 1. Returns ``bool[N]``: the largest set in which every face
    is at least ``threshold`` similar to some other, directly or through a chain; of several equally large ones the
    one with the first face.
    """
    alike = _similarity(embeddings) >= threshold
    labels = np.arange(len(embeddings))
    for face in range(len(embeddings)):
        reached = np.unique(labels[alike[face] | (labels == labels[face])])
        labels[np.isin(labels, reached)] = reached[0]
    labels = _numbered(labels)
    return np.asarray(labels == np.bincount(labels).argmax())


def _similarity(embeddings: NDArray[np.float32]) -> NDArray[np.float64]:
    similarity = (embeddings @ embeddings.T).astype(np.float64)
    # Matrix products need not be symmetric to the last digit.
    return (similarity + similarity.T) / 2


def _numbered(labels: NDArray[np.intp]) -> NDArray[np.int64]:
    """The same groups, numbered from 0 in the order of their first members."""
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    order = np.empty(len(first), dtype=np.int64)
    order[np.argsort(first)] = np.arange(len(first))
    return np.asarray(order[inverse], dtype=np.int64)
