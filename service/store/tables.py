"""The tables. Their history is in ``migrations``; a test holds the two together."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import (
    BigInteger,
    Column,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
)


class UtcDateTime(TypeDecorator[datetime]):
    """A time with its zone, kept as UTC on databases that know no zones."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite numbers rows by itself only where the key is called INTEGER.
_RowId = BigInteger().with_variant(Integer, "sqlite")

galleries = Table(
    "galleries",
    metadata,
    Column("id", _RowId, primary_key=True),
    Column("name", String(64), nullable=False, unique=True),
    Column("created_at", UtcDateTime, nullable=False),
    Column("own_calibration", String(16), nullable=False, server_default="stricter"),
    sqlite_autoincrement=True,
)

subjects = Table(
    "subjects",
    metadata,
    Column("id", _RowId, primary_key=True),
    Column("gallery_id", _RowId, ForeignKey("galleries.id", ondelete="CASCADE"), nullable=False),
    Column("name", String(256), nullable=False),
    Column("metadata", Text, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    UniqueConstraint("gallery_id", "name"),
    sqlite_autoincrement=True,
)

faces = Table(
    "faces",
    metadata,
    Column("id", _RowId, primary_key=True),
    Column("face_id", String(36), nullable=False, unique=True),
    Column("subject_id", _RowId, ForeignKey("subjects.id", ondelete="CASCADE"), nullable=False),
    Column("image_sha256", String(64), nullable=False),
    Column("model_id", String(64), nullable=False),
    Column("face", Text, nullable=False),
    Column("created_at", UtcDateTime, nullable=False),
    Column("embedding", LargeBinary, nullable=False),
    UniqueConstraint("subject_id", "image_sha256"),
    # Says who has templates of which model without reading the vectors.
    Index("ix_faces_subject_id_model_id", "subject_id", "model_id"),
    sqlite_autoincrement=True,
)

index_stamps = Table(
    "index_stamps",
    metadata,
    Column("stamp", String(32), primary_key=True),
)

crops = Table(
    "crops",
    metadata,
    Column(
        "face_row_id",
        _RowId,
        ForeignKey("faces.id", ondelete="CASCADE"),
        primary_key=True,
        autoincrement=False,
    ),
    Column("landmarks", Text, nullable=False),
    Column("portrait", LargeBinary, nullable=False),
)
