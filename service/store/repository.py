"""Every SQL statement of the service. SQL is the record: what it does not hold does not exist."""

from __future__ import annotations

import errno
import json
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from alembic import command
from alembic.config import Config
from numpy.typing import NDArray
from sqlalchemy import (
    Connection,
    Engine,
    Row,
    Select,
    create_engine,
    delete,
    event,
    func,
    insert,
    make_url,
    select,
    text,
    update,
)
from sqlalchemy.exc import DBAPIError, IntegrityError

from service.domain import (
    DEFAULT_GALLERY,
    Box,
    Embedding,
    EnrolledPhoto,
    Face,
    Gallery,
    IndexEntries,
    Members,
    NewTemplate,
    OwnCalibrationMode,
    Portrait,
    Quality,
    Removal,
    StoredPortrait,
    Subject,
    Template,
)
from service.errors import (
    FaceNotFound,
    GalleryExists,
    GalleryNotFound,
    InternalError,
    StorageFull,
    SubjectNotFound,
)
from service.store.tables import crops, faces, galleries, index_stamps, subjects

MIGRATIONS = Path(__file__).parent / "migrations"

# SQLite's SQLITE_FULL, and the SQLITE_IOERR kinds that a full disk shows as: write, fsync, shared-memory size.
_SQLITE_FULL = {13, 778, 1034, 4874}
_POSTGRES_FULL = {"53100"}


@dataclass(frozen=True)
class Label:
    """The public names of an enrolled face, and its embedding as it was enrolled."""

    face_id: str
    subject: str
    embedding: Embedding


