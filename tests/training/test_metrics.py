from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import roc_curve

from training.metrics import Pairs, all_pairs, curve, numbered, rates, rates_with_intervals

FPRS = (0.5, 0.2, 0.1, 0.05, 0.01, 0.001)


def similarities(count: int, mean: float, seed: int) -> NDArray[np.float32]:
    return np.tanh(np.random.default_rng(seed).normal(mean, 0.3, count)).astype(np.float32)


def unit(count: int, seed: int) -> NDArray[np.float32]:
    vectors = np.random.default_rng(seed).normal(size=(count, 8))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_by_hand() -> None:
    impostor = np.array([0.4, 0.0, 0.2, 0.1, 0.3], dtype=np.float32)
    genuine = np.array([0.9, 0.35, 0.2], dtype=np.float32)
    half, quarter = rates(genuine, impostor, [0.5, 0.25])
    # The median of 0, 0.1, ..., 0.4 is 0.2, which the genuine 0.2 equals and is not above.
    assert (half.threshold, half.tpr) == (pytest.approx(0.2), pytest.approx(2 / 3))
    assert (quarter.threshold, quarter.tpr) == (pytest.approx(0.3), pytest.approx(2 / 3))
    assert rates(genuine, impostor, [0.01])[0].threshold == pytest.approx(0.3 + 0.1 * 0.96)


def test_agrees_with_scikit_learn() -> None:
    genuine, impostor = similarities(700, 0.9, 1), similarities(20_000, 0.0, 2)
    fpr, tpr, _ = roc_curve(
        np.repeat([1, 0], [len(genuine), len(impostor)]), np.concatenate([genuine, impostor]), drop_intermediate=False
    )
    for rate in rates(genuine, impostor, FPRS):
        # The quantile lies between two impostors; between the same two, scikit-learn's curve is flat or steps up.
        allowed = np.floor(rate.fpr * (len(impostor) - 1) + 1e-9)
        reached = tpr[np.isclose(fpr, allowed / len(impostor)) | np.isclose(fpr, (allowed + 1) / len(impostor))]
        assert reached.min() <= rate.tpr <= reached.max()
        assert np.mean(impostor > rate.threshold) == pytest.approx(rate.fpr, abs=1.01 / len(impostor))
        assert rate.tpr == np.mean(genuine > rate.threshold)


def test_the_curve_runs_from_one_impostor_to_all_and_never_falls() -> None:
    genuine, impostor = similarities(500, 0.9, 3), similarities(5_000, 0.0, 4)
    fpr, tpr = curve(genuine, impostor, points=50)
    assert (fpr[0], fpr[-1], len(fpr), len(tpr)) == (pytest.approx(1 / 5_000), 1.0, 50, 50)
    assert (np.diff(fpr) > 0).all()
    assert (np.diff(tpr) >= 0).all()
    at = int(np.argmin(np.abs(fpr - 0.01)))
    assert tpr[at] == rates(genuine, impostor, [float(fpr[at])])[0].tpr


def test_pairs_are_every_two_and_each_with_each_other_person() -> None:
    embeddings, others = unit(1_100, 5), unit(7, 6)
    people = np.random.default_rng(7).integers(0, 40, len(embeddings)).astype(np.int32)
    other_people = np.arange(40, 47, dtype=np.int32)
    genuine, impostor = all_pairs(embeddings, people, others, other_people)
    expected: dict[bool, list[tuple[int, int, float]]] = {True: [], False: []}
    matrix = embeddings.astype(np.float64) @ np.concatenate([embeddings, others]).astype(np.float64).T
    everybody = np.concatenate([people, other_people])
    for i in range(len(embeddings)):
        for j in range(i + 1, len(everybody)):
            expected[bool(people[i] == everybody[j])].append((int(people[i]), int(everybody[j]), matrix[i, j]))
    for pairs, wanted in ((genuine, expected[True]), (impostor, expected[False])):
        first, second, similarity = zip(*wanted, strict=True)
        assert len(pairs) == len(wanted)
        assert (pairs.first == first).all()
        assert (pairs.second == second).all()
        np.testing.assert_allclose(pairs.similarity, similarity, atol=1e-6)


def test_nobody_may_be_a_stranger_to_himself() -> None:
    with pytest.raises(ValueError, match="among both"):
        all_pairs(unit(3, 1), np.array([0, 0, 1], np.int32), unit(1, 2), np.array([1], np.int32))


def test_without_pairs_there_are_no_rates() -> None:
    with pytest.raises(ValueError, match="needed"):
        rates(np.empty(0, np.float32), similarities(3, 0, 1), [0.1])


def everyone(people: int, photos: int, others: int) -> tuple[Pairs, Pairs]:
    centres = unit(people + others, 11)
    noise = unit(people * photos, 12) * np.float32(1.2)
    ids = np.repeat(np.arange(people, dtype=np.int32), photos)
    embeddings = centres[ids] + noise
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    return all_pairs(embeddings, ids, centres[people:], np.arange(people, people + others, dtype=np.int32))


def test_intervals_are_those_of_samples_of_people_written_out_in_full() -> None:
    genuine, impostor = everyone(9, 4, 30)
    found = rates_with_intervals(genuine, impostor, FPRS, resamples=25, seed=3)
    generator = np.random.default_rng(3)
    samples = []
    for _ in range(25):
        drawn = np.concatenate([generator.choice(np.arange(9), 9), generator.choice(np.arange(9, 39), 30)])
        times = np.bincount(drawn, minlength=39)
        same = np.repeat(genuine.similarity, times[genuine.first])
        different = np.repeat(impostor.similarity, times[impostor.first] * times[impostor.second])
        thresholds = np.quantile(different, [1 - fpr for fpr in FPRS], method="inverted_cdf")
        samples.append([np.mean(same > threshold) for threshold in thresholds])
    low, high = np.quantile(samples, [0.025, 0.975], axis=0)
    np.testing.assert_allclose([rate.low for rate in found], low, atol=1e-6)
    np.testing.assert_allclose([rate.high for rate in found], high, atol=1e-6)
    plain = rates(genuine.similarity, impostor.similarity, FPRS)
    assert [(r.fpr, r.threshold, r.tpr) for r in found] == [(r.fpr, r.threshold, r.tpr) for r in plain]


def test_intervals_need_no_strangers_and_may_be_left_out() -> None:
    genuine, impostor = everyone(6, 3, 0)
    for rate in rates_with_intervals(genuine, impostor, [0.1], resamples=20):
        assert rate.low is not None
        assert rate.high is not None
        assert 0 <= rate.low <= rate.high <= 1
    assert rates_with_intervals(genuine, impostor, [0.1], resamples=0)[0].low is None


def test_people_are_numbered() -> None:
    assert numbered(["b", "a", "b", "10"]).tolist() == [2, 1, 2, 0]
    assert numbered(["b"]).dtype == np.int32
