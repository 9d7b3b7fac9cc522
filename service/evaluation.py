"""How well faces are recognised on somebody's own photos: rates, intervals, curve and words. No I/O.

Photos lie in one folder for each person and one more for strangers. The first photos of each person are enrolled in a
gallery that exists only here; the person's other photos and the strangers' are probes. Rates are those of ISO/IEC
19795-1 and of NIST FRVT 1:N:

- FPIR: share of strangers' searches that are answered with somebody. A photo without a face is no search.
- FNIR: share of the people's probes that are not answered with that person, at rank 1 and with the threshold. A photo
  from which no face can be taken counts as a miss, and so does every probe of a person of whom no photo could be
  enrolled.
- FMR, FNMR: the same for pairs of faces, whoever is enrolled; photos without a face are in no pair.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from service.calibration import Calibration, thresholds_at
from service.domain import (
    Acquisition,
    DetPoint,
    Embedding,
    Estimate,
    EvaluatedPairs,
    EvaluatedPoint,
    Evaluation,
    FailedPhoto,
    GroupPoint,
    IndexEntries,
    OperatingPoint,
)
from service.layout import people
from service.own_calibration import OwnCalibrations

FPRS = (0.1, 0.03, 0.01, 0.001)
"""The rates that are asked for unless others are named."""

STRANGERS = "strangers"
"""Name of the strangers' folder unless another is named."""

LEVEL = 0.95
RESAMPLES = 200

ENOUGH_ERRORS = 30
"""People with an error from which a rate is believed: with 30, it is within 30 % of the true one in nine cases of ten
(Doddington et al. 2000, "The NIST speaker recognition evaluation", the rule of 30)."""

NONE_SEEN = 3.0
"""Over the number of people, the rate that may be true although none had an error (Hanley & Lippman-Hand 1983, "If
nothing goes wrong, is everything all right?", the rule of three)."""

_GALLERY = "evaluation"
_BLOCK = 512
_DET_POINTS = 101


@dataclass(frozen=True)
class Placed:
    """A photo and whose it is: a folder's name, or for a stranger the path below the strangers' folder."""

    file: str
    person: str
    stranger: bool


@dataclass(frozen=True)
class Shot:
    """What was seen in a photo. ``problem``: the error code with which enrolment refuses it, else "". ``embedding``: of
    the face to search with, ``float32[D]``, None where there is none or more than one."""

    photo: Placed
    problem: str
    embedding: Embedding | None


@dataclass(frozen=True)
class Plan:
    """What is asked: rates, how many photos of each person to enrol, who belongs to which group.

    ``groups``: by file or person. ``ignored``: how many files were no photos.
    """

    fprs: tuple[float, ...] = FPRS
    enrol: int = 1
    groups: Mapping[str, str] | None = None
    ignored: int = 0
    resamples: int = RESAMPLES


def laid_out(files: Iterable[str], strangers: str = STRANGERS) -> tuple[list[Placed], int]:
    """Say whose each photo is, sorted by file, and count the files that are no photos.

    ``files``: paths below the folder, with forward slashes. A file directly in the strangers' folder is a stranger of
    its own; a folder in it is one stranger. Hidden files and folders are passed over, and do not count. Raises
    ValueError if there are no people, or nothing but one folder.
    """
    photos, ignored = people(files)
    placed = [
        Placed(file, "/".join(PurePosixPath(file).parts[:2]), True)
        if person == strangers
        else Placed(file, person, False)
        for person, file in photos
    ]
    folders = {person for person, _ in photos}
    if not folders - {strangers}:
        raise ValueError("there are no photos of people: each person needs a folder with photos in it")
    if len(folders) < 2:
        raise ValueError(
            "there is only one folder with photos: each person needs one, and the strangers; the folders must not lie "
            "in another one"
        )
    return placed, ignored


def read_groups(text: str) -> dict[str, str]:
    """Read a CSV table of ``person-or-file,group``, whose first line may be such a heading.

    Raises ValueError, which names the line, if it is not of that form or names something twice.
    """
    groups: dict[str, str] = {}
    reader = csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline=""), strict=True)
    try:
        for row in reader:
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            if reader.line_num == 1 and cells[-1].lower() == "group":
                continue
            if len(cells) != 2 or not all(cells):
                raise ValueError(f"line {reader.line_num} of the groups: a person or file, and a group, are needed")
            if cells[0] in groups:
                raise ValueError(f"line {reader.line_num} of the groups: {cells[0]!r} is named twice")
            groups[cells[0]] = cells[1]
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num} of the groups: {error}") from None
    return groups


