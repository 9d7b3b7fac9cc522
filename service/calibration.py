"""From a false-positive rate to a threshold, and from a similarity to a probability. Pure arithmetic.

Rates are those of ISO/IEC 19795-1: FMR, the share of impostor comparisons (two different people) that
reach the threshold; FNMR, the share of genuine comparisons that do not. For 1:N search without knowledge
of who is enrolled, FPIR is the share of searches by strangers that return somebody (NIST FRVT 1:N).
"""

from __future__ import annotations

import math
import operator
from bisect import bisect_left, bisect_right
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.domain import OperatingPoint
from service.errors import FprUnsupported

MAX_STEPS = 100
"""Newton steps after which the fit of the probability ends; about ten are needed."""

Numbers = Annotated[tuple[float, ...], Field(min_length=2)]


class Calibration(BaseModel):
    """The score distributions that ship with a model.

    1:1. ``fmr`` falls from 1; ``threshold`` (cosine) rises with it: the share ``fmr[i]`` of impostor pairs has
    a similarity of ``threshold[i]`` or more. Below ``supported_fmr`` the sample has too few pairs of people,
    and the thresholds are those of a generalised Pareto tail. ``low`` and ``high`` are the 95 % interval of each
    threshold, with the people drawn anew.

    1:N. Of N subjects with T templates, ``N * effective(T / N)`` comparisons count as independent: ``effective[i]``
    for ``templates[i]`` templates of one subject, since the best of several scores higher than one, but lower than
    the best of as many different people. Probes differ: the rate at which a stranger is mistaken has a gamma
    distribution with shape ``spread`` over strangers.

    ``smallest_fmr`` and ``smallest_fpir``: what may be asked of verification and of identification at least.
    ``slope`` and ``intercept``: logistic regression of "same person" on similarity, both classes weighted
    alike (Platt 1999).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_id: str
    model_sha256: str
    source: str
    terms: str
    identities: int = Field(ge=2)
    images: int = Field(ge=2)
    genuine_pairs: int = Field(ge=1)
    impostor_pairs: int = Field(ge=1)
    supported_fmr: float = Field(gt=0, le=1)
    smallest_fmr: float = Field(gt=0, lt=1)
    smallest_fpir: float = Field(gt=0, lt=1)
    fmr: Numbers
    threshold: Numbers
    low: Numbers
    high: Numbers
    templates: Annotated[tuple[int, ...], Field(min_length=1)]
    effective: Annotated[tuple[float, ...], Field(min_length=1)]
    spread: float = Field(gt=0)
    slope: float = Field(gt=0)
    intercept: float

    @model_validator(mode="after")
    def _monotone(self) -> Calibration:
        if not len(self.fmr) == len(self.threshold) == len(self.low) == len(self.high):
            raise ValueError("fmr, threshold, low and high differ in length")
        if not (np.all(np.diff(self.fmr) < 0) and np.all(np.diff(self.threshold) >= 0)):
            raise ValueError("fmr must fall and threshold must not")
        if not 0 < self.fmr[-1] < self.fmr[0] <= 1:
            raise ValueError("fmr lies outside 0…1")
        if len(self.templates) != len(self.effective):
            raise ValueError("templates and effective differ in length")
        if self.templates[0] != 1 or self.effective[0] != 1:
            raise ValueError("templates and effective begin with 1")
        log_templates, log_effective = np.log(self.templates), np.log(self.effective)
        rises = np.diff(log_effective)
        # More templates are never fewer comparisons, and never count for more than as many people.
        if np.any(np.diff(self.high) < 0) or np.any(np.subtract(self.high, self.threshold) < 0):
            raise ValueError("high must not fall, nor lie below threshold")
        if np.any(np.diff(log_templates) <= 0) or np.any(rises < 0) or np.any(rises > np.diff(log_templates) + 1e-9):
            raise ValueError("effective must rise, and not faster than templates")
        return self

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read ``calibration.json``. Raises ``OSError`` or pydantic's ``ValidationError``."""
        return cls.model_validate_json(path.read_bytes())

    def at_fmr(self, fmr: float, *, safe: bool = False) -> tuple[float, bool]:
        """Return the threshold for an FMR in (0, 1), and whether the tail model had to stand in for the sample.

        ``safe``: half way to the upper end of the threshold's interval, about one standard error.

        Linear in the logarithm of the rate between stored levels; below the smallest it is that one's threshold.
        Raises ValueError for a rate outside (0, 1).
        """
        if not 0 < fmr < 1:
            raise ValueError(f"an FMR lies between 0 and 1, not at {fmr}")
        extrapolated = fmr < self.supported_fmr * (1 - 1e-9)
        place = bisect_left(self.fmr, -fmr, key=operator.neg)
        if place == 0:
            return self._level(0, safe), extrapolated
        if place == len(self.fmr):
            return self._level(-1, safe), True
        above, below = self.fmr[place - 1], self.fmr[place]
        share = min(1.0, max(0.0, math.log(above / fmr) / math.log(above / below)))
        start, end = self._level(place - 1, safe), self._level(place, safe)
        # Not beyond its neighbours by rounding: a threshold never falls as the rate does.
        return min(end, max(start, start + share * (end - start))), extrapolated

    def verification_point(self, fpr: float) -> OperatingPoint:
        """Return the 1:1 operating point for two photos: the FMR is the asked rate, in (0, 1).

        Raises :class:`~service.errors.FprUnsupported` below ``smallest_fmr``.
        """
        return self.subject_point(fpr, 1)

    def subject_point(self, fpr: float, templates: int) -> OperatingPoint:
        """Return the 1:1 operating point for a photo and a subject with ``templates`` enrolled faces.

        ``fpr``: share of impostors whose best comparison with the subject is a match, in (0, 1). Raises
        :class:`~service.errors.FprUnsupported` below ``smallest_fmr``.
        """
        _require(fpr, self.smallest_fmr)
        return self._point(fpr, 1, templates, safe=False)

    def identification_point(self, fpr: float, subjects: int, templates: int) -> OperatingPoint:
        """Return the 1:N operating point for a gallery of ``subjects`` with ``templates`` enrolled faces in all.

        ``fpr``: FPIR, in (0, 1). An empty gallery has the point of one subject with one template; nobody
        can be found in it. The threshold is about one standard error above the estimate: the rate is an upper
        limit, and a sample of people who happen to be unlike one another should not raise it. Raises
        :class:`~service.errors.FprUnsupported` below ``smallest_fpir``.
        """
        _require(fpr, self.smallest_fpir)
        return self._point(fpr, subjects, templates, safe=True)

    def identification_rate(self, similarity: float, subjects: int, templates: int) -> float:
        """Return the FPIR, 0…1, that a threshold at this similarity is estimated to have in such a gallery.

        The share of strangers whose best similarity reaches it, hence a number that is uniformly distributed over
        strangers, whatever the gallery's size. It undoes :meth:`identification_point`, but for that one's margin of
        safety, and never rises with the similarity. It says nothing of rates below the last of the calibration's.
        """
        fmr = self._fmr(similarity)
        return 1.0 if fmr >= 1 else rate_of_all(fmr, self.comparisons(subjects, templates), self.spread)

    def comparisons(self, subjects: int, templates: int) -> float:
        """Return how many independent comparisons a search of ``templates`` faces of ``subjects`` people is worth.

        At least 1. It falls neither with more subjects nor with more templates. Beyond the stored numbers of
        templates for a subject, each further one counts as much as it can: as another person.
        """
        subjects = max(subjects, 1)
        templates = max(templates, subjects)
        each = templates / subjects
        place = bisect_right(self.templates, each)
        start, effective = self.templates[place - 1], self.effective[place - 1]
        if place == len(self.templates):
            rise = 1.0
        else:
            rise = math.log(self.effective[place] / effective) / math.log(self.templates[place] / start)
        return float(subjects * effective * (each / start) ** rise)

    def probability(self, similarity: float) -> float:
        """Return the probability, 0…1, that two faces are one person's, if both answers were as likely before."""
        return 0.5 * (1.0 + math.tanh((self.slope * similarity + self.intercept) / 2))

    def _fmr(self, threshold: float) -> float:
        """The FMR in (0, 1] of a threshold: :meth:`at_fmr` undone; of levels with one threshold the highest."""
        place = bisect_left(self.threshold, threshold)
        if place == 0:
            return self.fmr[0]
        if place == len(self.threshold):
            return self.fmr[-1]
        start, end = self.threshold[place - 1], self.threshold[place]
        above, below = self.fmr[place - 1], self.fmr[place]
        share = (threshold - start) / (end - start)
        # Not beyond its neighbours by rounding: a rate never rises with the threshold.
        return float(min(above, max(below, above * (below / above) ** share)))

    def _level(self, place: int, safe: bool) -> float:
        return (self.threshold[place] + self.high[place]) / 2 if safe else self.threshold[place]

    def _point(self, fpr: float, subjects: int, templates: int, *, safe: bool) -> OperatingPoint:
        fmr = rate_of_one(fpr, self.comparisons(subjects, templates), self.spread)
        threshold, extrapolated = self.at_fmr(min(max(fmr, 1e-300), 1 - 1e-15), safe=safe)
        return OperatingPoint(fpr, threshold, extrapolated, model_identities=self.identities)


