"""From a false-positive rate to a threshold, and from a similarity to a probability. Pure arithmetic.

Rates are those of ISO/IEC 19795-1: FMR, the share of impostor comparisons (two different people) that
reach the threshold; FNMR, the share of genuine comparisons that do not. For 1:N search without knowledge
of who is enrolled, FPIR is the share of searches by strangers that return somebody (NIST FRVT 1:N).
"""

from __future__ import annotations

import math
import operator
from bisect import bisect_left
from pathlib import Path
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from service.domain import OperatingPoint

LEVELS_PER_DECADE = 40
"""How many FMR levels a calibration keeps between one power of ten and the next."""

MAX_STEPS = 100
"""Newton steps after which the fit of the probability ends; about ten are needed."""

Rates = Annotated[tuple[float, ...], Field(min_length=2)]


class Calibration(BaseModel):
    """The score distributions that ship with a model.

    ``fmr`` falls from 1 to 1 / ``impostor_pairs``; ``threshold`` (cosine) rises with it: of the sample's
    impostor pairs, the share ``fmr[i]`` at most has a similarity of ``threshold[i]`` or more.
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
    fmr: Rates
    threshold: Rates
    slope: float = Field(gt=0)
    intercept: float

    @model_validator(mode="after")
    def _monotone(self) -> Calibration:
        if len(self.fmr) != len(self.threshold):
            raise ValueError("fmr and threshold differ in length")
        if not (np.all(np.diff(self.fmr) < 0) and np.all(np.diff(self.threshold) >= 0)):
            raise ValueError("fmr must fall and threshold must not")
        if not 0 < self.fmr[-1] < self.fmr[0] <= 1:
            raise ValueError("fmr lies outside 0…1")
        return self

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read ``calibration.json``. Raises ``OSError`` or pydantic's ``ValidationError``."""
        return cls.model_validate_json(path.read_bytes())

    def at_fmr(self, fmr: float) -> tuple[float, bool]:
        """Return the threshold for an FMR in (0, 1), and whether the sample was too small for it.

        Between the stored levels it is the threshold of the next smaller one, so that the sample's own FMR
        never exceeds what was asked, and falls short of it by 6 % at most (:data:`LEVELS_PER_DECADE`). Below
        the smallest level it is the strictest that the sample supports, and the second value is True.
        Raises ValueError for a rate outside (0, 1).
        """
        if not 0 < fmr < 1:
            raise ValueError(f"an FMR lies between 0 and 1, not at {fmr}")
        # A rate that is a stored level up to rounding is that level.
        place = bisect_left(self.fmr, -fmr * (1 + 1e-9), key=operator.neg)
        if place == len(self.fmr):
            return self.threshold[-1], True
        return self.threshold[place], False

    def verification_point(self, fpr: float) -> OperatingPoint:
        """Return the 1:1 operating point: the FMR is the asked rate."""
        threshold, extrapolated = self.at_fmr(fpr)
        return OperatingPoint(fpr, threshold, extrapolated)

    def identification_point(self, fpr: float, templates: int) -> OperatingPoint:
        """Return the 1:N operating point for a gallery of ``templates`` enrolled faces (at least 0).

        A stranger is compared with every template, so that each comparison may err at
        ``1 - (1 - fpr)^(1 / templates)`` if all of them together shall err at ``fpr``.
        """
        fmr = -math.expm1(math.log1p(-fpr) / max(templates, 1))
        threshold, extrapolated = self.at_fmr(fmr)
        return OperatingPoint(fpr, threshold, extrapolated)

    def probability(self, similarity: float) -> float:
        """Return the probability, 0…1, that two faces are one person's, if both answers were as likely before."""
        return 0.5 * (1.0 + math.tanh((self.slope * similarity + self.intercept) / 2))


def rate_levels(pairs: int) -> NDArray[np.float64]:
    """Return the FMR levels that a sample of ``pairs`` supports: from 1 down to ``1 / pairs``, log-spaced."""
    count = max(2, math.ceil(LEVELS_PER_DECADE * math.log10(pairs)) + 1)
    return np.logspace(0, -math.log10(pairs), count)


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
