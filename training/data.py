"""The tables of a data-set folder: which photos there are, who is on them, and what each may be used for.

Three layouts are read. ``celeba``: CelebA-500 with its identification set ``celebA_ir`` (photos of Liu et al.
2015, "Deep Learning Face Attributes in the Wild", ICCV), in the folders and tables named below. ``folders``:
one folder for each person, photos in it, nothing else needed. ``utkface``: photos without names (Zhang, Song, Qi
2017, "Age Progression/Regression by Conditional Adversarial Autoencoder", CVPR).
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

from service.layout import PHOTO_SUFFIXES

TRAIN_FOLDER = "celebA_train_500/celebA_imgs"
QUERY_FOLDER = "celebA_ir/celebA_query"
DISTRACTOR_FOLDER = "celebA_ir/celebA_distractors"

PEOPLE_TABLE = "people.csv"
IDENTITY_TABLE = "identities.csv"
CLASS_TABLE = "celebA_train_500/celebA_anno.txt"
SPLIT_TABLE = "celebA_train_500/celebA_train_split.txt"
QUERY_TABLE = "celebA_ir/celebA_anno_query.csv"


_Value = TypeVar("_Value")


class DataError(ValueError):
    """A data-set folder, or one that was made from it, is not what it should be: says where and how."""


class Layout(StrEnum):
    """How a data-set folder is laid out."""

    CELEBA = "celeba"
    FOLDERS = "folders"
    UTKFACE = "utkface"


class Role(StrEnum):
    """What a person may be used for.

    ``class`` and ``further``: training. ``calibration``: the score distributions that ship with a model.
    ``validation``: choices between models. ``query`` and ``distractor``, together ``celebA_ir``: the final
    evaluation and nothing else. ``unlabelled``: faces without a name, training with a teacher. ``stranger``:
    faces without a name, evaluation only.
    """

    CLASS = "class"
    FURTHER = "further"
    CALIBRATION = "calibration"
    VALIDATION = "validation"
    QUERY = "query"
    DISTRACTOR = "distractor"
    UNLABELLED = "unlabelled"
    STRANGER = "stranger"


class Split(StrEnum):
    """Part of the official split of the ``class`` people's photos; all other photos have none."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"
    NONE = ""


STRANGERS_AMONG = 5
"""Of so many photos without a name one is kept apart for evaluation."""

NAMELESS_ROLES = frozenset({Role.UNLABELLED, Role.STRANGER})
"""The roles of photos without a name."""

IDENTIFICATION_ROLES = frozenset({Role.QUERY, Role.DISTRACTOR})
"""The roles that make up ``celebA_ir``: evaluation only."""

EXCLUDED: Mapping[str, str] = MappingProxyType(
    {
        f"{TRAIN_FOLDER}/001977.jpg": "training copy of test photo 131548.jpg",
        f"{TRAIN_FOLDER}/025191.jpg": "training copy of test photo 155170.jpg",
        f"{TRAIN_FOLDER}/108610.jpg": "validation copy of test photo 138746.jpg",
        f"{TRAIN_FOLDER}/122845.jpg": "validation copy of training photo 081967.jpg",
        f"{TRAIN_FOLDER}/128125.jpg": "validation copy of training photo 112481.jpg",
        f"{TRAIN_FOLDER}/021173.jpg": "same bytes as 128727.jpg, under another person's name",
        f"{TRAIN_FOLDER}/128727.jpg": "same bytes as 021173.jpg, under another person's name",
    }
)
"""CelebA photos that are left out, with the reason. Nine photos occur twice, byte for byte. These are the six
pairs that cross splits; the other three show one person of role ``further`` each, and harm nothing."""


@dataclass(frozen=True)
class Photo:
    """One photo. ``file``: path relative to the data folder, with forward slashes. ``identity``: the person."""

    file: str
    identity: str
    role: Role
    split: Split = Split.NONE

    @property
    def tight(self) -> bool:
        """An 83×100 photo of ``celebA_ir``, cut so close that a detector needs help."""
        return self.role in IDENTIFICATION_ROLES


def read_roles(data: Path) -> dict[str, Role]:
    """``people.csv``: role of each person, by CelebA's identity. Raises :class:`DataError`."""
    roles: dict[str, Role] = {}
    for place, row in _rows(data / PEOPLE_TABLE, ("celeba_identity", "role")):
        role = next((role for role in Role if role == row["role"] and role not in NAMELESS_ROLES), None)
        if role is None:
            raise DataError(f"{place}: there is no role {row['role']!r}")
        _add(roles, row["celeba_identity"], role, place)
    return roles


def read_identities(data: Path) -> dict[str, str]:
    """``identities.csv``: CelebA's identity of each photo, by file. Raises :class:`DataError`."""
    identities: dict[str, str] = {}
    for place, row in _rows(data / IDENTITY_TABLE, ("file", "celeba_identity")):
        _add(identities, row["file"], row["celeba_identity"], place)
    return identities


def read_classes(data: Path) -> dict[str, int]:
    """Class, from 0, of each photo that has one, by file name. Raises :class:`DataError`."""
    return {name: _whole(value, place) for place, name, value in _pairs(data / CLASS_TABLE)}


def read_splits(data: Path) -> dict[str, Split]:
    """Official split of each photo that has a class, by file name. Raises :class:`DataError`."""
    parts = (Split.TRAIN, Split.VALIDATION, Split.TEST)
    splits: dict[str, Split] = {}
    for place, name, value in _pairs(data / SPLIT_TABLE):
        number = _whole(value, place)
        if number >= len(parts):
            raise DataError(f"{place}: there is no part {number}")
        _add(splits, name, parts[number], place)
    return splits


