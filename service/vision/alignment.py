"""From landmarks to aligned crops: the same functions serve training and serving.

A similarity transform here is ``float64[2, 3]``: ``[[s cos, -s sin, tx], [s sin, s cos, ty]]`` takes a
point (x, y) of the photo to its place in the crop. Pixel centres have whole-numbered coordinates.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from service.domain import Crop, Face, Image, Landmarks, Portrait

Transform: TypeAlias = NDArray[np.float64]
"""``float64[2, 3]``, photo to crop."""

_TEMPLATE_SIZE = 112

TEMPLATE_112: Landmarks = np.array(
    [
        [38.2946, 51.6963],
        [73.5318, 51.5014],
        [56.0252, 71.7366],
        [41.5493, 92.3655],
        [70.7299, 92.2041],
    ],
    dtype=np.float32,
)
"""The five points of the usual 112×112 crop: Deng et al. 2019, "ArcFace", CVPR (arXiv:1801.07698).
Read only."""
TEMPLATE_112.setflags(write=False)

PORTRAIT_SIDE = 400
"""Longest side of a kept portrait, pixels. The largest crop in use, 150 px, stays below half of it."""

PORTRAIT_MARGIN = 1.35
"""How much wider than the 112×112 crop a portrait reaches, so that other templates find their pixels."""

PORTRAIT_QUALITY = 95
"""JPEG quality of a portrait; its colours are not subsampled."""


SHRINK_BELOW = 0.75
"""Below this scale the region is shrunk before it is warped. Against 8×8 supersampling of the photos in tests/images at
scales of 0.10 to 0.49 (``python -m bench.shrinking``): root mean square error of a crop 0.8 to 2.5 grey levels in place
of 1.6 to 6.7 (with added noise of 25 grey levels: 2.1 to 4.9 in place of 10 to 17), for 0.1 to 1.6 ms."""

WARP_SCALE = 0.75
"""Scale that is left to the warp after shrinking; 0.6 to 0.9 where whole blocks of pixels are averaged. At 1 the
bilinear warp blurs what averaging has just blurred (errors 40 to 90 % larger), at 0.5 it lets noise through."""


def eye_line_transform(landmarks: Landmarks, template: Landmarks) -> Transform:
    """Similarity transform that puts both eyes exactly on the template's eye line.

    ``landmarks``, ``template``: ``float32[5, 2]`` each, in pixels of the photo and of the crop.

    Rotation and the shift across the eye line follow from the eyes alone. What is left, scale and shift
    along the line, is the least-squares fit of all five points in closed form. With the middle of the eyes
    as origin and the eye line as first axis in photo and crop, landmarks are (p, q) and template points are
    (a, b); the eyes have q = b = 0. Setting the derivatives of Σ (s p + t − a)² + (s q − b)² by s and t to
    zero gives

        s = (Σ (p − p̄)(a − ā) + Σ q b) / (Σ (p − p̄)² + Σ q²),    t = ā − s p̄.

    Landmarks so contorted that this s is not positive get the ratio of the two sizes as scale instead, and
    eyes that coincide count as level: the transform is always a proper one. Raises ValueError if all five
    landmarks coincide, or if a coordinate is not finite.
    """
    # Five points are too few for arrays to pay.
    points, target = _points(landmarks), _points(template)
    origin, target_origin = (points[0] + points[1]) / 2, (target[0] + target[1]) / 2
    axis, target_axis = _direction(points), _direction(target)
    local = [(point - origin) * axis.conjugate() for point in points]
    target_local = [(point - target_origin) * target_axis.conjugate() for point in target]
    middle, target_middle = (sum(point.real for point in own) / len(own) for own in (local, target_local))
    fit = spread = target_spread = 0.0
    for one, other in zip(local, target_local, strict=True):
        p, q, a, b = one.real - middle, one.imag, other.real - target_middle, other.imag
        fit += p * a + q * b
        spread += p * p + q * q
        target_spread += a * a + b * b
    scale = fit / spread
    if scale <= 0:
        scale = math.sqrt(target_spread / spread)
    shift = target_middle - scale * middle
    turn = scale * target_axis * axis.conjugate()
    return _matrix(turn, target_origin + shift * target_axis - turn * origin)


def least_squares_transform(landmarks: Landmarks, template: Landmarks) -> Transform:
    """Similarity transform with the least sum of squared distances over the five points.

    ``landmarks``, ``template``: ``float32[5, 2]`` each, in pixels of the photo and of the crop. The
    two-dimensional case of Umeyama 1991, "Least-squares estimation of transformation parameters between two
    point patterns", without reflection: with the centred points as complex numbers p and t, rotation and
    scale together are Σ p* t / Σ |p|². Raises ValueError if all five landmarks coincide, or if a coordinate
    is not finite.
    """
    points, target = np.array(_points(landmarks)), np.array(_points(template))
    centred = points - points.mean()
    spread = np.vdot(centred, centred).real
    turn = complex(np.vdot(centred, target - target.mean()) / spread)
    if abs(turn) == 0.0:
        raise ValueError("the landmarks do not determine a transform")
    return _matrix(turn, complex(target.mean()) - turn * complex(points.mean()))


def align(
    image: Image,
    landmarks: Landmarks,
    template: Landmarks,
    size: int,
    *,
    transform: Callable[[Landmarks, Landmarks], Transform] = eye_line_transform,
) -> Crop:
    """Aligned crop ``uint8[size, size, 3]`` of the face with these landmarks; black outside the photo.

    ``image``: ``uint8[H, W, 3]``, RGB. ``landmarks``: ``float32[5, 2]``, pixels of ``image``. ``template``:
    ``float32[5, 2]``, pixels of the crop. ``transform``: which fit to use. Raises ValueError as ``transform``
    does.
    """
    return warp(image, transform(landmarks, template), size)


def warp(image: Image, transform: Transform, size: int, *, shrink_below: float = SHRINK_BELOW) -> Crop:
    """``uint8[size, size, 3]``: ``image`` under a similarity transform to crop coordinates.

    Bilinear interpolation looks at four pixels only. Where the face is much larger than in the crop, the
    pixels between would be skipped and noise and fine edges would alias; the region is then shrunk by area
    averaging first, below the scale ``shrink_below``.
    """
    image, transform = _region(image, transform, size, shrink_below)
    crop = cv2.warpAffine(
        image, transform, (size, size), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT, borderValue=0
    )
    return np.asarray(crop, dtype=np.uint8)


def cut_portrait(image: Image, face: Face) -> Portrait:
    """The part of ``image`` that any embedder's crop of this face may need, as a small JPEG file.

    ``image``: ``uint8[H, W, 3]``, RGB, in whose pixels ``face`` is. The part covers the face's box and the
    rotated square of the 112×112 crop widened by :data:`PORTRAIT_MARGIN`, as far as the photo reaches; it is
    shrunk by area averaging to at most :data:`PORTRAIT_SIDE` pixels. Raises ValueError if no part of the
    face lies in the photo.
    """
    height, width = image.shape[:2]
    low_x, low_y, high_x, high_y = _square(
        eye_line_transform(face.landmarks, TEMPLATE_112), _TEMPLATE_SIZE, PORTRAIT_MARGIN
    )
    box = face.box
    around = min(low_x, box.x), min(low_y, box.y), max(high_x, box.x + box.width), max(high_y, box.y + box.height)
    left, top, right, bottom = _bounds(around, width, height)
    part = image[top:bottom, left:right]
    if part.size == 0:
        raise ValueError("the face lies outside the photo")
    factor = min(1.0, PORTRAIT_SIDE / max(part.shape[:2]))
    landmarks = face.landmarks.astype(np.float64) - (left, top)
    if factor < 1:
        part, (x_scale, y_scale) = _resized(part, factor)
        landmarks = (landmarks + 0.5) * (x_scale, y_scale) - 0.5
    done, data = cv2.imencode(
        ".jpg",
        cv2.cvtColor(part, cv2.COLOR_RGB2BGR),
        [
            cv2.IMWRITE_JPEG_QUALITY,
            PORTRAIT_QUALITY,
            cv2.IMWRITE_JPEG_SAMPLING_FACTOR,
            cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444,
        ],
    )
    if not done:
        raise RuntimeError("the portrait could not be encoded")
    return Portrait(data=data.tobytes(), landmarks=landmarks.astype(np.float32))


def _points(landmarks: Landmarks) -> list[complex]:
    points = np.asarray(landmarks, dtype=np.float64)
    if points.shape != (5, 2):
        raise ValueError(f"five points (x, y) are needed, not an array of shape {points.shape}")
    result = [complex(x, y) for x, y in points.tolist()]
    if not all(map(cmath.isfinite, result)):
        raise ValueError("a landmark is not finite")
    mean = sum(result) / len(result)
    if max(abs(point - mean) for point in result) < 1e-6:
        raise ValueError("all landmarks coincide")
    return result


def _direction(points: Sequence[complex]) -> complex:
    eyes = points[1] - points[0]
    return eyes / abs(eyes) if abs(eyes) > 0 else complex(1)


def _matrix(turn: complex, shift: complex) -> Transform:
    return np.array([[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]])


def _square(transform: Transform, size: int, margin: float) -> tuple[float, float, float, float]:
    """Left, top, right, bottom of where in the photo the crop comes from, widened about its middle."""
    (cosine, _, shift_x), (sine, _, shift_y) = transform.tolist()
    square = cosine * cosine + sine * sine
    x, y = (size - 1) / 2 - shift_x, (size - 1) / 2 - shift_y
    middle_x, middle_y = (cosine * x + sine * y) / square, (cosine * y - sine * x) / square
    reach = size / 2 * margin * (abs(cosine) + abs(sine)) / square
    return middle_x - reach, middle_y - reach, middle_x + reach, middle_y + reach


def _bounds(region: tuple[float, float, float, float], width: int, height: int) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the whole pixels of a photo that hold this region."""
    left, top, right, bottom = region
    return (
        min(max(math.floor(left), 0), width),
        min(max(math.floor(top), 0), height),
        min(max(math.ceil(right) + 1, 0), width),
        min(max(math.ceil(bottom) + 1, 0), height),
    )


