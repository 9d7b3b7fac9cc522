"""The open-set trial: what an asked false-positive rate becomes when strangers search a gallery.

Some people are enrolled with k photos each; their other photos and those of strangers are the probes. FPIR is the
share of strangers' probes that are answered with somebody, FNIR the share of enrolled people's probes that are not
answered with that person (ISO/IEC 19795-1; NIST FRVT 1:N with rank 1 and a threshold). The gallery is then filled
up with people who are never probes. ``celebA_ir`` reports, once for each final version; ``validation`` is for choices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from service.calibration import Calibration
from service.domain import Crop, IndexEntries
from service.evaluation import times_drawn
from service.own_calibration import OwnCalibrations
from service.vision.embedder import Embedder
from training.calibrate import CALIBRATION, embed, require_crops_of
from training.data import DataError, Photo, Role
from training.degrade import cheap_camera
from training.evaluate import EvaluationSet
from training.metrics import LEVEL, numbered
from training.prepare import load_prepared

FPRS = (0.1, 0.03, 0.01)
TEMPLATES = (1, 3, 5)
SIZES = (200, 500, 1000)
REPEATS = 20
RESAMPLES = 10
"""Draws of people for the intervals, in each repeat."""

_ROUNDED = 6
_ENROLLED = {EvaluationSet.CELEBA_IR: Role.QUERY, EvaluationSet.VALIDATION: Role.VALIDATION}
_STRANGERS = {EvaluationSet.CELEBA_IR: Role.DISTRACTOR, EvaluationSet.VALIDATION: Role.FURTHER}
_FILLERS = {EvaluationSet.CELEBA_IR: (Role.VALIDATION, Role.CLASS), EvaluationSet.VALIDATION: (Role.CLASS,)}


class Outcome(BaseModel):
    """One line of the trial, rates as means over the repeats. ``threshold`` to ``fnir`` are the service's, of the
    model's calibration and the gallery's own people; ``model_fpir`` and ``model_fnir`` are at the threshold of the
    model's calibration alone. ``low``, ``high``: 95 % interval of ``fpir``, enrolled people and strangers drawn anew.
    ``oracle_fnir``: FNIR at the threshold with exactly the asked FPIR in that repeat. ``fixed_fpir``: FPIR at the
    threshold that is the service's for the gallery without fillers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    subjects: int
    templates: int
    fpr: float
    threshold: float
    extrapolated: bool
    fpir: float
    low: float
    high: float
    fnir: float
    oracle_fnir: float
    model_fpir: float
    model_fnir: float
    fixed_fpir: float

    @property
    def kept(self) -> bool:
        """Whether FPIR lies within a third and one and a half of the asked rate, or the interval holds it."""
        return self.fpr / 3 <= self.fpir <= 1.5 * self.fpr or self.low <= self.fpr <= self.high


