"""Create the tables.

Revision ID: 20261120_create_tables
Revises: none
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "20261120_create_tables"
down_revision: str | None = None
branch_labels: str | None = None
depends_on: str | None = None


def _json() -> sa.JSON:
    binary = postgresql.JSONB(none_as_null=True)
    return sa.JSON(none_as_null=True).with_variant(binary, "postgresql")


def _big_id() -> sa.BigInteger:
    return sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _claimable() -> list[sa.Column[object]]:
    return [
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
    ]


def upgrade() -> None:
    """Make the data set and job tables, then those that hang on jobs."""
    _create_claimed_tables()
    _create_other_tables()
    _create_job_tables()


def _create_claimed_tables() -> None:
    op.create_table(
        "datasets",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("name", sa.String(256), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("archive_sha256", sa.String(64), nullable=False),
        sa.Column("upload", sa.String(256), nullable=False),
        sa.Column("options", _json(), nullable=False),
        sa.Column("store", sa.String(256), nullable=True),
        sa.Column("summary", _json(), nullable=True),
        sa.Column("report", _json(), nullable=True),
        *_claimable(),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_datasets_claim", "datasets", ["status", "priority", "id"])
    op.create_index("ix_datasets_store", "datasets", ["store"])
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("name", sa.String(256), nullable=True),
        sa.Column("dataset_id", sa.String(40), nullable=False),
        sa.Column("metadata", _json(), nullable=False),
        sa.Column("config", _json(), nullable=False),
        sa.Column("gpus", sa.Integer(), nullable=True),
        sa.Column("phase", sa.String(32), nullable=True),
        sa.Column("result", _json(), nullable=True),
        sa.Column("model_id", sa.String(40), nullable=True),
        *_claimable(),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_jobs_claim", "jobs", ["status", "priority", "id"])
    op.create_index("ix_jobs_dataset", "jobs", ["dataset_id"])


def _create_other_tables() -> None:
    op.create_table(
        "models",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("name", sa.String(256), nullable=True),
        sa.Column("job_id", sa.String(40), nullable=True),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("info", _json(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_table(
        "workers",
        sa.Column("id", sa.String(128), nullable=False),
        sa.Column("seen_at", sa.Float(), nullable=False),
        sa.Column("info", _json(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )


def _create_job_tables() -> None:
    op.create_table(
        "checkpoints",
        sa.Column("id", sa.String(40), nullable=False),
        sa.Column("job_id", sa.String(40), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("stage", sa.String(32), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("path", sa.String(256), nullable=False),
        sa.Column("files", _json(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("job_id", "attempt", "name"),
    )
    op.create_index("ix_checkpoints_job", "checkpoints", ["job_id", "id"])
    op.create_table(
        "job_events",
        sa.Column("id", _big_id(), autoincrement=True, nullable=False),
        sa.Column("job_id", sa.String(40), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("seq", sa.Integer(), nullable=True),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.Column("kind", sa.String(32), nullable=False),
        sa.Column("level", sa.String(8), nullable=False),
        sa.Column("message", sa.String(4096), nullable=False),
        sa.Column("data", _json(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("job_id", "attempt", "seq"),
    )
    op.create_index("ix_job_events_job", "job_events", ["job_id", "id"])
    op.create_table(
        "job_transitions",
        sa.Column("id", _big_id(), autoincrement=True, nullable=False),
        sa.Column("job_id", sa.String(40), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("phase", sa.String(32), nullable=True),
        sa.Column("started_at", sa.Float(), nullable=False),
        sa.Column("ended_at", sa.Float(), nullable=True),
        sa.Column("message", sa.String(1024), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_job_transitions_job", "job_transitions", ["job_id", "id"])
    op.create_table(
        "metrics",
        sa.Column("job_id", sa.String(40), nullable=False),
        sa.Column("stage", sa.String(32), nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("step", sa.BigInteger(), nullable=False),
        sa.Column("value", sa.Float(), nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("created_at", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "stage", "name", "step"),
    )


def downgrade() -> None:
    """Drop everything."""
    op.drop_table("metrics")
    op.drop_table("job_transitions")
    op.drop_table("job_events")
    op.drop_table("checkpoints")
    op.drop_table("workers")
    op.drop_table("models")
    op.drop_table("jobs")
    op.drop_table("datasets")