class Repository:
    """The galleries, subjects, templates and kept crops of one database.

    Methods are transactions: each is done wholly, or raises and has done nothing. All may raise
    ``StorageFull``. A repository may be used from many threads.
    """

    def __init__(self, url: str) -> None:
        """Connect to ``url`` (SQLAlchemy's form), bring the schema up to date, and add the default gallery."""
        self._sqlite = make_url(url).get_backend_name() == "sqlite"
        self.engine = (
            _sqlite_engine(url) if self._sqlite else create_engine(url, pool_pre_ping=True, hide_parameters=True)
        )
        with _storage_errors():
            migrate(self.engine)
            with self._write() as connection:
                if connection.scalar(select(galleries.c.id).where(galleries.c.name == DEFAULT_GALLERY)) is None:
                    connection.execute(insert(galleries).values(name=DEFAULT_GALLERY, created_at=_now()))
        # A process that was killed may have deleted and not emptied the log.
        self.forget()

    def close(self) -> None:
        """Give every connection back. Nothing that was answered depends on it."""
        self.engine.dispose()

    def ping(self) -> None:
        """Raise if the database does not answer."""
        with self._read() as connection:
            connection.execute(text("SELECT 1"))

    # --- galleries

    def galleries(self) -> list[Gallery]:
        """Return every gallery, by name."""
        with self._read() as connection:
            return [_gallery(row) for row in connection.execute(_gallery_query().order_by(galleries.c.name))]

    def gallery(self, name: str) -> Gallery:
        """Return one gallery. Raises ``GalleryNotFound``."""
        with self._read() as connection:
            row = connection.execute(_gallery_query().where(galleries.c.name == name)).first()
        if row is None:
            raise GalleryNotFound(f"There is no gallery named {name!r}.")
        return _gallery(row)

    def own_calibration(self, gallery: str) -> OwnCalibrationMode:
        """Return what a gallery's own people may do to its thresholds. Raises ``GalleryNotFound``."""
        with self._read() as connection:
            mode = connection.scalar(select(galleries.c.own_calibration).where(galleries.c.name == gallery))
        if mode is None:
            raise GalleryNotFound(f"There is no gallery named {gallery!r}.")
        return "full" if mode == "full" else "stricter"

    def set_own_calibration(self, gallery: str, mode: OwnCalibrationMode) -> Gallery:
        """Say what a gallery's own people may do to its thresholds. Raises ``GalleryNotFound``."""
        with self._write() as connection:
            gallery_id = _gallery_id(connection, gallery)
            connection.execute(update(galleries).where(galleries.c.id == gallery_id).values(own_calibration=mode))
        return self.gallery(gallery)

    def create_gallery(self, name: str) -> Gallery:
        """Add an empty gallery. Raises ``GalleryExists``."""
        try:
            with self._write() as connection:
                connection.execute(insert(galleries).values(name=name, created_at=_now()))
        except IntegrityError as exc:
            raise GalleryExists(f"There is already a gallery named {name!r}.") from exc
        return self.gallery(name)

    # --- subjects

    def subjects(self, gallery: str, after: int, limit: int) -> tuple[list[Subject], int | None]:
        """Return up to ``limit`` subjects in the order of enrolment, and the mark to go on ``after``, if any."""
        with self._read() as connection:
            gallery_id = _gallery_id(connection, gallery)
            rows = connection.execute(
                select(subjects)
                .where(subjects.c.gallery_id == gallery_id, subjects.c.id > after)
                .order_by(subjects.c.id)
                .limit(limit + 1)
            ).all()
            page = rows[:limit]
            held = connection.execute(
                _template_query().where(faces.c.subject_id.in_([row.id for row in page])).order_by(faces.c.id)
            ).all()
        templates: dict[int, list[Template]] = {row.id: [] for row in page}
        for row in held:
            templates[row.subject_id].append(_template(row))
        found = [_subject(row, gallery, templates[row.id]) for row in page]
        return found, page[-1].id if len(rows) > limit else None

    def subject(self, gallery: str, name: str) -> Subject:
        """Return one subject with its faces. Raises ``GalleryNotFound`` and ``SubjectNotFound``."""
        with self._read() as connection:
            row = _subject_row(connection, gallery, name)
            held = connection.execute(_template_query().where(faces.c.subject_id == row.id).order_by(faces.c.id)).all()
        return _subject(row, gallery, [_template(face) for face in held])

    def update_subject(self, gallery: str, name: str, metadata: dict[str, Any]) -> Subject:
        """Replace a subject's metadata. Raises ``GalleryNotFound`` and ``SubjectNotFound``."""
        with self._write() as connection:
            row = _subject_row(connection, gallery, name)
            connection.execute(update(subjects).where(subjects.c.id == row.id).values(metadata=json.dumps(metadata)))
        return self.subject(gallery, name)

    # --- templates

    def enroll(
        self, gallery: str, subject: str, metadata: dict[str, Any] | None, new: Sequence[NewTemplate]
    ) -> tuple[list[Template], IndexEntries]:
        """Add templates, and the subject where it is new; replace its metadata unless that is None.

        A photo whose bytes this subject has already keeps its template. Returns the templates in the order of
        ``new``, and what the index lacks now. Raises ``GalleryNotFound``.
        """
        added: list[tuple[int, int, Embedding]] = []
        with self._write() as connection:
            # Two who enrol one subject at once must not both find it missing.
            gallery_id = _gallery_id(connection, gallery, lock=True)
            row = connection.execute(_subject_query(gallery_id, subject)).first()
            if row is None:
                subject_id = _inserted(
                    connection.execute(
                        insert(subjects).values(
                            gallery_id=gallery_id,
                            name=subject,
                            metadata=json.dumps(metadata or {}),
                            created_at=_now(),
                        )
                    )
                )
            else:
                subject_id = row.id
                if metadata is not None:
                    connection.execute(
                        update(subjects).where(subjects.c.id == subject_id).values(metadata=json.dumps(metadata))
                    )
            row_ids = []
            for item in new:
                known = connection.scalar(
                    select(faces.c.id).where(
                        faces.c.subject_id == subject_id, faces.c.image_sha256 == item.image_sha256
                    )
                )
                if known is None:
                    known = _insert_template(connection, subject_id, item)
                    added.append((known, subject_id, item.embedding))
                row_ids.append(known)
            stored = {
                template.row_id: template
                for template in map(_template, connection.execute(_template_query().where(faces.c.id.in_(row_ids))))
            }
        return [stored[row_id] for row_id in row_ids], _entries(gallery, added)

    def enrolled_photos(self, gallery: str, subject: str, sha256s: Sequence[str]) -> dict[str, EnrolledPhoto]:
        """Return those of these photos, by digest, that the subject has already; nothing of a subject there is not."""
        with self._read() as connection:
            rows = connection.execute(
                select(faces.c.image_sha256, faces.c.face, faces.c.embedding)
                .join(subjects, subjects.c.id == faces.c.subject_id)
                .join(galleries, galleries.c.id == subjects.c.gallery_id)
                .where(galleries.c.name == gallery, subjects.c.name == subject, faces.c.image_sha256.in_(list(sha256s)))
            ).all()
        return {row.image_sha256: EnrolledPhoto(_face(row.face), _vector(row.embedding)) for row in rows}

    def template(self, face_id: str) -> Template:
        """Return one enrolled face. Raises ``FaceNotFound``."""
        with self._read() as connection:
            return _template(_template_row(connection, face_id))

    def embeddings(self, row_ids: Sequence[int]) -> NDArray[np.float32]:
        """Return the embeddings of these faces, ``float32[N, D]``, in the order of enrolment.

        A face that is gone in the meantime is left out.
        """
        with self._read() as connection:
            blobs = connection.scalars(
                select(faces.c.embedding).where(faces.c.id.in_(row_ids)).order_by(faces.c.id)
            ).all()
        return np.stack([_vector(blob) for blob in blobs]) if blobs else np.empty((0, 0), np.float32)

    def labels(self, row_ids: Sequence[int]) -> dict[int, Label]:
        """Return names and embeddings of these faces; those that are gone in the meantime are left out."""
        found: dict[int, Label] = {}
        with self._read() as connection:
            for start in range(0, len(row_ids), 500):
                rows = connection.execute(
                    select(faces.c.id, faces.c.face_id, faces.c.embedding, subjects.c.name)
                    .join(subjects, subjects.c.id == faces.c.subject_id)
                    .where(faces.c.id.in_(row_ids[start : start + 500]))
                )
                found.update({row.id: Label(row.face_id, row.name, _vector(row.embedding)) for row in rows})
        return found

    def members(self, model_id: str) -> list[Members]:
        """Return what the index should hold, without the vectors: every gallery's templates of one model."""
        with self._read() as connection:
            found = [
                (
                    gallery,
                    np.array(
                        connection.execute(
                            select(faces.c.id, faces.c.subject_id)
                            .join(subjects, subjects.c.id == faces.c.subject_id)
                            .where(subjects.c.gallery_id == gallery_id, faces.c.model_id == model_id)
                        ).all(),
                        np.int64,
                    ).reshape(-1, 2),
                )
                for gallery_id, gallery in connection.execute(select(galleries.c.id, galleries.c.name)).all()
            ]
        by_row = [(gallery, rows[np.argsort(rows[:, 0])]) for gallery, rows in found if len(rows)]
        return [Members(gallery, rows[:, 0].copy(), rows[:, 1].copy()) for gallery, rows in by_row]

    def index_entries(self, members: Members, batch: int = 4096) -> Iterator[IndexEntries]:
        """Return these templates with their vectors, in batches; those that are gone in the meantime are left out."""
        for start in range(0, len(members.row_ids), batch):
            with self._read() as connection:
                rows = connection.execute(
                    select(faces.c.id, faces.c.subject_id, faces.c.embedding)
                    .where(faces.c.id.in_(members.row_ids[start : start + batch].tolist()))
                    .order_by(faces.c.id)
                ).all()
            yield _entries(members.gallery, [(row.id, row.subject_id, _vector(row.embedding)) for row in rows])

    def renew_stamp(self) -> tuple[str, str]:
        """Give this state of the record a new stamp, and return the one before, empty if there was none, and the new.

        Files of the index carry the stamp. One that does not fit belongs to another state: a copy of the database that
        was put back, one that was used elsewhere, or other embeddings.
        """
        with self._write() as connection:
            before = connection.scalar(select(index_stamps.c.stamp))
            return before or "", _restamp(connection)

    def foreign_models(self, model_id: str) -> dict[str, set[str]]:
        """Return the galleries that hold templates of other models than ``model_id``, with those models."""
        found: dict[str, set[str]] = {}
        with self._read() as connection:
            rows = connection.execute(
                select(galleries.c.name, faces.c.model_id)
                .join(subjects, subjects.c.gallery_id == galleries.c.id)
                .join(faces, faces.c.subject_id == subjects.c.id)
                .where(faces.c.model_id != model_id)
                .distinct()
            )
            for gallery, other in rows:
                found.setdefault(gallery, set()).add(other)
        return found

    # --- deletion

    @contextmanager
    def deleting_gallery(self, name: str) -> Iterator[Removal]:
        """Delete a gallery with all that it holds; commits when the block ends. Raises ``GalleryNotFound``."""
        with self._write() as connection:
            gallery_id = _gallery_id(connection, name)
            removed = _doomed(connection, name, subjects.c.gallery_id == gallery_id)
            connection.execute(delete(galleries).where(galleries.c.id == gallery_id))
            yield removed

    @contextmanager
    def deleting_subject(self, gallery: str, name: str) -> Iterator[Removal]:
        """Delete a subject with its faces and crops; commits when the block ends.

        Raises ``GalleryNotFound`` and ``SubjectNotFound``.
        """
        with self._write() as connection:
            row = _subject_row(connection, gallery, name)
            removed = _doomed(connection, gallery, faces.c.subject_id == row.id)
            connection.execute(delete(subjects).where(subjects.c.id == row.id))
            yield removed

    @contextmanager
    def deleting_face(self, face_id: str) -> Iterator[Removal]:
        """Delete one face and its crop; its subject stays. Commits when the block ends. Raises ``FaceNotFound``."""
        with self._write() as connection:
            row = _template_row(connection, face_id)
            removed = _doomed(connection, row.gallery, faces.c.id == row.id)
            connection.execute(delete(faces).where(faces.c.id == row.id))
            yield removed

    def forget(self, timeout: float = 30.0) -> None:
        """Let nothing that was deleted stay behind in the database's write-ahead log.

        SQLite overwrites deleted rows with zeros (``secure_delete``), yet its log still has the pages from
        before. Raises ``InternalError`` if readers keep the log busy for ``timeout`` seconds.
        """
        if not self._sqlite:
            return
        deadline = time.monotonic() + timeout
        while True:
            try:
                with _storage_errors(), self.engine.connect() as connection:
                    raw = connection.connection.cursor()
                    busy = raw.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            except StorageFull as exc:
                raise StorageFull(
                    "Deleted, but the disk is too full to empty the database's log; make room, and the next deletion "
                    "or restart empties it."
                ) from exc
            if not busy:
                return
            if time.monotonic() > deadline:
                raise InternalError("Deleted, but readers keep the database's log busy; the next deletion empties it.")
            time.sleep(0.01)

    # --- change of model

    def portraits(self, other_than: str, after: int, limit: int) -> list[StoredPortrait]:
        """Return kept crops of faces whose template is of another model than ``other_than``, by row id."""
        with self._read() as connection:
            rows = connection.execute(
                select(faces.c.id, crops.c.portrait, crops.c.landmarks)
                .join(crops, crops.c.face_row_id == faces.c.id)
                .where(faces.c.model_id != other_than, faces.c.id > after)
                .order_by(faces.c.id)
                .limit(limit)
            ).all()
        return [
            StoredPortrait(row.id, Portrait(row.portrait, np.asarray(json.loads(row.landmarks), np.float32)))
            for row in rows
        ]

    def count_templates(self, other_than: str) -> int:
        """Return how many templates are of another model than ``other_than``."""
        with self._read() as connection:
            return int(
                connection.scalar(select(func.count()).select_from(faces).where(faces.c.model_id != other_than)) or 0
            )

    def replace_embeddings(self, model_id: str, embeddings: Sequence[tuple[int, Embedding]]) -> None:
        """Give these faces (row id, embedding) templates of ``model_id``, all in one transaction."""
        with self._write() as connection:
            _restamp(connection)
            for row_id, embedding in embeddings:
                connection.execute(
                    update(faces).where(faces.c.id == row_id).values(model_id=model_id, embedding=_blob(embedding))
                )

    # --- transactions

    @contextmanager
    def _read(self) -> Iterator[Connection]:
        with _storage_errors(), self.engine.connect() as connection:
            yield connection

    @contextmanager
    def _write(self) -> Iterator[Connection]:
        with (
            _storage_errors(),
            self.engine.connect().execution_options(vultus_write=True) as connection,
            connection.begin(),
        ):
            yield connection


