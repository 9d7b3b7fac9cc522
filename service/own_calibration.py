"""What a gallery's own people say about its thresholds. Pure: vectors in, operating points out.

The people of a gallery are strangers to one another, seen by the user's own cameras. Each one in turn is left out and
searches the others: how often that finds somebody is a direct sample of FPIR (ISO/IEC 19795-1) in the user's own
domain. The model's calibration is the prior: where the gallery has few people, it is what counts.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from service.calibration import Calibration, rate_of_all, rate_of_one
from service.domain import IndexEntries, Members, OperatingPoint, OwnCalibrationMode
from service.int_map import IntMap

SUBJECTS = 1000
"""Subjects of a gallery that are compared with one another: those whose number has the smallest hash."""

TEMPLATES = 3
"""Templates of each of them, chosen in the same way."""

LEAST_SUBJECTS = 5
"""With fewer people the gallery says nothing."""

INFLUENCE = 3.0
"""Strangers, at most, whose being mistaken for one and the same subject counts at any threshold: nobody who enrols one
odd picture can raise a large gallery's threshold at will."""

_FRACTION = 2.0**15
"""Coordinates are rounded to its inverse. Products of two are then multiples of 2^-30, and sums of them are exact in
float64 in whatever order they are added: the same people give the same bits, however they came and went."""

_BINS = 8192
_LOCATED_AT = (0.1, 0.01)
"""FMR at which the domain's impostor similarities are compared with the model's, for location and scale."""

_LOCATION_ERROR, _SCALE_ERROR = 1.6, 1.2
"""Two standard errors of location (in the model's distances between those two) and of the logarithm of scale, of one
person; they fall with the root of the number of people. From the intervals of the bundled calibration."""

_PRIOR_LEAST, _PRIOR_MOST = 2.0, 50.0
"""Strangers, mistaken, that the model's calibration counts for; see :func:`_prior`."""

_BACK = 4
"""Levels from one to the one that is four times as frequent, whose ratio it inherits; see :func:`_ratios`."""

_SAFE = 0.5
"""Standard errors that are added to each ratio: the asked rate is an upper limit."""

_LEVELS = np.concatenate([[0.9, 0.7], 0.5 * 2.0 ** -np.arange(0, 30, 0.5)])
_RULE_OF_30 = 30
_BLOCK = 256
_FEW = 64
"""Changes from which on it is quicker to sort or to compare everything anew."""

Fetch = Callable[[Sequence[int]], NDArray[np.float32]]
"""Return the embeddings ``float32[N, D]`` of these row ids, in their order."""


@dataclass(frozen=True)
class OwnRates:
    """FPIR over the threshold, as a gallery's own people show it, in a search worth ``comparisons`` comparisons.

    ``identities``: people it rests on. ``thresholds``: ``float64[L]``, rising; ``log_rates``: ``float64[L]``, falling,
    natural logarithms of FPIR. ``extrapolated_below``: rates below it rest on a modelled tail.
    """

    identities: int
    comparisons: float
    thresholds: NDArray[np.float64]
    log_rates: NDArray[np.float64]
    extrapolated_below: float

    def combined(
        self, point: OperatingPoint, calibration: Calibration, subjects: int, templates: int, *, full: bool
    ) -> OperatingPoint:
        """Return the operating point for the model's own one of the same rate and numbers.

        ``full``: the threshold may be below the model's; otherwise it is the stricter of the two.
        """
        fmr = rate_of_one(point.fpr, calibration.comparisons(subjects, templates), calibration.spread)
        rate = rate_of_all(min(fmr, 1 - 1e-12), self.comparisons, calibration.spread)
        threshold = float(np.interp(-math.log(max(rate, 1e-300)), -self.log_rates, self.thresholds))
        if threshold < point.threshold and not full:
            return point
        supported = rate * self.identities >= _RULE_OF_30
        return OperatingPoint(
            point.fpr,
            threshold,
            rate < self.extrapolated_below and not supported,
            basis="gallery" if supported else "both",
            model_identities=point.model_identities,
            gallery_identities=self.identities,
        )


