from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from service.decision import decide, siblings
from service.domain import Candidate, Decision, OperatingPoint

POINT = OperatingPoint(0.01, 0.5, extrapolated=False)


def candidate(subject: str, similarity: float) -> Candidate:
    return Candidate(subject, f"face of {subject}", similarity, probability=similarity / 2)


def test_a_decision_explains_itself() -> None:
    ada, bob = candidate("Ada", 0.75), candidate("Bob", 0.25)
    assert decide([ada, bob], POINT) == Decision("match", "Ada", 0.75, 0.5, 0.375)
    assert decide([ada], POINT) == Decision("match", "Ada", 0.75, None, 0.375)
    assert decide([bob], POINT) == Decision("unknown", None, 0.25, None, 0.125)
    assert decide([], POINT) == Decision("unknown", None, None, None, None)


def faces(*people: int, spread: float = 0.1) -> NDArray[np.float32]:
    """Embeddings; those of one person are about 1 − spread² similar, those of two about 0."""
    generator = np.random.default_rng(0)
    vectors = np.eye(64)[list(people)] + generator.normal(0, spread / 8, (len(people), 64))
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


@pytest.mark.parametrize(
    ("people", "stay"),
    [
        ([1], [True]),
        ([1, 1], [True, True]),
        ([1, 2], [True, False]),
        ([1, 2, 2], [False, True, True]),
        ([1, 2, 1, 2], [True, False, True, False]),
        ([3, 1, 2, 1], [False, True, False, True]),
    ],
)
def test_the_majority_stays_and_of_equals_the_first(people: list[int], stay: list[bool]) -> None:
    assert siblings(faces(*people), 0.5).tolist() == stay


def test_an_unlike_photo_stays_through_one_between() -> None:
    angles = np.array([0, 40, 80, 200]) * np.pi / 180
    chain = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    assert siblings(chain, 0.7).tolist() == [True, True, True, False]
    assert siblings(chain[[0, 2, 3]], 0.7).tolist() == [True, False, False]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.floats(-1, 1), st.floats(-1, 1))
def test_a_higher_threshold_keeps_no_more(people: list[int], a: float, b: float) -> None:
    low, high = (int(siblings(faces(*people, spread=2.0), threshold).sum()) for threshold in sorted((a, b)))
    assert 1 <= high <= low <= len(people)
