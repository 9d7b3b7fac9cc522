"""Do strangers still score as the calibration said? Pure arithmetic, and what is remembered of probes for it.

A stranger's best similarity, turned into the rate of :meth:`service.calibration.Calibration.identification_rate`,
is uniform on 0…1 whatever the gallery's size, if the calibration is right. Failed searches of enrolled people
gather among the most similar, and matches are more similar still: the most similar fifth is left out. Of the rest,
:data:`EXPECTED` should lie in the more similar half of strangers.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, field

import structlog

from service.domain import Drift

TOP = 0.2
HALF = 0.5
EXPECTED = round((HALF - TOP) / (1 - TOP), 9)

MEMORY = 1000
"""Probes after which an old one counts 1 / e."""

LEAST = 100
"""Counted probes without which nothing is said."""

SIGMAS = 3.0

WORTH = 4.0
"""The number of probes says nothing about whom they are compared with: in a gallery of five it is chance whether
strangers resemble them. Between galleries drawn at random the share varies as if each subject were so many probes
(``vultus-train guards``)."""

EDGES = (*(step / 20 for step in range(14)), *(step / 40 for step in range(28, 41)))
"""Upper edges of the histogram of best similarities: steps of 0.05 up to 0.7, then of 0.025."""

WARNING = (
    "Strangers score higher than the calibration says: {measured:.0%} of the counted probes are more similar than the "
    "median stranger, {expected:.1%} were expected. More strangers than asked may be taken for somebody. Ask for a "
    "lower fpr, or calibrate with photos of these cameras."
)

_log = structlog.get_logger("vultus.drift")


@dataclass
class StrangerRates:
    """The recent rates of one gallery's probes, the older the less they count.

    ``upper``, ``lower``: decayed numbers of those from :data:`TOP` to :data:`HALF`, and from there to 1.
    """

    upper: float = 0.0
    lower: float = 0.0

    def add(self, rate: float) -> None:
        """Count a probe. ``rate``: FPIR, 0…1, at which its best similarity would be the threshold."""
        if rate < TOP:
            return
        keep = 1 - 1 / MEMORY
        self.upper = self.upper * keep + (rate < HALF)
        self.lower = self.lower * keep + (rate >= HALF)

    @property
    def probes(self) -> float:
        """How many probes it rests on; at most :data:`MEMORY`."""
        return self.upper + self.lower

    @property
    def measured(self) -> float:
        """The share to hold against :data:`EXPECTED`, 0…1."""
        return self.upper / max(self.probes, 1e-12)

    def drifted(self, subjects: int) -> bool:
        """Whether strangers score higher than :data:`EXPECTED` allows, beyond chance, in a gallery of ``subjects``.

        The lower end of Wilson's interval (1927) for :data:`SIGMAS` standard errors lies above it.
        """
        if self.probes < LEAST or not subjects:
            return False
        count = 1 / (1 / self.probes + 1 / (WORTH * subjects))
        square = SIGMAS**2 / count
        share = self.measured
        spread = SIGMAS * math.sqrt(share * (1 - share) / count + square / (4 * count))
        return (share + square / 2 - spread) / (1 + square) > EXPECTED


@dataclass
class Histogram:
    """Best similarities. ``counts``: those up to each of :data:`EDGES`, and at the end those beyond the last."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(EDGES) + 1))
    total: float = 0.0

    def add(self, similarity: float) -> None:
        self.counts[bisect_left(EDGES, similarity)] += 1
        self.total += similarity


class Probes:
    """What is remembered of each gallery's probes, in memory and without a face. Not for several threads at once."""

    def __init__(self) -> None:
        self._rates: dict[str, StrangerRates] = {}
        self._warned: set[str] = set()
        self.similarities: dict[tuple[str, str], Histogram] = {}

    def add(self, gallery: str, decision: str, similarity: float, rate: float, subjects: int) -> None:
        """Count a probe that was answered with ``decision``; log once when strangers begin to score too high."""
        self.similarities.setdefault((gallery, decision), Histogram()).add(similarity)
        rates = self._rates.setdefault(gallery, StrangerRates())
        rates.add(rate)
        if gallery not in self._warned:
            if rates.drifted(subjects):
                self._warned.add(gallery)
                _log.warning("strangers score high", gallery=gallery, measured=rates.measured, expected=EXPECTED)
        elif rates.measured <= EXPECTED:
            self._warned.remove(gallery)

    def drift(self, gallery: str) -> Drift:
        """Return what is known of one gallery's strangers. The warning stays until the share is as expected."""
        rates = self._rates.get(gallery, StrangerRates())
        measured = rates.measured if rates.probes else None
        warning = WARNING.format(measured=rates.measured, expected=EXPECTED) if gallery in self._warned else None
        return Drift(round(rates.probes), EXPECTED, measured, warning)

    def forget(self, gallery: str) -> None:
        """Forget a gallery."""
        self._rates.pop(gallery, None)
        self._warned.discard(gallery)
        for key in [key for key in self.similarities if key[0] == gallery]:
            del self.similarities[key]
