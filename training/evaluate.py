"""How well an embedder tells people apart whom it has not seen: figures, curve and table.

``celebA_ir`` reports, once for each final model; ``validation`` compares choices. Its protocol:

- ``celebA_ir``: genuine are all pairs of query photos of one person; impostor are query pairs of two people, and
  every query with every distractor.
- ``validation``: all pairs of the photos of these people.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from service.calibration import Calibration
from service.vision.embedder import Embedder
from service.vision.onnx import OnnxModel
from training.calibrate import CALIBRATION, embed, require_crops_of
from training.data import DataError, Role
from training.metrics import FPRS, LEVEL, RESAMPLES, all_pairs, curve, numbered, rates_with_intervals
from training.prepare import Alignment, Counts, load_prepared

ASKED = (0.1, 0.01, 0.001)
"""The FMR that are asked of the calibration."""

_ROUNDED = 6


class EvaluationSet(StrEnum):
    """On whom to evaluate. A choice between models is made on ``validation``, never on ``celebA_ir``."""

    CELEBA_IR = "celebA_ir"
    VALIDATION = "validation"


_ROLES = {
    EvaluationSet.CELEBA_IR: (Role.QUERY, Role.DISTRACTOR),
    EvaluationSet.VALIDATION: (Role.VALIDATION,),
}


class Point(BaseModel):
    """TPR at one FPR, ``threshold`` a cosine. ``low``, ``high``: 95 % interval, people drawn anew; None if
    there were too few people to draw from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fpr: float
    threshold: float
    tpr: float
    low: float | None
    high: float | None


class Asked(BaseModel):
    """What became of an asked FMR: ``fmr`` is the share of the impostor pairs at or above the calibration's
    ``threshold`` for it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    asked: float
    threshold: float
    extrapolated: bool
    fmr: float

    @property
    def kept(self) -> bool:
        """Whether the measured rate is within a factor of 1.5 of the asked one."""
        return self.asked / 1.5 <= self.fmr <= 1.5 * self.asked


class Figures(BaseModel):
    """One model on one set. ``people`` have genuine pairs or might have; ``others`` occur in impostor pairs
    only. ``curve_fpr``, ``curve_tpr``: the whole curve, FPR rising. ``asked``: empty without a calibration of the
    network as it was evaluated."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_id: str
    model_sha256: str
    flip: bool
    on: EvaluationSet
    alignment: Alignment
    like_queries: bool
    detector_sha256: str
    acquired: Counts
    people: int
    photos: int
    others: int
    other_photos: int
    genuine_pairs: int
    impostor_pairs: int
    resamples: int
    points: tuple[Point, ...]
    curve_fpr: tuple[float, ...]
    curve_tpr: tuple[float, ...]
    asked: tuple[Asked, ...] = ()


