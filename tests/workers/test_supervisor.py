"""A real supervisor with real children that finish, fail, hang, die and lie."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select, update

from service.db import Database
from service.jobs import lifecycle
from service.settings import Settings
from service.storage import Storage
from service.tables import (
    Checkpoint,
    Dataset,
    Job,
    JobEvent,
    JobTransition,
    Metric,
    Model,
    WorkerSeen,
)
from tests.workers.conftest import StartSupervisor
from tests.workers.rows import add_job, add_jobs, claim_job, get_job, upload, wait_until

on_sqlite = pytest.mark.parametrize("settings", ["sqlite"], indirect=True)


def _ended(database: Database, job_id: str) -> Job:
    wait_until(lambda: get_job(database, job_id).status in lifecycle.TERMINAL)
    return get_job(database, job_id)


def _running(database: Database, settings: Settings, job_id: str, mark: str) -> Path:
    """Wait until a job's child has left a mark in its run directory, and return that directory."""
    run = Storage(settings.data_dir).job_run(job_id, 1).root
    wait_until((run / mark).exists)
    assert get_job(database, job_id).status == "running"
    return run


def _error(job: Job) -> dict[str, Any]:
    assert job.status == "failed", job.error
    assert job.error is not None
    return job.error


def test_a_job_runs_to_its_model(
    settings: Settings, database: Database, start_supervisor: StartSupervisor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("CTUNE_DATABASE_URL", "secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    (job_id,) = add_jobs(database, name="roses", stub={"work_s": 0.3})
    start_supervisor(gpus="5,6")
    job = _ended(database, job_id)
    assert job.status == "succeeded"
    assert job.result is not None
    seen = job.result["seen"]
    storage = Storage(settings.data_dir)
    run = storage.job_run(job_id, 1).root
    environment = seen["environment"]
    told = {name: value for name, value in environment.items() if name.startswith("CTUNE_")}
    assert told == {
        "CTUNE_PARENT_PID": str(os.getpid()),
        "CTUNE_FENCE_S": "4.0",
        "CTUNE_GRACE_S": "1.0",
        "CTUNE_ATTEMPT": "1",
    }
    assert "secret" not in environment.values()
    assert (environment["CUDA_VISIBLE_DEVICES"], environment["OMP_NUM_THREADS"]) == ("5", "3")
    assert seen["file"] == {
        "config": job.config,
        "data": str(storage.root / "stores/x"),
        "resume_from": [],
        "encoder_dir": None,
        "job_id": job_id,
    }
    assert not (run / "model").exists()
    with database.reading() as session:
        model = session.get_one(Model, job.model_id)
        assert (model.name, model.job_id, model.info) == ("roses", job_id, {"embed_dim": 8})
        assert session.scalar(select(func.count()).select_from(Metric)) == 6
        assert [c.name for c in session.scalars(select(Checkpoint))] == ["second"]
        kinds = session.scalars(
            select(JobEvent.kind).where(JobEvent.seq.is_not(None)).order_by(JobEvent.seq)
        )
        assert list(kinds) == [
            "started", "stage", "checkpoint", "checkpoint", "warning", "finished",
        ]  # fmt: skip
    assert (storage.model(model.id) / "model.json").exists()
    assert job.progress is not None
    assert job.progress["fraction"] == 1.0
    assert job.phase == "contrastive"


@pytest.mark.parametrize(
    ("mode", "code", "attempts"),
    [
        ("fail", "data_error", 1),
        ("flaky", "flaky", 2),
        ("exit", "no_result", 1),
        ("no model", "no_result", 1),
        ("nonsense", "bad_event", 1),
        ("crash", "crashed", 2),
        ("die", "crashed", 2),
        ("half a line", "crashed", 2),
    ],
)
@on_sqlite
def test_a_job_that_cannot_succeed_fails(
    database: Database, start_supervisor: StartSupervisor, mode: str, code: str, attempts: int
) -> None:
    (job_id,) = add_jobs(database, stub={"mode": mode})
    start_supervisor(max_attempts=2)
    job = _ended(database, job_id)
    error = _error(job)
    assert (error["code"], job.attempt, job.model_id) == (code, attempts, None)
    if mode == "fail":
        assert (error["message"], error["hint"], error["fault"]) == (
            "the images are blank", "upload others", "user",
        )  # fmt: skip
    if mode == "crash":
        assert "exit code 7" in error["message"]
        assert error["log_tail"] == "line one\nlast words"
    if mode == "die":
        assert "ran out of memory" in error["hint"]


def test_a_killed_child_is_repeated_and_resumes(
    settings: Settings, database: Database, start_supervisor: StartSupervisor
) -> None:
    (job_id,) = add_jobs(database, stub={"work_s": 2.0})
    start_supervisor()
    run = _running(database, settings, job_id, "step")
    wait_until(lambda: int((run / "step").read_text() or 0) >= 5)
    with database.reading() as session:
        wanted = select(JobEvent).where(JobEvent.kind == "started")
        started = session.scalars(wanted).one()
    os.kill(started.data["details"]["pid"], signal.SIGKILL)
    job = _ended(database, job_id)
    assert (job.status, job.attempt, job.lost_attempts, job.error) == ("succeeded", 2, 1, None)
    assert job.result is not None
    assert job.result["seen"]["file"]["resume_from"] == [str(run)]
    with database.reading() as session:
        resumed = session.scalars(
            select(JobEvent).where(JobEvent.kind == "stage", JobEvent.attempt == 2)
        ).one()
        steps = session.scalars(select(Metric.step).order_by(Metric.step))
        assert list(steps) == list(range(1, 41))
    assert resumed.data["step"] >= 5


@pytest.mark.parametrize("mode", ["finish", "ignore SIGTERM"])
def test_cancel(
    settings: Settings, database: Database, start_supervisor: StartSupervisor, mode: str
) -> None:
    (job_id,) = add_jobs(database, stub={"mode": mode, "work_s": 60.0})
    start_supervisor(beat_s=60.0)
    _running(database, settings, job_id, "step" if mode == "finish" else "ignoring")
    with database.writing() as session:
        lifecycle.request_cancel(session, job_id)
    asked = time.monotonic()
    job = _ended(database, job_id)
    assert (job.status, job.error, job.attempt) == ("cancelled", None, 1)
    assert time.monotonic() - asked < 5
    if mode == "ignore SIGTERM":
        assert time.monotonic() - asked > 0.9


@on_sqlite
def test_a_job_that_takes_too_long_fails(
    database: Database, start_supervisor: StartSupervisor
) -> None:
    (job_id,) = add_jobs(database, stub={"work_s": 60.0}, resources={"max_duration_s": 1})
    start_supervisor()
    assert _error(_ended(database, job_id))["code"] == "max_duration"


@on_sqlite
def test_earlier_attempts_count_towards_the_limit(
    database: Database, start_supervisor: StartSupervisor
) -> None:
    (job_id,) = add_jobs(database, stub={"work_s": 2.0}, resources={"max_duration_s": 60})
    lease = claim_job(database)
    with database.writing() as session:
        stay = session.scalars(select(JobTransition).where(JobTransition.status == "running")).one()
        stay.started_at -= 100
        lifecycle.release(session, lease, "the worker stops")
    start_supervisor()
    assert _error(_ended(database, job_id))["code"] == "max_duration"


@on_sqlite
def test_a_child_that_has_finished_but_does_not_end_is_killed(
    database: Database, start_supervisor: StartSupervisor
) -> None:
    (job_id,) = add_jobs(database, stub={"mode": "finish and hang"})
    start_supervisor()
    assert _ended(database, job_id).status == "succeeded"


@on_sqlite
def test_nothing_of_the_childs_group_is_left(
    settings: Settings, database: Database, start_supervisor: StartSupervisor
) -> None:
    (job_id,) = add_jobs(database, stub={"mode": "leave a helper"})
    start_supervisor()
    assert _ended(database, job_id).status == "succeeded"
    helper = Storage(settings.data_dir).job_run(job_id, 1).root / "helper"
    wait_until(lambda: not _alive(int(helper.read_text())))


@on_sqlite
def test_stopping_gives_the_job_back_and_another_worker_goes_on(
    settings: Settings, database: Database, start_supervisor: StartSupervisor
) -> None:
    (job_id,) = add_jobs(database, stub={"work_s": 2.0})
    supervisor = start_supervisor()
    run = _running(database, settings, job_id, "step")
    supervisor.stop()
    job = get_job(database, job_id)
    assert (job.status, job.attempt, job.lost_attempts) == ("queued", 1, 0)
    assert '"stopped"' in (run / "events.jsonl").read_text()
    with database.reading() as session:
        assert session.scalars(select(WorkerSeen.id)).all() == []
    start_supervisor()
    assert _ended(database, job_id).status == "succeeded"


@on_sqlite
def test_stopping_does_not_wait_for_a_child_that_ignores_it(
    settings: Settings, database: Database, start_supervisor: StartSupervisor
) -> None:
    (job_id,) = add_jobs(database, stub={"mode": "ignore SIGTERM"})
    supervisor = start_supervisor()
    _running(database, settings, job_id, "ignoring")
    begun = time.monotonic()
    supervisor.stop()
    assert time.monotonic() - begun < 4
    assert get_job(database, job_id).status == "queued"


@on_sqlite
def test_a_worker_that_lost_its_lease_kills_the_child_and_writes_nothing(
    settings: Settings, database: Database, start_supervisor: StartSupervisor
) -> None:
    (job_id,) = add_jobs(database, stub={"mode": "ignore SIGTERM"})
    start_supervisor()
    run = _running(database, settings, job_id, "ignoring")
    with database.writing() as session:
        session.execute(update(Job).values(owner="another", attempt=2))
    wait_until(lambda: not _holders(run))
    time.sleep(0.3)
    job = get_job(database, job_id)
    assert (job.status, job.owner, job.attempt) == ("running", "another", 2)


@on_sqlite
def test_what_a_job_needs_may_be_gone(
    database: Database, start_supervisor: StartSupervisor
) -> None:
    with database.writing() as session:
        without_data = add_job(session, "ds_gone").id
    (without_model,) = add_jobs(database)
    with database.writing() as session:
        job = session.get_one(Job, without_model)
        job.config = job.config | {"encoder": {"source": "model", "id": "mdl_gone"}}
    start_supervisor()
    assert _error(_ended(database, without_data))["code"] == "dataset_gone"
    assert _error(_ended(database, without_model))["code"] == "model_gone"


@on_sqlite
def test_a_program_that_does_not_exist(
    database: Database, start_supervisor: StartSupervisor
) -> None:
    (job_id,) = add_jobs(database)
    start_supervisor(train_command=["/no/such/program"], max_attempts=1)
    error = _error(_ended(database, job_id))
    assert error["code"] == "worker_error"
    assert "/no/such/program" in error["message"]


@on_sqlite
def test_slots_and_gpus_bound_what_runs_at_once(
    database: Database, start_supervisor: StartSupervisor
) -> None:
    ids = add_jobs(database, count=4, stub={"work_s": 1.0})
    wide = add_jobs(database, gpus=2)[0]
    start_supervisor(slots=3, gpus="0,1")
    most = 0
    while get_job(database, ids[-1]).status not in lifecycle.TERMINAL:
        with database.reading() as session:
            running = session.scalars(select(Job).where(Job.status == "running")).all()
        most = max(most, sum(1 if job.gpus is None else job.gpus for job in running))
        time.sleep(0.05)
    assert most == 2
    assert _ended(database, wide).status == "succeeded"


def test_a_data_set_becomes_ready_beside_a_running_job(
    settings: Settings, database: Database, start_supervisor: StartSupervisor
) -> None:
    (job_id,) = add_jobs(database, stub={"work_s": 60.0})
    start_supervisor(slots=1)
    wait_until(lambda: get_job(database, job_id).status == "running")
    storage = Storage(settings.data_dir)
    with database.writing() as session:
        first = upload(session, storage, b"archive")
        second = upload(session, storage, b"archive")

    def data_set(row_id: str) -> Dataset:
        with database.reading() as session:
            return session.get_one(Dataset, row_id)

    for row_id in (first, second):
        wait_until(lambda row_id=row_id: data_set(row_id).status == "ready")  # type: ignore[misc]
        row = data_set(row_id)
        assert (row.summary, row.report) == ({"num_images": 1}, {"layout": "flat"})
        assert row.store is not None
        assert (storage.absolute(row.store) / "manifest.json").exists()
        wait_until(lambda row=row: not storage.absolute(row.upload).exists())  # type: ignore[misc]
        wait_until(lambda row=row: not (storage.root / "runs" / row.id).exists())  # type: ignore[misc]
    assert data_set(first).store == data_set(second).store


@on_sqlite
def test_an_ingestion_that_fails(
    settings: Settings, database: Database, start_supervisor: StartSupervisor
) -> None:
    with database.writing() as session:
        row_id = upload(session, Storage(settings.data_dir), b"archive", mode="fail")
    start_supervisor()

    def row() -> Dataset:
        with database.reading() as session:
            return session.get_one(Dataset, row_id)

    wait_until(lambda: row().status == "failed")
    error = row().error
    assert error is not None
    assert error["code"] == "data_error"


@on_sqlite
def test_workers_are_seen(database: Database, start_supervisor: StartSupervisor) -> None:
    supervisor = start_supervisor(slots=4, gpus="0")

    def seen() -> WorkerSeen | None:
        with database.reading() as session:
            return session.get(WorkerSeen, supervisor.name)

    wait_until(lambda: seen() is not None)
    row = seen()
    assert row is not None
    assert (row.info["slots"], row.info["gpus"]) == (4, 1)
    before = row.seen_at
    wait_until(lambda: (again := seen()) is not None and again.seen_at > before)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except FileNotFoundError:
        return False


def _holders(run: Path) -> list[str]:
    """Return the processes that have a run directory on their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command = (process / "cmdline").read_text()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if str(run) in command:
            found.append(process.name)
    return found
