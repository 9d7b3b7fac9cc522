"""Faces as a network tells them in maps of points: read from the maps, compared, and each told once.

What each map holds stands in :class:`~service.vision.manifest.PointMaps`. Of 15 values in all a cell has its score,
height and width, the shift of its middle, and five landmarks, in this order and each pair as (y, x).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from service.vision.alignment import TEMPLATE_112, Transform

Floats: TypeAlias = NDArray[np.float64]
Bools: TypeAlias = NDArray[np.bool_]

SCORE_THRESHOLD = 0.5
"""Least detection score of a face. On 1500 CelebA photos every portrait scores 0.6 or more; of what else is
found above 0.5 all were faces in the background, between 0.3 and 0.4 about half were hands, hair and ears."""

HINT_THRESHOLD = 0.35
"""Score from which something small is worth a closer look, at a finer scale. A face 14 px wide, which scores
over 0.5 only every second time, scores this nine times out of ten."""

OVERLAP = 0.4
"""Intersection over union above which two boxes are the same face."""

CONTAINMENT = 0.7
"""Share of the smaller box inside the larger one above which they are the same face."""

MIN_SIDE = 4.0
"""Sides of a box below which it is no face, pixels of what the network sees."""

LEAST_EXTENT = 1.0
"""The same for what the landmarks cover."""

TINY_FACE = 16.0
SMALL_FACE = 24.0
LARGE_FACE = 250.0
"""Widths in pixels of what the network sees: below the first the photo is looked at again at a finer scale, below the
second if there is no more than a hint, and beyond the third at a coarser one. Error of the landmarks in units of the
distance between the eyes, 80 CelebA faces resized: 0.15 at 14 px, 0.09 at 20, 0.05 at 29 to 58, 0.035 at 88
to 176, 0.05 at 263, 0.07 at 351, 0.13 at 527."""

TURNED = 0.1
"""Worth of a face that does not stand upright in a look, beside one that does."""

CONFIDENT_SCORE = 0.6
"""Score of a face that settles by itself that a photo is upright, if its landmarks agree."""

CONFIDENT_MISFIT = 9.0
"""Root mean square distance of the landmarks from the template under the best similarity transform, pixels of
the 112×112 crop, up to which landmarks support an orientation."""

MAX_ROLL = 50.0
"""Degrees from upright beyond which a face is turned. Above 45, so that each face is upright in one of four
orientations at least."""

MAX_ASPECT = 1.1
"""Width over height of a box beyond which a face is turned. Upright faces are at 0.6 to 0.95, faces rotated by
90 degrees at 1.2 to 2."""

CLOSE_SHIFT = 14.0
"""Pixels by which landmarks may move on average in a look at a face alone, half the distance between the eyes; beyond,
it has seen something else. Of CelebA's faces one in a hundred moves by 5."""

FEW_CELLS = 24
"""Cells of the maps up to which they are read one by one, about two faces'. Numbers then take half as long as arrays,
of whose many calls each finds little in the cache after a run of the network."""

_TEMPLATE = (TEMPLATE_112.astype(np.float64) @ np.array([1, 1j]))[:, None]
_TEMPLATE -= _TEMPLATE.mean()
"""``complex128[5, 1]``, the template's points around their middle."""

_TEMPLATE_POINTS: list[complex] = _TEMPLATE[:, 0].tolist()


@dataclass(frozen=True)
class Found:
    """What one look, or several, found: N faces in pixels of the photo.

    ``boxes``: ``[N, 4]`` left, top, right, bottom. ``landmarks``: ``[N, 5, 2]``. ``scores``: ``[N]``.
    ``widths``: ``[N]``, in pixels of what the network saw. ``upright``, ``confident``: ``[N]``, see
    :func:`_posture`. ``turns``: ``[N]``, quarter turns of the photo in which the face was found.
    """

    boxes: Floats
    landmarks: Floats
    scores: Floats
    widths: Floats
    upright: Bools
    confident: Bools
    turns: NDArray[np.intp]

    def __len__(self) -> int:
        return len(self.scores)

    def where(self, chosen: NDArray[Any]) -> Found:
        """The faces of a mask ``bool[N]`` or of indices."""
        return Found(**{name: values[chosen] for name, values in vars(self).items()})

    def faces(self) -> Found:
        """Those with the score of a face, without mere hints."""
        return self.where(self.scores >= SCORE_THRESHOLD)

    def sides(self) -> Floats:
        """The shorter sides of the boxes ``[N]``, pixels of the photo."""
        sides: Floats = (self.boxes[:, 2:] - self.boxes[:, :2]).min(axis=1)
        return sides

    def areas(self) -> Floats:
        """The areas of the boxes ``[N]``, square pixels of the photo."""
        return np.asarray((self.boxes[:, 2] - self.boxes[:, 0]) * (self.boxes[:, 3] - self.boxes[:, 1]), np.float64)