def read_queries(data: Path) -> dict[str, str]:
    """Person of each query photo as the identification set's own table says, by file name. Raises
    :class:`DataError`."""
    queries: dict[str, str] = {}
    for place, row in _rows(data / QUERY_TABLE, ("img", "id")):
        _add(queries, row["img"], row["id"], place)
    return queries


def celeba_photos(data: Path, roles: Collection[Role] = tuple(Role)) -> list[Photo]:
    """The photos of these roles, sorted by file, without :data:`EXCLUDED`.

    Raises :class:`DataError` if a table is missing or malformed, if tables contradict one another, or if
    nothing is left. That the photos themselves exist is seen when they are read.
    """
    role_of = read_roles(data)
    queries = read_queries(data)
    classes, splits = read_classes(data), read_splits(data)
    if classes.keys() != splits.keys():
        raise DataError(f"{data}: {CLASS_TABLE} and {SPLIT_TABLE} do not list the same photos")
    photos = []
    for file, identity in read_identities(data).items():
        folder, _, name = file.rpartition("/")
        role = role_of.get(identity)
        if role is None:
            raise DataError(f"{data}: {file} is of {identity}, who is not in {PEOPLE_TABLE}")
        if (folder == QUERY_FOLDER) != (role is Role.QUERY) or (folder == DISTRACTOR_FOLDER) != (
            role is Role.DISTRACTOR
        ):
            raise DataError(f"{data}: {file} is of {identity}, whose role is {role}")
        if folder == QUERY_FOLDER and queries.get(name) != identity:
            raise DataError(f"{data}: {QUERY_TABLE} and {IDENTITY_TABLE} differ about {name}")
        if (name in splits) != (role is Role.CLASS) and folder == TRAIN_FOLDER:
            raise DataError(f"{data}: {file} has role {role}, which {SPLIT_TABLE} contradicts")
        if role in roles and file not in EXCLUDED:
            photos.append(Photo(file, identity, role, splits[name] if role is Role.CLASS else Split.NONE))
    if not photos:
        raise DataError(f"{data}: no photo has one of the roles {', '.join(sorted(roles))}")
    return sorted(photos, key=lambda photo: photo.file)


def unlabelled_photos(data: Path) -> list[Photo]:
    """The photos below a folder that have no names, sorted by file; each counts as a person of its own.

    Every fifth, by the SHA-256 of its file name, is of role ``stranger``, the others ``unlabelled``. Raises
    :class:`DataError` if there are none.
    """
    try:
        files = [path for path in data.rglob("*") if path.suffix.lower() in PHOTO_SUFFIXES and path.is_file()]
    except OSError as error:
        raise DataError(f"{data} cannot be read: {error.strerror}") from error
    if not files:
        raise DataError(f"{data} has no photos in it")
    photos = []
    for file in files:
        kept_apart = int(hashlib.sha256(file.name.encode()).hexdigest(), 16) % STRANGERS_AMONG == 0
        name = file.relative_to(data).as_posix()
        photos.append(Photo(name, name, Role.STRANGER if kept_apart else Role.UNLABELLED))
    return sorted(photos, key=lambda photo: photo.file)


def folder_photos(data: Path, role: Role) -> list[Photo]:
    """The photos of a folder with one folder for each person, sorted by file; all of them get ``role``.

    Raises :class:`DataError` if there are none, or if ``role`` is one that only ``celebA_ir`` has.
    """
    if role in IDENTIFICATION_ROLES:
        raise DataError(f"a folder of people cannot have the role {role}, which stands for celebA_ir's crops")
    if role in NAMELESS_ROLES:
        raise DataError(f"a folder of people cannot have the role {role}, which stands for faces without a name")
    try:
        people = sorted(path for path in data.iterdir() if path.is_dir() and not path.name.startswith("."))
        photos = [
            Photo(file.relative_to(data).as_posix(), person.name, role)
            for person in people
            for file in person.rglob("*")
            if file.suffix.lower() in PHOTO_SUFFIXES and file.is_file()
        ]
    except OSError as error:
        raise DataError(f"{data} cannot be read: {error.strerror}") from error
    if not photos:
        raise DataError(f"{data} has no folders with photos in them")
    return sorted(photos, key=lambda photo: photo.file)


def _rows(path: Path, columns: tuple[str, ...]) -> Iterable[tuple[str, dict[str, str]]]:
    """Place (for messages) and values of each row of a table with a heading."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = [column for column in columns if column not in (reader.fieldnames or ())]
            if missing:
                raise DataError(f"{path} has no column {missing[0]!r}")
            for row in reader:
                place = f"{path}:{reader.line_num}"
                if any(not row[column] for column in columns):
                    raise DataError(f"{place}: a value is missing")
                yield place, row
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path} is not a table: {error}") from error


def _pairs(path: Path) -> Iterable[tuple[str, str, str]]:
    """Place, first and second word of each line of a list without a heading."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not a table: {error}") from error
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if len(words) != 2:
            raise DataError(f"{path}:{number}: two words are needed, not {len(words)}")
        yield f"{path}:{number}", words[0], words[1]


def _whole(value: str, place: str) -> int:
    if not value.isdecimal():
        raise DataError(f"{place}: {value!r} is not a number from 0")
    return int(value)


def _add(table: dict[str, _Value], key: str, value: _Value, place: str) -> None:
    if key in table:
        raise DataError(f"{place}: {key} is listed twice")
    table[key] = value
