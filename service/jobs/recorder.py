"""Store what a child says. Reading a line twice is harmless: rows are keyed by (attempt, seq)."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from sqlalchemy import TableClause, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert as postgres_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert
from sqlalchemy.orm import Session

from ctune.events import CheckpointSaved, Event, Finished, Metrics, Progress, StageStarted, describe
from service.db import now_s
from service.jobs.lifecycle import Lease, enter_phase
from service.tables import Base, Checkpoint, Job, JobEvent, Metric, new_id

LEVELS = {"warning": "warning", "failed": "error"}


def store_events(
    session: Session, lease: Lease, events: Sequence[Event], *, checkpoints: str, attempt: int
) -> None:
    """Store what a child said; the caller has renewed the lease in this transaction.

    Of an ingestion or a calibration only its progress is kept.

    Args:
        attempt: whose child it was: the lease's, or an earlier one of which the worker died before
            it had read everything. The progress of an earlier one is history.
        checkpoints: that attempt's checkpoint directory below the data directory.
    """
    if attempt == lease.attempt:
        _store_progress(session, lease, events)
    if lease.table is not Job:
        return
    if attempt == lease.attempt:
        _store_newest_metrics(session, lease.id, events)
    said_by = replace(lease, attempt=attempt)
    events = _unheard(session, said_by, events)
    rows = [_event_row(said_by, event) for event in events if not _is_series(event)]
    _insert(session, JobEvent, rows, keys=("job_id", "attempt", "seq"))
    metrics = _metric_rows(said_by, events)
    _insert(session, Metric, metrics, keys=("job_id", "stage", "name", "step"))
    for event in events:
        if isinstance(event, CheckpointSaved):
            _store_checkpoint(session, said_by, event, checkpoints)


def _unheard(session: Session, said_by: Lease, events: Sequence[Event]) -> list[Event]:
    """Return the events behind the last one stored: whatever precedes it was stored with it."""
    stored = select(func.max(JobEvent.seq)).where(
        JobEvent.job_id == said_by.id, JobEvent.attempt == said_by.attempt
    )
    last = session.scalar(stored)
    return [event for event in events if last is None or event.seq > last]


def _is_series(event: Event) -> bool:
    return isinstance(event, Metrics | Progress)


def _store_progress(session: Session, lease: Lease, events: Sequence[Event]) -> None:
    latest: Progress | None = None
    for event in events:
        if isinstance(event, StageStarted | Progress):
            enter_phase(session, lease, event.stage[:32])
        if isinstance(event, Progress):
            latest = event
    if latest is None:
        return
    values = latest.model_dump(mode="json", exclude={"seq", "time", "event"})
    table = lease.table
    written = update(table).where(table.id == lease.id, table.attempt == lease.attempt)
    session.execute(written.values(progress=values).execution_options(synchronize_session=False))


def _store_newest_metrics(session: Session, job_id: str, events: Sequence[Event]) -> None:
    """Keep the last point of each series of the present stage, for those who watch."""
    found = [event for event in events if isinstance(event, Metrics)]
    if not found:
        return
    newest = session.scalar(select(Job.newest_metrics).where(Job.id == job_id)) or {}
    for event in found:
        if newest.get("stage") != event.stage:
            newest = {"stage": event.stage, "points": {}}
        point = {name[:64]: {"step": event.step, "value": v} for name, v in event.values.items()}
        newest = {**newest, "points": newest["points"] | point}
    written = update(Job).where(Job.id == job_id).values(newest_metrics=newest)
    session.execute(written.execution_options(synchronize_session=False))


def _event_row(lease: Lease, event: Event) -> dict[str, Any]:
    hidden = {"seq", "time", "event", "message"}
    if isinstance(event, Finished):
        hidden.add("result")  # it becomes `Job.result`
    return {
        "job_id": lease.id,
        "attempt": lease.attempt,
        "seq": event.seq,
        "kind": event.event,
        "level": LEVELS.get(event.event, "info"),
        "message": describe(event)[:4096],
        "data": event.model_dump(mode="json", exclude=hidden),
    }


def _metric_rows(lease: Lease, events: Sequence[Event]) -> list[dict[str, Any]]:
    rows: dict[tuple[str, str, int], dict[str, Any]] = {}
    for event in events:
        if not isinstance(event, Metrics):
            continue
        for name, value in event.values.items():
            stage, short = event.stage[:32], name[:64]
            rows[stage, short, event.step] = {
                "job_id": lease.id,
                "stage": stage,
                "name": short,
                "step": event.step,
                "value": value,
                "attempt": lease.attempt,
            }
    return list(rows.values())


def _insert(
    session: Session, table: type[Base], rows: list[dict[str, Any]], *, keys: tuple[str, ...]
) -> None:
    """Insert rows; those that are there already stay, but for metrics, which are overwritten."""
    if not rows:
        return
    is_sqlite = session.get_bind().dialect.name == "sqlite"
    statement = (sqlite_insert if is_sqlite else postgres_insert)(
        cast(TableClause, table.__table__)
    )
    statement = statement.values(created_at=now_s())
    if table is Metric:  # a later attempt repeats the steps after its checkpoint
        overwritten = {name: statement.excluded[name] for name in ("value", "attempt")}
        statement = statement.on_conflict_do_update(index_elements=keys, set_=overwritten)
    else:
        statement = statement.on_conflict_do_nothing(index_elements=keys)
    session.connection().execute(statement, rows)


def _store_checkpoint(
    session: Session, lease: Lease, event: CheckpointSaved, checkpoints: str
) -> None:
    row = {
        "id": new_id("ckpt"),
        "job_id": lease.id,
        "attempt": lease.attempt,
        "name": event.name,
        "stage": event.stage[:32],
        "step": event.step,
        "path": f"{checkpoints}/{event.name}",
        "files": event.files,
    }
    _insert(session, Checkpoint, [row], keys=("job_id", "attempt", "name"))
    gone = delete(Checkpoint).where(
        Checkpoint.job_id == lease.id,
        Checkpoint.attempt == lease.attempt,
        Checkpoint.name.not_in(event.kept),
    )
    session.execute(gone.execution_options(synchronize_session=False))
    mark = update(Checkpoint).where(Checkpoint.job_id == lease.id)
    mark = mark.values(best=Checkpoint.name.in_(event.best))
    session.execute(mark.execution_options(synchronize_session=False))
