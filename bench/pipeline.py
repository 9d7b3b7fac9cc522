"""Where the time of a photo goes, stage by stage, and how near the whole is to its networks alone.

    python -m bench.pipeline [--model dlib-resnet --model dlib-resnet-int8] [--threads 1]

Two photos, made from those in tests/images: one face in 250×250 pixels, and 12 faces in 12 megapixels. The stages are
timed one by one in the order in which a photo takes them; search is that of 10,000 enrolled people. *Networks alone* is
the time inside ONNX Runtime with the same inputs as in the pipeline; *ratio* is the pipeline without decoding over it.
Then a photo of 12 megapixels read in several ways, and the embedders against one another.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import faiss
import numpy as np
import onnxruntime
from numpy.typing import NDArray
from PIL import Image as Pillow

from bench.harness import Strangers
from service.domain import IndexEntries
from service.gallery.faiss_gallery import FaissGallery
from service.recognizer import cut_crops
from service.settings import BUNDLED_MODELS
from service.vision.batcher import Batcher
from service.vision.detector import FaceDetector
from service.vision.embedder import Embedder
from service.vision.image import decode_image
from service.vision.manifest import load_detector_manifest, load_embedder_manifest
from service.vision.onnx import OnnxModel

IMAGES = Path(__file__).resolve().parent.parent / "tests" / "images"
FACES = {
    "obama2.jpg": (336, 425, 384),
    "obama.jpg": (493, 268, 360),
    "obama3.jpg": (772, 432, 355),
    "biden.jpg": (575, 372, 415),
    "astronaut.png": (221, 115, 106),
}
"""Middle, and height in pixels, of the face in each photo."""

ENROLLED = 10_000
BATCHES = (1, 2, 16)
LIMIT = 10**9


class Watched(OnnxModel):
    """A network that keeps what it is given, until it is asked for it."""

    def __init__(self, path: Path, threads: int) -> None:
        super().__init__(path, threads)
        self._given: list[dict[str, NDArray[Any]]] | None = []

    def run(self, inputs: Mapping[str, NDArray[Any]], *, release: bool = False) -> list[NDArray[np.float32]]:
        if self._given is not None:
            self._given.append(dict(inputs))
        return super().run(inputs, release=release)

    def given(self) -> list[dict[str, NDArray[Any]]]:
        """The inputs of every run so far; further ones are let go, so that each finds the memory of the one before."""
        given, self._given = self._given or [], None
        return given


def portrait(name: str, side: int, share: float) -> Pillow.Image:
    """A square around the face of a photo, in which it has this share of the height."""
    x, y, height = FACES[name]
    half = height / share / 2
    with Pillow.open(IMAGES / name) as photo:
        box = (round(x - half), round(y - half), round(x + half), round(y + half))
        return photo.convert("RGB").crop(box).resize((side, side), Pillow.Resampling.LANCZOS)


def jpeg(picture: Pillow.Image) -> bytes:
    """As a camera would write it."""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=90)
    return file.getvalue()


def one_face() -> bytes:
    """250×250 pixels, as those of LFW."""
    return jpeg(portrait("obama2.jpg", 250, 0.45))


def group() -> bytes:
    """12 faces in 4000×3000 pixels."""
    picture = Pillow.new("RGB", (4000, 3000))
    names = list(FACES)
    for place in range(12):
        picture.paste(portrait(names[place % len(names)], 1000, 0.33), (place % 4 * 1000, place // 4 * 1000))
    return jpeg(picture)


def filled(dimension: int) -> FaissGallery:
    """An index of 10,000 people."""
    rows = np.arange(ENROLLED, dtype=np.int64)
    index = FaissGallery(dimension)
    index.add(IndexEntries("default", rows, rows, Strangers(dimension, np.random.default_rng(0)).more(ENROLLED)))
    return index


def timed(*calls: Callable[[], object], repeats: int) -> list[float]:
    """Median milliseconds of each call; they take turns, so that what else the machine does falls on all alike."""
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(repeats):
        for call, taken in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            taken.append(1e3 * (time.perf_counter() - start))
    return [statistics.median(taken) for taken in times]


def profile(name: str, photo: bytes, model: Path, detector: Path, threads: int, repeats: int) -> None:
    """Print the stages of one photo."""
    finder = Watched(detector / load_detector_manifest(detector).file, threads)
    network = Watched(model / load_embedder_manifest(model).file, threads)
    faces_of = FaceDetector(load_detector_manifest(detector), finder)
    embedder = Embedder(load_embedder_manifest(model), network)
    batcher = Batcher(embedder.embed, 16)
    index = filled(embedder.dimension)
    image = decode_image(photo, LIMIT, LIMIT)
    faces = faces_of.detect(image)
    crops = cut_crops(embedder, [(image, face) for face in faces])
    vectors = batcher.embed(crops)
    looks, embeddings = finder.given(), network.given()

    def whole() -> None:
        found = faces_of.detect(image)
        cut = cut_crops(embedder, [(image, face) for face in found])
        index.search_subjects("default", batcher.embed(cut), 5)

    def networks() -> None:
        for inputs in looks:
            OnnxModel.run(finder, inputs)
        for inputs in embeddings:
            OnnxModel.run(network, inputs)

    stages: dict[str, Callable[[], object]] = {
        "decode": lambda: decode_image(photo, LIMIT, LIMIT),
        "detect": lambda: faces_of.detect(image),
        "align": lambda: cut_crops(embedder, [(image, face) for face in faces]),
        "embed": lambda: batcher.embed(crops),
        "search": lambda: index.search_subjects("default", vectors, 5),
        "all but decode": whole,
        "networks alone": networks,
    }
    taken = dict(zip(stages, timed(*stages.values(), repeats=repeats), strict=True))
    batcher.close()
    shapes = [next(iter(inputs.values())).shape for inputs in looks]
    sizes = ", ".join(f"{count} of {rows}×{columns}" for count, _, rows, columns in shapes)
    batch = len(next(iter(embeddings[0].values())))
    print(f"\n{name}: {len(faces)} faces, {embedder.model_id}, {threads} threads")
    print(
        f"  looks of {sizes}; embedder's batch {batch}"
        + (", crops and mirror images" if embedder.manifest.flip else "")
    )
    for stage, milliseconds in taken.items():
        print(f"  {stage:<15} {milliseconds:8.2f} ms")
    print(f"  ratio           {taken['all but decode'] / taken['networks alone']:8.3f}")


def reading(photo: bytes, repeats: int) -> None:
    """Print what it takes to read a photo of 12 megapixels, whole and at reduced scale, and to shrink it."""
    image = decode_image(photo, LIMIT, LIMIT)
    height, width = image.shape[:2]

    def reduced(scale: int) -> Callable[[], object]:
        def read() -> object:
            with Pillow.open(io.BytesIO(photo)) as picture:
                picture.draft("RGB", (width // scale, height // scale))
                return picture.load()

        return read

    ways: dict[str, Callable[[], object]] = {
        "decode_image": lambda: decode_image(photo, LIMIT, LIMIT),
        **{f"libjpeg alone, scale 1/{scale}": reduced(scale) for scale in (1, 2, 4, 8)},
        "shrink to 480 px": lambda: cv2.resize(image, (480, 360), interpolation=cv2.INTER_AREA),
        "halve": lambda: cv2.resize(image, (width // 2, height // 2), interpolation=cv2.INTER_AREA),
    }
    print(f"\nreading {width}×{height}")
    for name, milliseconds in zip(ways, timed(*ways.values(), repeats=repeats), strict=True):
        print(f"  {name:<30} {milliseconds:8.2f} ms")


def embedders(models: Sequence[Path], threads: int, repeats: int) -> None:
    """Print the time of each network at several sizes of batch, and its ratio to the first's."""
    loaded = [(load_embedder_manifest(model), Embedder.load(model, threads).network) for model in models]
    print(f"\nembedders alone, {threads} threads")
    for batch in BATCHES:
        calls = []
        for manifest, network in loaded:
            size = manifest.input.size
            crops = np.random.default_rng(0).normal(0, 0.25, (batch, 3, size, size)).astype(np.float32)
            calls.append(lambda network=network, inputs={manifest.input.name: crops}: network.run(inputs))
        taken = timed(*calls, repeats=max(5, 4 * repeats // batch))
        for (manifest, _), milliseconds in zip(loaded, taken, strict=True):
            print(
                f"  batch {batch:2} {manifest.model_id:<20} {milliseconds:8.2f} ms  ratio {milliseconds / taken[0]:.3f}"
            )


def main() -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=BUNDLED_MODELS)
    parser.add_argument(
        "--model", action="append", help="embedder, repeatable; the first is what others are compared with"
    )
    parser.add_argument("--detector", default="centerface")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=15)
    given = parser.parse_args()
    cv2.setNumThreads(given.threads)
    faiss.omp_set_num_threads(given.threads)
    models = [given.models / name for name in given.model or ("dlib-resnet", "dlib-resnet-int8")]
    print(
        f"{len(os.sched_getaffinity(0))} cores, {given.threads} threads, {given.detector}, "
        f"ONNX Runtime {onnxruntime.__version__}, medians of {given.repeats}"
    )
    for model in models:
        profile("one face, 250×250", one_face(), model, given.models / given.detector, given.threads, 4 * given.repeats)
    for model in models:
        profile("12 MP group", group(), model, given.models / given.detector, given.threads, given.repeats)
    reading(group(), given.repeats)
    embedders(models, given.threads, given.repeats)


if __name__ == "__main__":
    main()
