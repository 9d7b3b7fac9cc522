from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from pydantic import ValidationError
from sklearn.linear_model import LogisticRegression

from service.calibration import Calibration, fit_probability, rate_levels, thresholds_at

COSINES = st.floats(-1, 1, width=32, allow_subnormal=False)
SAMPLES = st.integers(2, 400).flatmap(lambda count: arrays(np.float32, count, elements=COSINES))
RATES = st.floats(1e-9, 0.999999)
COUNTS = st.integers(0, 1_000_000)


def calibration(impostors: NDArray[np.float32], **changes: Any) -> Calibration:
    levels = rate_levels(len(impostors))
    values: dict[str, Any] = {
        "model_id": "model",
        "model_sha256": "0" * 64,
        "source": "made up",
        "terms": "none",
        "identities": 2,
        "images": 4,
        "genuine_pairs": 2,
        "impostor_pairs": len(impostors),
        "fmr": tuple(levels.tolist()),
        "threshold": tuple(thresholds_at(impostors, levels).tolist()),
        "slope": 20.0,
        "intercept": -10.0,
    }
    return Calibration(**(values | changes))


NORMAL = calibration(np.random.default_rng(0).normal(0.1, 0.1, 100_000).clip(-1, 1).astype(np.float32))


@given(SAMPLES, RATES)
def test_on_its_own_sample_the_measured_rate_is_at_most_the_asked_one(
    impostors: NDArray[np.float32], asked: float
) -> None:
    made = calibration(impostors)
    for fmr in (asked, *made.fmr[1:]):
        threshold, extrapolated = made.at_fmr(fmr)
        measured = float(np.mean(impostors.astype(np.float64) >= threshold))
        assert extrapolated == (fmr < 1 / len(impostors) * (1 - 1e-8))
        assert measured <= (1 / len(impostors) if extrapolated else fmr) * (1 + 1e-8)


def test_the_measured_rate_is_not_much_below_the_asked_one() -> None:
    impostors = np.random.default_rng(2).normal(0.1, 0.1, 200_000)
    made = calibration(impostors.astype(np.float32))
    for asked in (0.5, 0.1, 0.03, 0.01, 0.0011):
        assert 0.94 * asked - 2 / len(impostors) <= np.mean(impostors >= made.at_fmr(asked)[0]) <= asked * 1.0001


@given(SAMPLES, RATES, RATES)
def test_the_threshold_never_falls_as_the_rate_falls(impostors: NDArray[np.float32], a: float, b: float) -> None:
    made = calibration(impostors)
    strict, loose = sorted((a, b))
    assert made.at_fmr(strict)[0] >= made.at_fmr(loose)[0]
    assert made.identification_point(strict, 50).threshold >= made.identification_point(loose, 50).threshold


@given(RATES, COUNTS, COUNTS)
def test_the_threshold_never_falls_as_templates_grow(fpr: float, a: int, b: int) -> None:
    few, many = sorted((a, b))
    assert NORMAL.identification_point(fpr, many).threshold >= NORMAL.identification_point(fpr, few).threshold


@given(st.floats(0.1, 500), st.floats(-400, 400), COSINES, COSINES)
def test_the_probability_rises_with_similarity(slope: float, intercept: float, a: float, b: float) -> None:
    made = calibration(np.array([0.0, 0.5], np.float32), slope=slope, intercept=intercept)
    low, high = made.probability(min(a, b)), made.probability(max(a, b))
    assert 0 <= low <= high <= 1
    odds = slope * max(a, b) + intercept
    if slope * abs(a - b) > 1e-6 and abs(odds) < 15:
        assert low < high


@given(RATES)
def test_below_one_impostor_pair_it_is_said_and_the_strictest_threshold_is_used(fpr: float) -> None:
    point = NORMAL.verification_point(fpr)
    assert point.fpr == fpr
    if fpr < 0.999e-5:
        assert (point.extrapolated, point.threshold) == (True, NORMAL.threshold[-1])
    elif fpr > 1.001e-5:
        assert not point.extrapolated


def test_the_strictest_supported_rate_is_not_extrapolated() -> None:
    assert NORMAL.at_fmr(1e-5) == (NORMAL.threshold[-1], False)
    assert NORMAL.at_fmr(0.99e-5)[1]


def test_thresholds_lie_just_above_an_impostor() -> None:
    impostors = np.array([0.3, 0.1, 0.2, 0.4], dtype=np.float32)
    above = [float(np.nextafter(np.float32(value), np.float32(2))) for value in (0.3, 0.2, 0.1)]
    assert thresholds_at(impostors, np.array([1.0, 0.75, 0.5, 0.49, 0.25])).tolist() == [
        float(np.float32(0.1)),
        above[2],
        above[1],
        above[0],
        above[0],
    ]


