"""What the quick look of the detector saves on photos in doubt, and whether it changes their faces.

    python -m bench.turned --data DATA [--every 4]

Every so many photos of the `class`, `further`, `calibration` and `validation` people of CelebA-500, as they are, cut as
tight as the photos of `celebA_ir`, and turned by 90, 180 and 270 degrees, go through the detector with and without the
look that tells whether an orientation is worth more of them. *In doubt*: more than two looks were taken. *Work*: what
the network was shown of them, in pixels, with quick looks over without. *Changed*: photos with another number of faces,
or a landmark elsewhere.
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from service.domain import Image
from service.settings import BUNDLED_MODELS
from service.vision.detector import FaceDetector, _Photo
from service.vision.image import decode_image
from service.vision.manifest import load_detector_manifest
from service.vision.onnx import OnnxModel
from service.vision.point_maps import Found
from training.data import Role, celeba_photos
from training.prepare import TIGHT_PADDING, TIGHT_SIZE, TIGHT_WINDOW

LIMIT = 10**9
ROLES = (Role.CLASS, Role.FURTHER, Role.CALIBRATION, Role.VALIDATION)


class Watched(FaceDetector):
    """Counts its looks, and the pixels of them."""

    looks = pixels = 0

    def _look(self, photo: _Photo, side: float, turns: int = 0, border: int = 0) -> Found:
        factor = min(1.0, side / max(photo.size))
        self.looks += 1
        self.pixels += round((photo.size[0] * factor + 2 * border) * (photo.size[1] * factor + 2 * border))
        return super()._look(photo, side, turns, border)


class Thorough(Watched):
    """Gives no orientation up at a quick look."""

    def _hopeless(self, photo: _Photo, found: Found, turns: int) -> bool:
        return False


class Seen(NamedTuple):
    """Of one photo in one way: whether it was in doubt, pixels with quick looks and without, whether it changed."""

    way: str
    doubt: bool
    quick: int
    thorough: int
    changed: bool


def tight(image: Image) -> Image:
    """Cut as `prepare --like-queries` does."""
    (left, top), (width, height) = TIGHT_WINDOW, TIGHT_SIZE
    cut = image[top : top + height, left : left + width]
    return np.asarray(cv2.copyMakeBorder(cut, *[TIGHT_PADDING] * 4, cv2.BORDER_REPLICATE), dtype=np.uint8)


WAYS: dict[str, Callable[[Image], Image]] = {
    "as they are": lambda image: image,
    "cut tight": tight,
    "turned by 90°": lambda image: np.rot90(image, 1),
    "turned by 180°": lambda image: np.rot90(image, 2),
    "turned by 270°": lambda image: np.rot90(image, 3),
}


@cache
def detectors() -> tuple[Watched, Thorough]:
    folder = BUNDLED_MODELS / "centerface"
    manifest = load_detector_manifest(folder)
    network = OnnxModel(folder / manifest.file)
    return Watched(manifest, network), Thorough(manifest, network)


def looked_at(path: Path) -> list[Seen]:
    """Look at one photo in every way, with both detectors."""
    cv2.setNumThreads(1)
    photo = decode_image(path.read_bytes(), LIMIT, LIMIT)
    return [seen(way, np.ascontiguousarray(change(photo))) for way, change in WAYS.items()]


def seen(way: str, image: Image) -> Seen:
    quick, thorough = detectors()
    for detector in (quick, thorough):
        detector.looks = detector.pixels = 0
    expected = thorough.detect(image)
    if thorough.looks <= 2:
        return Seen(way, False, thorough.pixels, thorough.pixels, False)
    found = quick.detect(image)
    same = len(found) == len(expected) and all(
        np.array_equal(one.landmarks, other.landmarks) for one, other in zip(found, expected, strict=True)
    )
    return Seen(way, True, quick.pixels, thorough.pixels, not same)


def everything(paths: list[Path]) -> Iterator[Seen]:
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for some in pool.map(looked_at, paths, chunksize=16):
            yield from some


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--every", type=int, default=4)
    asked = parser.parse_args()
    paths = [asked.data / photo.file for photo in celeba_photos(asked.data, ROLES)][:: asked.every]
    ways: dict[str, list[Seen]] = defaultdict(list)
    for one in everything(paths):
        ways[one.way].append(one)
    print(f"{len(os.sched_getaffinity(0))} cores, centerface, {len(paths)} photos")
    print("| photos | in doubt | work | changed |")
    print("| --- | ---: | ---: | ---: |")
    for way, all_seen in ways.items():
        doubtful = [one for one in all_seen if one.doubt]
        work = sum(one.quick for one in doubtful) / max(1, sum(one.thorough for one in doubtful))
        print(f"| {way} | {len(doubtful)} | {work:.2f} | {sum(one.changed for one in doubtful)} |")


if __name__ == "__main__":
    main()
