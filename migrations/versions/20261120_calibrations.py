"""Add the table of calibrations: short measurements for estimates.

Revision ID: 20261120_calibrations
Revises: 20261120_create_tables
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "20261120_calibrations"
down_revision: str | None = "20261120_create_tables"
branch_labels: str | None = None
depends_on: str | None = None


def _json() -> sa.JSON:
    binary = postgresql.JSONB(none_as_null=True)
    return sa.JSON(none_as_null=True).with_variant(binary, "postgresql")


def upgrade() -> None:
    """Make the table with its indexes."""
    op.create_table(
        "calibrations",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("worker_kind", sa.String(256), nullable=True),
        sa.Column("result", _json(), nullable=True),
        sa.Column("dataset_id", sa.String(40), nullable=False),
        sa.Column("config", _json(), nullable=False),
        sa.Column("gpus", sa.Integer(), nullable=True),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("priority", sa.Integer(), nullable=False),
        sa.Column("run_after", sa.Float(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("lost_attempts", sa.Integer(), nullable=False),
        sa.Column("owner", sa.String(128)),
        sa.Column("lease_until", sa.Float()),
        sa.Column("hint_sent_at", sa.Float()),
        sa.Column("cancel_requested_at", sa.Float()),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("started_at", sa.Float()),
        sa.Column("finished_at", sa.Float()),
        sa.Column("error", _json()),
        sa.Column("progress", _json()),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_calibrations_claim", "calibrations", ["status", "priority", "id"])
    op.create_index("ix_calibrations_key", "calibrations", ["key"])


def downgrade() -> None:
    """Drop the table."""
    op.drop_table("calibrations")
