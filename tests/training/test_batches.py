"""What is learned from, and in which order."""

from __future__ import annotations

import numpy as np
import pytest

from tests.training.learning import write_crops
from training.batches import people_by_photos, shuffled, training_set
from training.data import DataError, Role, Split
from training.losses import NOBODY
from training.prepare import load_prepared


def test_only_training_photos_are_learned_from(learnable):
    prepared = load_prepared(learnable)
    photos = training_set([prepared], [Role.CLASS, Role.FURTHER, Role.UNLABELLED])
    used = [prepared.rows[place].photo for place in photos.place]
    assert {photo.role for photo in used} == {Role.CLASS, Role.FURTHER, Role.UNLABELLED}
    assert {photo.split for photo in used if photo.role is Role.CLASS} == {Split.TRAIN}
    assert len(photos) == 10 * 6 + 3 * 4 + 6
    assert len(photos.people) == 13
    names = [photos.people[label] if label != NOBODY else None for label in photos.labels]
    assert names == [photo.identity if photo.role is not Role.UNLABELLED else None for photo in used]
    picked = np.array([3, 0, 70])
    assert np.array_equal(photos.crops(picked), prepared.crops[photos.place[picked]])


@pytest.mark.parametrize("role", [Role.CALIBRATION, Role.VALIDATION, Role.QUERY, Role.DISTRACTOR, Role.STRANGER])
def test_nothing_is_learned_from_people_who_are_held_out(learnable, role):
    with pytest.raises(DataError, match="nothing is learned from"):
        training_set([load_prepared(learnable)], [Role.CLASS, role])


def test_folders_must_hold_training_crops_of_every_role_asked_for(learnable, tmp_path):
    small = load_prepared(write_crops(tmp_path / "small", size=64))
    with pytest.raises(DataError, match="--training"):
        training_set([small], [Role.CLASS])
    other = load_prepared(learnable)
    without = training_set([other], [Role.FURTHER])
    assert len(without.people) == 3
    object.__setattr__(other, "rows", tuple(row for row in other.rows if row.photo.role is not Role.FURTHER))
    with pytest.raises(DataError, match="no crop has the role further"):
        training_set([other], [Role.CLASS, Role.FURTHER])


def test_every_photo_is_taken_once_in_each_epoch():
    taken = np.concatenate([shuffled(23, 8, step, seed=4) for step in range(23)])
    for epoch in range(8):
        assert sorted(taken[epoch * 23 : (epoch + 1) * 23]) == list(range(23))
    assert not np.array_equal(taken[:23], taken[23:46])
    assert np.array_equal(shuffled(23, 8, 5, seed=4), taken[40:48])
    assert not np.array_equal(shuffled(23, 8, 5, seed=5), taken[40:48])


def test_a_batch_may_be_larger_than_an_epoch():
    assert len(shuffled(3, 8, 1, seed=0)) == 8


def test_people_and_photos():
    labels = np.array([0] * 5 + [1] * 2 + [2] + [3] * 9 + [NOBODY] * 4)
    seen = set()
    for step in range(30):
        batch = people_by_photos(labels, 2, 4, step, seed=1)
        people = labels[batch].reshape(2, 4)
        assert (people == people[:, :1]).all()
        assert people[0, 0] != people[1, 0]
        assert len(set(batch[labels[batch] == 3])) in (0, 4)
        seen |= set(batch.tolist())
    assert seen == set(range(7)) | set(range(8, 17))
    assert np.array_equal(people_by_photos(labels, 2, 4, 7, seed=1), people_by_photos(labels, 2, 4, 7, seed=1))
    with pytest.raises(ValueError, match="larger"):
        people_by_photos(labels, 4, 2, 0, seed=1)
