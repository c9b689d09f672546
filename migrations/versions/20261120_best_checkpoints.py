"""Mark the best checkpoint of each stage.

Revision ID: 20261120_best_checkpoints
Revises: 20261120_calibrations
"""

import sqlalchemy as sa
from alembic import op

revision = "20261120_best_checkpoints"
down_revision: str | None = "20261120_calibrations"
branch_labels: str | None = None
depends_on: str | None = None


def upgrade() -> None:
    """Add the column; earlier checkpoints are not marked."""
    column: sa.Column[bool] = sa.Column(
        "best", sa.Boolean(), nullable=False, server_default=sa.false()
    )
    op.add_column("checkpoints", column)


def downgrade() -> None:
    """Drop the column."""
    op.drop_column("checkpoints", "best")