def _shrunk(image: Image, factor: float) -> tuple[Image, tuple[float, float]]:
    """As :func:`_resized`, by about this factor: whole blocks of pixels are averaged four to twenty times as fast.

    Pixels at the right and at the bottom that fill no block are left out.
    """
    block = round(1 / factor)
    height, width = (side // block for side in image.shape[:2])
    if factor > 0.5 or not (height and width):
        return _resized(image, factor)
    whole = image[: height * block, : width * block]
    small = cv2.resize(whole, (width, height), interpolation=cv2.INTER_AREA)
    return np.asarray(small, dtype=np.uint8), (1 / block, 1 / block)


def _resized(image: Image, factor: float) -> tuple[Image, tuple[float, float]]:
    """``image`` shrunk by area averaging, and the exact ratios of width and height."""
    height, width = image.shape[:2]
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    return np.asarray(small, dtype=np.uint8), (size[0] / width, size[1] / height)


def _region(image: Image, transform: Transform, size: int, shrink_below: float) -> tuple[Image, Transform]:
    """The part of the photo that the crop needs, shrunk if it must be, and the transform from there.

    OpenCV warps nothing from pictures with a side over 32767 pixels; a part of a panorama is smaller.
    """
    height, width = image.shape[:2]
    left, top, right, bottom = _bounds(_square(transform, size, 1 + 8 / size), width, height)
    if right <= left or bottom <= top:
        return np.zeros((1, 1, 3), dtype=np.uint8), transform
    part, x_scale, y_scale = image[top:bottom, left:right], 1.0, 1.0
    scale = math.hypot(transform[0, 0], transform[1, 0])
    if scale < shrink_below:
        part, (x_scale, y_scale) = _shrunk(part, scale / WARP_SCALE)
    # A pixel (i, j) of the part is the point ((i + 0.5) / x_scale − 0.5 + left, ...) of the photo.
    x, y = 0.5 / x_scale - 0.5 + left, 0.5 / y_scale - 0.5 + top
    back = [[a / x_scale, b / y_scale, a * x + b * y + shift] for a, b, shift in transform.tolist()]
    return part, np.array(back)
