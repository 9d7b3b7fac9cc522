"""Galleries, subjects, faces and kept crops."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_row_id = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "galleries",
        sa.Column("id", _row_id, nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_galleries"),
        sa.UniqueConstraint("name", name="uq_galleries_name"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "subjects",
        sa.Column("id", _row_id, nullable=False),
        sa.Column("gallery_id", _row_id, nullable=False),
        sa.Column("name", sa.String(256), nullable=False),
        sa.Column("metadata", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["gallery_id"], ["galleries.id"], name="fk_subjects_gallery_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_subjects"),
        sa.UniqueConstraint("gallery_id", "name", name="uq_subjects_gallery_id_name"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "faces",
        sa.Column("id", _row_id, nullable=False),
        sa.Column("face_id", sa.String(36), nullable=False),
        sa.Column("subject_id", _row_id, nullable=False),
        sa.Column("image_sha256", sa.String(64), nullable=False),
        sa.Column("model_id", sa.String(64), nullable=False),
        sa.Column("face", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("embedding", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["subject_id"], ["subjects.id"], name="fk_faces_subject_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name="pk_faces"),
        sa.UniqueConstraint("face_id", name="uq_faces_face_id"),
        sa.UniqueConstraint("subject_id", "image_sha256", name="uq_faces_subject_id_image_sha256"),
        sqlite_autoincrement=True,
    )
    op.create_table(
        "crops",
        sa.Column("face_row_id", _row_id, autoincrement=False, nullable=False),
        sa.Column("landmarks", sa.Text(), nullable=False),
        sa.Column("portrait", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(["face_row_id"], ["faces.id"], name="fk_crops_face_row_id", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("face_row_id", name="pk_crops"),
    )
