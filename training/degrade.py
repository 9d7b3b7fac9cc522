"""The look of a cheap camera, given to crops: what the open-set trial uses as another domain."""

from __future__ import annotations

import hashlib
from typing import Final

import cv2
import numpy as np

from service.domain import Crop

FACE: Final = 32
"""Width of the face that is left, pixels."""

EYES_TO_FACE: Final = 2.15
"""A face's width in distances between its eyes."""

JPEG_QUALITY: Final = 30
NOISE: Final = 8.0
"""Standard deviation of the noise on each channel of each pixel, of 255, before the picture is compressed."""

LIGHT: Final = 0.4
"""What is left of the light."""


def cheap_camera(crop: Crop, eye_distance: float, name: str) -> Crop:
    """Return the crop as a cheap camera would have seen it from afar in bad light, ``uint8[S, S, 3]``.

    ``eye_distance``: pixels between the eyes in the crop's template. The crop is brought to the scale at which the
    face is :data:`FACE` pixels wide, darkened, made noisy, compressed as JPEG and enlarged again. The noise depends
    on ``name``, the photo's, alone, so that the same photo always becomes the same.
    """
    size = crop.shape[0]
    small_size = max(8, round(size * FACE / (eye_distance * EYES_TO_FACE)))
    small = cv2.resize(crop, (small_size, small_size), interpolation=cv2.INTER_AREA).astype(np.float64)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    noisy = small * LIGHT + np.random.default_rng(seed).normal(0.0, NOISE, small.shape)
    # The order of the channels does not matter to what is lost.
    _, jpeg = cv2.imencode(".jpg", np.clip(noisy, 0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    seen = np.asarray(cv2.imdecode(jpeg, cv2.IMREAD_COLOR), np.uint8)
    return np.asarray(cv2.resize(seen, (size, size), interpolation=cv2.INTER_CUBIC), dtype=np.uint8)