class OwnCalibration:
    """The bounded sample of one gallery, a function of who is enrolled and of nothing else.

    Not safe for several threads at once. :attr:`rates` is replaced, never changed, by :meth:`refresh`.
    """

    def __init__(self, calibration: Calibration) -> None:
        self._calibration = calibration
        self._subject_of = IntMap()
        # The subjects of the sample by their hash, the templates of each by theirs; and whether there are others.
        self._order: list[tuple[int, int]] = []
        self._rows: dict[int, list[tuple[int, int]]] = {}
        self._beyond = False
        # Those whose vectors are held, each with its templates that are.
        self._taken: dict[int, list[int]] = {}
        self._held = _Held()
        self.rates: OwnRates | None = None

    def load(self, members: Members, fetch: Fetch) -> None:
        """Take templates in that are not there yet; what the sample needs of them, it fetches. Does not refresh."""
        self._subject_of.put(members.row_ids, members.subject_ids)
        self._enter(members.row_ids, members.subject_ids)
        self._sync(self._rows, {}, fetch)

    def add(self, entries: IndexEntries, fetch: Fetch) -> None:
        """Take templates in; what the sample needs of others, it fetches. Does not :meth:`refresh`."""
        self._leave(entries.row_ids)
        self._subject_of.put(entries.row_ids, entries.subject_ids)
        if not self._refilled():
            self._enter(entries.row_ids, entries.subject_ids)
        known = dict(zip(entries.row_ids.tolist(), entries.embeddings, strict=True))
        self._sync(entries.subject_ids.tolist(), known, fetch)

    def remove(self, row_ids: Sequence[int], fetch: Fetch) -> None:
        """Take templates out; row ids that are not there are passed over. Does not :meth:`refresh`."""
        touched = self._leave(np.asarray(row_ids, np.int64))
        self._refilled()
        self._sync(touched, {}, fetch)

    def refresh(self) -> None:
        """Bring :attr:`rates` up to date."""
        if self._held.changed:
            found = self._held.found()
            self.rates = None if found is None else own_rates(self._calibration, found)

    @property
    def templates(self) -> int:
        """How many templates the gallery has, in the sample or not."""
        return len(self._subject_of)

    def only(self, row_ids: Sequence[int]) -> bool:
        """Whether the gallery has no other templates."""
        held = self._subject_of.get(np.unique(np.asarray(row_ids, np.int64)))
        return int((held >= 0).sum()) == len(self._subject_of)

    def _enter(self, row_ids: NDArray[np.int64], subject_ids: NDArray[np.int64]) -> None:
        """Let the sample have what it wants of templates that are new to it."""
        hashes = _hash(subject_ids)
        # Of a million no more are looked at than can come in.
        people = np.unique(hashes)
        last = int(people[min(len(people), SUBJECTS) - 1]) if len(people) else 0
        if len(self._order) >= SUBJECTS:
            last = min(last, self._order[-1][0])
        wanted = hashes <= np.uint64(last)
        self._beyond |= not wanted.all()
        new = []
        for row, row_hash, subject, subject_hash in zip(
            row_ids[wanted].tolist(),
            _hash(row_ids[wanted]).tolist(),
            subject_ids[wanted].tolist(),
            hashes[wanted].tolist(),
            strict=True,
        ):
            if subject not in self._rows:
                self._rows[subject] = []
                new.append((subject_hash, subject))
            insort(self._rows[subject], (row_hash, row))
        self._order = sorted(self._order + new)
        for _, subject in self._order[SUBJECTS:]:
            del self._rows[subject]
            self._beyond = True
        del self._order[SUBJECTS:]

    def _leave(self, row_ids: NDArray[np.int64]) -> list[int]:
        """Take out what is there of these, and return its subjects."""
        row_ids = np.unique(row_ids)
        subject_ids = self._subject_of.get(row_ids)
        row_ids, subject_ids = row_ids[subject_ids >= 0], subject_ids[subject_ids >= 0]
        self._subject_of.drop(row_ids)
        rows: list[int] = row_ids.tolist()
        subjects: list[int] = subject_ids.tolist()
        self._held.remove([row for row in rows if row in self._held.slots])
        for row, row_hash, subject in zip(rows, _hash(row_ids).tolist(), subjects, strict=True):
            held = self._rows.get(subject)
            if held is None:
                continue
            del held[bisect_left(held, (row_hash, row))]
            if not held:
                del self._rows[subject]
                (subject_hash,) = _hash(np.array([subject], np.int64)).tolist()
                del self._order[bisect_left(self._order, (subject_hash, subject))]
        return subjects

    def _refilled(self) -> bool:
        """Choose anew if somebody has left the sample and others wait, and return whether that was so."""
        if len(self._order) >= SUBJECTS or not self._beyond:
            return False
        self._order, self._rows, self._beyond = [], {}, False
        self._enter(*self._subject_of.items())
        return True

    def _sync(self, touched: Iterable[int], known: dict[int, NDArray[np.float32]], fetch: Fetch) -> None:
        sampled = set(self._rows)
        changed = (sampled ^ self._taken.keys()) | (sampled & set(touched))
        wanted = {subject: [row for _, row in self._rows[subject][:TEMPLATES]] for subject in changed & sampled}
        rows = [row for held in wanted.values() for row in held]
        before = {row for subject in changed for row in self._taken.pop(subject, ())}
        self._held.remove([row for row in before.difference(rows) if row in self._held.slots])
        new = sorted(row for row in rows if row not in self._held.slots)
        missing = [row for row in new if row not in known]
        if missing:
            known = known | dict(zip(missing, fetch(missing), strict=True))
        if new:
            subjects = self._subject_of.get(np.array(new, np.int64))
            self._held.add(new, subjects, np.stack([known[row] for row in new]))
        # Last, so that what could not be fetched is asked for again with the next change.
        self._taken |= wanted


