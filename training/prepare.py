"""From a data-set folder to aligned crops, cut with the code that serves requests.

A prepared folder holds

- ``crops.npy``: ``uint8[N, S, S, 3]``, RGB, one crop for each photo, in the order of the index; black where
  no face was found. To be opened with ``mmap_mode="r"``.
- ``index.csv``: ``file, identity, role, split, acquired, score, problem``, one row for each crop. ``acquired`` says
  how the face was found, see :class:`Acquired`; ``score`` is the detector's, 0 without one; ``problem`` is the error
  code with which the service would refuse to enrol the photo, filled in where crops are taken like the service's.
- ``summary.json``: the settings, and how many faces of each role were acquired in which way.

While the work goes on, ``progress.jsonl`` stands in for the last two. A line is added to it after the crops
that it speaks of are on the disk, so that the work can be ended at any moment and taken up again, with the
same bytes in the end as if it had never been interrupted.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from os import fsync
from pathlib import Path
from typing import Final, TypeAlias

import cv2
import filelock
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from tqdm import tqdm  # type: ignore[import-untyped]

from service.domain import Crop, Face, Image, Landmarks
from service.errors import VultusError
from service.vision.alignment import Transform, align, eye_line_transform, least_squares_transform
from service.vision.detector import FaceDetector
from service.vision.image import decode_image
from service.vision.manifest import load_detector_manifest, load_embedder_manifest
from service.vision.point_maps import SCORE_THRESHOLD
from service.vision.quality import searchable
from training.data import DataError, Layout, Photo, Role, Split

CROPS: Final = "crops.npy"
INDEX: Final = "index.csv"
SUMMARY: Final = "summary.json"
PROGRESS: Final = "progress.jsonl"

TIGHT_SIZE: Final = (83, 100)
"""Width and height of a photo of ``celebA_ir``, pixels."""

LEAST_SCORE: Final = 0.2
"""Detection score from which a face is taken here. The service asks for more, since a photo may show nobody;
here each photo is known to show a face, and a crop by fixed landmarks is worse than an uncertain one. On
``validation`` cut like the queries, TPR at FPR 0.01 is 92.9 % with 0.5, 94.0 with 0.35 and with 0.2, and 94.3
with 0.1; 0.2 is what is customary for CenterFace."""

TIGHT_PADDING: Final = 40
"""Pixels by which a tight photo is widened on each side, its edge repeated, before the detector sees it."""

TIGHT_WINDOW: Final = (44, 75)
"""Left and top of the window of a 178×218 photo that looks like a photo of ``celebA_ir``. Measured: of all
windows of the mean photo it is the one that correlates best (0.998) with the mean photo of ``celebA_ir``, and the
medians of the landmarks found in both kinds of photo differ by it within 3 px."""

FALLBACK: Final[Landmarks] = np.array([[22, 51], [61, 51], [41.5, 75], [26, 92], [58, 92]], dtype=np.float32)
"""Landmarks of a tight photo in which no face is found, pixels of the photo before it is padded. Read only.
Part of the protocol of ``celebA_ir``."""
FALLBACK.setflags(write=False)

MAX_BYTES: Final = 100 * 2**20
MAX_PIXELS: Final = 100_000_000
"""Limits on one photo. Wider than those of the service: the photos are the user's own."""

LEAST_AREA: Final = 0.25
"""Of several faces those smaller than this share of the largest one's area are bystanders."""

_BATCH = 64

TRAINING_SIZE: Final = 168
"""Side of the crops that networks are trained on, pixels."""

TRAINING_VIEW: Final = 120
"""Side of the middle of such a crop that dlib-resnet's 150 px crop shows; around it is room to turn, shift and
scale. The eyes are 44.6 px apart, 39 in a photo of CelebA."""

_Crops: TypeAlias = np.memmap[tuple[int, ...], np.dtype[np.uint8]]


class Acquired(StrEnum):
    """How a face was found. ``none``: it was not, or the file is not a readable photo; the crop is black."""

    DETECTOR = "detector"
    FALLBACK = "fallback"
    NONE = "none"