def rate_of_all(fmr: float, comparisons: float, spread: float) -> float:
    """Return the FPIR of searches that are worth ``comparisons`` comparisons at an FMR, both rates in (0, 1).

    A stranger whose own rate is ``a`` times the average passes the threshold nowhere with probability
    exp(−a M h), M comparisons. With ``a`` gamma-distributed, mean 1 and shape ``spread``, over strangers, the
    share of those who pass it somewhere is 1 − (1 + M h / spread)^−spread, the negative binomial's zero term;
    h follows from M = 1, which is the FMR. As ``spread`` grows it becomes 1 − (1 − FMR)^M.
    """
    hazard = spread * math.expm1(-math.log1p(-fmr) / spread)
    return -math.expm1(-spread * math.log1p(comparisons * hazard / spread))


def rate_of_one(fpir: float, comparisons: float, spread: float) -> float:
    """Return the FMR at which ``comparisons`` comparisons together have this FPIR: :func:`rate_of_all` undone."""
    if comparisons <= 1:
        return fpir
    # With a very small spread and a rate near 1 the first exponential is beyond floats; 1 is what comes out.
    exponent = -math.log1p(-fpir) / spread
    hazard = math.exp(700) if exponent > 700 else spread * math.expm1(exponent)
    return -math.expm1(-spread * math.log1p(hazard / comparisons / spread))