class Trial(BaseModel):
    """The whole trial of one model on one set. ``probes``: photos of strangers in a repeat without fillers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_id: str
    model_sha256: str
    on: EvaluationSet
    degraded: bool = False
    repeats: int
    enrolled: int
    strangers: int
    probes: int
    outcomes: tuple[Outcome, ...]


@dataclass(frozen=True)
class People:
    """Photos by person. ``embeddings``: ``float32[N, D]``, L2-normalised; ``people``: ``int32[N]`` from 0."""

    embeddings: NDArray[np.float32]
    people: NDArray[np.int32]

    def drawn(self, generator: np.random.Generator) -> list[NDArray[np.intp]]:
        """The photos of each person in a random order."""
        return [generator.permutation(np.flatnonzero(self.people == one)) for one in range(self.people.max() + 1)]


@dataclass(frozen=True)
class _Line:
    """One repeat of one outcome. ``draws``: FPIR with people drawn anew."""

    threshold: float
    extrapolated: bool
    fpir: float
    fnir: float
    oracle_fnir: float
    model_fpir: float
    model_fnir: float
    fixed_fpir: float
    draws: NDArray[np.float64]


@dataclass(frozen=True)
class _Answers:
    """What searches returned: the best score and its person; ``person``: who searched, ``right``: who it should be,
    −1 for a stranger."""

    best: NDArray[np.float32]
    subject: NDArray[np.int64]
    person: NDArray[np.int64]
    right: NDArray[np.int64]


def open_set(
    model: Path,
    crops: Sequence[Path],
    on: EvaluationSet = EvaluationSet.CELEBA_IR,
    *,
    fillers: Path | None = None,
    degrade: bool = False,
    repeats: int = REPEATS,
    threads: int = 1,
    progress: bool = True,
) -> Trial:
    """Run the trial for the embedder in the folder ``model`` with its ``calibration.json``.

    ``crops``: folders that :func:`training.prepare.prepare` has filled; each role is taken from the first that
    holds it. ``fillers``: such a folder, cut like the queries, with the people who fill the gallery; without it
    no filling up is done. ``degrade``: give every crop the look of a cheap camera first, see
    :func:`training.degrade.cheap_camera`. On ``validation``, the strangers are the people of role ``further``, and a
    network that was trained on them is flattered.

    Raises :class:`~training.data.DataError` if people are missing or crops are not this embedder's, and
    :class:`~service.errors.FprUnsupported` if the calibration cannot support the rates.
    """
    embedder = Embedder.load(model, threads)
    calibration = Calibration.load(model / CALIBRATION)
    if calibration.model_sha256 != embedder.manifest.sha256:
        raise DataError(f"{model / CALIBRATION} was made for other weights; run `vultus-train calibrate` again")
    load = _Loader(embedder, degrade, progress)
    enrolled = load(crops, _ENROLLED[on], None)
    # Trial and error on validation needs no more photos of each stranger than celebA_ir has.
    strangers = load(crops, _STRANGERS[on], None if on is EvaluationSet.CELEBA_IR else max(TEMPLATES))
    filling = [load([fillers], role, max(TEMPLATES)) for role in _FILLERS[on]] if fillers is not None else []
    return Trial(
        model_id=embedder.model_id,
        model_sha256=embedder.manifest.sha256,
        on=on,
        degraded=degrade,
        repeats=repeats,
        enrolled=int(enrolled.people.max()) + 1,
        strangers=int(strangers.people.max()) + 1,
        probes=len(strangers.people),
        outcomes=tuple(run(calibration, enrolled, strangers, filling, repeats=repeats)),
    )


def run(
    calibration: Calibration, enrolled: People, strangers: People, fillers: Sequence[People], *, repeats: int = REPEATS
) -> list[Outcome]:
    """Every line of the trial, from embeddings.

    First all strangers are probes and only ``enrolled`` are in the gallery; then half of the strangers, and after
    them ``fillers`` in their order, fill it up to each of :data:`SIZES` that they suffice for.
    """
    found: list[Outcome] = []
    for k in TEMPLATES:
        lines: dict[tuple[int, float], list[_Line]] = {}
        for repeat in range(repeats):
            generator = np.random.default_rng(repeat)
            _one_repeat(calibration, enrolled, strangers, fillers, k, generator, lines)
        for (subjects, fpr), rows in lines.items():
            fpir = float(np.mean([row.fpir for row in rows]))
            draws = np.concatenate([row.draws for row in rows])
            # A gallery drawn with replacement has fewer different people and a lower FPIR: only the spread is taken.
            draws *= fpir / max(float(draws.mean()), 1e-12)
            low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
            found.append(
                Outcome(
                    subjects=subjects,
                    templates=k,
                    fpr=fpr,
                    threshold=_mean([row.threshold for row in rows]),
                    extrapolated=any(row.extrapolated for row in rows),
                    fpir=round(fpir, _ROUNDED),
                    low=round(float(low), _ROUNDED),
                    high=round(float(high), _ROUNDED),
                    fnir=_mean([row.fnir for row in rows]),
                    oracle_fnir=_mean([row.oracle_fnir for row in rows]),
                    model_fpir=_mean([row.model_fpir for row in rows]),
                    model_fnir=_mean([row.model_fnir for row in rows]),
                    fixed_fpir=_mean([row.fixed_fpir for row in rows]),
                )
            )
    return found


def _one_repeat(
    calibration: Calibration,
    enrolled: People,
    strangers: People,
    fillers: Sequence[People],
    k: int,
    generator: np.random.Generator,
    lines: dict[tuple[int, float], list[_Line]],
) -> None:
    own = enrolled.drawn(generator)
    gallery = [enrolled.embeddings[photos[:k]] for photos in own]
    rest = np.concatenate([photos[k:] for photos in own])
    everyone = generator.permutation(strangers.people.max() + 1)
    half = everyone[: len(everyone) // 2]
    by_person = strangers.drawn(generator)
    more = [strangers.embeddings[by_person[one][:k]] for one in half]
    for filler in fillers:
        photos = filler.drawn(generator)
        more += [filler.embeddings[photos[one][:k]] for one in generator.permutation(len(photos))]
    sizes = [len(gallery)]
    if fillers:
        sizes += [size for size in SIZES if len(gallery) < size <= len(gallery) + len(more)]
    gallery += more
    count = np.array([len(photos) for photos in gallery])
    ends = np.cumsum(count)
    templates = np.concatenate(gallery)
    first: dict[float, float] = {}
    subject_of = np.repeat(np.arange(len(gallery), dtype=np.int64), count)
    for size in sizes:
        everybody = np.arange(ends[size - 1], dtype=np.int64)
        own_people = OwnCalibrations(calibration, lambda rows: templates[np.asarray(rows)])
        own_people.add(IndexEntries("", everybody, subject_of[everybody], templates[everybody]))
        # The strangers who fill the gallery are never probes.
        probing = np.ones(len(strangers.people), bool) if size == sizes[0] else ~np.isin(strangers.people, half)
        probes = np.concatenate([enrolled.embeddings[rest], strangers.embeddings[probing]])
        scores = probes @ templates[: ends[size - 1]].T
        best = scores.argmax(axis=1)
        answers = _Answers(
            scores[np.arange(len(scores)), best],
            np.searchsorted(ends, best, side="right"),
            np.concatenate([enrolled.people[rest], strangers.people[probing]]).astype(np.int64),
            np.concatenate([enrolled.people[rest], np.full(int(probing.sum()), -1)]).astype(np.int64),
        )
        draws = _draws(scores[len(rest) :], answers, ends[:size], len(rest), generator)
        for fpr in FPRS:
            model = calibration.identification_point(fpr, size, int(ends[size - 1]))
            point = own_people.combined(model, "", "stricter", size, int(ends[size - 1]))
            fixed = first.setdefault(fpr, point.threshold)
            strange = answers.best[len(rest) :]
            oracle = float(np.quantile(strange.astype(np.float64), 1 - fpr))
            lines.setdefault((size, fpr), []).append(
                _Line(
                    point.threshold,
                    point.extrapolated,
                    float(np.mean(strange >= point.threshold)),
                    _missed(answers, point.threshold),
                    _missed(answers, oracle),
                    float(np.mean(strange >= model.threshold)),
                    _missed(answers, model.threshold),
                    float(np.mean(strange >= fixed)),
                    np.array([np.average(top >= point.threshold, weights=weight) for top, weight in draws]),
                )
            )


def _draws(
    scores: NDArray[np.float32],
    answers: _Answers,
    ends: NDArray[np.int64],
    skipped: int,
    generator: np.random.Generator,
) -> list[tuple[NDArray[np.float32], NDArray[np.float64]]]:
    """Best scores and weights of the strangers' probes with gallery and strangers drawn anew, with replacement."""
    starts = np.concatenate([[0], ends[:-1]])
    each = np.maximum.reduceat(scores, starts, axis=1)
    person = answers.person[skipped:]
    people = np.unique(person)
    drawn = []
    for _ in range(RESAMPLES):
        weight = times_drawn(generator, people, int(people.max()) + 1).astype(np.float64)
        held = np.unique(generator.choice(len(ends), len(ends)))
        drawn.append((each[:, held].max(axis=1), weight[person]))
    return drawn


