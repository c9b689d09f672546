"""Jobs can be paused and asked to finish early; they show their newest metrics.

Revision ID: 20261120_stop_pause
Revises: 20261120_best_checkpoints
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "20261120_stop_pause"
down_revision: str | None = "20261120_best_checkpoints"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    """Add the columns."""
    op.add_column("jobs", sa.Column("pause_requested_at", sa.Float()))
    op.add_column("jobs", sa.Column("stop_requested_at", sa.Float()))
    binary = postgresql.JSONB(none_as_null=True)
    json = sa.JSON(none_as_null=True).with_variant(binary, "postgresql")
    op.add_column("jobs", sa.Column("newest_metrics", json))


def downgrade() -> None:
    """Drop the columns; queue paused jobs: the version before would neither run nor end them."""
    op.execute("UPDATE jobs SET status = 'queued', run_after = 0 WHERE status = 'paused'")
    for name in ("newest_metrics", "stop_requested_at", "pause_requested_at"):
        op.drop_column("jobs", name)
