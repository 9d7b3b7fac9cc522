"""Tables and pictures of finished runs, from what stands in their folders: nothing is computed anew."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from pydantic import BaseModel, ConfigDict, ValidationError

from training.analysis import BINS, Analysis, Similarities
from training.data import DataError
from training.evaluate import EvaluationSet, Figures, read_figures, update_document
from training.validation import Score

_DASHES = ("-", "--", ":", "-.")

CONFIG, METRICS, TEST = "config.json", "metrics.jsonl", "test.json"

STUDY, ERRORS_TABLE = "study", "study.errors"
"""The names of the marked places in the document."""


class Tested(BaseModel):
    """``test.json``: the scores on the test split, and what they rest on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    score: Score
    analysis: Analysis


@dataclass(frozen=True)
class Run:
    """What a run's folder says. ``test``: None before the test split was looked at."""

    name: str
    config: dict[str, Any]
    lines: tuple[dict[str, Any], ...]
    test: Tested | None


def read_runs(folder: Path) -> list[Run]:
    """Every run below a folder, by name. Raises :class:`~training.data.DataError`."""
    runs = []
    for path in sorted(folder.glob(f"*/{METRICS}")):
        try:
            config = json.loads((path.parent / CONFIG).read_bytes())
            lines = tuple(json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
            tested = path.parent / TEST
            test = Tested.model_validate_json(tested.read_bytes()) if tested.exists() else None
        except (OSError, ValueError, ValidationError) as error:
            raise DataError(f"{path.parent} is not a run: {error}") from error
        if lines:
            runs.append(Run(path.parent.name, config, lines, test))
    if not runs:
        raise DataError(f"{folder} has no runs")
    return runs


def report(runs: Path, out: Path, document: Path) -> list[Path]:
    """Write the tables into ``document``, at its marks, and the pictures into ``out``; return the pictures' paths.

    Models whose figures on ``validation`` lie in ``out`` stand beside the runs in the picture of rates.

    Raises :class:`~training.data.DataError` if there are no runs, or no marks.
    """
    found = read_runs(runs)
    tested = [run for run in found if run.test is not None]
    update_document(document, STUDY, study_table(found))
    update_document(document, ERRORS_TABLE, errors_table(tested))
    out.mkdir(parents=True, exist_ok=True)
    pictures = {"training-curves": draw_curves(found)}
    if tested:
        pictures |= {
            "similarities": draw_similarities(tested),
            "study-tpr": draw_rates(tested, read_figures(out, EvaluationSet.VALIDATION)),
            "tsne": draw_maps(tested),
        }
    paths = []
    for name, figure in pictures.items():
        FigureCanvasAgg(figure)
        paths.append(out / f"{name}.png")
        figure.savefig(paths[-1], dpi=100, metadata={"Software": None})
    return paths


def study_table(runs: Sequence[Run]) -> str:
    """One row for each run: what it learned from and what it reached."""
    lines = [
        "| run | objective | learned from | crops seen | minutes | accuracy, validation | nearest centroid, validation "
        "| accuracy, test | nearest centroid, test | TPR at FPR 0.01, unseen people |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for run in runs:
        last = run.lines[-1]
        scores = (last.get("validation", {}), run.test.score.model_dump() if run.test is not None else {})
        cells = [
            run.name,
            _objective(run.config["loss"]),
            ", ".join(run.config["people"]),
            f"{last['samples']:,}",
            f"{last['seconds'] / 60:.0f}",
            *(_percent(found.get(name)) for found in scores for name in ("accuracy", "centroid_accuracy")),
            _percent(scores[0].get("tpr", {}).get("0.01")),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "In percent; – where there is none. Accuracy is the classifier's; unseen people are the 50 of `validation`.",
        *spread(runs),
    ]
    return "\n".join(lines)


def spread(runs: Sequence[Run]) -> list[str]:
    """What runs that differ in their seed alone reach: a sentence for each configuration that was run so."""
    groups: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        if "validation" in run.lines[-1]:
            groups[json.dumps(run.config | {"seed": None}, sort_keys=True)].append(run)
    told = []
    for group in groups.values():
        # Of one seed they differ in the weights that they began with.
        if len(group) > 1 and len({run.config["seed"] for run in group}) == len(group):
            reached = [100 * run.lines[-1]["validation"]["centroid_accuracy"] for run in group]
            told.append(
                f"{', '.join(run.name for run in group)} differ in their seed alone: nearest centroid "
                f"{np.mean(reached):.1f} with a standard deviation of {np.std(reached, ddof=1):.1f}."
            )
    return told


def errors_table(runs: Sequence[Run]) -> str:
    """The surest errors of each run: how many, and the files of the first three."""
    lines = ["| run | errors | surest errors: photo, taken for the person of CelebA's number |", "| --- | ---: | --- |"]
    for run in runs:
        if run.test is None:
            continue
        analysis = run.test.analysis
        first = "; ".join(f"{Path(e.file).name} → {e.answer} ({e.score:.2f})" for e in analysis.worst[:3])
        lines.append(f"| {run.name} | {analysis.errors} of {run.test.score.photos} | {first} |")
    return "\n".join(lines)


def draw_curves(runs: Sequence[Run]) -> Figure:
    """Loss, and nearest-centroid accuracy on the validation split, over the crops seen."""
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, run in enumerate(runs):
        samples = [line["samples"] for line in run.lines]
        # Of the shortest runs there is one point.
        style = _line(number) | {"marker": ".", "label": run.name}
        left.plot(samples, [line["loss_named"] for line in run.lines], **style)
        known = [line for line in run.lines if "validation" in line]
        accuracy = [line["validation"]["centroid_accuracy"] for line in known]
        right.plot([line["samples"] for line in known], accuracy, **style)
    left.set(xlabel="crops seen", ylabel="loss on named faces", title="Training")
    left.set_yscale("log")
    # While a run goes on, centroids are of a few photos: see CENTROID_PHOTOS.
    right.set(
        xlabel="crops seen",
        ylabel="nearest centroid of 5 training photos; at the end, of all",
        title="CelebA-500, validation split (1,874 photos, 500 people)",
    )
    right.yaxis.set_major_formatter(PercentFormatter(1))
    for axes in (left, right):
        axes.grid(visible=True, alpha=0.4)
    figure.legend(*right.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return figure


def _line(number: int) -> dict[str, str]:
    """Colour and dashes that no other number up to 39 has."""
    return {"color": f"C{number % 10}", "ls": _DASHES[number // 10 % len(_DASHES)]}


def draw_similarities(runs: Sequence[Run]) -> Figure:
    """For each run the cosines of genuine and impostor pairs, of people learned from and of others."""
    figure = Figure(figsize=(10, 2.6 * len(runs)), layout="constrained")
    grid = figure.subplots(len(runs), 2, squeeze=False, sharex=True)
    for row, run in zip(grid, runs, strict=True):
        if run.test is None:
            continue
        for axes, pairs, who in (
            (row[0], run.test.analysis.seen, f"people learned from, {run.test.analysis.split} split"),
            (row[1], run.test.analysis.unseen, "people not learned from, validation"),
        ):
            _histogram(axes, pairs)
            axes.set_title(
                f"{run.name}: {who}; {pairs.photos:,} photos of {pairs.people} people\n"
                f"d′ {pairs.d_prime:.2f}, EER {pairs.equal_error_rate:.1%}".replace("%", " %"),
                fontsize=8,
            )
    for axes in grid[-1]:
        axes.set_xlabel("cosine of two embeddings")
    grid[0][0].legend(fontsize=8)
    return figure


def draw_rates(runs: Sequence[Run], models: Sequence[Figures] = ()) -> Figure:
    """TPR over FPR of every run on a logarithmic axis, of people learned from and of others.

    ``models``: others, by their figures on ``validation``.
    """
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for number, run in enumerate(runs):
        if run.test is None:
            continue
        for axes, pairs in zip(panels, (run.test.analysis.seen, run.test.analysis.unseen), strict=True):
            axes.plot(pairs.fpr, pairs.tpr, label=run.name, **_line(number))
    for number, model in enumerate(models):
        style = {"color": "black", "ls": _DASHES[number % len(_DASHES)], "lw": 1}
        panels[1].plot(model.curve_fpr, model.curve_tpr, label=f"{model.model_id} (as it ships)", **style)
    for axes, who in zip(
        panels, ("people learned from, test split", "people not learned from, validation"), strict=True
    ):
        axes.set_xscale("log")
        axes.set_xlim(1e-4, 1)
        axes.set_ylim(0, 1.01)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.set(xlabel="false-positive rate of pairs", title=f"CelebA-500: {who}")
        axes.grid(visible=True, alpha=0.4)
    panels[0].set_ylabel("true-positive rate of pairs")
    panels[1].legend(fontsize=8)
    return figure


def draw_maps(runs: Sequence[Run]) -> Figure:
    """t-SNE maps of the test embeddings of 20 people, a panel for each run."""
    columns = min(3, len(runs))
    figure = Figure(figsize=(4.2 * columns, 4.2 * -(-len(runs) // columns)), layout="constrained")
    panels = figure.subplots(-(-len(runs) // columns), columns, squeeze=False)
    for axes in panels.flat:
        axes.set_axis_off()
    for axes, run in zip(panels.flat, runs, strict=False):
        if run.test is None:
            continue
        points = run.test.analysis.map
        names = sorted({point.identity for point in points})
        for number, name in enumerate(names):
            own = [point for point in points if point.identity == name]
            axes.scatter(
                [p.x for p in own],
                [p.y for p in own],
                s=18,
                color=f"C{number % 10}",
                marker="o" if number < 10 else "^",
            )
        axes.set_title(f"{run.name}: t-SNE of {len(points)} photos of {len(names)} people, test split", fontsize=8)
    return figure


def _histogram(axes: Axes, pairs: Similarities) -> None:
    edges = np.linspace(-1, 1, BINS + 1)
    for counts, name, colour in ((pairs.genuine, "same person", "C0"), (pairs.impostor, "different people", "C1")):
        share = np.array(counts) / max(1, sum(counts))
        axes.stairs(share, edges, fill=True, alpha=0.5, color=colour, label=f"{name} ({sum(counts):,} pairs)")
    axes.set_ylabel("share of pairs", fontsize=8)


def _objective(loss: dict[str, Any]) -> str:
    return f"triplet ({loss['mining']})" if loss["kind"] == "triplet" else str(loss["kind"])


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f}"