def evaluate(
    model: Path,
    crops: Path,
    on: EvaluationSet = EvaluationSet.CELEBA_IR,
    *,
    flip: bool | None = None,
    resamples: int = RESAMPLES,
    threads: int = 1,
    progress: bool = True,
) -> Figures:
    """Figures of the embedder in the folder ``model``, on crops that were prepared for it.

    ``flip``: overrules the manifest, for comparisons; not on ``celebA_ir``. ``resamples``: how often people
    are drawn anew for the intervals, 0 for none.

    Raises :class:`~training.data.DataError` if the crops are not this embedder's or lack genuine or impostor
    pairs; :class:`~service.vision.manifest.ModelError` if the model is unsound.
    """
    embedder = Embedder.load(model, threads)
    if flip is not None and flip != embedder.manifest.flip:
        if on is EvaluationSet.CELEBA_IR:
            raise DataError("celebA_ir reports a model as its manifest says; compare on validation")
        manifest = embedder.manifest.model_copy(update={"flip": flip})
        embedder = Embedder(manifest, OnnxModel(model / manifest.file, threads))
    prepared = load_prepared(crops)
    require_crops_of(prepared, embedder)
    settings = prepared.summary.settings
    if on is EvaluationSet.CELEBA_IR and settings.alignment is not Alignment.EYE_LINE:
        raise DataError("celebA_ir reports the alignment that the service uses; compare on validation")
    roles = _ROLES[on]
    chosen, rest = prepared.where(roles[0]), prepared.where(*roles[1:])
    missing = [role for role in roles if not len(prepared.where(role))]
    if missing:
        raise DataError(f"{crops} holds no faces of the role {missing[0]}")
    numbers = numbered([prepared.rows[i].photo.identity for i in (*chosen, *rest)])
    people, others = numbers[: len(chosen)], numbers[len(chosen) :]
    embeddings = embed(embedder, prepared, np.concatenate([chosen, rest]), progress=progress)
    genuine, impostor = all_pairs(embeddings[: len(chosen)], people, embeddings[len(chosen) :], others)
    if not len(genuine) or not len(impostor):
        raise DataError(f"{crops}: two photos of one person and a photo of another are the least")
    found = rates_with_intervals(genuine, impostor, FPRS, resamples=resamples)
    fpr, tpr = curve(genuine.similarity, impostor.similarity)
    return Figures(
        model_id=embedder.model_id,
        model_sha256=embedder.manifest.sha256,
        flip=embedder.manifest.flip,
        on=on,
        alignment=settings.alignment,
        like_queries=settings.like_queries,
        detector_sha256=settings.detector_sha256,
        acquired=prepared.counts(*roles),
        people=len(np.unique(people)),
        photos=len(chosen),
        others=len(np.unique(others)),
        other_photos=len(rest),
        genuine_pairs=len(genuine),
        impostor_pairs=len(impostor),
        resamples=resamples,
        points=tuple(
            Point(
                fpr=rate.fpr,
                threshold=round(rate.threshold, _ROUNDED),
                tpr=round(rate.tpr, _ROUNDED),
                low=None if rate.low is None else round(rate.low, _ROUNDED),
                high=None if rate.high is None else round(rate.high, _ROUNDED),
            )
            for rate in found
        ),
        curve_fpr=tuple(float(f"{value:.6g}") for value in fpr),
        curve_tpr=tuple(np.round(tpr, _ROUNDED).tolist()),
        asked=_asked(model, embedder, impostor.similarity) if flip is None else (),
    )


def _asked(model: Path, embedder: Embedder, impostors: NDArray[np.float32]) -> tuple[Asked, ...]:
    if not (model / CALIBRATION).exists():
        return ()
    calibration = Calibration.load(model / CALIBRATION)
    if calibration.model_sha256 != embedder.manifest.sha256:
        return ()
    points = [calibration.verification_point(fmr) for fmr in ASKED if fmr >= calibration.smallest_fmr]
    return tuple(
        Asked(
            asked=point.fpr,
            threshold=point.threshold,
            extrapolated=point.extrapolated,
            fmr=float(f"{np.mean(impostors >= point.threshold):.6g}"),
        )
        for point in points
    )


def asked_table(figures: Figures) -> str:
    """The Markdown table of what became of the asked FMR."""
    lines = ["| asked FMR | threshold | measured FMR | ratio |", "| ---: | ---: | ---: | ---: |"]
    for one in figures.asked:
        mark = "*" if one.extrapolated else ""
        lines.append(f"| {one.asked:g} | {one.threshold:.4f}{mark} | {one.fmr:.3g} | {one.fmr / one.asked:.2f} |")
    return "\n".join(lines)


