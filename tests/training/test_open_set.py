from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner

from service.calibration import Calibration, thresholds_at
from service.settings import BUNDLED_MODELS
from training.cli import app
from training.evaluate import EvaluationSet
from training.open_set import Outcome, People, Trial, draw, run, table, write_trial

SHIPPED = Calibration.load(BUNDLED_MODELS / "dlib-resnet" / "calibration.json")


def people(count: int, each: int, seed: int) -> People:
    generator = np.random.default_rng(seed)
    centres = np.repeat(generator.normal(size=(count, 16)), each, axis=0)
    found: NDArray[np.float64] = centres + 0.2 * generator.normal(size=centres.shape)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return People(found.astype(np.float32), np.repeat(np.arange(count), each).astype(np.int32))


def calibration() -> Calibration:
    """Of independent random directions, which the people above are."""
    sample = people(2000, 1, 99).embeddings
    impostors = (sample @ sample.T)[np.triu_indices(len(sample), 1)]
    thresholds = tuple(thresholds_at(impostors, np.array(SHIPPED.fmr)).tolist())
    return SHIPPED.model_copy(
        update={
            "threshold": thresholds,
            "low": thresholds,
            "high": thresholds,
            "spread": 50.0,
            "effective": (1.0, 1.3, 1.5, 1.7, 2.0, 2.3),
        }
    )


@pytest.fixture(scope="module")
def outcomes() -> list[Outcome]:
    return run(calibration(), people(30, 8, 0), people(300, 2, 1), [people(250, 6, 2)], repeats=4)


def test_every_gallery_and_rate_has_a_line(outcomes: list[Outcome]) -> None:
    keys = [(one.templates, one.subjects, one.fpr) for one in outcomes]
    assert keys == [(k, n, fpr) for k in (1, 3, 5) for n in (30, 200) for fpr in (0.1, 0.03, 0.01)]


def test_the_rates_are_kept_where_the_model_holds(outcomes: list[Outcome]) -> None:
    for one in outcomes:
        if one.fpr > 0.01:
            assert 0.5 * one.fpr < one.fpir < 1.6 * one.fpr
        assert one.low <= one.fpir <= one.high
        assert one.kept or one.fpr == 0.01


def test_a_fixed_threshold_breaks_in_a_larger_gallery(outcomes: list[Outcome]) -> None:
    for one in outcomes:
        assert one.fixed_fpir == one.fpir if one.subjects == 30 else one.fixed_fpir > one.fpir


def test_the_trial_is_written_drawn_and_tabled(outcomes: list[Outcome], tmp_path: Path) -> None:
    trial = Trial(
        model_id="m",
        model_sha256="0",
        on=EvaluationSet.VALIDATION,
        repeats=4,
        enrolled=30,
        strangers=300,
        probes=600,
        outcomes=tuple(outcomes),
    )
    assert Trial.model_validate_json(write_trial(trial, tmp_path).read_bytes()) == trial
    draw(trial, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert len(table(trial).splitlines()) == 2 + len(outcomes) + 2


def test_missing_people_are_said(prepared: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["open-set", "--crops", str(tmp_path), "--model", str(BUNDLED_MODELS / "dlib-resnet")]
    )
    assert done.exit_code == 2
    done = CliRunner().invoke(
        app,
        ["open-set", "--crops", str(prepared), "--repeats", "1", "--model", str(BUNDLED_MODELS / "dlib-resnet")],
    )
    assert done.exit_code == 0, done.output