@dataclass(frozen=True)
class Target:
    """What is cut: crops of ``size`` px with the landmarks at ``points``, ``float32[5, 2]``, pixels of the crop."""

    size: int
    points: Landmarks

    @classmethod
    def of(cls, embedder: Path) -> Target:
        """The crops of an embedder's folder. Raises :class:`~service.vision.manifest.ModelError`."""
        manifest = load_embedder_manifest(embedder)
        return cls(manifest.input.size, manifest.template.points)

    @classmethod
    def for_training(cls, embedder: Path) -> Target:
        """An embedder's crops scaled to :data:`TRAINING_VIEW` px, with room around them.

        Raises :class:`~service.vision.manifest.ModelError`.
        """
        whole = cls.of(embedder)
        margin = (TRAINING_SIZE - TRAINING_VIEW) / 2
        # Pixel centres have whole-numbered coordinates, so that scaling is about the corner at -0.5.
        points = (whole.points + 0.5) * (TRAINING_VIEW / whole.size) - 0.5 + margin
        return cls(TRAINING_SIZE, points.astype(np.float32))


class Alignment(StrEnum):
    """Which fit of the landmarks to the template cuts the crop; the service uses ``eye-line``."""

    EYE_LINE = "eye-line"
    LEAST_SQUARES = "least-squares"


_TRANSFORMS: Mapping[Alignment, Callable[[Landmarks, Landmarks], Transform]] = {
    Alignment.EYE_LINE: eye_line_transform,
    Alignment.LEAST_SQUARES: least_squares_transform,
}


class Settings(BaseModel):
    """All that decides what the crops are. ``photos_sha256``: digest of the list of photos, not of their
    contents. ``like_queries``: 178×218 photos were cut to the window of ``celebA_ir`` first. ``like_service``: the
    face is that which the service takes, and there is no fallback. ``least_score``: from which one is taken."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layout: Layout
    photos: int
    photos_sha256: str
    size: int
    template: tuple[tuple[float, float], ...]
    alignment: Alignment
    like_queries: bool
    detector: str
    detector_sha256: str
    like_service: bool = False
    least_score: float = LEAST_SCORE


class Counts(BaseModel):
    """How the faces of some photos were acquired."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    detector: int = 0
    fallback: int = 0
    none: int = 0

    @property
    def photos(self) -> int:
        """All of them."""
        return self.detector + self.fallback + self.none


class Summary(BaseModel):
    """``summary.json``: what was done and how it went, for each role that occurs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    settings: Settings
    acquired: dict[Role, Counts]


@dataclass(frozen=True)
class Row:
    """One row of the index. ``score``: 0…1, the detector's, rounded to six digits. ``problem``: an error code or ""."""

    photo: Photo
    acquired: Acquired
    score: float
    problem: str = ""


@dataclass(frozen=True)
class Prepared:
    """A finished folder. ``crops``: ``uint8[N, S, S, 3]``, memory-mapped, read only; ``rows``: N of them."""

    folder: Path
    summary: Summary
    rows: tuple[Row, ...]
    crops: NDArray[np.uint8]

    def where(self, *roles: Role) -> NDArray[np.intp]:
        """Indices of the crops of these roles in which there is a face; ascending."""
        chosen = [i for i, row in enumerate(self.rows) if row.photo.role in roles and row.acquired != Acquired.NONE]
        return np.array(chosen, dtype=np.intp)

    def counts(self, *roles: Role) -> Counts:
        """How the faces of these roles were acquired, together."""
        found = [self.summary.acquired.get(role, Counts()) for role in roles]
        return Counts(
            detector=sum(one.detector for one in found),
            fallback=sum(one.fallback for one in found),
            none=sum(one.none for one in found),
        )


def load_prepared(folder: Path) -> Prepared:
    """Open a prepared folder. Raises :class:`~training.data.DataError` if it is unfinished or damaged."""
    if not (folder / SUMMARY).is_file():
        state = "is unfinished: run `vultus-train prepare` again" if (folder / PROGRESS).exists() else "has no crops"
        raise DataError(f"{folder} {state}")
    try:
        summary = Summary.model_validate_json((folder / SUMMARY).read_bytes())
        crops = np.load(folder / CROPS, mmap_mode="r")
        rows = tuple(_read_index(folder / INDEX))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{folder} is damaged: {error}") from error
    settings = summary.settings
    if crops.shape != (settings.photos, settings.size, settings.size, 3) or crops.dtype != np.uint8:
        raise DataError(f"{folder / CROPS} does not hold what {SUMMARY} says")
    if photo_list_sha256([row.photo for row in rows]) != settings.photos_sha256:
        raise DataError(f"{folder / INDEX} does not hold what {SUMMARY} says")
    return Prepared(folder, summary, rows, crops)


