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

from service.calibration import Calibration, fit_probability, rate_of_all, rate_of_one, thresholds_at
from service.errors import FprUnsupported
from service.settings import BUNDLED_MODELS

COSINES = st.floats(-1, 1, width=32, allow_subnormal=False)
SAMPLES = st.integers(2, 400).flatmap(lambda count: arrays(np.float32, count, elements=COSINES))
RATES = st.floats(1e-9, 0.999999)
FPIRS = st.floats(1e-4, 0.999999)
COUNTS = st.integers(0, 1_000_000)
SPREADS = st.floats(0.05, 100)
LEVELS = np.logspace(0, -9, 181)


def calibration(impostors: NDArray[np.float32], **changes: Any) -> Calibration:
    thresholds = tuple(thresholds_at(impostors, LEVELS).tolist())
    values: dict[str, Any] = {
        "model_id": "model",
        "model_sha256": "0" * 64,
        "source": "made up",
        "terms": "none",
        "identities": 2,
        "images": 4,
        "genuine_pairs": 2,
        "impostor_pairs": len(impostors),
        "supported_fmr": 1e-4,
        "smallest_fmr": 1e-9,
        "smallest_fpir": 1e-4,
        "fmr": tuple(LEVELS.tolist()),
        "threshold": thresholds,
        "low": thresholds,
        "high": thresholds,
        "templates": (1, 5, 20),
        "effective": (1.0, 4.0, 9.0),
        "spread": 1e6,
        "slope": 20.0,
        "intercept": -10.0,
    }
    return Calibration(**(values | changes))


NORMAL = calibration(np.random.default_rng(0).normal(0.1, 0.1, 100_000).clip(-1, 1).astype(np.float32))
SHIPPED = Calibration.load(BUNDLED_MODELS / "dlib-resnet" / "calibration.json")


def test_the_measured_rate_is_the_asked_one() -> None:
    impostors = np.random.default_rng(2).normal(0.1, 0.1, 200_000)
    made = calibration(impostors.astype(np.float32))
    for asked in (0.5, 0.1, 0.03, 0.01, 0.0011):
        assert np.mean(impostors >= made.verification_point(asked).threshold) == pytest.approx(asked, rel=0.03)


@given(SAMPLES, FPIRS, FPIRS, COUNTS, COUNTS)
def test_the_threshold_never_falls_as_the_rate_falls(
    impostors: NDArray[np.float32], a: float, b: float, subjects: int, templates: int
) -> None:
    strict, loose = sorted((a, b))
    for made in (calibration(impostors), SHIPPED):
        assert made.at_fmr(strict)[0] >= made.at_fmr(loose)[0]
        points = [made.identification_point(fpr, subjects, templates) for fpr in (strict, loose)]
        assert points[0].threshold >= points[1].threshold
        assert points[0].extrapolated >= points[1].extrapolated


@given(FPIRS, COUNTS, COUNTS, COUNTS, COUNTS, SPREADS)
def test_the_threshold_never_falls_as_subjects_or_templates_grow(
    fpr: float, subjects: int, more: int, templates: int, faces: int, spread: float
) -> None:
    for made in (NORMAL.model_copy(update={"spread": spread}), SHIPPED):
        few = made.identification_point(fpr, subjects, templates)
        # A subject more brings a face at least; a face more may be of somebody who is there.
        many = made.identification_point(fpr, subjects + more, max(templates, subjects) + more + faces)
        assert many.threshold >= few.threshold - 1e-12
        assert many.extrapolated >= few.extrapolated
        assert made.identification_point(fpr, subjects, templates + faces).threshold >= few.threshold - 1e-12


@given(st.floats(1e-3, 0.999), st.integers(1, 100), st.integers(0, 100))
def test_a_subject_with_more_faces_needs_more(fpr: float, templates: int, more: int) -> None:
    few, many = (SHIPPED.subject_point(fpr, count).threshold for count in (templates, templates + more))
    assert many >= few - 1e-12
    assert SHIPPED.subject_point(fpr, 1) == SHIPPED.verification_point(fpr)


def test_templates_of_one_person_count_for_less_than_people() -> None:
    assert NORMAL.comparisons(0, 0) == NORMAL.comparisons(1, 1) == 1
    assert NORMAL.comparisons(10, 10) == 10
    assert NORMAL.comparisons(10, 50) == pytest.approx(40)
    assert NORMAL.comparisons(10, 100) == pytest.approx(60)
    assert NORMAL.comparisons(10, 400) == pytest.approx(180)


@given(st.floats(1e-6, 0.99), st.floats(1, 1e7), SPREADS)
def test_the_rate_of_one_undoes_the_rate_of_all(fpir: float, comparisons: float, spread: float) -> None:
    fmr = rate_of_one(fpir, comparisons, spread)
    assert 0 <= fmr <= fpir * (1 + 1e-9)
    if 1e-14 < fmr < 1 - 1e-9:
        assert rate_of_all(fmr, comparisons, spread) == pytest.approx(fpir, rel=1e-4)


@given(SAMPLES, st.floats(-1, 1), st.floats(-1, 1), COUNTS, COUNTS, COUNTS)
def test_the_rate_of_a_similarity_never_rises_with_it_and_never_falls_with_the_gallery(
    impostors: NDArray[np.float32], a: float, b: float, subjects: int, templates: int, more: int
) -> None:
    low, high = sorted((a, b))
    for made in (calibration(impostors), SHIPPED):
        rate = made.identification_rate(high, subjects, templates)
        assert 0 < rate <= made.identification_rate(low, subjects, templates) <= 1
        larger = made.identification_rate(high, subjects + more, max(templates, subjects) + more)
        assert larger >= rate * (1 - 1e-9)


