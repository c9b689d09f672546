"""What workers do to a row: claim, beat, finish, give back; `control.py` has what clients ask.

Every write of a worker is guarded by (id, attempt, owner, running), so one that was given up cannot
overwrite its successor. All times are the database's. Nothing here commits; `states.py` moves.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar, cast

from sqlalchemy import ColumnElement, and_, func, or_, select, update
from sqlalchemy.orm import InstrumentedAttribute, Session

from service.db import now_s
from service.jobs.states import AnyRow, move, record, stay
from service.tables import Calibration, Dataset, Job, JobTransition, Model, RunClaimable

Row = TypeVar("Row", Job, Dataset, Calibration)
Table = type[Job] | type[Dataset] | type[Calibration]

MAX_BACKOFF_S = 3600.0


class Beat(StrEnum):
    """What a heartbeat learns: of what clients want, the strongest."""

    GO_ON = "go_on"
    FINISH = "finish"
    PAUSE = "pause"
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


def enqueue(session: Session, row: AnyRow) -> None:
    """Insert a new row as `queued`; the caller tells the broker after the commit."""
    row.created_at = now_s()
    row.hint_sent_at = now_s()
    session.add(row)
    move(session, row, "queued", "accepted")


def claim(
    session: Session, table: type[Row], *, owner: str, lease_s: float, gpus: tuple[int, int]
) -> Row | None:
    """Take the waiting row of highest priority, oldest first; None when there is none.

    A row that needs more GPUs than are free, but no more than this worker has, is not overtaken by
    others that need GPUs: it would wait for ever beside a stream of smaller ones.

    Args:
        gpus: GPUs of this worker that are free, and all it has. A job that does not say how many
            it needs takes one where the worker has one.
    """
    free, total = gpus
    waiting = select(table.id).where(table.status == "queued", table.run_after <= now_s())
    if issubclass(table, RunClaimable):
        needed = func.coalesce(table.gpus, min(1, total))
        wide = waiting.where(needed > free, needed <= total).add_columns(table.priority)
        first = session.execute(wide.order_by(table.priority.desc(), table.id).limit(1)).first()
        waiting = waiting.where(needed <= free)
        if first is not None:
            older = and_(table.priority == first.priority, table.id < first.id)
            waiting = waiting.where(or_(needed == 0, table.priority > first.priority, older))
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
        record(session, row, f"attempt {row.attempt} starts")
    return row


def beat(session: Session, lease: Lease, lease_s: float) -> Beat:
    """Renew a lease that is still held; after `LOST` the worker writes nothing more."""
    wishes = _wishes(lease.table)
    statement = (
        update(lease.table)
        .where(*_held(lease), lease.table.lease_until > now_s())
        .values(lease_until=now_s() + lease_s)
        # The plain column: SQLite 3.40 answers `x IS NOT NULL` wrongly in RETURNING.
        .returning(lease.table.id, *wishes.values())
        .execution_options(synchronize_session=False)
    )
    renewed = session.execute(statement).one_or_none()
    return Beat.LOST if renewed is None else _strongest(wishes, renewed[1:])


def wishes_of_clients(session: Session, owner: str) -> dict[str, Beat]:
    """Return, of this worker's jobs of which somebody wants something, what `beat` would."""
    wishes = _wishes(Job)
    wanted = select(Job.id, *wishes.values()).where(
        Job.status == "running",
        Job.owner == owner,
        or_(*(asked_at.is_not(None) for asked_at in wishes.values())),
    )
    return {row[0]: _strongest(wishes, row[1:]) for row in session.execute(wanted)}


def _wishes(table: Table) -> dict[Beat, InstrumentedAttribute[float | None]]:
    """Return the columns that say what clients want of a running row, the strongest first."""
    found = {Beat.CANCEL: table.cancel_requested_at}
    if table is Job:
        found |= {Beat.PAUSE: Job.pause_requested_at, Beat.FINISH: Job.stop_requested_at}
    return found


def _strongest(wishes: Iterable[Beat], asked_at: Iterable[float | None]) -> Beat:
    pairs = zip(wishes, asked_at, strict=True)
    return next((wish for wish, time_s in pairs if time_s is not None), Beat.GO_ON)


def enter_phase(session: Session, lease: Lease, phase: str) -> None:
    """Note that a running job has entered a phase; a repeated one changes nothing."""
    row = _lock(session, lease)
    if isinstance(row, Job) and row.phase != phase:
        row.phase = phase
        stay(session, row)


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
    move(session, row, ending.status, ending.message)
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


def run_seconds(session: Session, job_id: str) -> float:
    """Return how long the earlier attempts of a job ran, all together; pauses do not count."""
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


def _lock(session: Session, lease: Lease) -> AnyRow | None:
    """Return the row under its lock (SQLite: the transaction's write lock) if it is still held."""
    wanted = select(lease.table).where(*_held(lease)).with_for_update()
    found = session.scalars(wanted.execution_options(populate_existing=True)).one_or_none()
    return cast("AnyRow | None", found)


def _lose(session: Session, row: AnyRow, error: dict[str, Any], retry: Retry) -> None:
    row.lost_attempts += 1
    row.error = error
    if row.lost_attempts >= retry.max_attempts and row.cancel_requested_at is None:
        move(session, row, "failed", error["message"])
        return
    delay_s = min(MAX_BACKOFF_S, retry.backoff_s * 2.0 ** (row.lost_attempts - 1))
    _back(session, row, delay_s=delay_s, message=f"will be repeated: {error['message']}")


def _back(session: Session, row: AnyRow, *, delay_s: float, message: str) -> None:
    """Queue a running row again, unless somebody wants to cancel or to pause it."""
    if row.cancel_requested_at is not None:
        row.error = None
        move(session, row, "cancelled", "cancelled")
        return
    if isinstance(row, Job) and row.pause_requested_at is not None:
        move(session, row, "paused", "paused")
        return
    row.run_after = now_s() + delay_s
    row.hint_sent_at = None
    move(session, row, "queued", message)
