"""The states of a claimable row, and the only code that moves one from state to state.

    queued ──claim──> running ──finish──> succeeded | ready | failed
    queued <──back──  running ──back────> paused | cancelled, where clients asked for it
    queued ─pause──> paused ──resume──> queued
    queued, paused ─cancel──> cancelled

`lifecycle.py` has what workers do to a row, `control.py` what clients ask for. Nothing here
commits. Every write to a job's events happens under the lock of its row, so that event ids appear
in the order of their commits.
"""

from sqlalchemy import update
from sqlalchemy.orm import Session

from service.db import now_s
from service.tables import Calibration, Dataset, Job, JobEvent, JobTransition

AnyRow = Job | Dataset | Calibration

TRANSITIONS: dict[str, frozenset[str]] = {
    "": frozenset({"queued"}),
    "queued": frozenset({"running", "paused", "cancelled"}),
    "running": frozenset({"queued", "paused", "succeeded", "ready", "failed", "cancelled"}),
    "paused": frozenset({"queued", "cancelled"}),
}
TERMINAL = frozenset({"succeeded", "ready", "failed", "cancelled"})


def move(session: Session, row: AnyRow, status: str, message: str) -> None:
    """Put a locked row into another state and write that into its history.

    Raises:
        ValueError: the row cannot go there from where it is.
    """
    before = row.status or ""
    if status not in TRANSITIONS.get(before, frozenset()):
        raise ValueError(f"{row.id} cannot go from {before or 'nothing'} to {status}")
    row.status = status
    row.owner = None
    row.lease_until = None
    if status in TERMINAL:
        row.finished_at = now_s()
    session.flush()
    record(session, row, message)


def record(session: Session, row: AnyRow, message: str) -> None:
    """Write the present state of a row into its history; only jobs have one."""
    if isinstance(row, Job):
        stay(session, row, message)
        note(session, row, message, level="error" if row.status == "failed" else "info")


def stay(session: Session, job: Job, message: str = "") -> None:
    """End the job's present stay and begin the one its status and phase say."""
    ended = update(JobTransition).where(
        JobTransition.job_id == job.id, JobTransition.ended_at.is_(None)
    )
    session.execute(ended.values(ended_at=now_s()).execution_options(synchronize_session=False))
    begun = JobTransition(
        job_id=job.id,
        attempt=job.attempt,
        status=job.status,
        phase=job.phase,
        started_at=now_s(),
        message=message[:1024],
    )
    session.add(begun)
    session.flush()


def note(session: Session, job: Job, message: str, *, level: str = "info") -> None:
    """Add an event of the service to those of a job."""
    code = job.error["code"] if job.error else None
    data = {"status": job.status, "phase": job.phase, "error_code": code}
    event = JobEvent(
        job_id=job.id,
        attempt=job.attempt,
        created_at=now_s(),
        kind="status",
        level=level,
        message=message[:4096],
        data=data,
    )
    session.add(event)
    session.flush()
