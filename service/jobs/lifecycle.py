"""The life of a job or an ingestion: the only code that writes `status`.

    queued ──claim──> running ──finish──> succeeded | ready | failed | cancelled
      ^ │                │
      │ └─request_cancel─┼──────────────> cancelled
      └─release, requeue_lost, reap

Every write of a worker is guarded by (id, attempt, owner, running), so one that was given up cannot
overwrite its successor. All times are the database's. Nothing here commits. Every write to a job's
events happens under the lock of its row, so that event ids appear in the order of their commits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar, cast

from sqlalchemy import ColumnElement, func, select, update
from sqlalchemy.orm import Session

from service.db import now_s
from service.tables import Dataset, Job, JobEvent, JobTransition, Model

Row = TypeVar("Row", Job, Dataset)
Table = type[Job] | type[Dataset]

TRANSITIONS: dict[str, frozenset[str]] = {
    "": frozenset({"queued"}),
    "queued": frozenset({"running", "cancelled"}),
    "running": frozenset({"queued", "succeeded", "ready", "failed", "cancelled"}),
}
TERMINAL = frozenset({"succeeded", "ready", "failed", "cancelled"})
MAX_BACKOFF_S = 3600.0


class Beat(StrEnum):
    """What a heartbeat learns."""

    GO_ON = "go_on"
    CANCEL = "cancel"
    LOST = "lost"


@dataclass(frozen=True)
class Lease:
    """The right of one worker to one attempt; every write names it."""

    table: Table
    id: str
    attempt: int
    owner: str


@dataclass(frozen=True)
class Retry:
    """When a lost attempt is repeated."""

    max_attempts: int
    backoff_s: float


@dataclass(frozen=True)
class Ending:
    """The end of an attempt that is not repeated."""

    status: str
    message: str = ""
    error: dict[str, Any] | None = None
    values: dict[str, Any] = field(default_factory=dict)
    """Further columns: `result`, `model_id`; `store`, `summary`, `report`."""
    model: dict[str, Any] | None = None
    """Columns of the model that the attempt made."""


class NotFoundError(Exception):
    """There is no row with this id."""


class NotCancellableError(Exception):
    """The job has ended already; `status` says how."""

    def __init__(self, job_id: str, status: str) -> None:
        super().__init__(f"job {job_id} cannot be cancelled: it is {status}")
        self.status = status


def enqueue(session: Session, row: Job | Dataset) -> None:
    """Insert a new row as `queued`; the caller tells the broker after the commit."""
    row.created_at = now_s()
    row.hint_sent_at = now_s()
    session.add(row)
    _move(session, row, "queued", "accepted")


def claim(
    session: Session, table: type[Row], *, owner: str, lease_s: float, gpus: tuple[int, int]
) -> Row | None:
    """Take the waiting row of highest priority, oldest first; None when there is none.

    Args:
        gpus: GPUs of this worker that are free, and all it has. A job that does not say how many
            it needs takes one where the worker has one.
    """
    free, total = gpus
    waiting = select(table.id).where(table.status == "queued", table.run_after <= now_s())
    if table is Job:
        waiting = waiting.where(func.coalesce(Job.gpus, min(1, total)) <= free)
    waiting = waiting.order_by(table.priority.desc(), table.id).limit(1)
    statement = (
        update(table)
        .where(
            table.id == waiting.with_for_update(skip_locked=True).scalar_subquery(),
            table.status == "queued",
        )
        .values(
            status="running",
            attempt=table.attempt + 1,
            owner=owner,
            lease_until=now_s() + lease_s,
            started_at=func.coalesce(table.started_at, now_s()),
        )
        .returning(table)
        .execution_options(synchronize_session=False, populate_existing=True)
    )
    row = session.scalars(statement).one_or_none()
    if row is not None:
        _record(session, row, f"attempt {row.attempt} starts")
    return row


def beat(session: Session, lease: Lease, lease_s: float) -> Beat:
    """Renew a lease that is still held; after `LOST` the worker writes nothing more."""
    statement = (
        update(lease.table)
        .where(*_held(lease), lease.table.lease_until > now_s())
        .values(lease_until=now_s() + lease_s)
        # The plain column: SQLite 3.40 answers `x IS NOT NULL` wrongly in RETURNING.
        .returning(lease.table.id, lease.table.cancel_requested_at)
        .execution_options(synchronize_session=False)
    )
    renewed = session.execute(statement).one_or_none()
    if renewed is None:
        return Beat.LOST
    return Beat.GO_ON if renewed.cancel_requested_at is None else Beat.CANCEL


def cancel_requests(session: Session, owner: str) -> Sequence[str]:
    """Return the ids of this worker's jobs that somebody wants to cancel."""
    wanted = select(Job.id).where(
        Job.status == "running", Job.owner == owner, Job.cancel_requested_at.is_not(None)
    )
    return session.scalars(wanted).all()