class OwnCalibrations:
    """The samples of all galleries; none knows of another.

    One thread at a time may change them, while any number ask for :meth:`combined`.
    """

    def __init__(self, calibration: Calibration, fetch: Fetch) -> None:
        """``fetch``: where the vectors come from at the start, and of people who move up when others are removed."""
        self._calibration = calibration
        self._fetch = fetch
        self._galleries: dict[str, OwnCalibration] = {}

    def load(self, members: Members) -> None:
        """Take in all the templates of a gallery at the start."""
        held = self._galleries[members.gallery] = OwnCalibration(self._calibration)
        held.load(members, self._fetch)
        held.refresh()

    def add(self, entries: IndexEntries) -> None:
        """Take templates in."""
        if len(entries.row_ids):
            held = self._galleries.setdefault(entries.gallery, OwnCalibration(self._calibration))
            held.add(entries, self._fetch)
            held.refresh()

    def remove(self, gallery: str, row_ids: Sequence[int]) -> None:
        """Take templates out; row ids that are not there are passed over."""
        held = self._galleries.get(gallery)
        if held is None:
            return
        if held.templates <= len(row_ids) and held.only(row_ids):
            del self._galleries[gallery]
            return
        held.remove(row_ids, self._fetch)
        held.refresh()

    def combined(
        self, point: OperatingPoint, gallery: str, mode: OwnCalibrationMode, subjects: int, templates: int
    ) -> OperatingPoint:
        """Return what becomes of the model's operating point for so many subjects and templates in this gallery."""
        held = self._galleries.get(gallery)
        rates = None if held is None else held.rates
        if rates is None:
            return point
        return rates.combined(point, self._calibration, subjects, templates, full=mode == "full")


@dataclass(frozen=True)
class Searches:
    """What the people of a sample found when each searched the others. ``best``: ``float64[M]``, the highest
    similarity for each template; ``weight``: ``float64[M]``, its share of a person, 0 for who is left out;
    ``place``, ``of``: ``int64[M]``, the person who searched and the one who was found, as numbers from 0; ``counts``:
    ``int64[B]``, a histogram of the similarities of two people's templates from −1 to 1."""

    best: NDArray[np.float64]
    weight: NDArray[np.float64]
    place: NDArray[np.int64]
    of: NDArray[np.int64]
    counts: NDArray[np.int64]