def _require(fpr: float, smallest: float) -> None:
    if fpr < smallest * (1 - 1e-9):
        raise FprUnsupported(f"The model's calibration supports rates from {smallest:.3g}; {fpr:.3g} was asked for.")


def thresholds_at(impostors: NDArray[np.floating], fmr: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the smallest thresholds at which at most ``fmr`` of the impostor similarities match.

    ``impostors``: ``float[N]`` cosines, N ≥ 1, any order. ``fmr``: ``float64[M]``, 0…1. A match is a
    similarity at or above the threshold, hence each threshold lies just above an observed impostor.
    """
    ascending = np.sort(impostors)
    allowed = np.floor(fmr * len(ascending) * (1 + 1e-12)).astype(np.int64)
    highest_refused = ascending[np.clip(len(ascending) - 1 - allowed, 0, None)]
    thresholds = np.nextafter(highest_refused, np.asarray(np.inf, dtype=ascending.dtype)).astype(np.float64)
    return np.where(allowed >= len(ascending), float(ascending[0]), thresholds)


def fit_probability(genuine: NDArray[np.floating], impostors: NDArray[np.floating]) -> tuple[float, float]:
    """Return slope and intercept of P(same person | similarity), both classes weighted alike (Platt 1999).

    ``genuine``, ``impostors``: ``float[N]`` cosines, N ≥ 1. Maximum likelihood by iteratively reweighted
    least squares, with Platt's targets (n + 1) / (n + 2) and 1 / (n + 2) in place of 1 and 0, n the smaller
    class, so that the slope stays finite where the classes do not overlap. Raises ValueError if a class is
    empty, or if similarity does not tell genuine from impostor pairs at all.
    """
    if not len(genuine) or not len(impostors):
        raise ValueError("genuine and impostor pairs are needed")
    similarity = np.concatenate([genuine, impostors]).astype(np.float64)
    weight = np.repeat([0.5 / len(genuine), 0.5 / len(impostors)], [len(genuine), len(impostors)])
    smaller = min(len(genuine), len(impostors))
    high, low = (smaller + 1) / (smaller + 2), 1 / (smaller + 2)
    target = np.repeat([high, low], [len(genuine), len(impostors)])
    centre = float(weight @ similarity)
    spread = math.sqrt(float(weight @ (similarity - centre) ** 2))
    if spread == 0:
        raise ValueError("all similarities are the same")
    scaled = (similarity - centre) / spread
    slope, intercept = 0.0, 0.0
    for _ in range(MAX_STEPS):
        odds = slope * scaled + intercept
        probability = 0.5 * (1 + np.tanh(odds / 2))
        curvature = weight * probability * (1 - probability)
        residual = weight * (target - probability)
        moments = [float(curvature.sum()), float(curvature @ scaled), float(curvature @ scaled**2)]
        step_intercept, step_slope = np.linalg.solve(
            [[moments[0], moments[1]], [moments[1], moments[2]]], [float(residual.sum()), float(residual @ scaled)]
        )
        # A full Newton step may overshoot far from the optimum; the likelihood is concave, so a bounded one arrives.
        factor = min(1.0, 2.0 / max(abs(step_slope), abs(step_intercept), 1e-300))
        slope += factor * float(step_slope)
        intercept += factor * float(step_intercept)
        if max(abs(step_slope), abs(step_intercept)) < 1e-10:
            break
    if slope <= 0:
        raise ValueError("genuine pairs are not more similar than impostor pairs")
    return slope / spread, intercept - slope * centre / spread
