"""Find the faces of a photo: CenterFace, at the scales and orientations that the photo needs."""

from __future__ import annotations

import math
import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from service.domain import Box, Face, Image
from service.vision.alignment import TEMPLATE_112, eye_line_transform, warp
from service.vision.manifest import DetectorManifest, ModelError, load_detector_manifest
from service.vision.onnx import OnnxModel
from service.vision.point_maps import (
    CONFIDENT_SCORE,
    HINT_THRESHOLD,
    LARGE_FACE,
    SCORE_THRESHOLD,
    SMALL_FACE,
    TINY_FACE,
    Bools,
    Floats,
    Found,
    View,
    landmarks_alone,
    merged,
    read_faces,
)
from service.vision.quality import assess

WORKING_SIDE = 480
"""Longest side of what the network sees first, pixels, at most."""

WORKING_SCALE = 0.5
LEAST_SIDE = 120
"""What the network sees first is also at most half as long as the photo, but for photos below twice :data:`LEAST_SIDE`.
In photos up to twice :data:`WORKING_SIDE` a face that may be enrolled is then at least
:data:`~service.vision.point_maps.TINY_FACE` wide; its landmarks come from the look at the face alone."""

CLOSE_SIDE = 96
"""Side of what the network sees of a face alone, pixels."""

CLOSE_SCALE = 0.82
"""Scale of the face there, as a part of that in the 112×112 crop: its box is about 58 px wide, its eyes 29 px apart."""

CLOSE_SHRINK = 0.5
"""Scale of that look below which the photo is shrunk by area averaging; above, four pixels are enough for landmarks."""

CLOSE_BATCH = 16
"""Faces alone that are looked at in one run, at most."""

COARSE_SIDE = 160
"""Longest side of the second look at a photo that a face may fill or overfill."""

COARSE_BORDER = 32
"""Black border around the coarse look, pixels: faces that the photo's edge cuts score higher with it."""

QUICK_SIDE = 96
QUICK_BORDER = 16
"""The same for the look that tells whether an orientation is worth the others: an eighth of their work. Of 18,859
looks at CelebA photos in doubt, most of them turned for the purpose, its verdict changed the faces of 10, of none
upright: ``python -m bench.turned``."""

FINE_SIDE = 1600
"""Longest side of the closer look at small faces, at most. About 400 ms on a core at this size."""

FREE_SIDE = 512
LARGE_STEP = 160
"""What the network sees may have any side up to :data:`FREE_SIDE` that it takes, pixels, and multiples of
:data:`LARGE_STEP` beyond: each new shape may cost memory that is never given back, large ones much."""

FINE_FACE = 64.0
"""The closer look makes the smallest face this wide, pixels, as far as photo and :data:`FINE_SIDE` allow."""

COARSE_FACE = 128.0
"""The coarser look at a large face makes it this wide, pixels."""

SURE_SCORE = 0.8
""":data:`CONFIDENT_SCORE` where the first look at the upright photo has left doubt."""

_CLOSE_TEMPLATE = ((TEMPLATE_112 - [56.0, 68.0]) * CLOSE_SCALE + (CLOSE_SIDE - 1) / 2).astype(np.float32)
"""``float32[5, 2]``, where the landmarks lie in the look at a face alone, the middle of whose box is in the middle."""

_ORIENTATIONS = (0, 1, 3, 2)
"""Quarter turns in the order in which they are tried: a camera is held sideways more often than upside down."""


