"""A folder of photos for each person, on a disk or in a ZIP: what `enroll` and `evaluate` read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import PurePosixPath

PHOTO_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"})
"""Endings, in lower case, of the files that count as photos."""


@dataclass(frozen=True)
class Lot:
    """Photos of one person that are enrolled in one go. ``files``: paths below the folder, with forward slashes."""

    person: str
    files: tuple[str, ...]


def people(files: Iterable[str]) -> tuple[list[tuple[str, str]], int]:
    """Return (person, file) for each photo, sorted by file, and how many files are no photos.

    ``files``: paths below the folder, with forward slashes; the first part names the person. Hidden files and folders
    are passed over, and do not count.
    """
    found, ignored = [], 0
    for file in sorted(files):
        path = PurePosixPath(file)
        if any(part.startswith(".") or part == "__MACOSX" for part in path.parts):
            continue
        if len(path.parts) < 2 or path.suffix.lower() not in PHOTO_SUFFIXES:
            ignored += 1
        else:
            found.append((path.parts[0], file))
    return found, ignored


def lots(photos: Iterable[tuple[str, str]], most: int) -> Iterator[Lot]:
    """Share the photos of :func:`people` out into lots of one person, ``most`` photos at most in each."""
    for person, held in groupby(sorted(photos), key=lambda photo: photo[0]):
        files = [file for _, file in held]
        for start in range(0, len(files), most):
            yield Lot(person, tuple(files[start : start + most]))
