from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tests.training.test_open_set import calibration, people
from training.cli import app
from training.guards import Look, conflict_rows, degraded, drift_rows, sibling_rows

MADE = calibration()
OWN, OTHERS = people(40, 10, 0), people(100, 3, 1)
GOOD = Look(OWN, OTHERS)


def percent(cell: str) -> float:
    return float(cell.removesuffix(" %"))


def test_strangers_are_let_in_as_often_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.guards.PHOTOS", (2, 5))
    monkeypatch.setattr("training.guards.SIBLING_FPRS", (0.2, 0.05))
    rows = list(sibling_rows(MADE, OWN, 5))
    assert [row[:2] for row in rows] == [("2", "0.2"), ("2", "0.05"), ("5", "0.2"), ("5", "0.05")]
    for _, fpr, refused, let_in in rows:
        assert percent(let_in) / 100 == pytest.approx(float(fpr), rel=0.6)
        assert percent(refused) < 1


def test_people_enrolled_twice_are_caught_and_new_ones_hardly_refused() -> None:
    rows = list(conflict_rows(MADE, GOOD, 5))
    assert [row[0] for row in rows] == ["5", "5", "20", "20", "50", "50", "101", "101"]
    assert all(percent(refused) <= 1 and percent(caught) > 95 for _, _, refused, caught in rows)


def test_strangers_who_score_higher_are_warned_of_in_galleries_that_can_tell() -> None:
    # Poor photos all look a little alike.
    alike = np.eye(16)[0]
    poor = [0.6 * alike + one.embeddings for one in (OWN, OTHERS)]
    bad = Look(
        *(
            type(one)((vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), one.people)
            for vectors, one in zip(poor, (OWN, OTHERS), strict=True)
        )
    )
    rows = {row[0]: row[1:] for row in drift_rows(MADE, GOOD, bad, 2)}
    assert [row[0] for row in rows.values()] == ["0 of 2"] * 4
    assert rows["50"][2] == rows["100"][2] == "2 of 2"


def test_a_degraded_crop_is_dark_and_as_large() -> None:
    crop = np.full((150, 150, 3), 200, np.uint8)
    poor = degraded(crop, np.random.default_rng(0))
    assert poor.shape == crop.shape and poor.dtype == np.uint8
    assert poor.mean() == pytest.approx(100, abs=3) and poor.std() > 1


def test_a_folder_without_the_people_is_told(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["guards", "--crops", str(tmp_path)])
    assert done.exit_code == 2 and "has no crops" in done.output