def enter_phase(session: Session, lease: Lease, phase: str) -> None:
    """Note that a running job has entered a phase; a repeated one changes nothing."""
    row = _lock(session, lease)
    if isinstance(row, Job) and row.phase != phase:
        row.phase = phase
        _stay(session, row)


def finish(session: Session, lease: Lease, ending: Ending) -> bool:
    """End an attempt for good, with its model; False when the lease is lost: nothing is written."""
    row = _lock(session, lease)
    if row is None:
        return False
    for name, value in ending.values.items():
        setattr(row, name, value)
    if ending.model is not None:
        session.add(Model(**ending.model))
    row.error = ending.error
    _move(session, row, ending.status, ending.message)
    return True


def release(session: Session, lease: Lease, message: str) -> bool:
    """Give an attempt back unharmed (the worker stops); it does not count as lost."""
    row = _lock(session, lease)
    if row is None:
        return False
    _back(session, row, delay_s=0.0, message=message)
    return True


def requeue_lost(session: Session, lease: Lease, error: dict[str, Any], retry: Retry) -> str | None:
    """Repeat an attempt that ended badly, later, or fail it with `error` once too many are lost.

    Returns:
        The new status; None when the lease is lost: nothing is written.
    """
    row = _lock(session, lease)
    if row is None:
        return None
    _lose(session, row, error, retry)
    return row.status


def reap(session: Session, table: type[Row], retry: Retry) -> list[tuple[str, str]]:
    """Take rows from workers whose lease has ended; any number of workers may do it at once.

    Returns:
        The (id, new status) of each.
    """
    silent = (
        select(table)
        .where(table.status == "running", table.lease_until < now_s())
        .order_by(table.id)
        .limit(50)
        .with_for_update(skip_locked=True)
        .execution_options(populate_existing=True)
    )
    reaped = []
    for row in session.scalars(silent).all():
        error = {
            "code": "lost",
            "message": f"the worker {row.owner} was not heard of while it ran attempt"
            f" {row.attempt}",
            "hint": "look at the worker's log: it was killed, or lost the database",
            "fault": "system",
            "retryable": True,
            "phase": getattr(row, "phase", None),
            "log_tail": "",
        }
        _lose(session, row, error, retry)
        reaped.append((row.id, row.status))
    return reaped


def resend(session: Session, table: Table, resend_s: float) -> Sequence[str]:
    """Mark waiting rows whose hint is old as announced now; the caller then tells the broker."""
    due = (
        select(table.id)
        .where(
            table.status == "queued",
            table.run_after <= now_s(),
            func.coalesce(table.hint_sent_at, 0.0) < now_s() - resend_s,
        )
        .order_by(table.priority.desc(), table.id)
        .limit(50)
        .with_for_update(skip_locked=True)
    )
    ids = session.scalars(due).all()
    marked = update(table).where(table.id.in_(ids)).values(hint_sent_at=now_s())
    session.execute(marked.execution_options(synchronize_session=False))
    return ids


