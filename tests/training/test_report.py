"""What is told of a run is what its network does, and can be drawn from numbers alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow
from sklearn.metrics import roc_curve

from tests.training.test_train import config, learn
from training.analysis import equal_error_rate, mapped, similarities
from training.data import DataError
from training.report import Run, read_runs, report, spread
from training.train import test as measure

MARKS = "".join(f"<!-- figures:{name} -->\nold\n<!-- /figures:{name} -->\n" for name in ("study", "study.errors"))


def people(count: int, photos: int, noise: float) -> tuple[np.ndarray, list[str]]:
    generator = np.random.default_rng(2)
    centres = generator.normal(size=(count, 24)).repeat(photos, axis=0)
    vectors = centres + noise * generator.normal(size=centres.shape)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit.astype(np.float32), [f"p{number // photos}" for number in range(count * photos)]


def test_similarities_count_every_pair():
    vectors, names = people(12, 5, 1.0)
    found = similarities(vectors, names)
    cosines = vectors @ vectors.T
    upper = np.triu(np.ones_like(cosines, dtype=bool), 1)
    same = np.array(names)[:, None] == np.array(names)
    genuine, impostor = cosines[upper & same], cosines[upper & ~same]
    assert (found.people, found.photos) == (12, 60)
    assert sum(found.genuine) == len(genuine)
    assert np.array_equal(found.impostor, np.histogram(impostor, 100, (-1, 1))[0])
    apart = genuine.mean() - impostor.mean()
    assert found.d_prime == pytest.approx(apart / np.sqrt((genuine.var() + impostor.var()) / 2), rel=1e-3)
    fpr, tpr, _ = roc_curve([1] * len(genuine) + [0] * len(impostor), np.concatenate([genuine, impostor]))
    place = np.argmin(np.abs(fpr - (1 - tpr)))
    assert found.equal_error_rate == pytest.approx((fpr[place] + 1 - tpr[place]) / 2, abs=0.01)


def test_the_equal_error_rate_of_separate_and_of_equal_classes():
    assert equal_error_rate(np.array([0.8, 0.9], np.float32), np.array([0.1, 0.2], np.float32)) == 0
    same = np.linspace(0, 1, 101, dtype=np.float32)
    assert equal_error_rate(same, same) == pytest.approx(0.5, abs=0.01)


def test_the_map_shows_twenty_people_and_keeps_them_together():
    vectors, names = people(25, 6, 0.2)
    found = mapped(vectors, names)
    assert len({point.identity for point in found}) == 20
    assert found == mapped(vectors, names)
    places = np.array([(point.x, point.y) for point in found])
    own = np.array([point.identity for point in found])
    distance = np.linalg.norm(places[:, None] - places, axis=2)
    np.fill_diagonal(distance, np.inf)
    assert (own[distance.argmin(axis=1)] == own).mean() > 0.9


def test_runs_that_differ_in_their_seed_alone_show_the_spread():
    def run(name: str, seed: int, size: int, reached: float) -> Run:
        line = {"validation": {"centroid_accuracy": reached}}
        return Run(name, {"seed": seed, "size": size}, (line,), None)

    # b and e began with other weights.
    runs = [run("a", 0, 64, 0.3), run("b", 0, 96, 0.9), run("e", 0, 96, 0.8)]
    told = spread([*runs, run("c", 1, 64, 0.34), run("d", 2, 64, 0.35)])
    assert told == ["a, c, d differ in their seed alone: nearest centroid 33.0 with a standard deviation of 2.6."]


def test_a_report_needs_no_weights_and_is_the_same_again(learnable: Path, tmp_path: Path):
    runs = tmp_path / "runs"
    for name, loss in (("first", "ce"), ("second", "triplet")):
        learn(config(tmp_path, loss, steps=6, measure_every=3), [learnable], runs / name, progress=False)
    found = measure(runs / "first", learnable)
    document = tmp_path / "accuracy.md"
    document.write_text(f"# Before\n{MARKS}after\n")
    for weights in runs.glob("*/*.pt"):
        weights.unlink()
    paths = report(runs, tmp_path / "out", document)
    text = document.read_text()
    assert "| first | cross-entropy | class | 120 |" in text
    assert "| second | triplet (batch-hard) | class | 120 |" in text
    assert f"| {100 * found.score.centroid_accuracy:.1f} |" in text
    assert f"| first | {found.analysis.errors} of 20 |" in text
    assert "old" not in text
    assert {path.stem for path in paths} == {"training-curves", "similarities", "study-tpr", "tsne"}
    before = {path: path.read_bytes() for path in paths}
    report(runs, tmp_path / "out", document)
    assert document.read_text() == text
    for path, content in before.items():
        assert path.read_bytes() == content
        with Pillow.open(path) as picture:
            assert len(picture.convert("L").getcolors(256)) > 20
    shutil.rmtree(runs / "second")
    assert [run.name for run in read_runs(runs)] == ["first"]
    (runs / "first" / "metrics.jsonl").write_text("{")
    with pytest.raises(DataError, match="is not a run"):
        report(runs, tmp_path / "out", document)


def test_no_runs_and_no_marks_are_told(learnable: Path, tmp_path: Path):
    with pytest.raises(DataError, match="no runs"):
        report(tmp_path, tmp_path / "out", tmp_path / "accuracy.md")
    learn(config(tmp_path, steps=1), [learnable], tmp_path / "runs" / "one", progress=False)
    (tmp_path / "accuracy.md").write_text("nothing")
    with pytest.raises(DataError, match="no place for figures"):
        report(tmp_path / "runs", tmp_path / "out", tmp_path / "accuracy.md")
