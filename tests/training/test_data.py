from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from training.data import (
    EXCLUDED,
    IDENTIFICATION_ROLES,
    DataError,
    Photo,
    Role,
    Split,
    celeba_photos,
    folder_photos,
    read_classes,
    read_identities,
    read_queries,
    read_roles,
    read_splits,
    unlabelled_photos,
)

PEOPLE = "celeba_identity,role,photos\n1,class,3\n2,further,1\n3,query,1\n4,distractor,1\n5,calibration,1\n"
IDENTITIES = """file,celeba_identity
celebA_train_500/celebA_imgs/000003.jpg,1
celebA_train_500/celebA_imgs/000001.jpg,1
celebA_train_500/celebA_imgs/000002.jpg,1
celebA_train_500/celebA_imgs/000004.jpg,2
celebA_ir/celebA_query/000005.jpg,3
celebA_ir/celebA_distractors/000006.jpg,4
celebA_train_500/celebA_imgs/000007.jpg,5
"""
CLASSES = "000001.jpg 0\n000002.jpg 0\n000003.jpg 0\n"
SPLITS = "000001.jpg 0\n000002.jpg 1\n000003.jpg 2\n"
QUERIES = "img,id\n000005.jpg,3\n"
TRAIN = "celebA_train_500/celebA_imgs"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Tables without photos: reading tables must not need them."""
    for name, text in {
        "people.csv": PEOPLE,
        "identities.csv": IDENTITIES,
        "celebA_train_500/celebA_anno.txt": CLASSES,
        "celebA_train_500/celebA_train_split.txt": SPLITS,
        "celebA_ir/celebA_anno_query.csv": QUERIES,
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def change(data: Path, name: str, old: str, new: str) -> None:
    text = (data / name).read_text()
    assert text.count(old) == 1
    (data / name).write_text(text.replace(old, new))


def test_tables_are_read_as_they_stand(data: Path) -> None:
    assert read_roles(data)["5"] is Role.CALIBRATION
    assert read_identities(data)["celebA_ir/celebA_query/000005.jpg"] == "3"
    assert read_classes(data) == {"000001.jpg": 0, "000002.jpg": 0, "000003.jpg": 0}
    assert list(read_splits(data).values()) == [Split.TRAIN, Split.VALIDATION, Split.TEST]
    assert read_queries(data) == {"000005.jpg": "3"}


def test_photos_are_sorted_and_have_person_role_and_split(data: Path) -> None:
    assert celeba_photos(data) == [
        Photo("celebA_ir/celebA_distractors/000006.jpg", "4", Role.DISTRACTOR),
        Photo("celebA_ir/celebA_query/000005.jpg", "3", Role.QUERY),
        Photo(f"{TRAIN}/000001.jpg", "1", Role.CLASS, Split.TRAIN),
        Photo(f"{TRAIN}/000002.jpg", "1", Role.CLASS, Split.VALIDATION),
        Photo(f"{TRAIN}/000003.jpg", "1", Role.CLASS, Split.TEST),
        Photo(f"{TRAIN}/000004.jpg", "2", Role.FURTHER),
        Photo(f"{TRAIN}/000007.jpg", "5", Role.CALIBRATION),
    ]


def test_only_the_roles_that_are_asked_for(data: Path) -> None:
    assert {photo.role for photo in celeba_photos(data, IDENTIFICATION_ROLES)} == IDENTIFICATION_ROLES
    assert [photo.tight for photo in celeba_photos(data, [Role.QUERY, Role.FURTHER])] == [True, False]
    with pytest.raises(DataError, match="validation"):
        celeba_photos(data, [Role.VALIDATION])


def test_duplicates_across_splits_are_left_out_and_their_counterparts_are_not(data: Path) -> None:
    pairs = ["001977", "131548", "025191", "155170", "108610", "138746", "081967", "122845", "112481", "128125"]
    names = [f"{name}.jpg" for name in (*pairs, "021173", "128727")]
    with (data / "identities.csv").open("a") as file:
        file.writelines(f"{TRAIN}/{name},1\n" for name in names)
    for table in ("celebA_anno.txt", "celebA_train_split.txt"):
        with (data / "celebA_train_500" / table).open("a") as file:
            file.writelines(f"{name} 0\n" for name in names)
    kept = {photo.file.removeprefix(f"{TRAIN}/").removesuffix(".jpg") for photo in celeba_photos(data, [Role.CLASS])}
    assert kept - {"000001", "000002", "000003"} == {"131548", "155170", "138746", "081967", "112481"}
    assert len(EXCLUDED) == 7
    assert all(EXCLUDED.values())


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("people.csv", "2,further", "2,stranger", r"people\.csv:3: there is no role 'stranger'"),
        ("people.csv", "2,further", "1,further", r"people\.csv:3: 1 is listed twice"),
        ("people.csv", "2,further,1\n", "", "000004.jpg is of 2, who is not in people.csv"),
        ("people.csv", "role", "part", "no column 'role'"),
        ("identities.csv", "000004.jpg,2", "000004.jpg,", r"identities\.csv:5: a value is missing"),
        ("identities.csv", "000004.jpg,2", "000004.jpg,3", "000004.jpg is of 3, whose role is query"),
        ("identities.csv", "000005.jpg,3", "000005.jpg,2", "000005.jpg is of 2, whose role is further"),
        ("identities.csv", "000006.jpg,4", "000006.jpg,5", "000006.jpg is of 5, whose role is calibration"),
        ("identities.csv", "000004.jpg", "000001.jpg", "000001.jpg is listed twice"),
        ("identities.csv", "000007.jpg,5", "000008.jpg,1", "000008.jpg has role class"),
        ("celebA_train_500/celebA_train_split.txt", "000003.jpg 2", "000003.jpg 3", "split.txt:3: there is no part 3"),
        ("celebA_train_500/celebA_train_split.txt", "000003.jpg 2", "000003.jpg x", "'x' is not a number"),
        ("celebA_train_500/celebA_train_split.txt", "000003.jpg 2", "000003.jpg", "split.txt:3: two words"),
        ("celebA_train_500/celebA_anno.txt", "000003.jpg 0\n", "", "do not list the same photos"),
        ("celebA_ir/celebA_anno_query.csv", "000005.jpg,3", "000005.jpg,1", "differ about 000005.jpg"),
    ],
)
def test_tables_that_are_wrong_or_contradict_one_another_are_refused(
    data: Path, name: str, old: str, new: str, message: str
) -> None:
    change(data, name, old, new)
    with pytest.raises(DataError, match=message):
        celeba_photos(data)


@pytest.mark.parametrize("read", [read_roles, read_identities, read_classes, read_splits, read_queries, celeba_photos])
def test_a_missing_or_binary_table_is_told(data: Path, read: Callable[[Path], object]) -> None:
    for path in [path for path in data.rglob("*") if path.is_file()]:
        path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="is not a table"):
        read(data)
    shutil.rmtree(data)
    with pytest.raises(DataError, match="No such file"):
        read(data)


def test_a_folder_for_each_person(tmp_path: Path) -> None:
    for name in ("Bo/2.PNG", "Bo/1.jpg", "Ada/trip/3.jpeg", "Ada/notes.txt", ".cache/4.jpg", "5.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert folder_photos(tmp_path, Role.FURTHER) == [
        Photo("Ada/trip/3.jpeg", "Ada", Role.FURTHER),
        Photo("Bo/1.jpg", "Bo", Role.FURTHER),
        Photo("Bo/2.PNG", "Bo", Role.FURTHER),
    ]


def test_photos_without_names_are_told_apart_by_their_files_digests(tmp_path: Path) -> None:
    names = [f"{number}_0_1_2017.webp" for number in range(60)]
    (tmp_path / "faces").mkdir()
    for name in [*names, "README.md"]:
        (tmp_path / "faces" / name).touch()
    photos = unlabelled_photos(tmp_path)
    assert [photo.file for photo in photos] == sorted(f"faces/{name}" for name in names)
    assert len({photo.identity for photo in photos}) == 60
    apart = {name for name in names if int(hashlib.sha256(name.encode()).hexdigest(), 16) % 5 == 0}
    assert 0 < len(apart) < 30
    for photo in photos:
        assert photo.role is (Role.STRANGER if Path(photo.file).name in apart else Role.UNLABELLED)
    with pytest.raises(DataError, match="no photos"):
        unlabelled_photos(tmp_path / "elsewhere")


def test_folders_without_people_or_for_an_impossible_role_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folders with photos"):
        folder_photos(tmp_path, Role.FURTHER)
    with pytest.raises(DataError, match="cannot be read"):
        folder_photos(tmp_path / "missing", Role.FURTHER)
    with pytest.raises(DataError, match="celebA_ir"):
        folder_photos(tmp_path, Role.QUERY)