def request_cancel(session: Session, job_id: str) -> Job:
    """Cancel a waiting job at once; ask the worker of a running one to stop it.

    Raises:
        NotFoundError: no such job.
        NotCancellableError: the job has ended already.
    """
    wanted = select(Job).where(Job.id == job_id).with_for_update()
    job = session.scalars(wanted.execution_options(populate_existing=True)).one_or_none()
    if job is None:
        raise NotFoundError(f"there is no job {job_id}")
    if job.status in TERMINAL:
        raise NotCancellableError(job_id, job.status)
    if job.cancel_requested_at is None:
        job.cancel_requested_at = now_s()
    if job.status == "queued":
        _move(session, job, "cancelled", "cancelled before it started")
    else:
        session.add(_event(job, "info", "cancelling was asked for"))
    session.flush()
    return job


def run_seconds(session: Session, job_id: str) -> float:
    """Return how long the earlier attempts of a job ran, all together."""
    stays = select(func.sum(JobTransition.ended_at - JobTransition.started_at)).where(
        JobTransition.job_id == job_id, JobTransition.status == "running"
    )
    return session.scalar(stays) or 0.0


def _held(lease: Lease) -> tuple[ColumnElement[bool], ...]:
    table = lease.table
    return (
        table.id == lease.id,
        table.attempt == lease.attempt,
        table.owner == lease.owner,
        table.status == "running",
    )


def _lock(session: Session, lease: Lease) -> Job | Dataset | None:
    """Return the row under its lock (SQLite: the transaction's write lock) if it is still held."""
    wanted = select(lease.table).where(*_held(lease)).with_for_update()
    found = session.scalars(wanted.execution_options(populate_existing=True)).one_or_none()
    return cast("Job | Dataset | None", found)


def _lose(session: Session, row: Job | Dataset, error: dict[str, Any], retry: Retry) -> None:
    row.lost_attempts += 1
    row.error = error
    if row.lost_attempts >= retry.max_attempts and row.cancel_requested_at is None:
        _move(session, row, "failed", error["message"])
        return
    delay_s = min(MAX_BACKOFF_S, retry.backoff_s * 2.0 ** (row.lost_attempts - 1))
    _back(session, row, delay_s=delay_s, message=f"will be repeated: {error['message']}")


def _back(session: Session, row: Job | Dataset, *, delay_s: float, message: str) -> None:
    """Queue a running row again; one that somebody wants to cancel ends here."""
    if row.cancel_requested_at is not None:
        row.error = None
        _move(session, row, "cancelled", "cancelled")
        return
    row.run_after = now_s() + delay_s
    row.hint_sent_at = None
    _move(session, row, "queued", message)


def _move(session: Session, row: Job | Dataset, status: str, message: str) -> None:
    before = row.status or ""
    if status not in TRANSITIONS.get(before, frozenset()):
        raise ValueError(f"{row.id} cannot go from {before or 'nothing'} to {status}")
    row.status = status
    row.owner = None
    row.lease_until = None
    if status in TERMINAL:
        row.finished_at = now_s()
    session.flush()
    _record(session, row, message)


def _record(session: Session, row: Job | Dataset, message: str) -> None:
    if isinstance(row, Job):
        _stay(session, row, message)
        level = "error" if row.status == "failed" else "info"
        session.add(_event(row, level, message))
        session.flush()


def _stay(session: Session, job: Job, message: str = "") -> None:
    """End the job's present stay and begin the one its status and phase say."""
    ended = update(JobTransition).where(
        JobTransition.job_id == job.id, JobTransition.ended_at.is_(None)
    )
    session.execute(ended.values(ended_at=now_s()).execution_options(synchronize_session=False))
    stay = JobTransition(
        job_id=job.id,
        attempt=job.attempt,
        status=job.status,
        phase=job.phase,
        started_at=now_s(),
        message=message[:1024],
    )
    session.add(stay)
    session.flush()


def _event(job: Job, level: str, message: str) -> JobEvent:
    code = job.error["code"] if job.error else None
    data = {"status": job.status, "phase": job.phase, "error_code": code}
    return JobEvent(
        job_id=job.id,
        attempt=job.attempt,
        created_at=now_s(),
        kind="status",
        level=level,
        message=message[:4096],
        data=data,
    )
