"""Rows and waiting, for the tests of the lifecycle and the workers."""

import hashlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from service.db import Database
from service.jobs import lifecycle
from service.jobs.lifecycle import Lease, Retry
from service.jobs.states import TERMINAL
from service.settings import Settings
from service.storage import Storage
from service.tables import Dataset, Job, JobTransition, new_id

STUB = [sys.executable, str(Path(__file__).with_name("stub_child.py"))]
RETRY = Retry(max_attempts=3, backoff_s=0.0)
SCALED: dict[str, Any] = {
    "train_command": STUB,
    "ingest_command": STUB,
    "calibrate_command": STUB,
    "poll_s": 0.05,
    "beat_s": 0.5,
    "lease_s": 6.0,
    "fence_s": 4.0,
    "grace_s": 1.0,
    "reap_s": 0.5,
    "resend_s": 1.0,
    "retry_backoff_s": 0.05,
}
"""Settings under which everything happens within seconds."""


def scaled(settings: Settings, **changes: Any) -> Settings:
    """Return settings with short times and the stub as the program."""
    return settings.model_copy(update=SCALED | changes)


def add_dataset(session: Session, **columns: Any) -> Dataset:
    """Insert a data set that is ready."""
    row = Dataset(
        id=new_id("ds"), name="flowers", size_bytes=1, archive_sha256="0" * 64, upload="uploads/x",
        options={}, store="stores/x",
    )  # fmt: skip
    lifecycle.enqueue(session, row)
    row.status = "ready"
    for name, value in columns.items():
        setattr(row, name, value)
    session.flush()
    return row


def upload(session: Session, storage: Storage, content: bytes, **stub: Any) -> str:
    """Put an archive into the storage and insert a waiting data set for it."""
    row_id = new_id("ds")
    path = storage.create().upload(row_id)
    path.write_bytes(content)
    row = Dataset(
        id=row_id, name="flowers", size_bytes=len(content), upload=storage.relative(path),
        archive_sha256=hashlib.sha256(content).hexdigest(), options={"mode": "finish"} | stub,
    )  # fmt: skip
    lifecycle.enqueue(session, row)
    return row_id


def add_job(session: Session, dataset_id: str = "ds_none", **columns: Any) -> Job:
    """Insert a waiting job; `stub` says what its child is to do."""
    stub = {"mode": "finish"} | columns.pop("stub", {})
    resources = columns.pop("resources", {})
    config = {"stub": stub, "encoder": {"source": "timm"}, "resources": resources}
    time.sleep(0.002)  # ids sort by the millisecond
    row = Job(id=new_id("job"), dataset_id=dataset_id, metadata_={}, config=config, **columns)
    lifecycle.enqueue(session, row)
    return row


def add_jobs(database: Database, count: int = 1, **columns: Any) -> list[str]:
    """Insert a ready data set and jobs on it; return the jobs' ids."""
    with database.writing() as session:
        dataset_id = add_dataset(session).id
        return [add_job(session, dataset_id, **columns).id for _ in range(count)]


def claim_job(database: Database, owner: str = "w", lease_s: float = 60.0) -> Lease:
    """Claim the next job."""
    with database.writing() as session:
        row = lifecycle.claim(session, Job, owner=owner, lease_s=lease_s, gpus=(0, 0))
    assert row is not None
    return Lease(Job, row.id, row.attempt, owner)


def get_job(database: Database, job_id: str) -> Job:
    """Return a job as it is now."""
    with database.reading() as session:
        return session.get_one(Job, job_id)


def stays(database: Database, job_id: str) -> list[JobTransition]:
    """Return a job's stays, oldest first."""
    with database.reading() as session:
        wanted = select(JobTransition).where(JobTransition.job_id == job_id)
        return list(session.scalars(wanted.order_by(JobTransition.id)))


def end_lease(database: Database, job_id: str) -> None:
    """Let a lease have ended an hour ago."""
    with database.writing() as session:
        session.execute(
            update(Job).where(Job.id == job_id).values(lease_until=Job.lease_until - 3600)
        )


def wait_until(holds: Callable[[], object], timeout_s: float = 20.0) -> None:
    """Wait for something to become true."""
    until = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.02)


def job_ended(database: Database, job_id: str) -> Job:
    """Wait for the end of a job and return it."""
    wait_until(lambda: get_job(database, job_id).status in TERMINAL)
    return get_job(database, job_id)


def job_running(database: Database, settings: Settings, job_id: str, mark: str) -> Path:
    """Wait until a job's child has left a mark in its run directory, and return that directory."""
    run = Storage(settings.data_dir).job_run(job_id, 1).root
    wait_until((run / mark).exists)
    assert get_job(database, job_id).status == "running"
    return run


def job_error(job: Job) -> dict[str, Any]:
    """Return the error of a job that must have failed."""
    assert job.status == "failed", job.error
    assert job.error is not None
    return job.error
