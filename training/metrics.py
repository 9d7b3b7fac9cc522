"""True-positive rate at a false-positive rate, from similarities of genuine and of impostor pairs.

Terms and rates follow ISO/IEC 19795-1:2021 (biometric performance testing): a genuine pair is two photos of
one person, an impostor pair photos of two people; FPR is the FMR of the standard, TPR = 1 − FNMR.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.evaluation import LEVEL as LEVEL
from service.evaluation import RESAMPLES as RESAMPLES
from service.evaluation import numbered as numbered
from service.evaluation import times_drawn

FPRS = (0.5, 0.2, 0.1, 0.05, 0.01, 0.001)
"""The false-positive rates that are reported."""

_BLOCK = 512


@dataclass(frozen=True)
class Pairs:
    """Similarities of P pairs and the two people of each.

    ``similarity``: ``float32[P]``, cosine. ``first``, ``second``: ``int32[P]``, numbers of the people, the
    same number in a genuine pair.
    """

    similarity: NDArray[np.float32]
    first: NDArray[np.int32]
    second: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.similarity)


@dataclass(frozen=True)
class Rate:
    """One operating point. ``threshold``: cosine. ``low``, ``high``: 95 % interval of ``tpr``; None if not asked."""

    fpr: float
    threshold: float
    tpr: float
    low: float | None = None
    high: float | None = None


def pairs_among(embeddings: NDArray[np.float32], people: NDArray[np.int32]) -> tuple[Pairs, Pairs]:
    """Genuine and impostor pairs: every two of ``embeddings``, see :func:`all_pairs`."""
    return all_pairs(embeddings, people, np.empty((0, embeddings.shape[1]), np.float32), np.empty(0, np.int32))


def all_pairs(
    embeddings: NDArray[np.float32],
    people: NDArray[np.int32],
    others: NDArray[np.float32],
    other_people: NDArray[np.int32],
) -> tuple[Pairs, Pairs]:
    """Genuine and impostor pairs: every two of ``embeddings``, and each of them with each of ``others``.

    ``embeddings``: ``float32[N, D]``, L2-normalised, of people ``int32[N]``. ``others``: ``float32[M, D]`` of
    people ``int32[M]``, M ≥ 0, none of whom is among the first; they are not compared with one another.
    Memory: 12 bytes for each pair, and one block of the similarity matrix. Raises ValueError if people are
    among both.
    """
    if np.intersect1d(people, other_people).size:
        raise ValueError("a person is among both, the embeddings and the others")
    count = len(embeddings)
    _, sizes = np.unique(people, return_counts=True)
    genuine_count = int((sizes * (sizes - 1) // 2).sum())
    impostor_count = count * (count - 1) // 2 - genuine_count + count * len(others)
    genuine, impostor = _empty(genuine_count), _empty(impostor_count)
    at_genuine = at_impostor = 0
    columns, column_people = np.concatenate([embeddings, others]), np.concatenate([people, other_people])
    for start in range(0, count, _BLOCK):
        stop = min(start + _BLOCK, count)
        block = embeddings[start:stop] @ columns.T
        for row in range(start, stop):
            similarity, second = block[row - start, row + 1 :], column_people[row + 1 :]
            same = second == people[row]
            at_genuine = _fill(genuine, at_genuine, similarity[same], people[row], second[same])
            at_impostor = _fill(impostor, at_impostor, similarity[~same], people[row], second[~same])
    return genuine, impostor


def rates(genuine: NDArray[np.float32], impostor: NDArray[np.float32], fprs: Sequence[float]) -> list[Rate]:
    """TPR at each FPR: the threshold is the 1 − fpr quantile of the impostors, linear between neighbours
    (type 7 of Hyndman & Fan 1996), and TPR the share of genuine pairs above it.

    ``genuine``, ``impostor``: ``float32[P]``, ``float32[Q]``, P, Q ≥ 1. Raises ValueError if one is empty.
    """
    if not len(genuine) or not len(impostor):
        raise ValueError("genuine and impostor pairs are needed")
    thresholds = np.quantile(impostor.astype(np.float64), [1 - fpr for fpr in fprs])
    ascending = np.sort(genuine)
    above = len(ascending) - np.searchsorted(ascending, thresholds, side="right")
    return [
        Rate(fpr, float(threshold), float(count) / len(ascending))
        for fpr, threshold, count in zip(fprs, thresholds, above, strict=True)
    ]


def curve(
    genuine: NDArray[np.float32], impostor: NDArray[np.float32], points: int = 201
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """FPR and TPR, ``float64[points]`` each: FPR from 1 / Q to 1 in equal steps of its logarithm, Q impostors."""
    fprs = np.logspace(-np.log10(len(impostor)), 0, points)
    fprs[-1] = 1.0
    return fprs, np.array([rate.tpr for rate in rates(genuine, impostor, fprs.tolist())])


def rates_with_intervals(
    genuine: Pairs, impostor: Pairs, fprs: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0
) -> list[Rate]:
    """:func:`rates` with 95 % intervals: the middle 95 % of ``resamples`` samples of the people.

    Pairs that share a person are not independent, so people are drawn with replacement, not pairs (Bolle,
    Ratha, Pankanti 2004, "Error analysis of pattern recognition systems: the subsets bootstrap"): a genuine
    pair counts as often as its person was drawn, an impostor pair as often as the product for both. Each
    group of people is drawn on its own: those with genuine pairs, and those who occur as impostors only.
    """
    order = np.argsort(impostor.similarity)
    similarity = impostor.similarity[order]
    first, second = impostor.first[order], impostor.second[order]
    del order
    probes = np.unique(np.concatenate([genuine.first, impostor.first]))
    fillers = np.setdiff1d(impostor.second, probes)
    generator = np.random.default_rng(seed)
    samples = []
    for _ in range(resamples):
        weights = np.zeros(int(max(probes.max(), fillers.max(initial=0))) + 1, dtype=np.float32)
        for group in (probes, fillers):
            if len(group):
                weights += times_drawn(generator, group, len(weights))
        genuine_weights = weights[genuine.first]
        shares = np.cumsum(weights[first] * weights[second], dtype=np.float64)
        if not genuine_weights.any() or shares[-1] == 0:
            continue
        places = np.searchsorted(shares, [(1 - fpr) * shares[-1] for fpr in fprs])
        thresholds = similarity[np.minimum(places, len(similarity) - 1)]
        samples.append([genuine_weights[genuine.similarity > t].sum() / genuine_weights.sum() for t in thresholds])
    found = rates(genuine.similarity, impostor.similarity, fprs)
    if not samples:
        return found
    low, high = np.quantile(np.array(samples, dtype=np.float64), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return [
        Rate(rate.fpr, rate.threshold, rate.tpr, float(least), float(most))
        for rate, least, most in zip(found, low, high, strict=True)
    ]


def _empty(count: int) -> Pairs:
    return Pairs(np.empty(count, np.float32), np.empty(count, np.int32), np.empty(count, np.int32))


def _fill(pairs: Pairs, start: int, similarity: NDArray[np.float32], first: np.int32, second: NDArray[np.int32]) -> int:
    stop = start + len(similarity)
    pairs.similarity[start:stop] = similarity
    pairs.first[start:stop] = first
    pairs.second[start:stop] = second
    return stop
