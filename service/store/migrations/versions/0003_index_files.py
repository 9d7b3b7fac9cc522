"""What the files of the index belong to, and an index by which they are compared with the record."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index("ix_faces_subject_id_model_id", "faces", ["subject_id", "model_id"])
    op.create_table("index_stamps", sa.Column("stamp", sa.String(32), primary_key=True))