class FaceDetector:
    """CenterFace with all that a real photo needs. Safe to use from several threads.

    Xu et al. 2019, "CenterFace: Joint Face Detection and Alignment Using Face as Point" (arXiv:1911.03599).
    """

    def __init__(
        self,
        manifest: DetectorManifest,
        network: OnnxModel,
        least_score: float = SCORE_THRESHOLD,
        large_looks: int = 1,
    ) -> None:
        """``least_score``: what is reported; a lower one suits photos that are known to show a face.

        ``large_looks``: how many looks beyond :data:`FREE_SIDE` may be taken at once.
        """
        maps = manifest.output
        names = (maps.heatmap, maps.scale, maps.offset, maps.landmarks)
        if set(network.inputs) != {manifest.input.name} or not set(names) <= set(network.outputs):
            raise ModelError(f"{manifest.model_id}: the network's inputs or outputs are not the manifest's")
        order = list(network.outputs)
        self._indices = [order.index(name) for name in names]
        self._manifest = manifest
        self._network = network
        self._least_score = least_score
        # Each takes up to 400 MB.
        self._large = threading.Semaphore(large_looks)
        self._mean = np.array(manifest.input.mean, dtype=np.float32)
        self._divisor = np.array(manifest.input.divisor, dtype=np.float32)

    @classmethod
    def load(
        cls, folder: Path, threads: int = 1, least_score: float = SCORE_THRESHOLD, large_looks: int = 1
    ) -> FaceDetector:
        """The detector of ``models/<model_id>``, on at most ``threads`` cores for each call.

        ``least_score``: what is reported; a lower one suits photos that are known to show a face. ``large_looks``: how
        many looks at small faces may be taken at once; others wait. Raises
        :class:`~service.vision.manifest.ModelError` if the folder is not a sound detector.
        """
        manifest = load_detector_manifest(folder)
        return cls(manifest, OnnxModel(folder / manifest.file, threads), least_score, large_looks)

    @property
    def manifest(self) -> DetectorManifest:
        """What ``manifest.json`` says."""
        return self._manifest

    def detect(self, image: Image) -> list[Face]:
        """Every face of ``image`` (``uint8[H, W, 3]``, RGB), the largest box first; none is ``[]``.

        Coordinates are pixels of ``image``: boxes with the pixel (0, 0) from 0 to 1, landmarks with its
        centre at (0, 0). All are finite, boxes have an area, reach at most half a side beyond the photo and
        have their middle in it; landmarks are at most half a side of the box outside the box.

        Most photos need one look at the whole, at :data:`WORKING_SIDE` or half their size, and one at each face alone,
        upright and at a fixed size: the landmarks are those of the latter, so that they are as good in every photo.
        Where it does not show the face again, they are those of the former. Further looks are taken:

        - coarse, when no face in it is certainly upright: one may fill the photo;
        - the three other orientations, when still none is, or when a face lies on its side or upside down. Where the
          faces found so far are large enough for it, a quick look first tells whether any is upright there;
          the network finds turned faces with scores up to 0.95 and landmarks that turn along, only roughly,
          so that the landmarks tell an orientation and the score does not. The first orientation in which a
          face is certainly upright and none is turned is kept. If there is none, certain faces of every
          orientation are, and the others of the photo as it is if their scores outweigh;
        - finer or coarser, when a face is too small or too large to be seen well, or none is certain.

        Raises ValueError if ``image`` is not of that shape and type.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or image.size == 0:
            raise ValueError(f"uint8[H, W, 3] is needed, not {image.dtype}{list(image.shape)}")
        photo = _Photo(image)
        found, turns = self._oriented(photo)
        found = self._refined(photo, found, turns)
        # A face that is upright in no orientation is no face.
        kept = np.flatnonzero(found.upright & (found.scores >= self._least_score))
        largest_first = np.argsort(-found.areas()[kept], kind="stable")
        faces = self._looked_at_alone(image, found.where(kept[largest_first]))
        return [_face(image, faces, index) for index in range(len(faces))]

    def _oriented(self, photo: _Photo) -> tuple[Found, int]:
        """Faces and hints of the best orientation, and which one it is in quarter turns."""
        looks: dict[int, Found] = {}
        for turns in _ORIENTATIONS:
            if turns and self._hopeless(photo, looks[0], turns):
                looks[turns] = looks[0].where(np.array([], dtype=np.intp))
                continue
            look = self._look(photo, _first_side(photo), turns)
            # People may be turned differently: a face that was upright before must not be given up.
            undisputed = not any(earlier.confident.any() for earlier in looks.values())
            if undisputed and _settled(look, CONFIDENT_SCORE if turns == 0 else SURE_SCORE):
                return look, turns
            close = self._look(photo, COARSE_SIDE, turns, COARSE_BORDER)
            look = merged([look, close])
            if undisputed and _settled(look, SURE_SCORE):
                return look, turns
            looks[turns] = look
        # Four looks at anything are four chances to take it for a face: those turned must be certain.
        for turns in _ORIENTATIONS[1:]:
            looks[turns] = looks[turns].where(_certain(looks[turns]))
        best = max(_ORIENTATIONS, key=lambda turns: _support(looks[turns]))
        if best != 0:
            looks[0] = looks[0].where(_certain(looks[0]))
        return merged([looks[turns] for turns in _ORIENTATIONS]), best

    def _hopeless(self, photo: _Photo, found: Found, turns: int) -> bool:
        """Whether none of the faces, as ``found`` in the photo as it is, can be upright in another orientation."""
        faces = found.faces()
        factor = min(1.0, QUICK_SIDE / max(photo.size))
        if not len(faces) or faces.sides().min() * factor < SMALL_FACE:
            return False
        return not self._look(photo, QUICK_SIDE, turns, QUICK_BORDER).upright.any()

    def _refined(self, photo: _Photo, found: Found, turns: int) -> Found:
        """``found``, with faces that another scale shows better replaced, and those that it adds."""
        longest = max(photo.size)
        looks = [found]
        if found.widths[found.scores >= SCORE_THRESHOLD].max(initial=0.0) > LARGE_FACE:
            side = longest * COARSE_FACE / found.faces().sides().max()
            looks.append(self._look(photo, side, turns, COARSE_BORDER))
        widths, sure = found.widths[found.upright], found.scores[found.upright] >= SCORE_THRESHOLD
        if (widths < np.where(sure, TINY_FACE, SMALL_FACE)).any() or not sure.any():
            wanted = longest * FINE_FACE / found.sides()[found.upright].min() if len(widths) else FINE_SIDE
            side = min(FINE_SIDE, longest, wanted if sure.any() else max(wanted, WORKING_SIDE))
            if side > _first_side(photo):
                looks.append(self._look(photo, side, turns))
        return looks[0] if len(looks) == 1 else merged(looks)

    def _look(self, photo: _Photo, side: float, turns: int = 0, border: int = 0) -> Found:
        """One run of the network on ``photo``, shrunk to ``side`` and rotated by ``turns`` quarter turns."""
        width, height = photo.size
        factor = min(1.0, side / max(height, width))
        seen = (max(1, round(width * factor)), max(1, round(height * factor)))
        found = self._run(np.ascontiguousarray(np.rot90(photo.shrunk(seen), turns)), border, turns)
        return _to_photo(found, seen, (width, height))

    def _looked_at_alone(self, image: Image, faces: Found) -> Found:
        """``faces`` with the landmarks that the network gives them when each is shown alone and upright."""
        landmarks = faces.landmarks.copy()
        for start in range(0, len(faces), CLOSE_BATCH):
            some = slice(start, start + CLOSE_BATCH)
            # Landmarks of the network count from the corner of the first pixel.
            landmarks[some] = self._closer(image, landmarks[some] - 0.5, faces.boxes[some]) + 0.5
        return replace(faces, landmarks=landmarks)

    def _closer(self, image: Image, landmarks: Floats, boxes: Floats) -> Floats:
        """Better landmarks ``[N, 5, 2]`` of faces whose landmarks and boxes ``[N, 4]`` are about these."""
        transforms = [eye_line_transform(points, _CLOSE_TEMPLATE) for points in landmarks]
        batch = np.empty((len(landmarks), 3, CLOSE_SIDE, CLOSE_SIDE), dtype=np.float32)
        for planes, transform in zip(batch, transforms, strict=True):
            self._fill(planes, warp(image, transform, CLOSE_SIDE, shrink_below=CLOSE_SHRINK))
        stride = self._manifest.output.stride
        looks = zip(zip(*self._maps(batch), strict=True), transforms, landmarks, boxes, strict=True)
        return np.array([landmarks_alone(maps, stride, *face) for maps, *face in looks])

    def _run(self, image: Image, border: int, turns: int) -> Found:
        """Faces and hints in ``image`` as it is, in its own pixels."""
        height, width = image.shape[:2]
        rows, columns = (_padded(side + 2 * border, self._manifest.input.multiple) for side in (height, width))
        batch = np.zeros((1, 3, rows, columns), dtype=np.float32)
        self._fill(batch[0, :, border : border + height, border : border + width], image)
        large = max(rows, columns) > FREE_SIDE
        with self._large if large else nullcontext():
            maps = [values[0] for values in self._maps(batch, release=large)]
        least = min(HINT_THRESHOLD, self._least_score)
        view = View(self._manifest.output.stride, border, (width, height), turns)
        return read_faces(maps, view, least)

    def _fill(self, planes: NDArray[np.float32], image: Image) -> None:
        """Write ``image`` into ``float32[3, H, W]`` as the network wants it."""
        for plane, values, mean, divisor in zip(cv2.split(image), planes, self._mean, self._divisor, strict=True):
            values[...] = plane
            if mean:
                values -= mean
            if divisor != 1:
                values /= divisor

    def _maps(self, batch: NDArray[np.float32], *, release: bool = False) -> list[NDArray[np.float32]]:
        """Heatmap, scale, offset and landmark maps ``[N, C, h, w]`` of ``float32[N, 3, H, W]``."""
        outputs = self._network.run({self._manifest.input.name: batch}, release=release)
        return [outputs[index] for index in self._indices]


class _Photo:
    """A photo, and its halves, quarters and so on as far as a look has asked for them."""

    def __init__(self, image: Image) -> None:
        self._levels = [image]

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, pixels."""
        height, width = self._levels[0].shape[:2]
        return width, height

    def shrunk(self, size: tuple[int, int]) -> Image:
        """Shrunk to this width and height by area averaging; the photo itself if it has this size.

        To average two by two pixels is ten times faster than any other ratio, for which at least two more are left.
        """
        number = 0
        while (half := self._half(number, size)) is not None:
            number += 1
            if number == len(self._levels):
                self._levels.append(_area(self._levels[-1], half))
        level = self._levels[number]
        return level if (level.shape[1], level.shape[0]) == size else _area(level, size)

    def _half(self, number: int, size: tuple[int, int]) -> tuple[int, int] | None:
        height, width = self._levels[number].shape[:2]
        if height % 2 or width % 2 or width < 4 * size[0] or height < 4 * size[1]:
            return None
        return width // 2, height // 2