def test_levels_run_from_one_to_one_pair() -> None:
    levels = rate_levels(3_000_000)
    assert (levels[0], levels[-1]) == (1.0, pytest.approx(1 / 3_000_000))
    assert (np.diff(levels) < 0).all()
    assert len(levels) == math.ceil(40 * math.log10(3_000_000)) + 1
    assert len(rate_levels(2)) >= 2


def test_a_normal_distribution_gives_back_its_quantiles() -> None:
    # Standard normal quantiles, from tables: 1.2816, 2.3263, 3.0902.
    for fmr, z in ((0.1, 1.2816), (0.01, 2.3263), (0.001, 3.0902)):
        assert NORMAL.at_fmr(fmr)[0] == pytest.approx(0.1 + 0.1 * z, abs=0.005)


def test_a_gallery_of_independent_templates_keeps_the_asked_rate() -> None:
    generator = np.random.default_rng(1)
    for templates in (1, 10, 100):
        threshold = NORMAL.identification_point(0.05, templates).threshold
        best = generator.normal(0.1, 0.1, (20_000, templates)).max(axis=1)
        assert np.mean(best >= threshold) == pytest.approx(0.05, abs=0.008)
    assert NORMAL.identification_point(0.05, 0) == NORMAL.identification_point(0.05, 1)


@settings(deadline=None, max_examples=25)
@given(st.floats(0.05, 0.5), st.integers(20, 300), st.integers(20, 3_000), st.integers(0, 1_000))
def test_the_fit_agrees_with_scikit_learn(distance: float, genuine: int, impostors: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    same = generator.normal(0.4 + distance, 0.2, genuine)
    different = generator.normal(0.4, 0.2, impostors)
    try:
        slope, intercept = fit_probability(same, different)
    except ValueError:
        assert same.mean() <= different.mean()
        return
    smaller = min(genuine, impostors)
    # Platt's targets are soft labels: each pair counts for its own class and, a little, for the other.
    similarity = np.concatenate([same, different, same, different])[:, None]
    labels = np.repeat([1, 0, 0, 1], [genuine, impostors, genuine, impostors])
    main, rest = (smaller + 1) / (smaller + 2), 1 / (smaller + 2)
    weights = np.repeat(
        [main / genuine, main / impostors, rest / genuine, rest / impostors], [genuine, impostors, genuine, impostors]
    )
    reference = LogisticRegression(C=1e12, tol=1e-10, max_iter=10_000).fit(similarity, labels, weights * 1_000)
    assert slope == pytest.approx(float(reference.coef_[0, 0]), rel=1e-3, abs=1e-3)
    assert intercept == pytest.approx(float(reference.intercept_[0]), rel=1e-3, abs=1e-3)


def test_classes_that_do_not_overlap_get_a_finite_slope() -> None:
    slope, intercept = fit_probability(np.array([0.9, 0.8]), np.array([0.1, 0.2, 0.3]))
    assert 0 < slope < 1_000
    assert math.isfinite(intercept)
    assert -intercept / slope == pytest.approx(0.55, abs=0.1)


@pytest.mark.parametrize(
    ("genuine", "impostors", "message"),
    [
        ([], [0.1], "needed"),
        ([0.1], [], "needed"),
        ([0.1, 0.1], [0.1], "the same"),
        ([0.1, 0.2], [0.7, 0.8], "not more similar"),
    ],
)
def test_what_cannot_be_fitted_is_refused(genuine: list[float], impostors: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_probability(np.array(genuine), np.array(impostors))


@pytest.mark.parametrize("fmr", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_a_rate_lies_between_0_and_1(fmr: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        NORMAL.at_fmr(fmr)


def test_a_file_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(NORMAL.model_dump_json())
    assert Calibration.load(path) == NORMAL


@pytest.mark.parametrize(
    "changes",
    [
        {"fmr": (1.0, 0.5, 0.6), "threshold": (0.1, 0.2, 0.3)},
        {"fmr": (1.0, 0.5, 0.1), "threshold": (0.1, 0.3, 0.2)},
        {"fmr": (1.0, 0.5), "threshold": (0.1, 0.2, 0.3)},
        {"fmr": (1.0, 0.0), "threshold": (0.1, 0.2)},
        {"fmr": (1.1, 0.5), "threshold": (0.1, 0.2)},
        {"slope": 0.0},
        {"identities": 1},
        {"unknown": 1},
    ],
)
def test_a_file_that_contradicts_itself_is_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(json.loads(NORMAL.model_dump_json()) | changes))
    with pytest.raises(ValidationError):
        Calibration.load(path)