@dataclass(frozen=True)
class View:
    """How a picture lies in what the network saw.

    ``stride``: pixels from one cell to the next. ``border``: pixels around the picture. ``size``: width and height of
    the picture, pixels. ``turns``: quarter turns by which the photo was rotated for it.
    """

    stride: int
    border: int
    size: tuple[int, int]
    turns: int


def read_faces(maps: Sequence[NDArray[np.float32]], view: View, least_score: float) -> Found:
    """Faces and hints of the heatmap, scale, offset and landmark maps ``[C, h, w]``, in pixels of the picture.

    Whatever is not a face by its geometry (not finite, without area, larger than the picture by far, its middle
    outside) is left out, and so is what overlaps a face that is worth more.
    """
    cells = np.flatnonzero(maps[0][0] >= least_score)
    values = np.concatenate([one.reshape(len(one), -1)[:, cells] for one in maps])
    read = _read_few if len(cells) <= FEW_CELLS else _read_many
    return read(cells, maps[0].shape[2], values, view)


def _read_many(cells: NDArray[np.intp], columns: int, values: NDArray[np.float32], view: View) -> Found:
    """The faces of N cells, which count along rows of so many ``columns``, from their values ``[15, N]``."""
    finite = np.isfinite(values).all(axis=0)
    if not finite.all():
        cells, values = cells[finite], values[:, finite]
    # Pairs stay (y, x) for now, and the faces stand in the last axis.
    places = np.stack(np.divmod(cells, columns))
    exact = values.astype(np.float64)
    scores, scale, offset, points = exact[0], exact[1:3], exact[3:5], exact[5:].reshape(5, 2, -1)
    # What would overflow is cut to what the next lines throw away.
    sides = np.exp(np.minimum(np.maximum(scale, -20), 20)) * view.stride
    middle = (places + offset + 0.5) * view.stride - view.border
    corner = middle - sides / 2
    points = corner + np.minimum(np.maximum(points, -0.5), 1.5) * sides
    limits = np.array(view.size[::-1], dtype=np.float64)[:, None]
    plausible = (
        ((points.max(axis=0) - points.min(axis=0)).max(axis=0) > LEAST_EXTENT)
        & (sides >= MIN_SIDE).all(axis=0)
        & (sides <= 2 * limits + MIN_SIDE).all(axis=0)
        & (middle >= 0).all(axis=0)
        & (middle <= limits).all(axis=0)
    )
    upright, confident = _posture(sides, points, scores)
    found = Found(
        boxes=np.concatenate([corner[::-1], (corner + sides)[::-1]]).T,
        landmarks=points[:, ::-1].transpose(2, 0, 1),
        scores=np.minimum(scores, 1.0),
        widths=sides.min(axis=0),
        upright=upright,
        confident=confident,
        turns=np.full(len(scores), view.turns),
    )
    return _without_overlaps(found if plausible.all() else found.where(plausible))


def _posture(sides: Floats, landmarks: Floats, scores: Floats) -> tuple[Bools, Bools]:
    """Which faces stand upright in what the network saw, and which of those leave no doubt.

    ``sides``: ``[2, N]``, ``landmarks``: ``[5, 2, N]``, both (y, x); ``scores``: ``[N]``.

    The landmarks are compared with the 112×112 template by the similarity transform that fits best, whose
    angle and residual tell. Of 300 CelebA photos at half their size, rotated by 90, 180 and 270 degrees, 2 of the
    652 faces found are confident; of the same photos as they are, all 300.
    """
    points = landmarks[:, 1] + 1j * landmarks[:, 0]
    points -= points.sum(axis=0) / 5
    spread = np.maximum((np.abs(points) ** 2).sum(axis=0), 1e-12)
    turn = (points.conj() * _TEMPLATE).sum(axis=0) / spread
    roll = np.degrees(np.abs(np.arctan2(turn.imag, turn.real)))
    misfit = np.sqrt((np.abs(turn * points - _TEMPLATE) ** 2).sum(axis=0) / 5)
    upright = (roll <= MAX_ROLL) & (sides[1] <= MAX_ASPECT * sides[0])
    return upright, upright & (scores >= CONFIDENT_SCORE) & (misfit <= CONFIDENT_MISFIT)


