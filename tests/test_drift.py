from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from service.drift import EDGES, EXPECTED, LEAST, MEMORY, TOP, Probes, StrangerRates

SUBJECTS = 100


def feed(rates: list[float], probes: Probes | None = None) -> Probes:
    probes = probes or Probes()
    for rate in rates:
        probes.add("g", "unknown", 0.5, rate, SUBJECTS)
    return probes


def uniform(count: int, seed: int = 0) -> list[float]:
    return np.random.default_rng(seed).uniform(size=count).tolist()


def higher(count: int, seed: int = 0) -> list[float]:
    """Rates of strangers who score higher: three in five are more similar than the median."""
    return (TOP + (1 - TOP) * np.random.default_rng(seed).uniform(size=count) ** 2).tolist()


@pytest.mark.parametrize("seed", range(20))
def test_strangers_as_expected_give_no_warning(seed: int) -> None:
    drift = feed(uniform(5_000, seed)).drift("g")
    assert drift.warning is None
    assert drift.measured == pytest.approx(drift.expected, abs=0.09)
    assert drift.probes <= MEMORY


def test_strangers_who_score_higher_are_told_of_and_logged_once() -> None:
    with capture_logs() as log:
        probes = feed(uniform(2_000))
        assert log == []
        feed(higher(3_000), probes)
    drift = probes.drift("g")
    assert drift.measured is not None and drift.measured > EXPECTED
    assert drift.warning is not None and f"{drift.measured:.0%}" in drift.warning
    assert [(line["log_level"], line["gallery"]) for line in log] == [("warning", "g")]
    assert probes.drift("other").warning is None
    # When they score as expected again it ends, and may begin again.
    with capture_logs() as log:
        assert feed([0.9] * 2_000, probes).drift("g").warning is None
        assert feed(higher(3_000, 1), probes).drift("g").warning is not None
    assert len(log) == 1


def test_the_most_similar_are_no_strangers() -> None:
    failed = [float(rate) for rate in np.random.default_rng(1).uniform(0, TOP, 5_000)]
    drift = feed([*failed, *uniform(2_000), *failed]).drift("g")
    assert drift.warning is None and drift.probes <= MEMORY
    assert feed(failed).drift("g").measured is None


def test_few_probes_or_few_subjects_say_nothing() -> None:
    rates = StrangerRates()
    for _ in range(LEAST - 1):
        rates.add(0.3)
    assert not rates.drifted(SUBJECTS)
    for _ in range(2_000):
        rates.add(0.3)
    assert rates.drifted(SUBJECTS)
    assert not rates.drifted(1) and not rates.drifted(0)


@given(st.lists(st.floats(0, 1), max_size=300), st.integers(1, 10_000), st.integers(0, 10_000))
def test_more_subjects_never_end_a_warning(given_rates: list[float], subjects: int, more: int) -> None:
    rates = StrangerRates()
    for rate in given_rates:
        rates.add(rate)
    assert 0 <= rates.measured <= 1 and 0 <= rates.probes <= len(given_rates)
    if rates.drifted(subjects):
        assert rates.drifted(subjects + more)


def test_nothing_of_a_gallery_stays_when_it_is_forgotten() -> None:
    probes = feed(higher(3_000))
    probes.add("other", "match", 0.9, 0.001, 5)
    probes.forget("g")
    assert probes.drift("g").probes == 0 and probes.drift("g").warning is None
    assert set(probes.similarities) == {("other", "match")}


def test_similarities_are_counted_in_their_bins() -> None:
    probes = Probes()
    for similarity in (-0.5, 0.0, 0.7, 0.701, 1.0):
        probes.add("g", "match", similarity, 0.0, 5)
    held = probes.similarities["g", "match"]
    assert {edge: count for edge, count in zip((*EDGES, None), held.counts, strict=True) if count} == {
        0.0: 2,
        0.7: 1,
        0.725: 1,
        1.0: 1,
    }
    assert held.total == pytest.approx(1.901)