def prepare(
    photos: Sequence[Photo],
    data: Path,
    out: Path,
    *,
    layout: Layout,
    target: Target,
    detector: Path,
    alignment: Alignment = Alignment.EYE_LINE,
    like_queries: bool = False,
    like_service: bool = False,
    jobs: int = 1,
    progress: bool = True,
) -> Summary:
    """Cut one crop for each photo into the folder ``out``, or finish what was begun there.

    ``photos``: from :mod:`training.data`, paths relative to ``data``. ``target``: crop
    size and template. ``detector``: folder of the detector. ``jobs``: photos that are worked on at
    the same time, each on one core. ``like_queries``: cut 178×218 photos to the window of ``celebA_ir``
    first, to see on other people what its tight photos do. ``like_service``: take faces from the detection score,
    and of several faces the one, that the service takes; no fallback.

    Tight photos are padded by :data:`TIGHT_PADDING`; where the detector finds nothing in them,
    :data:`FALLBACK` takes its place. Other photos without a face, and files that are not readable photos,
    keep a black crop and are counted. Of several faces :func:`pick_face` takes one.

    Raises :class:`~training.data.DataError` if a photo is missing, if ``out`` was begun with other settings,
    or if another process works on it; :class:`~service.vision.manifest.ModelError` if a model is unsound.
    """
    finder = load_detector_manifest(detector)
    settings = Settings(
        layout=layout,
        photos=len(photos),
        photos_sha256=photo_list_sha256(photos),
        size=target.size,
        template=tuple((float(x), float(y)) for x, y in target.points),
        alignment=alignment,
        like_queries=like_queries,
        detector=finder.model_id,
        detector_sha256=finder.sha256,
        like_service=like_service,
        least_score=SCORE_THRESHOLD if like_service else LEAST_SCORE,
    )
    out.mkdir(parents=True, exist_ok=True)
    with _alone(out):
        if (out / SUMMARY).exists():
            return _finished(out, settings)
        cutter = _Cutter(
            data,
            FaceDetector.load(detector, least_score=settings.least_score, large_looks=jobs),
            target.points,
            target.size,
            settings,
        )
        done, crops = _begun(out, settings)
        bar = tqdm(total=len(photos), initial=len(done), unit="photo", disable=not progress)
        with bar, ThreadPoolExecutor(jobs) as pool, (out / PROGRESS).open("a", encoding="utf-8") as journal:
            for start in range(len(done), len(photos), _BATCH):
                batch = range(start, min(start + _BATCH, len(photos)))
                results = list(pool.map(cutter.cut, (photos[i] for i in batch)))
                for index, (crop, *_) in zip(batch, results, strict=True):
                    crops[index] = crop
                crops.flush()
                entries = [(acquired, score, problem) for _, acquired, score, problem in results]
                journal.write(json.dumps(entries) + "\n")
                journal.flush()
                fsync(journal.fileno())
                done += entries
                bar.update(len(batch))
        return _finish(out, settings, [Row(photo, *entry) for photo, entry in zip(photos, done, strict=True)])


def pick_face(faces: Sequence[Face], width: int, height: int) -> Face | None:
    """The face that a photo of ``width`` × ``height`` pixels is of; None if there is none.

    Data-set photos are cut around their subject, who is neither always the largest face nor, among
    bystanders in the distance, always the one in the middle: of the faces with at least
    :data:`LEAST_AREA` of the largest one's area, the one whose box's middle is nearest to the photo's.
    """
    largest = max((face.box.area for face in faces), default=0.0)

    def off_centre(face: Face) -> float:
        x = face.box.x + face.box.width / 2 - width / 2
        y = face.box.y + face.box.height / 2 - height / 2
        return x * x + y * y

    return min((face for face in faces if face.box.area >= LEAST_AREA * largest), key=off_centre, default=None)


def photo_list_sha256(photos: Sequence[Photo]) -> str:
    """Digest of files, people, roles and splits in their order, 64 hexadecimal digits."""
    lines = "".join(json.dumps([photo.file, photo.identity, photo.role, photo.split]) + "\n" for photo in photos)
    return hashlib.sha256(lines.encode()).hexdigest()


