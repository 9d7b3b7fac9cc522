from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from service import own_calibration
from service.calibration import Calibration
from service.domain import IndexEntries, Members, OperatingPoint
from service.own_calibration import OwnCalibrations
from service.settings import BUNDLED_MODELS

SHIPPED = Calibration.load(BUNDLED_MODELS / "dlib-resnet" / "calibration.json")
DIMENSION = 32


def vectors(rows: Sequence[int], *, alike: float = 3.0, spread: float = 0.2) -> NDArray[np.float32]:
    """Embeddings of these rows, three of each person; the larger ``alike``, the more similar are all people."""
    found = []
    for row in rows:
        person = np.random.default_rng(row // 3).normal(size=DIMENSION)
        face = np.random.default_rng(10_000 + row).normal(size=DIMENSION)
        found.append(alike + person + spread * face)
    stacked = np.array(found)
    stacked /= np.linalg.norm(stacked, axis=1, keepdims=True)
    return stacked.astype(np.float32)


def entries(rows: Sequence[int], **look: float) -> IndexEntries:
    numbers = np.array(rows, np.int64)
    return IndexEntries("g", numbers, numbers // 3, vectors(rows, **look))


def fetch(rows: Sequence[int]) -> NDArray[np.float32]:
    return vectors(sorted(rows))


def gallery(rows: Sequence[int], **look: float) -> OwnCalibrations:
    own = OwnCalibrations(SHIPPED, lambda missing: vectors(sorted(missing), **look))
    own.add(entries(rows, **look))
    return own


def points(own: OwnCalibrations, *, mode: str = "full") -> list[OperatingPoint]:
    sizes = ((1, 1), (50, 60), (1000, 3000))
    return [
        own.combined(SHIPPED.identification_point(fpr, *size), "g", "full" if mode == "full" else "stricter", *size)
        for fpr in (0.3, 0.1, 0.01, 0.001)
        for size in sizes
    ]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_calibration, "SUBJECTS", 20)


people = st.lists(st.integers(0, 120), min_size=1, max_size=100, unique=True)


@settings(max_examples=40, deadline=None)
@given(people, people, st.randoms())
def test_removal_undoes_addition_to_the_bit(first: list[int], second: list[int], random: object) -> None:
    before = own_calibration.SUBJECTS
    # So few that people move up as others leave.
    own_calibration.SUBJECTS = 20
    try:
        added = [row for row in second if row not in first]
        own = gallery(first)
        for start in range(0, len(added), 7):
            if added[start : start + 7]:
                own.add(entries(added[start : start + 7]))
        assert points(own) == points(gallery(first + added))
        random.shuffle(added)  # type: ignore[attr-defined]
        for start in range(0, len(added), 5):
            own.remove("g", added[start : start + 5])
        assert points(own) == points(gallery(first))
    finally:
        own_calibration.SUBJECTS = before


@pytest.mark.usefixtures("small")
def test_a_start_finds_what_enrolment_had_made() -> None:
    for rows in (range(30), range(150)):
        loaded = OwnCalibrations(SHIPPED, fetch)
        loaded.load(Members("g", *(held[::-1].copy() for held in (entries(rows).row_ids, entries(rows).subject_ids))))
        assert points(loaded) == points(gallery(rows))
        # Those who were left out move up as in a gallery that grew.
        loaded.remove("g", list(range(24)))
        assert points(loaded) == points(gallery(range(24, len(rows))))


@pytest.mark.usefixtures("small")
def test_what_was_removed_is_held_nowhere() -> None:
    own = gallery(range(90))
    own.remove("g", list(range(90)))
    assert points(own) == points(OwnCalibrations(SHIPPED, fetch))
    assert not own._galleries


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 80),
    st.floats(0.5, 5.0),
    st.floats(0.0005, 0.9),
    st.floats(0.0005, 0.9),
    st.integers(1, 5000),
    st.integers(1, 5000),
    st.floats(1, 5),
)
def test_the_threshold_never_falls(
    count: int, alike: float, fpr: float, other: float, subjects: int, more: int, each: float
) -> None:
    own = gallery(range(3 * count), alike=alike) if count else OwnCalibrations(SHIPPED, fetch)

    def threshold(rate: float, people: int, templates: int, mode: str = "full") -> float:
        point = SHIPPED.identification_point(rate, people, templates)
        return own.combined(point, "g", "full" if mode == "full" else "stricter", people, templates).threshold

    rare, common = sorted((fpr, other))
    few, many = sorted((subjects, more))
    for mode in ("full", "stricter"):
        assert threshold(rare, few, few, mode) >= threshold(common, few, few, mode)
        assert threshold(rare, many, many, mode) >= threshold(rare, few, few, mode)
        assert threshold(rare, few, round(few * each), mode) >= threshold(rare, few, few, mode)
    # Without leave, never more permissive than the model.
    assert threshold(rare, few, few, "stricter") >= SHIPPED.identification_point(rare, few, few).threshold


