"""How a gallery does as it grows: `python bench/gallery.py`.

Time, recall, memory, enrolment and removal beside searches at 10,000, 100,000 and 1,000,000 people, and the start with
each. `--sizes 10000,4000000` for others. It wants about 8 GB of disk and 4 GB of memory.

The people are made up, so that similarities are distributed as the bundled model's. An embedding is the same mean
plus a person plus a photo, normalised; person and photo are normally distributed, with variances that fall
exponentially over 128 directions, one of them (as men and women differ) larger. The constants are fitted to the model's
calibration: the first lines of the output show how well they fit. At D = 512 the same vectors lie in 128 directions of
512, at random.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faiss
import numpy as np
import psutil
from numpy.typing import NDArray
from sqlalchemy import insert

from service.calibration import Calibration
from service.domain import IndexEntries
from service.gallery.faiss_gallery import FaissGallery
from service.recognizer import Recognizer, RecognizerOptions
from service.settings import BUNDLED_MODELS
from service.store.repository import Repository
from service.store.tables import faces, subjects

ROOT = Path(__file__).resolve().parent.parent
MODEL = "made-up"
BLOCK = 10_000
MATED = 5000
"""Probes: another photo each of the first people. Enough for a recall of 0.995 to show at the threshold."""
FPR = 0.01
TOP_K = 5
BESIDE = 3.0
"""Seconds of enrolment beside searches."""
REMOVED = 300
BARE = 536
"""Bytes that a removal writes at D = 512."""

DIRECTIONS = 128
PEOPLE, PHOTOS = 0.136, 0.0507
"""Variance between people, and between photos of one, where the mean has length 1."""
PEOPLE_FALL, PHOTOS_FALL = 10.0, 60.0
"""Directions over which the variance falls by the factor e."""
FIRST = 2.5
"""Factor of the first direction between people."""
UNLIKE = 0.16
"""Standard deviation of the logarithm of how much a person's photos differ, and of how much a photo does."""

Vectors = NDArray[np.float32]


class People:
    """Made-up people, the same each time. See the module."""

    def __init__(self, dimension: int) -> None:
        fall = np.exp(-np.arange(DIRECTIONS) / np.array([[PEOPLE_FALL], [PHOTOS_FALL]]))
        fall[0, 0] *= FIRST
        fall *= np.array([[PEOPLE], [PHOTOS]]) / fall.sum(axis=1, keepdims=True)
        self._between, self._within = np.sqrt(fall).astype(np.float32)
        # Within D = 128 the mean takes the place of the direction that varies least.
        self._kept = min(DIRECTIONS + 1, dimension)
        random = np.random.default_rng(0).normal(size=(dimension, self._kept))
        self._rotation = np.linalg.qr(random)[0].T.astype(np.float32)

    def photos(self, block: int, photo: int) -> Vectors:
        """One photo ``float32[BLOCK, D]`` of each person of a block."""
        person = np.random.default_rng((1, block))
        centre = person.standard_normal((BLOCK, DIRECTIONS), np.float32) * self._between
        scale = UNLIKE * person.standard_normal((BLOCK, 1), np.float32)
        shot = np.random.default_rng((2, block, photo))
        scale = np.exp(scale + UNLIKE * shot.standard_normal((BLOCK, 1), np.float32))
        latent = centre + shot.standard_normal((BLOCK, DIRECTIONS), np.float32) * self._within * scale
        latent = np.concatenate([np.ones((BLOCK, 1), np.float32), latent], axis=1)[:, : self._kept]
        latent /= np.linalg.norm(latent, axis=1, keepdims=True)
        return np.asarray(latent @ self._rotation, np.float32)