def _missed(answers: _Answers, threshold: float) -> float:
    ours = answers.right >= 0
    found = (answers.best >= threshold) & (answers.subject == answers.right)
    return float(1 - np.mean(found[ours]))


def _mean(values: Sequence[float]) -> float:
    return round(float(np.mean(values)), _ROUNDED)


class _Loader:
    """Embeds the people of a role from the first folder that holds them."""

    def __init__(self, embedder: Embedder, degrade: bool, progress: bool) -> None:
        self._embedder, self._degrade, self._progress = embedder, degrade, progress

    def __call__(self, folders: Sequence[Path], role: Role, most: int | None) -> People:
        """``most``: photos for each person, drawn with a fixed seed; None for all."""
        for folder in folders:
            prepared = load_prepared(folder)
            require_crops_of(prepared, self._embedder)
            chosen = prepared.where(role)
            if not len(chosen):
                continue
            people = numbered([prepared.rows[i].photo.identity for i in chosen])
            if most is not None:
                order = np.random.default_rng(0).permutation(len(chosen))
                taken = np.concatenate([order[people[order] == one][:most] for one in range(people.max() + 1)])
                chosen, people = chosen[np.sort(taken)], people[np.sort(taken)]
            look = self._cheap if self._degrade else None
            return People(embed(self._embedder, prepared, chosen, look=look, progress=self._progress), people)
        raise DataError(f"{', '.join(map(str, folders))}: there is nobody of the role {role}")

    def _cheap(self, crop: Crop, photo: Photo) -> Crop:
        left, right = self._embedder.manifest.template.points[:2]
        return cheap_camera(crop, float(right[0] - left[0]), photo.file)


