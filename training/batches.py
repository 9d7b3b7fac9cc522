"""Which crops are learned from, and which of them each step takes.

What a step takes follows from the seed and the step's number alone, so that a run that was ended goes on as if it had
not been, and so that each of several processes knows its part without asking the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.data import DataError, Role, Split
from training.losses import NOBODY
from training.prepare import TRAINING_SIZE, Prepared

NAMED_ROLES = (Role.CLASS, Role.FURTHER)
TRAINING_ROLES = (*NAMED_ROLES, Role.UNLABELLED)
"""The only people that anything is learned from, and of ``class`` only the split ``train``."""


@dataclass(frozen=True)
class TrainingSet:
    """N crops to learn from, of C people.

    ``labels``: ``int64[N]``, 0…C − 1 in the order of ``people``, or −1 for a face without a name.
    """

    folders: tuple[Prepared, ...]
    folder: NDArray[np.intp]
    place: NDArray[np.intp]
    labels: NDArray[np.int64]
    people: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def crops(self, indices: NDArray[np.intp]) -> NDArray[np.uint8]:
        """``uint8[M, T, T, 3]``, the crops with these indices, in their order."""
        out = np.empty((len(indices), TRAINING_SIZE, TRAINING_SIZE, 3), dtype=np.uint8)
        for row, index in enumerate(indices):
            out[row] = self.folders[self.folder[index]].crops[self.place[index]]
        return out


def training_set(folders: Sequence[Prepared], roles: Sequence[Role]) -> TrainingSet:
    """The crops of these roles in prepared folders of training crops.

    Raises :class:`~training.data.DataError` if a role is not for training, if a folder holds other crops, or if a role
    has no crop.
    """
    if not set(roles) <= set(TRAINING_ROLES):
        raise DataError(f"nothing is learned from {', '.join(sorted(set(roles) - set(TRAINING_ROLES)))}")
    folder, place, names = [], [], []
    for number, prepared in enumerate(folders):
        require_training_crops(prepared)
        for index in taught(prepared, roles):
            photo = prepared.rows[index].photo
            folder.append(number)
            place.append(int(index))
            names.append(photo.identity if photo.role in NAMED_ROLES else "")
    found = {prepared.rows[i].photo.role for prepared in folders for i in prepared.where(*roles)}
    if found != set(roles):
        raise DataError(f"no crop has the role {', '.join(sorted(set(roles) - found))}")
    people = tuple(sorted(set(names) - {""}))
    number_of = {name: number for number, name in enumerate(people)} | {"": NOBODY}
    labels = np.array([number_of[name] for name in names], dtype=np.int64)
    return TrainingSet(tuple(folders), np.array(folder, np.intp), np.array(place, np.intp), labels, people)


def require_training_crops(prepared: Prepared) -> None:
    """Raise :class:`~training.data.DataError` unless the folder holds training crops."""
    if prepared.summary.settings.size != TRAINING_SIZE:
        raise DataError(f"{prepared.folder} holds no training crops: prepare them with --training")


def taught(prepared: Prepared, roles: Sequence[Role]) -> NDArray[np.intp]:
    """The crops of these roles, without those of the ``class`` people that the official split keeps for judging."""
    kept = [i for i in prepared.where(*roles) if prepared.rows[i].photo.split in (Split.NONE, Split.TRAIN)]
    return np.array(kept, np.intp)


def shuffled(count: int, batch: int, step: int, seed: int) -> NDArray[np.intp]:
    """The ``batch`` indices of a step, when ``count`` items are taken in a new random order in each epoch.

    An epoch's last items are followed by the next epoch's first ones in the same batch.
    """
    taken = []
    start, stop = step * batch, (step + 1) * batch
    while start < stop:
        epoch, offset = divmod(start, count)
        order = np.random.default_rng((seed, 0, epoch)).permutation(count)
        part = order[offset : offset + stop - start]
        taken.append(part)
        start += len(part)
    return np.concatenate(taken).astype(np.intp)


def people_by_photos(labels: NDArray[np.int64], people: int, photos: int, step: int, seed: int) -> NDArray[np.intp]:
    """The indices of a step of ``people`` random people with ``photos`` random photos of each, person by person.

    P × K sampling (Hermans et al. 2017, arXiv:1703.07737). Whoever has fewer photos has some of them twice. Raises
    ValueError if fewer people have two photos or more.
    """
    generator = np.random.default_rng((seed, 1, step))
    numbers, counts = np.unique(labels[labels != NOBODY], return_counts=True)
    chosen = generator.choice(numbers[counts > 1], people, replace=False)
    taken = []
    for label in chosen:
        own = np.flatnonzero(labels == label)
        order = generator.permutation(own)
        taken.append(np.resize(order, photos))
    return np.concatenate(taken).astype(np.intp)