def times_drawn(generator: np.random.Generator, people: NDArray[np.integer], count: int) -> NDArray[np.float32]:
    """How often each of ``count`` people is drawn, ``float32[count]``, when all of ``people`` are, with replacement."""
    return np.bincount(generator.choice(people, len(people)), minlength=count).astype(np.float32)


def numbered(names: Sequence[str]) -> NDArray[np.int32]:
    """``int32[N]``: a number for each name from 0, the same for the same name."""
    return np.unique(np.asarray(names), return_inverse=True)[1].astype(np.int32)


def operating_points(calibration: Calibration, fprs: Sequence[float], gallery: _Gallery) -> list[OperatingPoint]:
    """The thresholds of searches in this evaluation's gallery: those that the service would use for it."""
    own = OwnCalibrations(calibration, lambda rows: gallery.embeddings[np.asarray(rows, np.intp)])
    count = len(gallery.subject)
    own.add(IndexEntries(_GALLERY, np.arange(count), gallery.subject.astype(np.int64), gallery.embeddings))
    points = [calibration.identification_point(fpr, gallery.size, count) for fpr in fprs]
    return [own.combined(point, _GALLERY, "stricter", gallery.size, count) for point in points]


def evaluate(shots: Sequence[Shot], calibration: Calibration, plan: Plan) -> Evaluation:
    """Enrol, search, count. ``shots``: in the order of :func:`laid_out`.

    The first ``plan.enrol`` photos of each person are enrolled; one that cannot be is not replaced. Nothing depends on
    chance but the intervals, which are drawn with a fixed seed. Raises :class:`~service.errors.FprUnsupported`
    below what the calibration supports.
    """
    uses = _uses(shots, plan.enrol)
    templates = [s for s, use in zip(shots, uses, strict=True) if use == "enrolled" and not s.problem]
    mated = [s for s, use in zip(shots, uses, strict=True) if use == "probe"]
    strange = [s for s, use in zip(shots, uses, strict=True) if use == "stranger" and s.embedding is not None]
    subjects = sorted({shot.photo.person for shot in templates})
    dimension = next((len(s.embedding) for s in shots if s.embedding is not None), 1)
    gallery = _Gallery(
        _embeddings(templates, dimension),
        np.searchsorted(subjects, [shot.photo.person for shot in templates]) if templates else np.empty(0, np.int64),
        len(subjects),
    )
    own = _Mated.searched(mated, subjects, gallery, dimension)
    others = _Strange(gallery.scores(_embeddings(strange, dimension)), numbered([s.photo.person for s in strange]))
    points = operating_points(calibration, plan.fprs, gallery)
    thresholds = [point.threshold for point in points]
    fpirs, fnirs = others.fpir(plan.fprs, thresholds, plan.resamples), own.fnir(thresholds, plan.resamples)
    groups, notes = _grouped(plan, shots, mated, strange, own, others, thresholds)
    people = {shot.photo.person for shot in shots if not shot.photo.stranger}
    failures = tuple(
        FailedPhoto(shot.photo.file, use, shot.problem)
        for shot, use in zip(shots, uses, strict=True)
        if shot.problem and (use == "enrolled" or shot.embedding is None)
    )
    return Evaluation(
        model_id=calibration.model_id,
        enrol=plan.enrol,
        resamples=plan.resamples,
        people=len(people),
        gallery_size=len(subjects),
        templates=len(templates),
        stranger_people=len({shot.photo.person for shot in shots if shot.photo.stranger}),
        enrolled=_acquisition("enrolled", uses, failures),
        probes=_acquisition("probe", uses, failures),
        strangers=_acquisition("stranger", uses, failures),
        ignored=plan.ignored,
        rank1=own.rank1(plan.resamples),
        points=tuple(
            EvaluatedPoint(
                point.fpr,
                point.threshold,
                point.extrapolated,
                fpir,
                fnir,
                int(own.found(point.threshold).sum()),
                own.mistaken(point.threshold),
            )
            for point, fpir, fnir in zip(points, fpirs, fnirs, strict=True)
        ),
        pairs=_pairs(shots, calibration, plan.fprs, dimension),
        groups=groups,
        det=_det(own, others),
        failures=failures,
        notes=tuple(_notes(people, len(subjects), plan, mated, strange) + notes),
    )


