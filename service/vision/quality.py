"""How well a face can be recognised later: its size, sharpness and pose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul

import cv2
import numpy as np
from numpy.typing import NDArray

from service.domain import Box, Face, Image, Landmarks, Quality
from service.errors import FaceTooSmall, LowQuality, NoFace, PhotoError, SeveralFaces, VultusError
from service.vision.alignment import TEMPLATE_112, align

MIN_SIZE = 32.0
"""Pixels of the box's shorter side below which a face is not enrolled."""

MIN_SHARPNESS = 0.1
"""Sharpness below which a face is not enrolled."""

MAX_YAW = 60.0
"""Degrees to either side beyond which a face is not enrolled: one eye is hidden."""

MAX_PITCH = 45.0
"""Degrees up or down beyond which a face is not enrolled."""

MIN_SCORE = 0.5
"""Detection score below which a face is not enrolled."""

HALF_SHARP = 60.0
"""Variance of the Laplacian, in squared grey levels, at which sharpness is 0.5."""

_CENTRE_SIZE = 80
_CENTRE_TEMPLATE = TEMPLATE_112 - np.array([16, 24], dtype=np.float32)
_CENTRE = slice(4, 76)
"""The part of the 112×112 crop that eyes, nose and mouth fill, rows 24 to 103 and columns 20 to 91; hair and background
would count otherwise. Only a square of it that holds this part is cut."""

_MODEL: NDArray[np.float64] = np.array(
    [[-0.5, 0.0, 0.0], [0.5, 0.0, 0.0], [0.0, 0.59, -0.44], [-0.43, 1.03, 0.0], [0.43, 1.03, 0.0]]
)
"""An average head's landmarks, x to the right, y down, z away from the viewer; unit: distance between the
eyes. x and y are the median of CenterFace's landmarks on frontal portraits, the nose's z is what makes its
shift in turned heads agree with the foreshortened distance between their eyes."""

_FIT: list[list[float]] = np.linalg.pinv(_MODEL - _MODEL.mean(axis=0)).tolist()


def assess(image: Image, box: Box, landmarks: Landmarks) -> Quality:
    """Size, sharpness and pose of one face.

    ``image``: ``uint8[H, W, 3]``, RGB. ``box`` and ``landmarks`` (``float32[5, 2]``): in its pixels. What the
    numbers mean stands in :class:`service.domain.Quality`. Never raises: landmarks that do not determine a
    face give sharpness 0 and a yaw of 90.
    """
    try:
        yaw, pitch, roll = head_pose(landmarks)
        sharpness = _sharpness(image, landmarks)
    except ValueError:
        yaw, pitch, roll, sharpness = 90.0, 0.0, 0.0, 0.0
    return Quality(size=float(min(box.width, box.height)), sharpness=sharpness, yaw=yaw, pitch=pitch, roll=roll)


def head_pose(landmarks: Landmarks) -> tuple[float, float, float]:
    """Yaw, pitch and roll in degrees, from ``float32[5, 2]`` landmarks alone.

    An average head is fitted under scaled orthography ("POS" of DeMenthon & Davis 1995, "Model-based object
    pose in 25 lines of code"): least squares for the affine camera, then the nearest rotation. With the
    rotation taken apart as roll · yaw · pitch, positive yaw looks to the viewer's right, positive pitch up,
    and positive roll is clockwise in the photo. Yaw and pitch are within ±90, roll within ±180. A real head
    differs from the average one: expect errors of about 10 degrees, more in pitch. Raises ValueError if the
    landmarks do not determine a pose.
    """
    points = np.asarray(landmarks, dtype=np.float64)
    if points.shape != (5, 2):
        raise ValueError("five points (x, y) are needed")
    # Numbers so few that arrays do not pay. The rows of the camera, for x and y; the columns of the fit sum to 0.
    u, v = ([_dot(axis, row) for axis in _FIT] for row in points.T.tolist())
    a, b, c = _dot(u, u), _dot(u, v), _dot(v, v)
    root = math.sqrt(max(0.0, a * c - b * b))
    if not (math.isfinite(root) and root > 1e-6 * (a + c)):
        raise ValueError("the landmarks are not finite, coincide or lie on one line")
    # The nearest matrix with orthonormal rows is (C Cᵀ)^(−1/2) C, and of a matrix of 2×2 that root is known.
    scale = root * math.sqrt(a + c + 2 * root)
    first = [((c + root) * x - b * y) / scale for x, y in zip(u, v, strict=True)]
    second = [((a + root) * y - b * x) / scale for x, y in zip(u, v, strict=True)]
    # The cross product, the head's own z.
    x = first[1] * second[2] - first[2] * second[1]
    y = first[2] * second[0] - first[0] * second[2]
    z = first[0] * second[1] - first[1] * second[0]
    yaw = math.asin(max(-1.0, min(1.0, x)))
    # Only the front of a head has landmarks, so that a pitch beyond ±90 is the fit's failure.
    pitch = -math.atan2(y, max(0.0, z))
    roll = math.atan2(second[0], first[0])
    return math.degrees(yaw), math.degrees(pitch), math.degrees(roll)