def merged(looks: Sequence[Found]) -> Found:
    """All faces of several looks at one photo, each once, as the look saw it that suits it best."""
    names = vars(looks[0])
    return _without_overlaps(Found(**{name: np.concatenate([vars(look)[name] for look in looks]) for name in names}))


def _without_overlaps(found: Found) -> Found:
    """Greedy suppression: the best face stays, what overlaps it goes, then the best of the rest."""
    remaining = np.argsort(-_worth(found), kind="stable")
    kept: list[int] = []
    boxes, areas = found.boxes, found.areas()
    while len(remaining):
        best, remaining = int(remaining[0]), remaining[1:]
        kept.append(best)
        low = np.maximum(boxes[best, :2], boxes[remaining, :2])
        high = np.minimum(boxes[best, 2:], boxes[remaining, 2:])
        both = np.maximum(high - low, 0.0)
        shared = both[:, 0] * both[:, 1]
        union = areas[best] + areas[remaining] - shared
        smaller = np.minimum(areas[best], areas[remaining])
        remaining = remaining[(shared <= OVERLAP * union) & (shared <= CONTAINMENT * smaller)]
    return found.where(np.array(kept, dtype=np.intp))


def _worth(found: Found) -> Floats:
    """Which of two views of one face to keep: upright before turned, then score, at a size that suits."""
    widths = np.maximum(found.widths, 1.0)
    suits = np.sqrt(np.minimum(1.0, np.minimum(widths / (2 * SMALL_FACE), LARGE_FACE / widths)))
    worth: Floats = found.scores * suits * np.where(found.upright, 1.0, TURNED)
    return worth


@dataclass(slots=True)
class _Cell:
    """A face as one cell tells it, in pixels of the picture."""

    values: Sequence[float]
    left: float
    top: float
    width: float
    height: float
    worth: float = 0.0
    points: Sequence[complex] = ()
    """The landmarks, once they are read; by then ``worth`` is what it is at most."""
    upright: bool = False
    confident: bool = False


def _read_few(cells: NDArray[np.intp], columns: int, values: NDArray[np.float32], view: View) -> Found:
    """The same as :func:`_read_many`, number by number; only of faces that may stay the landmarks are read."""
    limits = [2 * side + MIN_SIDE for side in view.size]
    waiting = []
    for place, own in zip(cells.tolist(), values.T.tolist(), strict=True):
        if not all(map(math.isfinite, own)):
            continue
        row, column = divmod(place, columns)
        left, top, width, height = _box(own, row, column, view.stride, view.border)
        side, x, y = min(width, height), left + width / 2, top + height / 2
        inside = 0 <= x <= view.size[0] and 0 <= y <= view.size[1]
        if inside and side >= MIN_SIDE and width <= limits[0] and height <= limits[1]:
            suits = math.sqrt(min(1.0, side / (2 * SMALL_FACE), LARGE_FACE / side))
            waiting.append(_Cell(own, left, top, width, height, min(own[0], 1.0) * suits))
    kept: list[_Cell] = []
    while waiting:
        best = max(waiting, key=attrgetter("worth"))
        if not best.points:
            best.points = _points(best.values, best.left, best.top, best.width, best.height)
            roll, misfit, extent = _fit(best.points)
            best.upright = roll <= MAX_ROLL and best.width <= MAX_ASPECT * best.height
            best.confident = best.upright and best.values[0] >= CONFIDENT_SCORE and misfit <= CONFIDENT_MISFIT
            if extent <= LEAST_EXTENT:
                waiting.remove(best)
                continue
            if not best.upright:
                # Perhaps another one is the best now.
                best.worth *= TURNED
                continue
        kept.append(best)
        waiting = [cell for cell in waiting if not _same(best, cell)]
    return Found(
        boxes=np.array([(c.left, c.top, c.left + c.width, c.top + c.height) for c in kept], np.float64).reshape(-1, 4),
        landmarks=np.array([(p.real, p.imag) for c in kept for p in c.points], np.float64).reshape(-1, 5, 2),
        scores=np.array([min(c.values[0], 1.0) for c in kept], np.float64),
        widths=np.array([min(c.width, c.height) for c in kept], np.float64),
        upright=np.array([c.upright for c in kept], bool),
        confident=np.array([c.confident for c in kept], bool),
        turns=np.full(len(kept), view.turns),
    )


