from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist

from service.decision import decide, group, siblings
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


@settings(deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=20), st.floats(-1, 1), st.floats(-1, 1))
def test_a_higher_threshold_keeps_no_more(people: list[int], a: float, b: float) -> None:
    low, high = (int(siblings(faces(*people, spread=2.0), threshold).sum()) for threshold in sorted((a, b)))
    assert 1 <= high <= low <= len(people)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 60), st.floats(-0.5, 0.95), st.floats(0.5, 8))
def test_groups_and_siblings_are_those_of_scipy(seed: int, count: int, threshold: float, spread: float) -> None:
    generator = np.random.default_rng(seed)
    vectors = np.eye(8)[generator.integers(0, 8, count)] + generator.normal(0, spread / 8, (count, 8))
    vectors = np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)
    distances = pdist(vectors.astype(np.float64), "cosine")
    ours, theirs = group(vectors, threshold), fcluster(linkage(distances, "complete"), 1 - threshold, "distance")
    assert ((ours[:, None] == ours) == (theirs[:, None] == theirs)).all()
    assert (np.diff(np.unique(ours, return_index=True)[1]) > 0).all()
    single = fcluster(linkage(distances, "single"), 1 - threshold, "distance")
    sizes = np.bincount(single)[single]
    assert siblings(vectors, threshold).tolist() == (single == single[int(sizes.argmax())]).tolist()


def test_groups_of_nobody_and_of_one() -> None:
    assert group(np.empty((0, 8), np.float32), 0.5).tolist() == []
    assert group(faces(3), 0.5).tolist() == [0]
    assert group(faces(5, 2, 5, 1, 2), 0.5).tolist() == [0, 1, 0, 2, 1]
