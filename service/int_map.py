"""Whole numbers by whole numbers, millions of them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_GROWTH = 1.25


class IntMap:
    """A map from integers to integers of 0 or more, of 16 bytes an entry where a dict takes about 150.

    Two sorted arrays. Keys that come in rising order, as row ids do, are appended; others cost a copy. Not safe for
    changes beside other calls. All arrays are ``int64[N]``.
    """

    def __init__(self) -> None:
        self._keys = np.empty(0, np.int64)
        # -1 for whoever was dropped, until the next tidying.
        self._values = np.empty(0, np.int64)
        self._used = 0
        self._dropped = 0

    def __len__(self) -> int:
        return self._used - self._dropped

    def get(self, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the value of each key, -1 where there is none."""
        held = self._keys[: self._used]
        if not len(held):
            return np.full(keys.shape, -1, np.int64)
        place = np.minimum(np.searchsorted(held, keys), self._used - 1)
        return np.where(held[place] == keys, self._values[place], -1)

    def put(self, keys: NDArray[np.int64], values: NDArray[np.int64]) -> None:
        """Set the value of each key; no key may come twice."""
        order = np.argsort(keys)
        keys, values = keys[order], values[order]
        place = np.searchsorted(self._keys[: self._used], keys)
        inside = place < self._used
        known = np.zeros(len(keys), bool)
        known[inside] = self._keys[place[inside]] == keys[inside]
        self._dropped -= int((self._values[place[known]] < 0).sum())
        self._values[place[known]] = values[known]
        if known.all():
            return
        keys, values, place = keys[~known], values[~known], place[~known]
        if place[0] < self._used:
            self._keys = np.insert(self._keys[: self._used], place, keys)
            self._values = np.insert(self._values[: self._used], place, values)
            self._used = len(self._keys)
            return
        end = self._used + len(keys)
        if end > len(self._keys):
            self._keys, self._values = (_grown(held, self._used, end) for held in (self._keys, self._values))
        self._keys[self._used : end] = keys
        self._values[self._used : end] = values
        self._used = end

    def drop(self, keys: NDArray[np.int64]) -> None:
        """Take keys out; each must be there, once."""
        self._values[np.searchsorted(self._keys[: self._used], keys)] = -1
        self._dropped += len(keys)
        if self._dropped > self._used // 4:
            self._keys, self._values = self.items()
            self._used, self._dropped = len(self._keys), 0

    def items(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return copies of keys and values, by key."""
        held = self._values[: self._used] >= 0
        return self._keys[: self._used][held], self._values[: self._used][held]


def _grown(held: NDArray[np.int64], used: int, end: int) -> NDArray[np.int64]:
    larger = np.empty(max(end, int(used * _GROWTH)), np.int64)
    larger[:used] = held[:used]
    return larger