def _dot(one: Sequence[float], other: Sequence[float]) -> float:
    return sum(map(mul, one, other), start=0.0)


def enrolment_problem(face: Face) -> VultusError | None:
    """Why this face should not be enrolled, as an error to raise or report; None if it is good enough.

    :class:`~service.errors.FaceTooSmall` or :class:`~service.errors.LowQuality`, with the measured number and
    the limit in plain words. Of several reasons the first of size, score, pose and sharpness is told.
    """
    quality = face.quality
    if quality.size < MIN_SIZE:
        return FaceTooSmall(f"The face is {quality.size:.0f} pixels across; at least {MIN_SIZE:.0f} are needed.")
    if face.detection_score < MIN_SCORE:
        return LowQuality(
            f"The detector is not sure that this is a face: score {face.detection_score:.2f}, "
            f"at least {MIN_SCORE:.2f} is needed."
        )
    if abs(quality.yaw) > MAX_YAW:
        return LowQuality(
            f"The face is turned {abs(quality.yaw):.0f} degrees to the side; at most {MAX_YAW:.0f} are usable."
        )
    if abs(quality.pitch) > MAX_PITCH:
        direction = "up" if quality.pitch > 0 else "down"
        return LowQuality(
            f"The face is tilted {abs(quality.pitch):.0f} degrees {direction}; at most {MAX_PITCH:.0f} are usable."
        )
    if quality.sharpness < MIN_SHARPNESS:
        return LowQuality(
            f"The face is blurred: sharpness {quality.sharpness:.2f}, at least {MIN_SHARPNESS:.2f} is needed."
        )
    return None


def one_usable(faces: Sequence[Face]) -> Face:
    """The face that a photo for enrolment is of, of all its faces, the largest first.

    Raises :class:`~service.errors.NoFace`, what :func:`enrolment_problem` says of the largest, or
    :class:`~service.errors.SeveralFaces` if another is good enough too.
    """
    if not faces:
        raise NoFace
    problem = enrolment_problem(faces[0])
    if problem is not None:
        raise problem
    others = sum(enrolment_problem(face) is None for face in faces[1:])
    if others:
        raise SeveralFaces(f"{others + 1} faces in this photo could be the subject; one must be alone.")
    return faces[0]


def searchable(faces: Sequence[Face]) -> tuple[Face | None, str]:
    """The face with which an evaluation searches, and the error code with which enrolment refuses the photo, or "".

    That of :func:`one_usable`; and the largest, as a search does with it, where only its size or quality is against it.
    """
    try:
        return one_usable(faces), ""
    except (FaceTooSmall, LowQuality) as error:
        return faces[0], error.code
    except PhotoError as error:
        return None, error.code


def _sharpness(image: Image, landmarks: Landmarks) -> float:
    """v / (v + HALF_SHARP) with v the variance of the Laplacian over the middle of the 112×112 crop.

    Pech-Pacheco et al. 2000, "Diatom autofocusing in brightfield microscopy". The fixed scale makes faces of
    different sizes comparable: detail that the crop cannot hold does not count, a small face that is
    enlarged to fill the crop is as blurred as it looks.
    """
    crop = align(image, landmarks, _CENTRE_TEMPLATE, _CENTRE_SIZE)
    grey = cv2.cvtColor(crop[:, _CENTRE], cv2.COLOR_RGB2GRAY)
    deviation = float(cv2.meanStdDev(cv2.Laplacian(grey, cv2.CV_16S))[1][0, 0])
    variance = deviation * deviation
    return variance / (variance + HALF_SHARP)
