"""What the sweep takes back and removes, and what it leaves alone."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select

from service.db import Database
from service.jobs import control, lifecycle
from service.jobs.lifecycle import Ending
from service.queue import Announcer
from service.settings import Settings
from service.storage import Storage
from service.tables import Checkpoint, Dataset, Job, Model, WorkerSeen
from tests.workers.rows import (
    add_dataset,
    add_jobs,
    claim_job,
    end_lease,
    get_job,
    scaled,
    upload,
    wait_until,
)
from workers.kinds import Context
from workers.sweep import Sweeper, purge

DAY_S = 24 * 3600


@pytest.fixture
def context(settings: Settings, database: Database) -> Context:
    return Context(scaled(settings), database, Storage(settings.data_dir).create(), "w")


@pytest.fixture
def root(context: Context) -> Iterator[Path]:
    yield context.storage.root
    assert list(context.storage.root.rglob(".trash-*")) == []


def _make(path: Path, age_s: float = 2 * DAY_S) -> Path:
    """Make a directory with a file in it, both of some age."""
    path.mkdir(parents=True)
    (path / "file").touch()
    then = time.time() - age_s
    os.utime(path, (then, then))
    return path


def _age(path: Path) -> Path:
    then = time.time() - 2 * DAY_S
    os.utime(path, (then, then))
    return path


def test_lost_rows_are_taken_back(context: Context, database: Database) -> None:
    (job_id,) = add_jobs(database)
    claim_job(database)
    end_lease(database, job_id)
    with database.writing() as session:
        dataset = add_dataset(session, status="running", attempt=3, lost_attempts=2, owner="x")
        dataset.lease_until = 1.0
    woken = []
    Sweeper(context, Announcer(context.settings), wake=lambda: woken.append(1)).sweep()
    assert (get_job(database, job_id).status, woken) == ("queued", [1])
    with database.reading() as session:
        lost = session.get_one(Dataset, dataset.id)
    assert lost.status == "failed"
    assert lost.error is not None
    assert lost.error["code"] == "lost"


def test_what_nobody_needs_of_lost_rows_goes_once_they_are_not_repeated(
    context: Context, root: Path, database: Database
) -> None:
    (repeated, given_up) = add_jobs(database, count=2)
    with database.writing() as session:
        datasets = [upload(session, context.storage, b"1") for _ in range(2)]
        rows: list[Job | Dataset] = [session.get_one(Job, repeated), session.get_one(Job, given_up)]
        rows += [session.get_one(Dataset, row_id) for row_id in datasets]
        for n, row in enumerate(rows):
            row.status, row.attempt, row.lost_attempts = "running", 1, 2 * (n % 2)
            row.owner, row.lease_until = "x", 1.0
    for job_id in (repeated, given_up):
        _make(root / "jobs" / job_id / "a1" / "cache")
        context.storage.job_run(job_id, 1).log.touch()
    for row_id in datasets:
        _make(root / "runs" / row_id / "a1")
    Sweeper(context, Announcer(context.settings), wake=lambda: None).sweep()
    assert get_job(database, repeated).status == "queued"
    assert get_job(database, given_up).status == "failed"
    assert [path.parts[-3] for path in (root / "jobs").glob("*/*/cache")] == [repeated]
    assert context.storage.job_run(given_up, 1).log.exists()
    for folder in ("uploads", "runs"):
        assert [path.name for path in (root / folder).iterdir()] == datasets[:1]


def test_a_cancelled_job_that_had_run_before_leaves_no_decoded_images(
    context: Context, root: Path, database: Database
) -> None:
    (job_id,) = add_jobs(database)
    lease = claim_job(database)
    run = _make(root / "jobs" / job_id / "a1")
    _make(run / "cache")
    with database.writing() as session:
        lifecycle.release(session, lease, "the worker stops")
    purge(context)
    assert (run / "cache").exists()
    with database.writing() as session:
        control.request_cancel(session, job_id)
    purge(context)
    assert [path.name for path in run.iterdir()] == ["file"]


def test_a_paused_job_keeps_all_it_needs_to_go_on(
    context: Context, root: Path, database: Database
) -> None:
    (job_id,) = add_jobs(database)
    lease = claim_job(database)
    with database.writing() as session:
        control.request_pause(session, job_id)
        lifecycle.release(session, lease, "")
        session.add(_checkpoint(job_id, 1))
    run = _make(root / "jobs" / job_id / "a1" / "checkpoints")
    purge(context, young_s=0.0)
    Sweeper(context, Announcer(context.settings), wake=lambda: None).sweep()
    assert get_job(database, job_id).status == "paused"
    assert (run / "file").exists()
    with database.reading() as session:
        assert len(session.scalars(select(Checkpoint)).all()) == 1


def test_the_thread_sweeps_until_it_is_stopped(context: Context, database: Database) -> None:
    sweeper = Sweeper(context, Announcer(context.settings), wake=lambda: None)
    sweeper.start()
    (job_id,) = add_jobs(database)
    claim_job(database)
    end_lease(database, job_id)
    wait_until(lambda: get_job(database, job_id).status == "queued")
    sweeper.stop(timeout_s=5)


def test_uploads(context: Context, root: Path, database: Database) -> None:
    with database.writing() as session:
        waiting = upload(session, context.storage, b"1")
        failed = upload(session, context.storage, b"2")
        session.get_one(Dataset, failed).status = "failed"
    uploads = root / "uploads"
    for name in (waiting, failed, "ds_half.part", "ds_gone"):
        (uploads / name).touch()
        _age(uploads / name)
    (uploads / "ds_new.part").touch()
    purge(context)
    assert {path.name for path in uploads.iterdir()} == {waiting, "ds_new.part"}


def test_ingestion_runs(context: Context, root: Path, database: Database) -> None:
    with database.writing() as session:
        running = add_dataset(session, status="running", attempt=2, lease_until=9e9, owner="x").id
        ready = add_dataset(session).id
    for row_id in (running, ready, "ds_gone"):
        _make(root / "runs" / row_id)
    for attempt in (1, 2):
        (root / "runs" / running / f"a{attempt}").mkdir()
    _make(root / "runs" / "ds_new", age_s=0)
    purge(context)
    assert {path.name for path in (root / "runs").iterdir()} == {running, "ds_new"}
    assert not (root / "runs" / running / "a1").exists()
    assert (root / "runs" / running / "a2").exists()


def test_stores_and_models(context: Context, root: Path, database: Database) -> None:
    with database.writing() as session:
        add_dataset(session, store="stores/used")
        session.add(Model(id="mdl_used", created_at=0.0, size_bytes=0, info={}))
    for folder in ("stores", "models"):
        prefix = "mdl_" if folder == "models" else ""
        _make(root / folder / f"{prefix}used")
        _make(root / folder / f"{prefix}unused")
        _make(root / folder / f"{prefix}young", age_s=60)
    purge(context)
    assert {path.name for path in (root / "stores").iterdir()} == {"used", "young"}
    assert {path.name for path in (root / "models").iterdir()} == {"mdl_used", "mdl_young"}


def test_job_runs(context: Context, root: Path, database: Database) -> None:
    ended, running = add_jobs(database, count=2)
    for _ in range(2):
        lease = claim_job(database)
        with database.writing() as session:
            lifecycle.release(session, lease, "")
    lease = claim_job(database)
    with database.writing() as session:
        for job_id in (ended, running):
            for attempt in (1, 2):
                session.add(_checkpoint(job_id, attempt))
                _make(root / "jobs" / job_id / f"a{attempt}")
        session.get_one(Job, running).attempt = 3
    assert lease.id == ended
    with database.writing() as session:
        lifecycle.finish(session, lease, Ending("succeeded"))
    _make(root / "jobs" / ended / "a3")
    _make(root / "jobs" / "job_gone")
    purge(context)
    left = {str(path.relative_to(root / "jobs")) for path in (root / "jobs").glob("*/a*")}
    assert left == {f"{ended}/a3", f"{running}/a1", f"{running}/a2"}
    assert not (root / "jobs" / "job_gone").exists()
    with database.reading() as session:
        kept = session.execute(select(Checkpoint.job_id, Checkpoint.attempt)).all()
    assert sorted(tuple(row) for row in kept) == [(running, 1), (running, 2)]


def test_an_earlier_attempt_with_the_best_checkpoint_stays(
    context: Context, root: Path, database: Database
) -> None:
    (job,) = add_jobs(database)
    for _ in range(2):
        lease = claim_job(database)
        with database.writing() as session:
            lifecycle.release(session, lease, "")
    lease = claim_job(database)
    with database.writing() as session:
        for attempt in (1, 2, 3):
            session.add(_checkpoint(job, attempt, best=attempt == 2))
            _make(root / "jobs" / job / f"a{attempt}")
        lifecycle.finish(session, lease, Ending("succeeded"))
    purge(context)
    assert {path.name for path in (root / "jobs" / job).iterdir()} == {"a2", "a3"}
    with database.reading() as session:
        kept = session.scalars(select(Checkpoint.attempt).order_by(Checkpoint.attempt))
        assert kept.all() == [2, 3]


def test_workers_not_seen_for_long(context: Context, database: Database) -> None:
    with database.writing() as session:
        session.add(WorkerSeen(id="old", seen_at=1.0, info={}))
        session.add(WorkerSeen(id="new", seen_at=time.time(), info={}))
    purge(context)
    with database.reading() as session:
        assert session.scalars(select(WorkerSeen.id)).all() == ["new"]


def _checkpoint(job_id: str, attempt: int, *, best: bool = False) -> Checkpoint:
    return Checkpoint(
        id=f"ckpt_{job_id[-4:]}_{attempt}",
        job_id=job_id,
        attempt=attempt,
        name="a",
        stage="s",
        step=1,
        path="x",
        files={},
        best=best,
        created_at=0.0,
    )