@dataclass(frozen=True)
class _Cutter:
    data: Path
    detector: FaceDetector
    template: Landmarks
    size: int
    settings: Settings

    def cut(self, photo: Photo) -> tuple[Crop, Acquired, float, str]:
        nothing = np.zeros((self.size, self.size, 3), dtype=np.uint8)
        try:
            data = (self.data / photo.file).read_bytes()
        except OSError as error:
            raise DataError(f"{self.data / photo.file} cannot be read: {error.strerror}") from error
        try:
            image = decode_image(data, MAX_BYTES, MAX_PIXELS)
        except VultusError as error:
            return nothing, Acquired.NONE, 0.0, error.code
        tight = photo.tight
        if self.settings.like_queries and not tight:
            image, tight = _window(image, photo), True
        if tight:
            image = _padded(image)
        height, width = image.shape[:2]
        faces = self.detector.detect(image)
        if self.settings.like_service:
            face, problem = searchable(faces)
        else:
            face, problem = pick_face(faces, width, height), ""
        if face is not None:
            return self._align(image, face.landmarks), Acquired.DETECTOR, round(face.detection_score, 6), problem
        if tight and not self.settings.like_service:
            return self._align(image, FALLBACK + TIGHT_PADDING), Acquired.FALLBACK, 0.0, ""
        return nothing, Acquired.NONE, 0.0, problem

    def _align(self, image: Image, landmarks: Landmarks) -> Crop:
        return align(image, landmarks, self.template, self.size, transform=_TRANSFORMS[self.settings.alignment])


def _window(image: Image, photo: Photo) -> Image:
    (left, top), (width, height) = TIGHT_WINDOW, TIGHT_SIZE
    part = image[top : top + height, left : left + width]
    if part.shape[:2] != (height, width):
        raise DataError(f"{photo.file} is too small to be cut like a query photo")
    return part


def _padded(image: Image) -> Image:
    pad = TIGHT_PADDING
    return np.asarray(cv2.copyMakeBorder(image, pad, pad, pad, pad, cv2.BORDER_REPLICATE), dtype=np.uint8)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    lock = filelock.FileLock(out / ".lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise DataError(f"another process is at work in {out}") from None
    try:
        yield
    finally:
        lock.release()


def _begun(out: Path, settings: Settings) -> tuple[list[tuple[Acquired, float, str]], _Crops]:
    """What an earlier run has finished, and the crops to go on with."""
    journal = out / PROGRESS
    shape = (settings.photos, settings.size, settings.size, 3)
    heading = settings.model_dump_json() + "\n"
    text = journal.read_text(encoding="utf-8") if journal.exists() else ""
    # Without its end of line, a line was being written when the earlier run ended.
    lines = text[: text.rfind("\n") + 1].splitlines(keepends=True)
    if not lines:
        crops = np.lib.format.open_memmap(out / CROPS, mode="w+", dtype=np.uint8, shape=shape)
        crops.flush()
        _write(journal, heading)
        return [], crops
    if lines[0] != heading:
        raise DataError(f"{out} was begun with other settings or photos: choose another folder, or delete it")
    _write(journal, "".join(lines))
    done = [(Acquired(way), float(score), str(why)) for line in lines[1:] for way, score, why in json.loads(line)]
    return done, np.lib.format.open_memmap(out / CROPS, mode="r+")


def _finish(out: Path, settings: Settings, rows: Sequence[Row]) -> Summary:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "identity", "role", "split", "acquired", "score", "problem"])
    for row in rows:
        photo = row.photo
        writer.writerow([photo.file, photo.identity, photo.role, photo.split, row.acquired, row.score, row.problem])
    _write(out / INDEX, text.getvalue())
    acquired: dict[Role, Counts] = {}
    for role in Role:
        ways = [row.acquired for row in rows if row.photo.role is role]
        if ways:
            acquired[role] = Counts(**{way.value: ways.count(way) for way in Acquired})
    summary = Summary(settings=settings, acquired=acquired)
    _write(out / SUMMARY, summary.model_dump_json(indent=2) + "\n")
    (out / PROGRESS).unlink()
    return summary


def _finished(out: Path, settings: Settings) -> Summary:
    summary = load_prepared(out).summary
    if summary.settings != settings:
        raise DataError(f"{out} holds crops of other settings or photos: choose another folder, or delete it")
    (out / PROGRESS).unlink(missing_ok=True)
    return summary


def _read_index(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            photo = Photo(row["file"], row["identity"], Role(row["role"]), Split(row["split"]))
            # Folders from before there were reasons have no such column.
            yield Row(photo, Acquired(row["acquired"]), float(row["score"]), row.get("problem") or "")


def _write(path: Path, text: str) -> None:
    """Write a file as a whole: after a crash it has its old contents or the new ones."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        fsync(file.fileno())
    part.replace(path)