def _box(values: Sequence[float], row: int, column: int, stride: int, border: int) -> tuple[float, float, float, float]:
    """Left, top, width and height."""
    height, width = (math.exp(min(max(value, -20.0), 20.0)) * stride for value in values[1:3])
    top = (row + values[3] + 0.5) * stride - border - height / 2
    left = (column + values[4] + 0.5) * stride - border - width / 2
    return left, top, width, height


def _points(values: Sequence[float], left: float, top: float, width: float, height: float) -> list[complex]:
    """The five landmarks x + iy."""
    return [
        complex(left + min(max(x, -0.5), 1.5) * width, top + min(max(y, -0.5), 1.5) * height)
        for y, x in zip(values[5::2], values[6::2], strict=True)
    ]


def _fit(points: Sequence[complex]) -> tuple[float, float, float]:
    """Roll in degrees and misfit, see :func:`_posture`, and the larger side of what the landmarks cover, pixels."""
    middle = sum(points) / len(points)
    own = [point - middle for point in points]
    spread = max(sum(point.real * point.real + point.imag * point.imag for point in own), 1e-12)
    turn = sum(p.conjugate() * t for p, t in zip(own, _TEMPLATE_POINTS, strict=True)) / spread
    roll = abs(math.degrees(math.atan2(turn.imag, turn.real)))
    apart = sum(abs(turn * p - t) ** 2 for p, t in zip(own, _TEMPLATE_POINTS, strict=True))
    xs, ys = [point.real for point in own], [point.imag for point in own]
    return roll, math.sqrt(apart / len(points)), max(max(xs) - min(xs), max(ys) - min(ys))


def _same(one: _Cell, other: _Cell) -> bool:
    """Whether two boxes are the same face's, as :func:`_without_overlaps` has it."""
    wide = min(one.left + one.width, other.left + other.width) - max(one.left, other.left)
    high = min(one.top + one.height, other.top + other.height) - max(one.top, other.top)
    shared = max(wide, 0.0) * max(high, 0.0)
    area, other_area = one.width * one.height, other.width * other.height
    return shared > OVERLAP * (area + other_area - shared) or shared > CONTAINMENT * min(area, other_area)


def landmarks_alone(
    maps: Sequence[NDArray[np.float32]], stride: int, transform: Transform, landmarks: Floats, box: Floats
) -> Floats:
    """Landmarks ``[5, 2]`` of the surest face in the middle of a look at it alone, pixels of the photo.

    ``maps``: ``[C, h, w]`` each. ``transform``: photo to look. If the look does not show the face that has about these
    ``landmarks`` and this ``box``, they stay as they are.
    """
    heat = maps[0][0]
    above, beside = heat.shape[0] // 4, heat.shape[1] // 4
    middle = heat[above:-above, beside:-beside]
    row, column = divmod(int(middle.argmax()), middle.shape[1])
    row, column = row + above, column + beside
    values: list[float] = [value for one in maps for value in one[:, row, column].tolist()]
    if not (values[0] >= HINT_THRESHOLD and all(map(math.isfinite, values))):
        return landmarks
    # Pixels of the look count from the centre of the first one.
    seen = [point - (0.5 + 0.5j) for point in _points(values, *_box(values, row, column, stride, 0))]
    # A point of the photo is turn · point + shift in the look.
    turn, shift = complex(transform[0, 0], transform[1, 0]), complex(transform[0, 2], transform[1, 2])
    before = [turn * complex(x, y) + shift for x, y in landmarks.tolist()]
    moved = sum(abs(one - other) for one, other in zip(seen, before, strict=True)) / len(seen)
    points = [(point - shift) / turn for point in seen]
    left, top, right, bottom = box.tolist()
    x, y, width, height = (left + right) / 2, (top + bottom) / 2, right - left, bottom - top
    near = all(abs(point.real - x) <= width and abs(point.imag - y) <= height for point in points)
    return np.array([(point.real, point.imag) for point in points]) if moved <= CLOSE_SHIFT and near else landmarks
