"""The database tables. `migrations/` builds them; relationships are never loaded lazily.

Times are seconds since the epoch by the clock of the database (`service.db.now_s`). The columns of
`Claimable` are one contract for jobs and ingestions: only `service/jobs/lifecycle.py` writes them.
"""

import secrets
import time
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Float,
    ForeignKey,
    Index,
    Integer,
    String,
    UniqueConstraint,
    false,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

Json = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
BigId = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers only INTEGER keys by itself


def new_id(prefix: str) -> str:
    """Return an id that sorts by the time of its making: `job_0192f3…`."""
    return f"{prefix}_{time.time_ns() // 1_000_000:012x}{secrets.token_hex(8)}"


class Base(DeclarativeBase):
    """Base of all tables."""

    type_annotation_map = {dict[str, Any]: Json, list[Any]: Json}


class Claimable:
    """A row that a worker claims, runs in a child process and finishes."""

    status: Mapped[str] = mapped_column(String(16))
    priority: Mapped[int] = mapped_column(default=0)
    run_after: Mapped[float] = mapped_column(Float, default=0.0)
    """Not claimed before this time."""
    attempt: Mapped[int] = mapped_column(default=0)
    """Fencing token: every write of a worker names the attempt it claimed."""
    lost_attempts: Mapped[int] = mapped_column(default=0)
    """Attempts that ended without a word of the child; released ones do not count."""
    owner: Mapped[str | None] = mapped_column(String(128))
    """The worker that holds the lease."""
    lease_until: Mapped[float | None] = mapped_column(Float)
    hint_sent_at: Mapped[float | None] = mapped_column(Float)
    """When the broker was last told."""
    cancel_requested_at: Mapped[float | None] = mapped_column(Float)
    created_at: Mapped[float] = mapped_column(Float)
    started_at: Mapped[float | None] = mapped_column(Float)
    finished_at: Mapped[float | None] = mapped_column(Float)
    error: Mapped[dict[str, Any] | None]
    """`{code, message, hint, fault, retryable, phase, log_tail}`."""
    progress: Mapped[dict[str, Any] | None]
    """`{stage, step, total_steps, fraction, seconds_remaining}`."""


class RunClaimable(Claimable):
    """A claimable row that runs a config on a data set, on the device which the config asks for."""

    dataset_id: Mapped[str] = mapped_column(String(40))
    """No foreign key: the row outlives its data set."""
    config: Mapped[dict[str, Any]]
    """The resolved `ctune.config.RunConfig`."""
    gpus: Mapped[int | None]
    """GPUs it asks for; none: one where the worker has one."""


