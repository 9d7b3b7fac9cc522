"""What a gallery's own people may do to its thresholds."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("galleries", sa.Column("own_calibration", sa.String(16), nullable=False, server_default="stricter"))