class _Held:
    """Vectors, the best similarity of each to another person's, and the histogram of all of those similarities."""

    def __init__(self) -> None:
        # Where each template is; and whether anything came or went since the last ``found``.
        self.slots: dict[int, int] = {}
        self._rows = np.empty(0, np.int64)
        self._subjects = np.empty(0, np.int64)
        self._vectors = np.empty((0, 0))
        self._best = np.empty(0)
        self._best_row = np.empty(0, np.int64)
        self._counts = np.zeros(_BINS, np.int64)
        self._stale = False
        self.changed = False

    def add(self, rows: Sequence[int], subjects: NDArray[np.int64], vectors: NDArray[np.float32]) -> None:
        self.changed = True
        exact = np.round(vectors.astype(np.float64) * _FRACTION) / _FRACTION
        start = len(self._rows)
        self._rows = np.concatenate([self._rows, np.asarray(rows, np.int64)])
        self._subjects = np.concatenate([self._subjects, subjects])
        self._vectors = np.concatenate([self._vectors, exact]) if start else exact
        self._best = np.concatenate([self._best, np.full(len(rows), -np.inf)])
        self._best_row = np.concatenate([self._best_row, np.full(len(rows), -1, np.int64)])
        self.slots |= {row: start + i for i, row in enumerate(rows)}
        if self._stale or len(rows) > max(_FEW, start // 8):
            self._stale = True
            return
        similar = self._similar(slice(start, None))
        for new, row in zip(similar, range(start, len(self._rows)), strict=True):
            # Each pair once: with those who were there, and with the new ones before it.
            self._counts += _histogram(new[:row])
        self._raise(similar.max(axis=0), self._first_of(similar.T, slice(start, None)), slice(None))
        self._raise(similar.max(axis=1), self._first_of(similar, slice(None)), slice(start, None))

    def remove(self, rows: Sequence[int]) -> None:
        if not rows:
            return
        self.changed = True
        gone = np.array([self.slots[row] for row in rows], np.int64)
        stay = np.ones(len(self._rows), bool)
        stay[gone] = False
        if not self._stale:
            if len(rows) > max(_FEW, len(self._rows) // 8):
                self._stale = True
            else:
                similar = self._similar(gone)
                for i, row in enumerate(similar):
                    self._counts -= _histogram(row[stay])
                    self._counts -= _histogram(row[gone[:i]])
        bereft = np.isin(self._best_row, self._rows[gone])[stay]
        self._rows, self._subjects, self._vectors = self._rows[stay], self._subjects[stay], self._vectors[stay]
        self._best, self._best_row = self._best[stay], self._best_row[stay]
        self.slots = {row: i for i, row in enumerate(self._rows.tolist())}
        if not self._stale and bereft.any():
            self._search(np.flatnonzero(bereft))

    def found(self) -> Searches | None:
        if self._stale:
            self._counts[:] = 0
            for start in range(0, len(self._rows), _BLOCK):
                block = slice(start, min(start + _BLOCK, len(self._rows)))
                similar = self._similar(block)
                self._best[block] = similar.max(axis=1)
                self._best_row[block] = self._first_of(similar, slice(None))
                self._counts += _histogram(similar[:, :start]) + _histogram(
                    similar[:, block][np.tri(len(similar), k=-1, dtype=bool)]
                )
            self._stale = False
        self.changed = False
        # In the order of the row ids, whatever the order they came in.
        order = np.argsort(self._rows)
        people, place, size = np.unique(self._subjects[order], return_inverse=True, return_counts=True)
        if len(people) < LEAST_SUBJECTS:
            return None
        of = place[np.searchsorted(self._rows[order], self._best_row[order])]
        weight = 1.0 / size[place]
        weight[np.isin(place, self._one_person(order, place, of, size))] = 0.0
        return Searches(self._best[order], weight, place, of, self._counts.copy())

    def _one_person(
        self, order: NDArray[np.intp], place: NDArray[np.int64], of: NDArray[np.int64], size: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Two subjects who probably are the same person, all such: each found by every template of the other, and their
        templates on average as similar to the other's as to their own. It takes two templates of both to tell."""
        found_by_last = np.empty(len(size), np.int64)
        found_by_last[place] = of
        agreed = np.bincount(place, of == found_by_last[place], len(size)) == size
        mutual = found_by_last[found_by_last] == np.arange(len(size))
        candidates = np.flatnonzero(agreed & agreed[found_by_last] & mutual & (size > 1) & (size[found_by_last] > 1))
        found: list[int] = []
        for one in candidates.tolist():
            mine, theirs = (self._vectors[order[place == who]] for who in (one, found_by_last[one]))
            if (mine @ theirs.T).mean() >= max(_within(mine), _within(theirs)):
                found.append(one)
        return np.array(found, np.int64)

    def _search(self, slots: NDArray[np.int64]) -> None:
        similar = self._similar(slots)
        self._best[slots] = similar.max(axis=1)
        self._best_row[slots] = self._first_of(similar, slice(None))

    def _similar(self, slots: slice | NDArray[np.int64]) -> NDArray[np.float64]:
        """Similarities ``float64[len(slots), N]``, −inf for templates of the same person."""
        similar = self._vectors[slots] @ self._vectors.T
        similar[self._subjects[slots, None] == self._subjects] = -np.inf
        return similar

    def _first_of(self, similar: NDArray[np.float64], columns: slice) -> NDArray[np.int64]:
        """For each row of ``similar`` the smallest row id among the columns with the highest value."""
        rows = self._rows[columns]
        best = similar.max(axis=1, keepdims=True)
        place = similar.argmax(axis=1)
        tied = np.flatnonzero((similar == best).sum(axis=1) > 1)
        found = rows[place]
        for i in tied:
            found[i] = rows[similar[i] == best[i]].min()
        return np.asarray(found, np.int64)

    def _raise(self, best: NDArray[np.float64], row: NDArray[np.int64], slots: slice) -> None:
        held, held_row = self._best[slots], self._best_row[slots]
        better = (best > held) | ((best == held) & ((row < held_row) | (held_row < 0)))
        held[better] = best[better]
        held_row[better] = row[better]


def own_rates(calibration: Calibration, found: Searches) -> OwnRates:
    """Combine the searches of a gallery's people with the model's calibration.

    The model's impostor similarities are moved and scaled to the gallery's; how many strangers they let expect at
    each level is then corrected by how many there are.
    """
    present = np.unique(found.place[found.weight > 0])
    identities, sampled = len(present), int(found.place.max()) + 1
    comparisons = calibration.comparisons(sampled - 1, round(len(found.best) * (sampled - 1) / sampled))
    spread = calibration.spread
    fmr = [rate_of_one(float(level), comparisons, spread) for level in _LEVELS]
    modelled = [calibration.at_fmr(min(max(rate, 1e-300), 1 - 1e-12)) for rate in fmr]
    thresholds = _moved(calibration, np.array([threshold for threshold, _ in modelled]), found.counts, sampled)
    prior = _prior(calibration, np.array(fmr), np.array([threshold for threshold, _ in modelled]))
    ratios = _ratios(_exceeding(found, thresholds), identities * _LEVELS, prior)
    rates = np.minimum.accumulate(ratios * _LEVELS)
    extrapolated = [level for level, (_, beyond) in zip(_LEVELS, modelled, strict=True) if beyond]
    return OwnRates(
        identities,
        comparisons,
        np.maximum.accumulate(thresholds),
        np.log(np.minimum(rates, 1.0)),
        float(max(extrapolated, default=0.0)),
    )


def _moved(
    calibration: Calibration, thresholds: NDArray[np.float64], counts: NDArray[np.int64], subjects: int
) -> NDArray[np.float64]:
    common, rare = (_quantile(counts, 1 - fmr) for fmr in _LOCATED_AT)
    (model_common, _), (model_rare, _) = (calibration.at_fmr(fmr) for fmr in _LOCATED_AT)
    unit = max(model_rare - model_common, 1e-6)
    root = math.sqrt(subjects)
    moved = _certain(common - model_common, _LOCATION_ERROR * unit / root)
    scale = math.exp(_certain(math.log(max((rare - common) / unit, 1e-3)), _SCALE_ERROR / root))
    return np.clip(model_common + moved + scale * (thresholds - model_common), -1.0, 1.0)


def _certain(difference: float, error: float) -> float:
    """What remains of a measured difference that is drawn to 0 as far as its error explains it (James and Stein 1961,
    positive part)."""
    return difference * max(0.0, 1 - (error / difference) ** 2) if difference else 0.0


def _within(vectors: NDArray[np.float64]) -> float:
    """The mean similarity of two or more templates of one person."""
    return float((vectors @ vectors.T)[np.triu_indices(len(vectors), 1)].mean())


def _exceeding(found: Searches, thresholds: NDArray[np.float64]) -> NDArray[np.float64]:
    """How many people found somebody at each threshold, nobody being found by more than :data:`INFLUENCE`."""
    order = np.lexsort((-found.best, found.of))
    weight, of, best = found.weight[order], found.of[order], found.best[order]
    total = np.cumsum(weight)
    starts = np.flatnonzero(np.diff(of, prepend=-1))
    before = np.repeat((total - weight)[starts], np.diff(starts, append=len(of)))
    capped = np.minimum(total - before, INFLUENCE)
    counted = capped - np.where(np.diff(of, prepend=-1) != 0, 0.0, np.roll(capped, 1))
    rising = np.argsort(best, kind="stable")
    above = np.cumsum(counted[rising][::-1])[::-1]
    place = np.searchsorted(best[rising], thresholds)
    return np.concatenate([above, [0.0]])[place]


def _prior(calibration: Calibration, fmr: NDArray[np.float64], thresholds: NDArray[np.float64]) -> NDArray[np.float64]:
    """As how many mistaken strangers the calibration counts at each level: the inverse of the squared standard error
    of the logarithm of its rate, which is that of the threshold times the slope there."""
    safe = np.array([calibration.at_fmr(min(max(rate, 1e-300), 1 - 1e-12), safe=True)[0] for rate in fmr])
    slope = np.gradient(np.log(np.maximum(fmr, 1e-300)), np.arange(len(fmr)))
    slope /= np.minimum(-np.gradient(thresholds), -1e-9)
    error = (safe - thresholds) * slope
    return np.clip(1 / np.maximum(error, 1e-3) ** 2, _PRIOR_LEAST, _PRIOR_MOST)


def _ratios(
    exceeding: NDArray[np.float64], expected: NDArray[np.float64], prior: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The ratio of found to expected at each level, the levels from frequent to rare.

    Poisson counts with a gamma prior (Gelman et al., Bayesian Data Analysis, 2.6), whose mean is the ratio of the
    level four times as frequent. Where no counts are left, the ratios that they supported go on; where there never
    were any, it is 1.
    """
    ratios = np.ones(len(expected))
    for i in range(len(expected)):
        before = ratios[i - _BACK] if i >= _BACK else 1.0
        ratios[i] = (prior[i] * before + exceeding[i]) / (prior[i] + expected[i])
    return ratios * (1 + _SAFE / np.sqrt(prior + exceeding))


def _quantile(counts: NDArray[np.int64], share: float) -> float:
    total = np.concatenate([[0], np.cumsum(counts)])
    target = share * total[-1]
    place = min(int(np.searchsorted(total, target, side="left")), len(counts))
    place = max(place, 1)
    inside = (target - total[place - 1]) / max(int(counts[place - 1]), 1)
    return float((place - 1 + inside) * 2 / _BINS - 1)


def _histogram(similar: NDArray[np.float64]) -> NDArray[np.int64]:
    finite = similar[similar > -np.inf]
    bins = np.clip(((finite + 1) * (_BINS / 2)).astype(np.int64), 0, _BINS - 1)
    return np.asarray(np.bincount(bins, minlength=_BINS), np.int64)


def _hash(numbers: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Spread numbers over 64 bits (splitmix64, Steele et al. 2014), so that nobody is chosen by when they enrolled."""
    mixed = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(mixed ^ (mixed >> np.uint64(31)), np.uint64)