class Dataset(Claimable, Base):
    """An uploaded archive and, once `ready`, the packed store made of it."""

    __tablename__ = "datasets"
    __table_args__ = (
        Index("ix_datasets_claim", "status", "priority", "id"),
        Index("ix_datasets_store", "store"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    """`ds_…`; status: queued, running (the API says processing for both), ready, failed."""
    name: Mapped[str] = mapped_column(String(256))
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    archive_sha256: Mapped[str] = mapped_column(String(64))
    upload: Mapped[str] = mapped_column(String(256))
    """Path of the archive below the data directory; gone once the data set is ready."""
    options: Mapped[dict[str, Any]]
    store: Mapped[str | None] = mapped_column(String(256))
    """Path of the packed store below the data directory; data sets with equal bytes share it."""
    summary: Mapped[dict[str, Any] | None]
    report: Mapped[dict[str, Any] | None]


class Job(RunClaimable, Base):
    """A run of one method on one data set; the row is the job, a broker message only a hint."""

    __tablename__ = "jobs"
    __table_args__ = (
        Index("ix_jobs_claim", "status", "priority", "id"),
        Index("ix_jobs_dataset", "dataset_id"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    """`job_…`; status: queued, running, paused, succeeded, failed, cancelled."""
    name: Mapped[str | None] = mapped_column(String(256))
    metadata_: Mapped[dict[str, Any]] = mapped_column("metadata")
    phase: Mapped[str | None] = mapped_column(String(32))
    pause_requested_at: Mapped[float | None] = mapped_column(Float)
    """None again once it was resumed."""
    stop_requested_at: Mapped[float | None] = mapped_column(Float)
    """The wish to finish early, with a model."""
    newest_metrics: Mapped[dict[str, Any] | None]
    """`{stage, points: {name: {step, value}}}`: the last point of each series of a stage."""
    result: Mapped[dict[str, Any] | None]
    model_id: Mapped[str | None] = mapped_column(String(40))


class Calibration(RunClaimable, Base):
    """A short measurement of a config on a worker, for `POST /jobs/estimate`."""

    __tablename__ = "calibrations"
    __table_args__ = (
        Index("ix_calibrations_claim", "status", "priority", "id"),
        Index("ix_calibrations_key", "key"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    """`cal_…`; status: queued, running, ready, failed."""
    key: Mapped[str] = mapped_column(String(64))
    """`ctune.estimate.calibration_key`: runs that share it take equally long per step."""
    worker_kind: Mapped[str | None] = mapped_column(String(256))
    """Processor, cores and GPU of the worker that claimed it."""
    result: Mapped[dict[str, Any] | None]
    """`ctune.estimate.Measurement`."""


class JobTransition(Base):
    """One stay of a job in a status and phase."""

    __tablename__ = "job_transitions"
    __table_args__ = (Index("ix_job_transitions_job", "job_id", "id"),)

    id: Mapped[int] = mapped_column(BigId, primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    attempt: Mapped[int]
    status: Mapped[str] = mapped_column(String(16))
    phase: Mapped[str | None] = mapped_column(String(32))
    started_at: Mapped[float] = mapped_column(Float)
    ended_at: Mapped[float | None] = mapped_column(Float)
    message: Mapped[str] = mapped_column(String(1024), default="")


class JobEvent(Base):
    """A line of a child's `events.jsonl` (not its metrics), or a remark of the supervisor."""

    __tablename__ = "job_events"
    __table_args__ = (
        UniqueConstraint("job_id", "attempt", "seq"),
        Index("ix_job_events_job", "job_id", "id"),
    )

    id: Mapped[int] = mapped_column(BigId, primary_key=True, autoincrement=True)
    """Strictly increasing within a job; the id of the server-sent event."""
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    attempt: Mapped[int]
    seq: Mapped[int | None]
    """Line number in the attempt's file; none for remarks of the service."""
    created_at: Mapped[float] = mapped_column(Float)
    kind: Mapped[str] = mapped_column(String(32))
    level: Mapped[str] = mapped_column(String(8))
    message: Mapped[str] = mapped_column(String(4096))
    data: Mapped[dict[str, Any]]


class Metric(Base):
    """One value of one series; a later attempt that repeats a step overwrites it."""

    __tablename__ = "metrics"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    stage: Mapped[str] = mapped_column(String(32), primary_key=True)
    name: Mapped[str] = mapped_column(String(64), primary_key=True)
    step: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    value: Mapped[float | None] = mapped_column(Float)
    attempt: Mapped[int]
    created_at: Mapped[float] = mapped_column(Float)


class Checkpoint(Base):
    """A complete checkpoint on disk; the row goes when the files go."""

    __tablename__ = "checkpoints"
    __table_args__ = (
        UniqueConstraint("job_id", "attempt", "name"),
        Index("ix_checkpoints_job", "job_id", "id"),
    )

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    """`ckpt_…`"""
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    attempt: Mapped[int]
    name: Mapped[str] = mapped_column(String(128))
    stage: Mapped[str] = mapped_column(String(32))
    step: Mapped[int] = mapped_column(BigInteger)
    path: Mapped[str] = mapped_column(String(256))
    """Below the data directory."""
    files: Mapped[dict[str, Any]]
    best: Mapped[bool] = mapped_column(default=False, server_default=false())
    """Of its stage, by the k-NN accuracy of the looks during training."""
    created_at: Mapped[float] = mapped_column(Float)


class Model(Base):
    """An exported encoder that can be downloaded, served and tuned further."""

    __tablename__ = "models"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    """`mdl_…`; its files are `models/<id>/` below the data directory."""
    name: Mapped[str | None] = mapped_column(String(256))
    job_id: Mapped[str | None] = mapped_column(String(40))
    created_at: Mapped[float] = mapped_column(Float)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    info: Mapped[dict[str, Any]]
    """`model.json` of the export: architecture, embed_dim, preprocessing, classes, licence."""


class WorkerSeen(Base):
    """A supervisor that is alive; `/readyz` answers 200 only while one was seen lately.

    Each supervisor upserts its own row at every poll, not only while it runs something: `id` is
    the name it puts into `Claimable.owner`, `seen_at` is `service.db.now_s`. It deletes its row
    when it stops; rows silent for a day may be swept.
    """

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(String(128), primary_key=True)
    seen_at: Mapped[float] = mapped_column(Float)
    info: Mapped[dict[str, Any]]
    """`{slots, gpus, version, kind}`."""
