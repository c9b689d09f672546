"""A real supervisor with real children that finish, fail, die and lie."""

import os
import signal
import time

import pytest
from sqlalchemy import func, select

from service.db import Database
from service.jobs.states import TERMINAL
from service.settings import Settings
from service.storage import Storage
from service.tables import (
    Checkpoint,
    Job,
    JobEvent,
    Metric,
    Model,
    WorkerSeen,
)
from tests.workers.conftest import StartSupervisor
from tests.workers.rows import (
    add_jobs,
    get_job,
    job_ended,
    job_error,
    job_running,
    wait_until,
)

on_sqlite = pytest.mark.parametrize("settings", ["sqlite"], indirect=True)


def test_a_job_runs_to_its_model(
    settings: Settings, database: Database, start_supervisor: StartSupervisor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("CTUNE_DATABASE_URL", "secret")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    (job_id,) = add_jobs(database, name="roses", stub={"work_s": 0.3})
    start_supervisor(gpus="5,6")
    job = job_ended(database, job_id)
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
        "CTUNE_LEASE_S": "6.0",
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
        "finish": False,
        "allow_noncommercial_weights": False,
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
    job = job_ended(database, job_id)
    error = job_error(job)
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
    run = job_running(database, settings, job_id, "step")
    wait_until(lambda: int((run / "step").read_text() or 0) >= 5)
    with database.reading() as session:
        wanted = select(JobEvent).where(JobEvent.kind == "started")
        started = session.scalars(wanted).one()
    os.kill(started.data["details"]["pid"], signal.SIGKILL)
    job = job_ended(database, job_id)
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


@on_sqlite
def test_a_program_that_does_not_exist(
    database: Database, start_supervisor: StartSupervisor
) -> None:
    (job_id,) = add_jobs(database)
    start_supervisor(train_command=["/no/such/program"], max_attempts=1)
    error = job_error(job_ended(database, job_id))
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
    while get_job(database, ids[-1]).status not in TERMINAL:
        with database.reading() as session:
            running = session.scalars(select(Job).where(Job.status == "running")).all()
        most = max(most, sum(1 if job.gpus is None else job.gpus for job in running))
        time.sleep(0.05)
    assert most == 2
    result = job_ended(database, wide).result
    assert result is not None
    assert sorted(result["seen"]["environment"]["CUDA_VISIBLE_DEVICES"].split(",")) == ["0", "1"]


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