@dataclass(frozen=True)
class _Gallery:
    """``embeddings``: ``float32[T, D]``; ``subject``: ``int64[T]`` from 0, ascending; ``size``: subjects."""

    embeddings: NDArray[np.float32]
    subject: NDArray[np.int64]
    size: int

    def scores(self, probes: NDArray[np.float32]) -> NDArray[np.float32]:
        """Best similarity of each probe with each subject, ``float32[P, S]``."""
        if not self.size or not len(probes):
            return np.empty((len(probes), self.size), np.float32)
        starts = np.searchsorted(self.subject, np.arange(self.size))
        blocks = [
            np.maximum.reduceat(probes[start : start + _BLOCK] @ self.embeddings.T, starts, axis=1)
            for start in range(0, len(probes), _BLOCK)
        ]
        return np.concatenate(blocks)


@dataclass(frozen=True)
class _Mated:
    """Searches by enrolled people: ``best``, ``float32[P]``, −2 where there was none; ``right``: whether the best
    subject is that person; ``person``: ``int32[P]``."""

    best: NDArray[np.float32]
    right: NDArray[np.bool_]
    person: NDArray[np.int32]

    @classmethod
    def searched(cls, probes: Sequence[Shot], subjects: Sequence[str], gallery: _Gallery, dimension: int) -> _Mated:
        best = np.full(len(probes), -2, np.float32)
        right = np.zeros(len(probes), bool)
        seen = np.array([i for i, shot in enumerate(probes) if shot.embedding is not None], np.intp)
        if len(seen) and gallery.size:
            scores = gallery.scores(_embeddings([probes[i] for i in seen], dimension))
            first = scores.argmax(axis=1)
            best[seen] = scores[np.arange(len(seen)), first]
            right[seen] = [subjects[j] == probes[i].photo.person for i, j in zip(seen, first, strict=True)]
        return cls(best, right, numbered([shot.photo.person for shot in probes]))

    def found(self, threshold: float) -> NDArray[np.bool_]:
        """Probes that are answered with the right person."""
        return self.right & (self.best >= threshold)

    def mistaken(self, threshold: float) -> int:
        """How many are answered with somebody else."""
        return int((~self.right & (self.best >= threshold)).sum())

    def where(self, chosen: NDArray[np.bool_]) -> _Mated:
        """Only these probes."""
        return _Mated(self.best[chosen], self.right[chosen], self.person[chosen])

    def fnir(self, thresholds: Sequence[float], resamples: int) -> list[Estimate]:
        """FNIR at each threshold."""
        return [_estimate(~self.found(t), self.person, resamples, "were missed") for t in thresholds]

    def rank1(self, resamples: int) -> Estimate:
        """Whose best candidate is not that person, whatever the similarity."""
        return _estimate(~self.right, self.person, resamples, "were not the best candidate")


