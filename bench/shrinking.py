"""How near the crop of a large face is to one made with 64 samples a pixel, and what it takes.

    python -m bench.shrinking

The photos of tests/images, at several sizes, as they are and with added noise (25 grey levels, one standard deviation),
warped to 112×112 pixels. For each scale from photo to crop: the root mean square error in grey levels of bilinear
interpolation alone, of the service's way, which shrinks the region first, and its milliseconds on one core.
"""

from __future__ import annotations

import os

import cv2
import numpy as np

from bench.pipeline import FACES, IMAGES, LIMIT, timed
from service.settings import BUNDLED_MODELS
from service.vision.alignment import TEMPLATE_112, eye_line_transform, warp
from service.vision.detector import FaceDetector
from service.vision.image import decode_image
from tests.support import supersampled

SIZE = 112
NOISE = 25
SIZES = (0.5, 0.6, 0.7, 0.8, 1.0, 1.25, 1.5, 2.0, 3.0)
REPEATS = 21


def main() -> None:
    """See the module's text."""
    cv2.setNumThreads(1)
    detector = FaceDetector.load(BUNDLED_MODELS / "centerface")
    print(f"1 of {len(os.sched_getaffinity(0))} cores, OpenCV {cv2.__version__}; errors without and with noise")
    print("photo         scale    bilinear alone    shrunk first       ms")
    for name in FACES:
        photo = decode_image((IMAGES / name).read_bytes(), LIMIT, LIMIT)
        landmarks = detector.detect(photo)[0].landmarks
        for size in SIZES:
            way = cv2.INTER_AREA if size < 1 else cv2.INTER_CUBIC
            plain = np.asarray(cv2.resize(photo, None, fx=size, fy=size, interpolation=way), np.uint8)
            transform = eye_line_transform(((landmarks + 0.5) * size - 0.5).astype(np.float32), TEMPLATE_112)
            scale = float(np.hypot(transform[0, 0], transform[1, 0]))
            if scale >= 0.5:
                continue
            noise = np.random.default_rng(0).normal(0, NOISE, plain.shape)
            errors = []
            for image in (plain, np.clip(plain + noise, 0, 255).astype(np.uint8)):
                exact = supersampled(image, transform, SIZE).astype(np.float64)
                for crop in (warp(image, transform, SIZE, shrink_below=0), warp(image, transform, SIZE)):
                    errors.append(float(np.sqrt(np.mean((crop - exact) ** 2))))
            (taken,) = timed(lambda plain=plain, transform=transform: warp(plain, transform, SIZE), repeats=REPEATS)
            print(
                f"{name:<14}{scale:5.2f}    {errors[0]:5.1f} {errors[2]:5.1f}       {errors[1]:5.1f} {errors[3]:5.1f}"
                f"     {taken:6.2f}"
            )


if __name__ == "__main__":
    main()