@given(FPIRS, COUNTS, COUNTS)
def test_the_rate_of_a_similarity_undoes_the_threshold_of_a_rate(fpr: float, subjects: int, templates: int) -> None:
    fmr = rate_of_one(fpr, SHIPPED.comparisons(subjects, templates), SHIPPED.spread)
    if SHIPPED.fmr[-1] < fmr < 0.99:
        rate = SHIPPED.identification_rate(SHIPPED.at_fmr(fmr)[0], subjects, templates)
        assert rate == pytest.approx(fpr, rel=1e-3)
        # The service's own threshold is a little higher.
        safe = SHIPPED.identification_point(fpr, subjects, templates).threshold
        assert SHIPPED.identification_rate(safe, subjects, templates) <= rate * (1 + 1e-9)


def test_strangers_best_similarities_are_uniform_as_rates() -> None:
    generator = np.random.default_rng(3)
    for templates in (1, 10, 100):
        best = generator.normal(0.1, 0.1, (20_000, templates)).max(axis=1)
        rates = [NORMAL.identification_rate(similarity, templates, templates) for similarity in best.tolist()]
        for share in (0.05, 0.2, 0.5, 0.8):
            assert np.mean(np.array(rates) <= share) == pytest.approx(share, abs=0.02)


def test_strangers_who_differ_are_mistaken_as_often_as_simulated() -> None:
    generator = np.random.default_rng(5)
    for spread in (0.5, 2.0):
        # Own rate of each stranger; hazard h such that one comparison errs at 0.002.
        hazard = spread * ((1 - 0.002) ** (-1 / spread) - 1)
        own = generator.gamma(spread, 1 / spread, 400_000)
        simulated = float(np.mean(-np.expm1(-own * hazard * 300)))
        assert rate_of_all(0.002, 300, spread) == pytest.approx(simulated, rel=0.02)


def test_rates_that_nothing_supports_are_refused() -> None:
    with pytest.raises(FprUnsupported, match=r"from 0\.0001; 1e-05"):
        NORMAL.identification_point(1e-5, 10, 10)
    assert NORMAL.verification_point(1e-5).extrapolated
    with pytest.raises(FprUnsupported):
        NORMAL.verification_point(1e-10)
    with pytest.raises(FprUnsupported):
        NORMAL.subject_point(1e-10, 3)
    assert not NORMAL.verification_point(1e-4).extrapolated


def test_the_bundled_calibration_is_of_a_hundred_people() -> None:
    assert SHIPPED.identities == 100
    assert SHIPPED.smallest_fpir == pytest.approx(1e-4)
    assert SHIPPED.supported_fmr < 1e-4
    assert SHIPPED.identification_point(0.01, 100_000, 500_000).extrapolated
    assert SHIPPED.identification_point(0.01, 100_000, 500_000).threshold <= 1


@given(st.floats(0.1, 500), st.floats(-400, 400), COSINES, COSINES)
def test_the_probability_rises_with_similarity(slope: float, intercept: float, a: float, b: float) -> None:
    made = calibration(np.array([0.0, 0.5], np.float32), slope=slope, intercept=intercept)
    low, high = made.probability(min(a, b)), made.probability(max(a, b))
    assert 0 <= low <= high <= 1
    odds = slope * max(a, b) + intercept
    if slope * abs(a - b) > 1e-6 and abs(odds) < 15:
        assert low < high


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


def test_a_normal_distribution_gives_back_its_quantiles() -> None:
    # Standard normal quantiles, from tables: 1.2816, 2.3263, 3.0902.
    for fmr, z in ((0.1, 1.2816), (0.01, 2.3263), (0.001, 3.0902)):
        assert NORMAL.at_fmr(fmr)[0] == pytest.approx(0.1 + 0.1 * z, abs=0.005)


def test_a_gallery_of_independent_templates_keeps_the_asked_rate() -> None:
    generator = np.random.default_rng(1)
    for templates in (1, 10, 100):
        threshold = NORMAL.identification_point(0.05, templates, templates).threshold
        best = generator.normal(0.1, 0.1, (20_000, templates)).max(axis=1)
        assert np.mean(best >= threshold) == pytest.approx(0.05, abs=0.008)
    assert NORMAL.identification_point(0.05, 0, 0) == NORMAL.identification_point(0.05, 1, 1)


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


@pytest.mark.parametrize("impostors", [2_000, 200_000])
def test_the_probability_is_for_equal_odds_before_whatever_the_sample_holds(impostors: int) -> None:
    generator = np.random.default_rng(7)
    slope, intercept = fit_probability(generator.normal(0.6, 0.1, 20_000), generator.normal(0.4, 0.1, impostors))
    # Of two normal distributions with one variance the posterior is logistic: log odds = 20 (x - 0.5) at even odds.
    assert slope == pytest.approx(20, rel=0.05)
    assert -intercept / slope == pytest.approx(0.5, abs=0.005)


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
        {"high": (0.0,) * 181},
        {"low": (0.1, 0.2)},
        {"effective": (1.0, 6.0, 9.0)},
        {"effective": (1.0, 4.0, 3.0)},
        {"effective": (2.0, 4.0, 9.0)},
        {"templates": (1, 5)},
        {"spread": 0.0},
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