def test_few_people_change_nothing() -> None:
    own = gallery(range(6))
    assert points(own) == [
        SHIPPED.identification_point(fpr, *size)
        for fpr in (0.3, 0.1, 0.01, 0.001)
        for size in ((1, 1), (50, 60), (1000, 3000))
    ]


def test_people_who_look_alike_raise_the_threshold_and_say_so() -> None:
    alike, unlike = gallery(range(300), alike=6.0), gallery(range(300), alike=0.5)
    model = SHIPPED.identification_point(0.1, 100, 300)
    raised = alike.combined(model, "g", "stricter", 100, 300)
    assert raised.threshold > model.threshold
    assert raised.basis == "both" and raised.gallery_identities == 100 and raised.model_identities == 100
    assert unlike.combined(model, "g", "stricter", 100, 300) == model
    lowered = unlike.combined(model, "g", "full", 100, 300)
    assert lowered.threshold < model.threshold and lowered.basis == "both"


def test_many_people_are_a_basis_of_their_own() -> None:
    own = gallery(range(3 * 400), alike=6.0)
    assert own.combined(SHIPPED.identification_point(0.1, 400, 1200), "g", "full", 400, 1200).basis == "gallery"
    assert own.combined(SHIPPED.identification_point(0.01, 400, 1200), "g", "full", 400, 1200).basis == "both"


def test_the_asked_rate_is_kept_among_strangers_of_the_gallerys_kind() -> None:
    own = gallery(range(3 * 300), alike=6.0)
    strangers = vectors(range(3 * 1000, 3 * 2000, 3), alike=6.0)
    best = (strangers @ vectors(range(3 * 300), alike=6.0).T).max(axis=1)
    for fpr in (0.1, 0.03):
        model = SHIPPED.identification_point(fpr, 300, 900)
        point = own.combined(model, "g", "stricter", 300, 900)
        assert fpr / 2 < np.mean(best >= point.threshold) < 1.3 * fpr
        assert np.mean(best >= model.threshold) > 5 * fpr


def test_one_person_moves_the_threshold_little() -> None:
    rows = list(range(3 * 300))
    own = gallery(rows, alike=6.0)
    before = own.combined(SHIPPED.identification_point(0.1, 300, 900), "g", "full", 300, 900).threshold
    # Somebody who resembles everybody: the mean face.
    mean = vectors(rows, alike=6.0).mean(axis=0)
    row = np.array([3 * 300], np.int64)
    own.add(IndexEntries("g", row, row // 3, (mean / np.linalg.norm(mean))[None].astype(np.float32)))
    after = own.combined(SHIPPED.identification_point(0.1, 300, 900), "g", "full", 300, 900).threshold
    similar = np.sort((vectors(rows, alike=6.0) @ vectors(rows, alike=6.0).T)[np.triu_indices(900, 3)])
    # What it may cost at most: as if the asked rate were smaller by a tenth.
    assert np.mean(similar >= after) > 0.75 * np.mean(similar >= before)


def test_one_person_under_two_names_is_left_out() -> None:
    rows = list(range(3 * 100))
    own = gallery(rows, alike=1.0)
    before = points(own)[3]
    double = np.arange(3 * 100, 3 * 100 + 3, dtype=np.int64)
    own.add(IndexEntries("g", double, double // 3, vectors([0, 1, 2], alike=1.0)))
    after = points(own)[3]
    assert (before.gallery_identities, after.gallery_identities) == (100, 99)
    assert after.threshold == pytest.approx(before.threshold, abs=0.01)


def test_galleries_know_nothing_of_one_another() -> None:
    own = gallery(range(300), alike=6.0)
    model = SHIPPED.identification_point(0.1, 100, 300)
    assert own.combined(model, "other", "stricter", 100, 300) == model