def name_of(trial: Trial) -> str:
    """The set's name, with ``-degraded`` where every photo was given the look of a cheap camera."""
    return f"{trial.on}-degraded" if trial.degraded else str(trial.on)


def table(trial: Trial) -> str:
    """The Markdown table: one row for each gallery and asked rate, in percent."""
    lines = [
        "| subjects | photos each | asked FPIR | measured FPIR | ratio | kept | FNIR | FNIR, oracle "
        "| FPIR, model only | ratio | FNIR, model only | FPIR, fixed threshold |",
        "| ---: | ---: | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in trial.outcomes:
        mark = "*" if one.extrapolated else ""
        cells = [
            f"{one.subjects:,}",
            str(one.templates),
            f"{one.fpr:.0%}",
            f"{one.fpir:.2%}{mark} ({one.low:.2%}–{one.high:.2%})",
            f"{one.fpir / one.fpr:.2f}",
            "yes" if one.kept else "no",
            f"{one.fnir:.1%}",
            f"{one.oracle_fnir:.1%}",
            f"{one.model_fpir:.2%}",
            f"{one.model_fpir / one.fpr:.2f}",
            f"{one.model_fnir:.1%}",
            f"{one.fixed_fpir:.2%}",
        ]
        lines.append(f"| {' | '.join(cells)} |".replace("%", " %"))
    kept = sum(one.kept for one in trial.outcomes)
    lines += [
        "",
        f"{trial.model_id} on {name_of(trial)}: {trial.enrolled} people enrolled, {trial.probes:,} photos of "
        f"{trial.strangers} strangers, {trial.repeats} repeats; in brackets the 95 % interval over people; "
        f"* extrapolated. The promise is kept in {kept} of {len(trial.outcomes)} rows.",
    ]
    return "\n".join(lines)


def write_trial(trial: Trial, folder: Path) -> Path:
    """Write ``folder/<model_id>.<set>.open-set.json`` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{trial.model_id}.{name_of(trial)}.open-set.json"
    path.write_text(trial.model_dump_json(indent=2) + "\n", encoding="utf-8", newline="\n")
    return path


def draw(trial: Trial, path: Path) -> None:
    """Draw measured FPIR over subjects as a PNG, a panel for each k: at the service's threshold, at the one of
    the model's calibration alone, and at a fixed one."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    counts = sorted({one.templates for one in trial.outcomes})
    figure = Figure(figsize=(4 * len(counts), 4.5), layout="constrained")
    panels = figure.subplots(1, len(counts), sharey=True, squeeze=False)[0]
    for axes, k in zip(panels, counts, strict=True):
        for number, fpr in enumerate(sorted({one.fpr for one in trial.outcomes}, reverse=True)):
            rows = [one for one in trial.outcomes if one.templates == k and one.fpr == fpr]
            subjects, colour = [one.subjects for one in rows], f"C{number}"
            axes.axhline(fpr, color=colour, lw=0.8, ls=":")
            # The interval is of resampled rates, and may in odd cases leave the rate itself outside.
            errors = [[max(0.0, r.fpir - r.low) for r in rows], [max(0.0, r.high - r.fpir) for r in rows]]
            measured = [one.fpir for one in rows]
            name = f"asked {fpr:g}"
            axes.errorbar(subjects, measured, yerr=errors, fmt="o-", ms=4, capsize=3, color=colour, label=name)
            axes.plot(subjects, [one.model_fpir for one in rows], "s:", ms=3, color=colour, alpha=0.8)
            axes.plot(subjects, [one.fixed_fpir for one in rows], "x--", color=colour, alpha=0.6)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("subjects in the gallery")
        axes.set_title(f"{k} photo{'s' * (k > 1)} each", fontsize=10)
        axes.grid(visible=True, which="major", alpha=0.4)
    panels[0].set_ylabel("measured FPIR")
    panels[0].legend(loc="best", fontsize=8)
    figure.suptitle(
        f"{trial.model_id}, {name_of(trial)}: with the gallery's own people (lines), model only (dotted), "
        "fixed threshold (dashed)",
        fontsize=11,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110, metadata={"Software": None})