def show_fit(calibration: Calibration) -> None:
    """Print the made-up similarities beside the calibration's."""
    first, second = (People(DIRECTIONS).photos(0, photo) for photo in (0, 1))
    impostors = (first @ first.T)[np.triu_indices(BLOCK, 1)]
    rates = (0.5, 0.1, 0.01, 1e-3, 1e-4, 1e-5, 1e-6)
    print("similarity of two people that is exceeded by a share of", *(f"{rate:g}" for rate in rates))
    print("  bundled model", *(f"{calibration.at_fmr(rate)[0]:.3f}" for rate in rates))
    print("  made up      ", *(f"{np.quantile(impostors, 1 - rate):.3f}" for rate in rates))
    genuine = np.einsum("nd,nd->n", first, second)
    share = [f"{np.mean(genuine >= calibration.at_fmr(rate)[0]):.1%}" for rate in (0.1, 0.01, 0.001)]
    print("pairs of one person recognised at FPR 0.1, 0.01, 0.001: made up", *share, "(docs: 98.5%, 95.1%, 85.6%)")


def quantiles(seconds: list[float]) -> str:
    median, rare = (1e3 * float(np.quantile(seconds, q)) for q in (0.5, 0.99))
    return f"p50 {median:.2f} ms, p99 {rare:.2f} ms"


def timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def resident() -> int:
    """The process's resident bytes, without what freed memory still holds."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return psutil.Process().memory_info().rss


def bandwidth() -> float:
    """Bytes a second that one thread reads from memory."""
    large = np.ones(2**26, np.int64)
    return large.nbytes / min(timed(large.max) for _ in range(5))


def opened(dimension: int, work: Path) -> tuple[Repository, FaissGallery]:
    repository = Repository(f"sqlite:///{work / 'vultus.db'}")
    return repository, FaissGallery(dimension, folder=work / "index", model_id=MODEL)


def ready(repository: Repository, index: FaissGallery, dimension: int) -> Recognizer:
    """Do what the service does between its start and being ready, networks aside."""
    nothing: Any = SimpleNamespace(model_id=MODEL, dimension=dimension)
    return Recognizer(
        detector=nothing,
        embedder=nothing,
        queue=nothing,
        calibration=Calibration.load(BUNDLED_MODELS / "dlib-resnet" / "calibration.json"),
        index=index,
        repository=repository,
        options=RecognizerOptions(0.01, 0.001, 0.001, 1, 1, False),
    )


def grow(dimension: int, size: int, work: Path) -> None:
    """Enrol people until there are so many, in SQL and in the index, and note whom exact search finds."""
    people = People(dimension)
    probes = people.photos(0, 1)[:MATED]
    truth = work / "truth.npz"
    best, best_at, start = np.full(MATED, -1, np.float32), np.zeros(MATED, np.int64), 0
    if truth.exists():
        with np.load(truth) as held:
            best, best_at, start = held["best"], held["best_at"], int(held["size"])
    if start >= size:
        return
    repository, index = opened(dimension, work)
    ready(repository, index, dimension)
    adding = 0.0
    for first in range(start, size, BLOCK):
        vectors = people.photos(first // BLOCK, 0)
        rows = np.arange(first + 1, first + BLOCK + 1, dtype=np.int64)
        similar = probes @ vectors.T
        nearest = similar.argmax(axis=1)
        highest = similar[np.arange(MATED), nearest]
        best_at[highest > best] = rows[nearest[highest > best]]
        best = np.maximum(best, highest)
        record(repository, rows, vectors)
        begin = time.perf_counter()
        for place in range(0, BLOCK, 1000):
            part = slice(place, place + 1000)
            index.add(IndexEntries("default", rows[part], rows[part], vectors[part]))
        adding += time.perf_counter() - begin
        np.savez(truth, best=best, best_at=best_at, size=first + BLOCK)
    adding += timed(index.settle)
    print(f"\n{size:,} people: {size - start:,} added in {adding:.0f} s, all rebuilding included", flush=True)
    index.close()
    repository.close()


def measure(dimension: int, work: Path) -> None:
    """Start anew, and measure."""
    people = People(dimension)
    probes = people.photos(0, 1)[:MATED]
    own = np.einsum("nd,nd->n", probes, people.photos(0, 0)[:MATED])
    with np.load(work / "truth.npz") as held:
        best, best_at, size = held["best"], held["best_at"], int(held["size"])
    speed = bandwidth()
    threshold = (
        Calibration.load(BUNDLED_MODELS / "dlib-resnet" / "calibration.json")
        .identification_point(FPR, size, size)
        .threshold
    )
    before = resident()
    begin = time.perf_counter()
    repository, index = opened(dimension, work)
    restoring, restored = 0.0, 0
    restore = index.restore

    def watched(record: Any, *stamps: str) -> Any:
        nonlocal restoring, restored
        held, start = resident(), time.perf_counter()
        missing = restore(record, *stamps)
        restoring = time.perf_counter() - start
        restored = resident() - held
        return missing

    index.restore = watched  # type: ignore[method-assign]
    recognizer = ready(repository, index, dimension)
    seconds = time.perf_counter() - begin
    kind = "approximate" if index.approximate("default") else "exact"
    print(f"{size:,} people, D = {dimension}, {kind}; one thread reads {speed / 1e9:.1f} GB/s from memory")
    print(f"  ready {seconds:.1f} s after the start (networks and imports aside), {restoring:.1f} s of it for the file")
    used = resident() - before
    # An exact index is filled after it was restored, with nothing.
    index_bytes = restored if index.approximate("default") else used
    print(
        f"  memory: {index_bytes / size / dimension:.2f} bytes a value, {index_bytes / 2**20:,.0f} MiB; "
        f"{used / 2**20:,.0f} MiB with all else that the start brought"
    )
    quality(index, probes, best, best_at, own, threshold, repository, speed)
    beside(index, people, probes, work)
    index.close()
    repository.close()
    del recognizer


def quality(
    index: FaissGallery,
    probes: Vectors,
    best: Vectors,
    best_at: NDArray[np.int64],
    own: Vectors,
    threshold: float,
    repository: Repository,
    speed: float,
) -> None:
    """Print time and recall of searches of one thread."""
    faiss.cvar.indexIVF_stats.reset()
    seconds, rescoring, found, shown = [], [], [], []
    for probe in probes:
        begin = time.perf_counter()
        (hits,) = index.search_subjects("default", probe[None], TOP_K).hits
        middle = time.perf_counter()
        labels = repository.labels([hit.row_id for hit in hits])
        # As the recogniser does: similarities come from the record.
        exact = max((float(labels[hit.row_id].embedding @ probe), hit.row_id) for hit in hits)
        seconds.append(middle - begin)
        rescoring.append(time.perf_counter() - middle)
        found.append(exact)
        shown.append(hits[0].similarity)
    similarity, row = np.array([item[0] for item in found]), np.array([item[1] for item in found])
    stats = faiss.cvar.indexIVF_stats
    read = stats.ndis / max(stats.nq, 1) * probes.shape[1]
    bound = f"; reads {read / 1e6:.1f} MB of codes, {1e3 * read / speed:.2f} ms at least" if read else ""
    print(
        f"  search, one thread: {quantiles(seconds)}{bound}; "
        f"names and true similarities from SQL: {quantiles(rescoring)}"
    )
    mated = (best >= threshold) & (best_at == np.arange(1, MATED + 1))
    same = row == best_at
    print(
        f"  threshold {threshold:.4f} (fpr {FPR}): recall@1 {same[mated].mean():.4f} of {mated.sum()} mated probes "
        f"that exact search finds; of all {MATED}, {same.mean():.4f}"
    )
    right = best_at == np.arange(1, MATED + 1)
    exactly = np.mean(~((own >= threshold) & right))
    here = np.mean(~((similarity >= threshold) & (row == np.arange(1, MATED + 1))))
    print(f"  FNIR {exactly:.4f} with exact search, {here:.4f} with this one: {here - exactly:+.4f}")
    error = np.array(shown)[same] - best[same]
    print(f"  similarity of codes against the true one: sd {error.std():.1e}, at most {np.abs(error).max():.1e}")


def beside(index: FaissGallery, people: People, probes: Vectors, work: Path) -> None:
    """Print how fast people come and go while another thread searches without a pause."""
    going = threading.Event()
    going.set()
    seconds: list[float] = []

    def search() -> None:
        while going.is_set():
            for probe in probes:
                seconds.append(timed(lambda p=probe: index.search_subjects("default", p[None], TOP_K)))
                if not going.is_set():
                    return

    vectors = people.photos(10_000, 0)
    thread = threading.Thread(target=search)
    thread.start()
    begin, added = time.perf_counter(), 0
    while time.perf_counter() - begin < BESIDE and added < BLOCK:
        row = np.array([2**40 + added], np.int64)
        index.add(IndexEntries("default", row, row, vectors[added : added + 1]))
        added += 1
    rate, searched = added / (time.perf_counter() - begin), len(seconds)
    print(f"  enrolling one by one beside searches: {rate:,.0f}/s; the searches: {quantiles(seconds[:searched])}")
    removals = [
        timed(lambda p=place: index.remove("default", np.array([2**40 + p], np.int64)))
        for place in range(min(REMOVED, added))
    ]
    print(
        f"  removing beside searches: {quantiles(removals)}, at most {1e3 * max(removals):.1f} ms; "
        f"the searches: {quantiles(seconds[searched:])}"
    )
    with tempfile.NamedTemporaryFile(dir=work, buffering=0) as file:
        bare = [timed(lambda: (file.write(bytes(BARE)), os.fsync(file))) for _ in removals]
    print(f"  writing {BARE} bytes to the disk beside searches: {quantiles(bare)}")
    going.clear()
    thread.join()
    index.remove("default", 2**40 + np.arange(added, dtype=np.int64))


def record(repository: Repository, rows: NDArray[np.int64], vectors: Vectors) -> None:
    """Put people into SQL, one template each, as enrolment does, in one transaction."""
    now = datetime.now(UTC)
    # As long as a real one.
    face = " " * 400
    with repository.engine.connect().execution_options(vultus_write=True) as connection, connection.begin():
        connection.execute(
            insert(subjects),
            [{"id": i, "gallery_id": 1, "name": f"{i}", "metadata": "{}", "created_at": now} for i in rows.tolist()],
        )
        connection.execute(
            insert(faces),
            [
                {
                    "id": i,
                    "face_id": f"{i:036}",
                    "subject_id": i,
                    "image_sha256": f"{i:064}",
                    "model_id": MODEL,
                    "face": face,
                    "created_at": now,
                    "embedding": vector.tobytes(),
                }
                for i, vector in zip(rows.tolist(), vectors, strict=True)
            ],
        )


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimensions", type=numbers, default=[128, 512], help="D, comma-separated")
    parser.add_argument("--sizes", type=numbers, default=[10_000, 100_000, 1_000_000], help="multiples of 10,000")
    parser.add_argument(
        "--work", type=Path, help="folder to keep the galleries in; those that are there are used again"
    )
    parser.add_argument("--step", choices=["grow", "measure"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if any(size % BLOCK for size in arguments.sizes):
        parser.error(f"sizes are multiples of {BLOCK:,}")
    if arguments.step == "grow":
        grow(arguments.dimensions[0], arguments.sizes[0], arguments.work)
        return
    if arguments.step == "measure":
        measure(arguments.dimensions[0], arguments.work)
        return
    print(f"{len(os.sched_getaffinity(0))} cores of {platform.machine()}, FAISS {faiss.__version__}, batch 1;", end=" ")
    print("1 thread for searches and rebuilds, as many as cores for enrolment in bulk")
    show_fit(Calibration.load(BUNDLED_MODELS / "dlib-resnet" / "calibration.json"))
    with tempfile.TemporaryDirectory() as temporary:
        for dimension in arguments.dimensions:
            folder = (arguments.work or Path(temporary)) / str(dimension)
            folder.mkdir(parents=True, exist_ok=True)
            for size in sorted(arguments.sizes):
                # Processes of their own, so that memory is the index's, and the start is a start.
                for step in ("grow", "measure"):
                    sys.stdout.flush()
                    options = ["--dimensions", str(dimension), "--sizes", str(size), "--work", str(folder)]
                    subprocess.run(
                        [sys.executable, __file__, "--step", step, *options],
                        check=True,
                        env={**os.environ, "PYTHONPATH": str(ROOT)},
                    )


if __name__ == "__main__":
    main()