@dataclass(frozen=True)
class _Strange:
    """Searches by strangers: ``scores``, ``float32[P, S]``, the best with each subject; ``person``: ``int32[P]``."""

    scores: NDArray[np.float32]
    person: NDArray[np.int32]

    @property
    def best(self) -> NDArray[np.float32]:
        """``float32[P]``; −2 where nobody is enrolled."""
        return np.asarray(self.scores.max(axis=1, initial=-2), np.float32)

    def where(self, chosen: NDArray[np.bool_]) -> _Strange:
        """Only these probes."""
        return _Strange(self.scores[chosen], self.person[chosen])

    def fpir(self, fprs: Sequence[float], thresholds: Sequence[float], resamples: int) -> list[Estimate]:
        """FPIR at each threshold. Strangers and enrolled people are both drawn anew for the intervals."""
        best = self.best
        drawn = self._drawn(thresholds, resamples)
        found = []
        for place, (fpr, threshold) in enumerate(zip(fprs, thresholds, strict=True)):
            wrong = best >= threshold
            estimate = _estimate(wrong, self.person, resamples, "were taken for somebody", least=fpr)
            rate = estimate.rate
            if rate and rate < 1 and estimate.people > 1 and drawn is not None and drawn[:, place].any():
                # A gallery drawn with replacement has fewer different people and a lower FPIR: only the spread counts.
                spread = drawn[:, place] * rate / drawn[:, place].mean()
                low, high = np.quantile(np.minimum(spread, 1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
                estimate = replace(estimate, low=float(min(low, rate)), high=float(max(high, rate)))
            found.append(estimate)
        return found

    def _drawn(self, thresholds: Sequence[float], resamples: int) -> NDArray[np.float64] | None:
        """FPIR of each draw at each threshold, ``float64[R, F]``."""
        if not resamples or not self.scores.size:
            return None
        generator = np.random.default_rng(0)
        people, subjects = np.unique(self.person), np.arange(self.scores.shape[1], dtype=np.int32)
        rates = np.empty((resamples, len(thresholds)))
        for draw in range(resamples):
            weights = times_drawn(generator, people, int(people.max()) + 1)[self.person]
            held = times_drawn(generator, subjects, len(subjects)) > 0
            best = self.scores[:, held].max(axis=1)
            rates[draw] = [np.average(best >= threshold, weights=weights) for threshold in thresholds]
        return rates


def _uses(shots: Sequence[Shot], enrol: int) -> list[Literal["enrolled", "probe", "stranger"]]:
    seen: Counter[str] = Counter()
    uses: list[Literal["enrolled", "probe", "stranger"]] = []
    for shot in shots:
        if shot.photo.stranger:
            uses.append("stranger")
        else:
            seen[shot.photo.person] += 1
            uses.append("enrolled" if seen[shot.photo.person] <= enrol else "probe")
    return uses


def _embeddings(shots: Sequence[Shot], dimension: int) -> NDArray[np.float32]:
    vectors = [shot.embedding for shot in shots if shot.embedding is not None]
    return np.array(vectors, np.float32).reshape(-1, dimension)


def _acquisition(use: str, uses: Sequence[str], failures: Sequence[FailedPhoto]) -> Acquisition:
    codes = Counter(failure.code for failure in failures if failure.use == use)
    return Acquisition(sum(one == use for one in uses), codes.total(), dict(sorted(codes.items())))


def _estimate(
    errors: NDArray[np.bool_], person: NDArray[np.int32], resamples: int, verb: str, *, least: float | None = None
) -> Estimate:
    """The rate of errors ``bool[N]`` in trials of people ``int32[N]``. ``least``: the rate that was asked for."""
    trials = len(errors)
    if not trials:
        return Estimate(None, 0, 0, 0, 0, None, None, False, "There is nobody to measure this on.")
    each = np.bincount(person)
    wrong_of, trials_of = np.bincount(person, weights=errors)[each > 0].astype(np.float64), each[each > 0]
    people, affected, count = len(trials_of), int((wrong_of > 0).sum()), int(errors.sum())
    low, high = _interval(wrong_of, trials_of, resamples)
    note = ""
    if least is not None and least * people < NONE_SEEN * (1 - 1e-9):
        note = (
            f"{_count(people)} cannot show a rate of {least:g}: even if none of them {verb}, it could be "
            f"{min(1.0, NONE_SEEN / people):.2g}. {int(np.ceil(NONE_SEEN / least - 1e-6)):,} are the least."
        )
    elif affected < ENOUGH_ERRORS:
        note = (
            f"Only {affected} of {_count(people)} {verb}: with fewer than {ENOUGH_ERRORS}, the rate may be off by "
            "more than 30 %."
        )
    return Estimate(count / trials, count, trials, people, affected, low, high, not note, note)


def _interval(
    wrong: NDArray[np.float64], trials: NDArray[np.signedinteger], resamples: int
) -> tuple[float | None, float | None]:
    """95 % interval of a rate, from the errors and trials of each person; exact where all or none is an error."""
    if not resamples:
        return None, None
    people, rate = len(trials), float(wrong.sum() / trials.sum())
    tail = (1 - LEVEL) / 2
    if rate == 0:
        return 0.0, 1 - tail ** (1 / people)
    if rate == 1:
        return tail ** (1 / people), 1.0
    if people == 1:
        return 0.0, 1.0
    generator = np.random.default_rng(0)
    everyone = np.arange(people, dtype=np.int32)
    weights = np.stack([times_drawn(generator, everyone, people) for _ in range(resamples)])
    low, high = np.quantile((weights @ wrong) / (weights @ trials), [tail, 1 - tail])
    return float(min(low, rate)), float(max(high, rate))


def _det(own: _Mated, others: _Strange) -> tuple[DetPoint, ...]:
    best = others.best
    if not others.scores.size:
        return ()
    counts = np.unique(np.round(np.logspace(0, np.log10(len(best)), _DET_POINTS)).astype(np.int64))
    thresholds = thresholds_at(best, np.concatenate([[0], counts]) / len(best))
    return tuple(
        DetPoint(
            float(threshold),
            float(np.mean(best >= threshold)),
            float(np.mean(~own.found(float(threshold)))) if len(own.best) else None,
        )
        for threshold in thresholds
    )


def _pairs(
    shots: Sequence[Shot], calibration: Calibration, fprs: Sequence[float], dimension: int
) -> tuple[EvaluatedPairs, ...]:
    """Every two photos of the people, and each of them with each stranger's; strangers are not compared."""
    own = [shot for shot in shots if shot.embedding is not None and not shot.photo.stranger]
    strange = [shot for shot in shots if shot.embedding is not None and shot.photo.stranger]
    rows, columns = _embeddings(own, dimension), _embeddings([*own, *strange], dimension)
    people = numbered([shot.photo.person for shot in (*own, *strange)])
    points = [calibration.verification_point(fpr) for fpr in fprs]
    pairs = np.zeros(2, np.int64)
    matches = np.zeros((len(fprs), 2), np.int64)
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK] @ columns.T
        numbers = np.arange(start, start + len(block))[:, None]
        once = numbers < np.arange(len(columns))[None]
        same = people[numbers] == people[None]
        for kind, chosen in enumerate((once & ~same, once & same)):
            similarity = block[chosen]
            pairs[kind] += len(similarity)
            matches[:, kind] += [int((similarity >= point.threshold).sum()) for point in points]
    impostors, genuine = int(pairs[0]), int(pairs[1])
    return tuple(
        EvaluatedPairs(
            point.fpr,
            point.threshold,
            point.extrapolated,
            int(matched[0]) / impostors if impostors else None,
            int(matched[0]),
            impostors,
            (genuine - int(matched[1])) / genuine if genuine else None,
            genuine - int(matched[1]),
            genuine,
        )
        for point, matched in zip(points, matches, strict=True)
    )


def _grouped(
    plan: Plan,
    shots: Sequence[Shot],
    mated: Sequence[Shot],
    strange: Sequence[Shot],
    own: _Mated,
    others: _Strange,
    thresholds: Sequence[float],
) -> tuple[tuple[GroupPoint, ...], list[str]]:
    if plan.groups is None:
        return (), []
    named = plan.groups

    def group_of(shot: Shot) -> str | None:
        return named.get(shot.photo.file, named.get(shot.photo.person))

    own_groups, other_groups = [group_of(shot) for shot in mated], [group_of(shot) for shot in strange]
    points = []
    for group in sorted(set(named.values())):
        ours = own.where(np.array([one == group for one in own_groups], bool))
        theirs = others.where(np.array([one == group for one in other_groups], bool))
        fpirs, fnirs = theirs.fpir(plan.fprs, thresholds, plan.resamples), ours.fnir(thresholds, plan.resamples)
        points += [GroupPoint(group, *row) for row in zip(plan.fprs, fpirs, fnirs, strict=True)]
    notes = []
    known = {shot.photo.file for shot in shots} | {shot.photo.person for shot in shots}
    nobody = len(named.keys() - known)
    if nobody:
        notes.append(f"{nobody:,} of {len(named):,} lines of the groups name no photo and nobody here.")
    without = own_groups.count(None) + other_groups.count(None)
    if without:
        notes.append(f"{without:,} probes belong to no group; they are in the rates of all, and in no group's.")
    return tuple(points), notes


def _notes(
    people: Iterable[str], enrolled: int, plan: Plan, mated: Sequence[Shot], strange: Sequence[Shot]
) -> list[str]:
    notes = []
    missing = len(set(people)) - enrolled
    if missing:
        photos = "photo" if plan.enrol == 1 else f"{plan.enrol} photos"
        notes.append(
            f"{_count(missing)} could not be enrolled from the first {photos}; the others of these people count as "
            "missed."
        )
    if not mated:
        notes.append(f"Nobody has photos beyond the first {plan.enrol}: there is nothing to measure FNIR on.")
    if not strange:
        notes.append("There are no faces of strangers: there is nothing to measure FPIR on.")
    return notes


def table(found: Evaluation) -> str:
    """The figures as text for people, in percent."""
    lines = [
        f"{found.people:,} people, {found.gallery_size:,} enrolled with {found.templates:,} photos "
        f"(the first {found.enrol} of each); {found.probes.photos:,} other photos of them, "
        f"{found.strangers.photos:,} photos of {found.stranger_people:,} strangers; model {found.model_id}",
        "No usable face: " + "; ".join(_failed(found)),
        f"Best candidate wrong (rank 1): {_shown(found.rank1)}",
        "",
        f"{'asked FPIR':>10}  {'threshold':>9}  {'FPIR':>26}  {'FNIR':>26}  matches  mistaken",
    ]
    for point in found.points:
        mark = "*" if point.extrapolated else " "
        lines.append(
            f"{point.fpr:>10g}  {point.threshold:>8.4f}{mark}  {_shown(point.fpir):>26}  {_shown(point.fnir):>26}  "
            f"{point.matches:>7,}  {point.mistaken:>8,}"
        )
    lines += ["", "In brackets the 95 % interval over people; * beyond the calibration sample; ? see below."]
    if found.pairs:
        lines += ["", f"{'asked FMR':>10}  {'threshold':>9}  {'FMR':>10}  {'FNMR':>10}"]
        lines += [
            f"{p.fpr:>10g}  {p.threshold:>8.4f}{'*' if p.extrapolated else ' '}  {_percent(p.fmr):>10}  "
            f"{_percent(p.fnmr):>10}"
            for p in found.pairs
        ]
        pairs = found.pairs[0]
        lines.append(f"{pairs.genuine_pairs:,} pairs of one person's photos, {pairs.impostor_pairs:,} of two people's")
    if found.groups:
        width = max(5, *(len(one.group) for one in found.groups))
        lines += ["", f"{'group':<{width}}  {'asked FPIR':>10}  {'FPIR':>26}  {'FNIR':>26}"]
        lines += [
            f"{one.group:<{width}}  {one.fpr:>10g}  {_shown(one.fpir):>26}  {_shown(one.fnir):>26}"
            for one in found.groups
        ]
    said = list(found.notes)
    said += [f"FPIR at {point.fpr:g}: {point.fpir.note}" for point in found.points if point.fpir.note]
    said += [f"FNIR at {point.fpr:g}: {point.fnir.note}" for point in found.points if point.fnir.note]
    if found.ignored:
        said.append(f"{found.ignored:,} files are no photos by their names, or lie in no folder, and were passed over.")
    return "\n".join([*lines, "", *said]).rstrip()


def _failed(found: Evaluation) -> Iterable[str]:
    for name, one in (("to enrol", found.enrolled), ("probes", found.probes), ("strangers", found.strangers)):
        codes = ", ".join(f"{count} {code}" for code, count in one.codes.items())
        yield f"{name} {one.failed:,} of {one.photos:,}" + (f" ({codes})" if codes else "")


def _percent(rate: float | None) -> str:
    return "–" if rate is None else f"{100 * rate:.3g} %"


def _shown(rate: Estimate) -> str:
    if rate.rate is None or rate.low is None or rate.high is None:
        return "– ?"
    mark = "" if rate.supported else " ?"
    return f"{100 * rate.rate:.3g} % ({100 * rate.low:.2g}–{100 * rate.high:.2g}){mark}"


def _count(people: int) -> str:
    return f"{people:,} {'person' if people == 1 else 'people'}"
