"""How high strangers score: what :class:`service.calibration.Calibration` holds, from similarities of known people.

1:1. Above a high threshold the excesses of almost any distribution follow a generalised Pareto distribution
(Balkema & de Haan 1974, Pickands 1975). It takes over where the sample thins out.

1:N. The best of k templates of one person scores higher than one of them, and lower than the best of k people;
and some probes resemble everybody. Both are measured here: k templates count as ``effective`` independent
ones, and ``spread`` tells how much the rate of false positives differs between strangers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from service.calibration import rate_of_all, thresholds_at
from service.evaluation import times_drawn
from training.metrics import LEVEL, Pairs

RULE_OF_30 = 30
"""Errors that a rate must rest on (Doddington's rule of 30, ISO/IEC 19795-1), counted in pairs of people: the
photos of the same two people are not independent."""

TEMPLATES = (1, 2, 3, 5, 10, 20)
"""Templates of one subject for which their worth is measured."""

DRAWS = 10
"""Sets of k photos that are drawn of each person."""

RESAMPLES = 100

_TAIL = (0.001, 0.1)
_TAIL_LEAST = 10
_EFFECTIVE_AT = (0.01, 0.003, 0.001)
_SPREAD_AT = (0.5, 0.3, 0.2, 0.1, 0.05)
_SPREADS = (0.05, 100.0)
_DEFAULT_SPREAD = 1.0


@dataclass(frozen=True)
class Sample:
    """Photos of one look, such as whole or tight ones. ``embeddings``: ``float32[N, D]``, L2-normalised;
    ``people``: ``int32[N]``, the same number for one person in every look."""

    embeddings: NDArray[np.float32]
    people: NDArray[np.int32]


@dataclass(frozen=True)
class Curve:
    """Thresholds at FMR levels, ``float64[M]`` each; ``low``, ``high``: 95 % interval of ``threshold``."""

    fmr: NDArray[np.float64]
    threshold: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]
    supported: float


def rate_levels() -> NDArray[np.float64]:
    """The FMR levels that a calibration keeps: 1 to 1e-12, 20 a decade down to 1e-6 and 5 below."""
    return np.concatenate([np.logspace(0, -6, 121), np.logspace(-6, -12, 31)[1:]])


@dataclass(frozen=True)
class ParetoTail:
    """P(X > x | X > start) = (1 + shape (x − start) / scale)^(−1 / shape), a generalised Pareto distribution.

    ``start``: where it takes over; ``scale`` > 0; ``shape``: below 0 the distribution ends at
    ``start - scale / shape``.
    """

    start: float
    scale: float
    shape: float

    def survival(self, x: NDArray[np.float64]) -> NDArray[np.float64]:
        """P(X > x | X > start), ``float64[...]``, for x ≥ start."""
        excess = np.maximum(x - self.start, 0.0) / self.scale
        if abs(self.shape) < 1e-9:
            return np.exp(-excess)
        return np.maximum(1 + self.shape * excess, 0.0) ** (-1 / self.shape)

    def exceeded(self, share: NDArray[np.float64]) -> NDArray[np.float64]:
        """The x that a share in (0, 1] of what lies above ``start`` exceeds."""
        if abs(self.shape) < 1e-9:
            return self.start - self.scale * np.log(share)
        return self.start + self.scale / self.shape * (share**-self.shape - 1)


def fit_tail(descending: NDArray[np.float64], weights: NDArray[np.float64], start: float) -> ParetoTail:
    """Fit by probability-weighted moments (Hosking & Wallis 1987), which need no iteration.

    ``descending``: ``float64[M]``, M ≥ 1, what lies above ``start``, highest first; ``weights``: ``float64[M]``,
    ≥ 0, not all 0. The shape is kept within −0.5…0.5, outside which these moments say little.
    """
    excess = np.maximum(descending - start, 0.0)
    total = float(weights.sum())
    # Share of the weight that lies above each value.
    above = (np.cumsum(weights) - weights / 2) / total
    mean = float(weights @ excess) / total
    first = float(weights @ (excess * above)) / total
    if mean <= 0 or mean <= 2 * first:
        return ParetoTail(start, max(mean, 1e-9), 0.0)
    shape = float(np.clip(2 - mean / (mean - 2 * first), -0.5, 0.5))
    return ParetoTail(start, max(mean * (1 - shape), 1e-9), shape)


def fmr_curve(impostor: Pairs, *, resamples: int = RESAMPLES, seed: int = 0) -> Curve:
    """Thresholds of the sample as far as it supports them, and of a Pareto tail beyond.

    Supported is the FMR at which :data:`RULE_OF_30` pairs of people still match. The interval is of
    ``resamples`` samples in which people are drawn with replacement (Bolle, Ratha, Pankanti 2004): a pair
    counts as often as both its people were drawn, taken times each other. Raises ValueError without a pair.
    """
    if not len(impostor):
        raise ValueError("impostor pairs are needed")
    order = np.argsort(-impostor.similarity, kind="stable")
    similarity = impostor.similarity[order].astype(np.float64)
    first, second = impostor.first[order], impostor.second[order]
    fmr = rate_levels()
    supported = _supported(first, second)
    everything = np.ones(len(similarity))
    threshold = _thresholds(similarity, everything, fmr, supported)
    # Where the sample decides, its own rate must not exceed the level by a tie.
    sampled = fmr >= supported
    threshold[sampled] = thresholds_at(impostor.similarity, fmr[sampled])
    threshold = np.minimum(np.maximum.accumulate(threshold), 1.0)
    people = np.unique(np.concatenate([first, second]))
    generator = np.random.default_rng(seed)
    samples = [threshold]
    for _ in range(resamples):
        # Sums of these weights over millions of pairs need float64.
        weights = times_drawn(generator, people, int(people.max()) + 1).astype(np.float64)
        drawn = weights[first] * weights[second]
        if drawn.any():
            samples.append(np.minimum(np.maximum.accumulate(_thresholds(similarity, drawn, fmr, supported)), 1.0))
    low, high = np.quantile(np.array(samples), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return Curve(fmr, threshold, np.minimum(low, threshold), np.maximum(high, threshold), supported)


def effective_templates(samples: Sequence[Sample], *, seed: int = 0) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """For how many independent templates k templates of one person count, for each k of :data:`TEMPLATES`.

    The ratio of the rates at which the best of k and a single one reach a threshold, geometric mean over
    those at which the best of k has the rates 0.01, 0.003 and 0.001. Left out are k for which not even half of
    the people, or not two, have so many photos. Never falls with k and never rises faster than k.
    """
    templates, effective = [1], [1.0]
    people = len(np.unique(np.concatenate([sample.people for sample in samples])))
    for k in TEMPLATES[1:]:
        able = [_with_photos(sample, k) for sample in samples]
        if any(len(subjects) < max(2, people / 2) for subjects in able):
            break
        single: list[NDArray[np.float64]] = []
        best: list[NDArray[np.float64]] = []
        for sample, subjects in zip(samples, able, strict=True):
            single += _strangers(sample, subjects, 1, seed)
            best += _strangers(sample, subjects, k, seed)
        one, several = np.sort(np.concatenate(single, axis=None)), np.sort(np.concatenate(best, axis=None))
        ratios = []
        for rate in _EFFECTIVE_AT:
            above = len(one) - int(np.searchsorted(one, np.quantile(several, 1 - rate)))
            if rate * len(several) >= _TAIL_LEAST and above:
                ratios.append(math.log(rate * len(one) / above))
        most = effective[-1] * k / templates[-1]
        effective.append(min(most, max(effective[-1], math.exp(float(np.mean(ratios))) if ratios else most)))
        templates.append(k)
    return tuple(templates), tuple(effective)


def spread_of_strangers(samples: Sequence[Sample], *, seed: int = 0) -> float:
    """The shape of the gamma distribution of strangers' own rates, see :func:`service.calibration.rate_of_all`.

    Every photo searches a gallery of all other people with one template each; the median over the shapes that
    explain, at FPIR 0.5 to 0.05, how much rarer that is somebody than as many independent comparisons would be.
    1 for samples of fewer than 20 people, which cannot tell.
    """
    single: list[NDArray[np.float64]] = []
    best: list[NDArray[np.float64]] = []
    others = []
    for sample in samples:
        numbers = np.unique(sample.people)
        scores = _strangers(sample, numbers, 1, seed)
        single += scores
        # One row of scores for each stranger: of each other person one photo at a time.
        best += [row.reshape(len(numbers) - 1, -1).max(axis=0) for row in scores]
        others.append(len(numbers) - 1)
    if min(others) < 19:
        return _DEFAULT_SPREAD
    one, several = np.sort(np.concatenate(single)), np.sort(np.concatenate(best))
    found = []
    for rate in _SPREAD_AT:
        fmr = 1 - np.searchsorted(one, np.quantile(several, 1 - rate)) / len(one)
        low, high = (rate_of_all(fmr, float(np.mean(others)), spread) - rate for spread in _SPREADS)
        if low >= 0 or high <= 0:
            found.append(_SPREADS[0] if low >= 0 else _SPREADS[1])
            continue
        found.append(float(brentq(lambda x, f=fmr, r=rate: rate_of_all(f, float(np.mean(others)), x) - r, *_SPREADS)))
    return float(np.median(found))


def _strangers(sample: Sample, subjects: NDArray[np.int32], k: int, seed: int) -> list[NDArray[np.float64]]:
    """For each photo the best score with each drawn set of k photos of each other subject, set by set.

    ``float64[S * DRAWS]`` for each photo, S the subjects without the photo's own person, subject by subject.
    """
    generator = np.random.default_rng(seed)
    similarity = sample.embeddings @ sample.embeddings.T
    columns = []
    for subject in subjects:
        photos = np.flatnonzero(sample.people == subject)
        drawn = np.stack([generator.permutation(photos)[:k] for _ in range(DRAWS)])
        columns.append(similarity[:, drawn].max(axis=2))
    scores = np.stack(columns, axis=1).astype(np.float64)
    return [scores[i, subjects != person].ravel() for i, person in enumerate(sample.people)]


def _with_photos(sample: Sample, k: int) -> NDArray[np.int32]:
    numbers, photos = np.unique(sample.people, return_counts=True)
    return numbers[photos >= k]


def _supported(first: NDArray[np.int32], second: NDArray[np.int32]) -> float:
    """The share of pairs, highest first, in which :data:`RULE_OF_30` pairs of people occur; 1 if there are fewer."""
    low, high = np.minimum(first, second).astype(np.int64), np.maximum(first, second)
    _, places = np.unique(low * (int(high.max()) + 1) + high, return_index=True)
    if len(places) < RULE_OF_30:
        return 1.0
    return float(np.sort(places)[RULE_OF_30 - 1] + 1) / len(first)


def _thresholds(
    descending: NDArray[np.float64], weights: NDArray[np.float64], fmr: NDArray[np.float64], supported: float
) -> NDArray[np.float64]:
    shares = np.cumsum(weights)
    shares /= shares[-1]
    least = min(_TAIL_LEAST, len(descending)) / len(descending)
    begin = max(min(max(10 * supported, _TAIL[0]), _TAIL[1]), least)
    above = min(int(np.searchsorted(shares, begin * (1 - 1e-9))), len(shares) - 1)
    tail = fit_tail(descending[: above + 1], weights[: above + 1], float(descending[above]))
    places = np.minimum(np.searchsorted(shares, fmr * (1 - 1e-12)), len(shares) - 1)
    reached = float(shares[above])
    modelled = tail.exceeded(np.minimum(fmr / reached, 1.0))
    return np.where(fmr < min(supported, reached), modelled, descending[places])