def write_figures(figures: Figures, folder: Path) -> Path:
    """Write ``folder/<model_id>.<set>.json`` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{figures.model_id}.{figures.on}.json"
    path.write_text(figures.model_dump_json(indent=2) + "\n", encoding="utf-8", newline="\n")
    return path


def read_figures(folder: Path, on: EvaluationSet) -> list[Figures]:
    """All figures on one set that a folder holds, by model. Raises :class:`~training.data.DataError`."""
    found = []
    for path in sorted(folder.glob(f"*.{on}.json")):
        try:
            found.append(Figures.model_validate_json(path.read_bytes()))
        except (OSError, ValidationError) as error:
            raise DataError(f"{path} does not hold figures: {error}") from error
    return found


def table(figures: Sequence[Figures]) -> str:
    """The Markdown table: one row for each model, TPR and its 95 % interval at each FPR, in percent."""
    fprs = [point.fpr for point in figures[0].points]
    lines = [
        "| model | " + " | ".join(f"FPR {fpr:g}" for fpr in fprs) + " | fallback |",
        "| --- |" + " ---: |" * (len(fprs) + 1),
    ]
    for one in figures:
        name = f"{one.model_id}{', flip' if one.flip else ''}"
        cells = [f"{_percent(p.tpr)}{_interval(p)}" for p in one.points]
        share = one.acquired.fallback / one.acquired.photos
        lines.append(f"| {name} | {' | '.join(cells)} | {share:.1%} |".replace("%", " %"))
    one = figures[0]
    others = f" {one.other_photos:,} photos of {one.others:,} others;" if one.other_photos else ""
    lines += [
        "",
        f"TPR in percent, in brackets the {LEVEL:.0%} interval over people".replace("%", " %")
        + f". {one.on}: {one.photos:,} photos of {one.people:,} people;{others} "
        + f"{one.genuine_pairs:,} genuine and {one.impostor_pairs:,} impostor pairs.",
    ]
    if one.acquired.none:
        lines[-1] += f" No face was found in {one.acquired.none:,} further photos; they count nowhere."
    return "\n".join(lines)


def update_document(document: Path, on: str, text: str) -> None:
    """Replace what stands between the two marker lines of a set, or of another name, in a Markdown file.

    The markers are ``<!-- figures:SET -->`` and ``<!-- /figures:SET -->``. Raises
    :class:`~training.data.DataError` if they are not there exactly once and in this order.
    """
    first, last = f"<!-- figures:{on} -->", f"<!-- /figures:{on} -->"
    try:
        old = document.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{document} cannot be read: {error.strerror}") from error
    if old.count(first) != 1 or old.count(last) != 1 or old.index(first) > old.index(last):
        raise DataError(f"{document} has no place for figures: {first} and {last} are needed, once each")
    before, after = old.split(first)[0], old.split(last)[1]
    document.write_text(f"{before}{first}\n{text}\n{last}{after}", encoding="utf-8", newline="\n")


def draw(figures: Sequence[Figures], path: Path) -> None:
    """Draw the curves of all models on one set as a PNG: TPR over FPR on a logarithmic axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    one = figures[0]
    others = f", {one.other_photos:,} photos of {one.others:,} others" if one.other_photos else ""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    for number, item in enumerate(figures):
        colour = f"C{number}"
        name = f"{item.model_id}{' (flip)' if item.flip else ''}"
        axes.plot(item.curve_fpr, item.curve_tpr, color=colour, label=name)
        known = [p for p in item.points if p.low is not None and p.high is not None]
        # The interval is of resampled rates, and may in odd cases leave the rate itself outside.
        below = [max(0.0, p.tpr - (p.low or 0.0)) for p in known]
        above = [max(0.0, (p.high or 0.0) - p.tpr) for p in known]
        axes.errorbar(
            [p.fpr for p in known], [p.tpr for p in known], yerr=[below, above], fmt="o", ms=4, capsize=3, color=colour
        )
    axes.set_xscale("log")
    axes.set_xlim(1 / one.impostor_pairs, 1)
    axes.set_ylim(0, 1.01)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("false-positive rate: share of impostor pairs above the threshold")
    axes.set_ylabel("true-positive rate: share of genuine pairs above it")
    axes.set_title(
        f"{one.on}: {one.photos:,} photos of {one.people:,} people{others}\n"
        f"{one.genuine_pairs:,} genuine, {one.impostor_pairs:,} impostor pairs; bars: {LEVEL:.0%} interval over people",
        fontsize=10,
    )
    axes.grid(visible=True, which="major", alpha=0.4)
    axes.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _interval(point: Point) -> str:
    if point.low is None or point.high is None:
        return ""
    return f" ({_percent(point.low)}–{_percent(point.high)})"
