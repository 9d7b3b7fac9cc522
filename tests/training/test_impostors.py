from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.stats import genpareto

from training.impostors import Sample, effective_templates, fit_tail, fmr_curve, spread_of_strangers
from training.metrics import Pairs


@pytest.mark.parametrize("shape", [-0.3, 0.0, 0.2])
def test_the_tail_agrees_with_scipy(shape: float) -> None:
    excess = genpareto.rvs(shape, scale=0.02, size=50_000, random_state=3)
    tail = fit_tail(np.sort(excess + 0.5)[::-1], np.ones(len(excess)), 0.5)
    assert (tail.shape, tail.scale) == (pytest.approx(shape, abs=0.03), pytest.approx(0.02, rel=0.05))
    shares = np.array([0.5, 0.1, 0.001])
    reference = genpareto(tail.shape, loc=0.5, scale=tail.scale)
    assert tail.exceeded(shares) == pytest.approx(reference.isf(shares))
    assert tail.survival(tail.exceeded(shares)) == pytest.approx(shares)


def impostor_pairs(people: int, each: int, seed: int) -> Pairs:
    """Each of ``each`` pairs of every two people, of which two share much of their similarity."""
    generator = np.random.default_rng(seed)
    first, second = np.triu_indices(people, 1)
    common = generator.normal(0.0, 0.06, len(first))
    similarity = 0.1 + np.repeat(common, each) + generator.normal(0, 0.08, len(first) * each)
    return Pairs(
        similarity.astype(np.float32), np.repeat(first, each).astype(np.int32), np.repeat(second, each).astype(np.int32)
    )


def test_the_curve_holds_for_other_people_beyond_what_the_sample_supports() -> None:
    curve = fmr_curve(impostor_pairs(60, 20, 0), resamples=20)
    others = impostor_pairs(700, 20, 1).similarity
    assert 1e-5 < curve.supported < 0.01
    for level, bound in ((0.01, 1.25), (0.001, 1.5), (0.0001, 3.0)):
        place = int(np.argmin(np.abs(curve.fmr - level)))
        assert level / bound < np.mean(others >= curve.threshold[place]) < level * bound
    assert np.all(np.diff(curve.fmr) < 0) and np.all(np.diff(curve.threshold) >= 0)
    assert np.all(curve.low <= curve.threshold) and np.all(curve.threshold <= curve.high)
    # Less is known of the tail than of the middle.
    width = curve.high - curve.low
    assert width[np.argmin(np.abs(curve.fmr - 1e-6))] > width[np.argmin(np.abs(curve.fmr - 0.1))]


def vectors(people: int, each: int, within: float) -> Sample:
    generator = np.random.default_rng(7)
    centres = np.repeat(generator.normal(size=(people, 32)), each, axis=0)
    found: NDArray[np.float64] = centres + within * generator.normal(size=centres.shape)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return Sample(found.astype(np.float32), np.repeat(np.arange(people), each).astype(np.int32))


def test_alike_photos_count_for_less_than_unlike_ones() -> None:
    alike, unlike = (effective_templates([vectors(40, 10, within)]) for within in (0.03, 3.0))
    # Ten of ten photos are the same set in each draw, yet enough; twenty there are not.
    assert alike[0] == unlike[0] == (1, 2, 3, 5, 10)
    assert alike[1][0] == 1 and np.all(np.diff(alike[1]) >= 0)
    assert alike[1][3] < 2 < 3.5 < unlike[1][3] <= 5


def test_few_people_do_not_tell_how_strangers_differ() -> None:
    assert spread_of_strangers([vectors(5, 4, 1.0)]) == 1.0
    assert 0.05 <= spread_of_strangers([vectors(40, 10, 1.0)]) <= 100
