"""Which registry this is; and of blobs, whether they are claimed, and whether they are on their
way out."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    """Make the table `identity`, and the columns `claims` and `moving` of `blobs`."""
    op.create_table(
        "identity",
        sa.Column("number", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("id", sa.String(32), nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_identity"),
    )
    op.add_column("blobs", sa.Column("claims", sa.Integer, nullable=False, server_default="0"))
    op.add_column(
        "blobs", sa.Column("moving", sa.Boolean, nullable=False, server_default=sa.false())
    )
