"""Few faces are read from the maps number by number, many by arrays: both must say the same."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from service.vision import point_maps
from service.vision.alignment import TEMPLATE_112
from service.vision.point_maps import FEW_CELLS, Found, View, read_faces

CELLS = 24
STRIDE = 4
VIEW = View(STRIDE, border=8, size=(80, 76), turns=1)


def face(size: float, turn: complex = 1) -> NDArray[np.float32]:
    """Height, width, and landmarks (y, x) as the network tells them, of a face that is turned in its box."""
    points = (TEMPLATE_112 - [56, 72]).astype(np.float64) @ np.array([1, 1j]) * turn / 70
    landmarks = np.stack([points.imag, points.real], axis=1) + 0.5
    sides = np.log(np.array([1.3 * size, size]) / STRIDE)
    return np.concatenate([sides, landmarks.ravel()]).astype(np.float32)


def maps_of(rng: np.random.Generator, cells: int) -> list[NDArray[np.float32]]:
    """Heatmap, scale, offset and landmark maps with so many cells that may be faces, side by side and far apart."""
    values = np.zeros((15, CELLS, CELLS), np.float32)
    row, column = rng.integers(CELLS, size=2)
    for _ in range(cells):
        if rng.random() < 0.3:
            row, column = rng.integers(CELLS, size=2)
        else:
            row, column = np.clip(np.array([row, column]) + rng.integers(-1, 2, size=2), 0, CELLS - 1)
        told = face(rng.choice([3, 12, 40, 90, 300]) * rng.uniform(0.8, 1.2), 1j ** int(rng.choice([0, 0, 0, 1, 2])))
        told += rng.normal(0, rng.choice([0.01, 0.05]), len(told)).astype(np.float32)
        if rng.random() < 0.05:
            # Landmarks in one place, values that overflow and values that are none.
            told[2:] = 0.5
        told[rng.integers(len(told))] = rng.choice([told[5], 1e30, np.nan, -np.inf], p=[0.9, 0.04, 0.04, 0.02])
        values[0, row, column] = rng.uniform(0.3, 1.05)
        values[1:3, row, column] = told[:2]
        values[3:5, row, column] = rng.uniform(-0.5, 0.5, 2)
        values[5:, row, column] = told[2:]
    return [values[:1], values[1:3], values[3:5], values[5:]]


@pytest.mark.parametrize("seed", range(200))
def test_numbers_and_arrays_agree(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(seed)
    maps = maps_of(rng, int(rng.integers(FEW_CELLS + 1)))
    read: list[Found] = []
    for few in (FEW_CELLS, -1):
        monkeypatch.setattr(point_maps, "FEW_CELLS", few)
        read.append(read_faces(maps, VIEW, 0.35))
    numbers, arrays = (vars(found) for found in read)
    for name, values in arrays.items():
        assert numbers[name].shape == values.shape, name
        assert numbers[name].dtype == values.dtype, name
        np.testing.assert_allclose(numbers[name], values, rtol=0, atol=1e-9, err_msg=name)


def test_what_is_compared_has_faces_of_every_kind() -> None:
    """Several, none, upright, turned, certain and not: or the agreement above would say little."""
    found = [read_faces(maps_of(np.random.default_rng(seed), 12), VIEW, 0.35) for seed in range(50)]
    assert {len(one) for one in found} >= {1, 2, 3}
    for name in ("upright", "confident"):
        assert {bool(value) for one in found for value in getattr(one, name)} == {False, True}