def _first_side(photo: _Photo) -> float:
    """Longest side of the first look at a photo, pixels."""
    return min(WORKING_SIDE, max(LEAST_SIDE, WORKING_SCALE * max(photo.size)))


def _area(image: Image, size: tuple[int, int]) -> Image:
    return np.asarray(cv2.resize(image, size, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def _padded(side: int, multiple: int) -> int:
    """``side`` rounded up to a side that the network takes; of large ones there are few, so that memory is reused."""
    step = multiple if side <= FREE_SIDE else math.lcm(multiple, LARGE_STEP)
    return math.ceil(side / step) * step


def _to_photo(found: Found, seen: tuple[int, int], size: tuple[int, int]) -> Found:
    """From pixels of the rotated small picture to pixels of the photo.

    ``seen``, ``size``: width and height of the small picture before it was rotated, and of the photo.
    """
    if not len(found):
        return found
    turns = int(found.turns[0])
    ratio = np.array(size, dtype=np.float64) / seen

    def back(points: Floats) -> Floats:
        if turns == 0:
            return points * ratio
        x, y = points[..., 0], points[..., 1]
        width, height = seen
        if turns == 1:
            x, y = width - y, x
        elif turns == 2:
            x, y = width - x, height - y
        else:
            x, y = y, height - x
        return np.stack([x, y], axis=-1) * ratio

    corners = back(found.boxes.reshape(-1, 2, 2))
    boxes = np.concatenate([corners.min(axis=1), corners.max(axis=1)], axis=1)
    return replace(found, boxes=boxes, landmarks=back(found.landmarks))


def _settled(found: Found, score: float) -> bool:
    """This orientation is right: a confident face of at least this score says so, none says otherwise."""
    return bool((found.confident & (found.scores >= score)).any()) and not bool(
        (~found.upright & (found.scores >= SCORE_THRESHOLD)).any()
    )


def _certain(found: Found) -> Bools:
    """Faces to believe where the orientation is in doubt; a head in profile fits the template badly."""
    return found.confident | (found.upright & (found.scores >= SURE_SCORE))


def _support(found: Found) -> float:
    """Sum of the scores of the faces that are upright in an orientation."""
    faces = found.faces()
    return float(faces.scores[faces.upright].sum())


def _face(image: Image, found: Found, index: int) -> Face:
    left, top, right, bottom = (float(value) for value in found.boxes[index])
    # The network measures from the corner of the first pixel, landmarks count from its centre.
    landmarks = (found.landmarks[index] - 0.5).astype(np.float32)
    box = Box(x=left, y=top, width=right - left, height=bottom - top)
    return Face(
        box=box,
        landmarks=landmarks,
        detection_score=float(found.scores[index]),
        quality=assess(image, box, landmarks),
    )