def migrate(engine: Engine) -> None:
    """Bring the database's schema to this version's."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    with engine.connect().execution_options(vultus_write=True) as connection, connection.begin():
        config.attributes["connection"] = connection
        command.upgrade(config, "head")


def _sqlite_engine(url: str) -> Engine:
    engine = create_engine(url, connect_args={"timeout": 30}, hide_parameters=True)

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _: Any) -> None:
        # The driver would open transactions late, after the first SELECT; we open them ourselves.
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON", "foreign_keys=ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("vultus_write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


@contextmanager
def _storage_errors() -> Iterator[None]:
    try:
        yield
    except DBAPIError as exc:
        if (
            getattr(exc.orig, "sqlite_errorcode", None) in _SQLITE_FULL
            or getattr(exc.orig, "sqlstate", None) in _POSTGRES_FULL
        ):
            raise StorageFull("The database's disk is full; nothing was changed.") from exc
        raise
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull("The disk is full; nothing was changed.") from exc
        raise


def _now() -> datetime:
    return datetime.now(UTC)


def _inserted(result: Any) -> int:
    return int(result.inserted_primary_key[0])


def _blob(embedding: Embedding) -> bytes:
    return np.asarray(embedding, dtype="<f4").tobytes()


def _vector(blob: bytes) -> Embedding:
    return np.frombuffer(blob, dtype="<f4").astype(np.float32)


def _entries(gallery: str, rows: Sequence[tuple[int, int, Embedding]]) -> IndexEntries:
    return IndexEntries(
        gallery,
        np.array([row[0] for row in rows], np.int64),
        np.array([row[1] for row in rows], np.int64),
        np.stack([row[2] for row in rows]) if rows else np.empty((0, 0), np.float32),
    )


def _restamp(connection: Connection) -> str:
    stamp = uuid.uuid4().hex
    connection.execute(delete(index_stamps))
    connection.execute(insert(index_stamps).values(stamp=stamp))
    return stamp


def _insert_template(connection: Connection, subject_id: int, item: NewTemplate) -> int:
    row_id = _inserted(
        connection.execute(
            insert(faces).values(
                face_id=str(uuid.uuid4()),
                subject_id=subject_id,
                image_sha256=item.image_sha256,
                model_id=item.model_id,
                face=_face_json(item.face),
                created_at=_now(),
                embedding=_blob(item.embedding),
            )
        )
    )
    if item.portrait is not None:
        connection.execute(
            insert(crops).values(
                face_row_id=row_id,
                landmarks=json.dumps(item.portrait.landmarks.tolist()),
                portrait=item.portrait.data,
            )
        )
    return row_id


def _doomed(connection: Connection, gallery: str, condition: Any) -> Removal:
    rows = connection.execute(
        select(faces.c.id, faces.c.subject_id, faces.c.model_id, faces.c.embedding)
        .join(subjects, subjects.c.id == faces.c.subject_id)
        .where(condition)
    ).all()
    by_model: dict[str, list[tuple[int, int, Embedding]]] = {}
    for row in rows:
        by_model.setdefault(row.model_id, []).append((row.id, row.subject_id, _vector(row.embedding)))
    return Removal(gallery, {model: _entries(gallery, held) for model, held in by_model.items()})


def _gallery_id(connection: Connection, name: str, *, lock: bool = False) -> int:
    query = select(galleries.c.id).where(galleries.c.name == name)
    found = connection.scalar(query.with_for_update() if lock else query)
    if found is None:
        raise GalleryNotFound(f"There is no gallery named {name!r}.")
    return int(found)


def _subject_row(connection: Connection, gallery: str, name: str) -> Row[Any]:
    gallery_id = _gallery_id(connection, gallery)
    row = connection.execute(_subject_query(gallery_id, name)).first()
    if row is None:
        raise SubjectNotFound(f"The gallery {gallery!r} has no subject named {name!r}.")
    return row


def _template_row(connection: Connection, face_id: str) -> Row[Any]:
    row = connection.execute(_template_query().where(faces.c.face_id == face_id)).first()
    if row is None:
        raise FaceNotFound(f"There is no enrolled face {face_id!r}.")
    return row


def _subject_query(gallery_id: int, name: str) -> Select[Any]:
    return select(subjects).where(subjects.c.gallery_id == gallery_id, subjects.c.name == name)


def _gallery_query() -> Select[Any]:
    return (
        select(
            galleries.c.name,
            galleries.c.created_at,
            galleries.c.own_calibration,
            func.count(subjects.c.id.distinct()).label("subjects"),
            func.count(faces.c.id).label("templates"),
        )
        .outerjoin(subjects, subjects.c.gallery_id == galleries.c.id)
        .outerjoin(faces, faces.c.subject_id == subjects.c.id)
        .group_by(galleries.c.id, galleries.c.name, galleries.c.created_at, galleries.c.own_calibration)
    )


def _template_query() -> Select[Any]:
    return (
        select(
            faces.c.id,
            faces.c.face_id,
            faces.c.subject_id,
            faces.c.model_id,
            faces.c.face,
            faces.c.created_at,
            subjects.c.name.label("subject"),
            galleries.c.name.label("gallery"),
        )
        .join(subjects, subjects.c.id == faces.c.subject_id)
        .join(galleries, galleries.c.id == subjects.c.gallery_id)
    )


def _gallery(row: Row[Any]) -> Gallery:
    mode: OwnCalibrationMode = "full" if row.own_calibration == "full" else "stricter"
    return Gallery(row.name, int(row.subjects), int(row.templates), row.created_at, mode)


def _subject(row: Row[Any], gallery: str, templates: Sequence[Template]) -> Subject:
    return Subject(row.name, gallery, json.loads(row.metadata), row.created_at, tuple(templates))


def _template(row: Row[Any]) -> Template:
    return Template(row.id, row.face_id, row.subject, row.gallery, row.model_id, _face(row.face), row.created_at)


def _face_json(face: Face) -> str:
    box, quality = face.box, face.quality
    return json.dumps(
        {
            "box": [box.x, box.y, box.width, box.height],
            "landmarks": face.landmarks.tolist(),
            "detection_score": face.detection_score,
            "quality": vars(quality),
        }
    )


def _face(stored: str) -> Face:
    face = json.loads(stored)
    return Face(
        Box(*face["box"]),
        np.asarray(face["landmarks"], np.float32),
        face["detection_score"],
        Quality(**face["quality"]),
    )
