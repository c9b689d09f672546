"""Jobs that clients stop early, pause and resume while real children run them."""

import signal
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from service.db import Database
from service.jobs import control
from service.settings import Settings
from service.tables import Job, JobEvent
from tests.workers.conftest import StartSupervisor
from tests.workers.processes import WorkerProcess
from tests.workers.rows import (
    add_jobs,
    claim_job,
    get_job,
    job_ended,
    job_running,
    scaled,
    stays,
    wait_until,
)

on_sqlite = pytest.mark.parametrize("settings", ["sqlite"], indirect=True)
LONG_S = 60.0


def ask(database: Database, job_id: str, name: str) -> None:
    request = getattr(control, f"request_{name}")
    with database.writing() as session:
        request(session, job_id)


def seen(job: Job) -> dict[str, Any]:
    """Return what the stub told of the last attempt."""
    assert job.result is not None, job.error
    found: dict[str, Any] = job.result["seen"]
    return found


def becomes(database: Database, job_id: str, status: str) -> Job:
    wait_until(lambda: get_job(database, job_id).status == status)
    return get_job(database, job_id)


def test_a_stopped_job_succeeds_early(
    settings: Settings, database: Database, start_supervisor: StartSupervisor
) -> None:
    (job_id,) = add_jobs(database, stub={"work_s": LONG_S})
    start_supervisor(beat_s=60.0)
    run = job_running(database, settings, job_id, "step")
    ask(database, job_id, "stop")
    job = job_ended(database, job_id)
    assert (job.status, job.attempt, job.error) == ("succeeded", 1, None)
    assert job.model_id is not None
    assert 0 < seen(job)["steps"] < LONG_S / 0.05
    assert (run / "finish").exists()


@on_sqlite
def test_a_job_whose_worker_is_killed_after_the_stop_finishes_early(
    settings: Settings, database: Database, tmp_path: Path
) -> None:
    own = scaled(settings, lease_s=1.5, fence_s=0.7, grace_s=0.3)
    (job_id,) = add_jobs(database, stub={"work_s": LONG_S})
    first = WorkerProcess(own, tmp_path / "first.log")
    job_running(database, own, job_id, "step")
    with database.writing() as session:
        control.request_stop(session, job_id)
        # While we hold the write lock it does not; frozen, it cannot tell its child any more.
        first.process.send_signal(signal.SIGSTOP)
    first.kill()
    second = WorkerProcess(own, tmp_path / "second.log")
    try:
        job = job_ended(database, job_id)
    finally:
        second.terminate(20)
    assert (job.status, job.attempt) == ("succeeded", 2)
    assert seen(job)["file"]["finish"] is True
    assert seen(job)["steps"] < LONG_S / 0.05


def test_a_paused_job_frees_its_slot_and_goes_on_where_it_was(
    settings: Settings, database: Database, start_supervisor: StartSupervisor
) -> None:
    first, second = add_jobs(database, 2, stub={"work_s": 2.0})
    start_supervisor(slots=1, beat_s=60.0)
    run = job_running(database, settings, first, "step")
    ask(database, first, "pause")
    ask(database, first, "pause")
    paused = becomes(database, first, "paused")
    assert (paused.owner, paused.lease_until, paused.lost_attempts) == (None, None, 0)
    assert '"stopped"' in (run / "events.jsonl").read_text()
    assert job_ended(database, second).status == "succeeded"
    assert get_job(database, first).status == "paused", "nobody takes it"
    ask(database, first, "resume")
    job = job_ended(database, first)
    assert (job.status, job.attempt) == ("succeeded", 2)
    assert seen(job)["file"]["resume_from"] == [str(run)]
    with database.reading() as session:
        said = select(JobEvent.data).where(JobEvent.job_id == first, JobEvent.kind == "stage")
        resumed_at = [data["step"] for data in session.scalars(said.order_by(JobEvent.id))]
    assert resumed_at[0] == 0 and resumed_at[1] >= 1
    history = [stay.status for stay in stays(database, first) if stay.phase is None]
    assert history == ["queued", "running"]
    assert [stay.status for stay in stays(database, first)].count("paused") == 1


@on_sqlite
def test_a_child_that_ignores_the_pause_is_killed_and_paused(
    settings: Settings, database: Database, start_supervisor: StartSupervisor
) -> None:
    (job_id,) = add_jobs(database, stub={"mode": "ignore SIGTERM"})
    start_supervisor()
    job_running(database, settings, job_id, "ignoring")
    ask(database, job_id, "pause")
    assert becomes(database, job_id, "paused").lost_attempts == 0


@on_sqlite
@pytest.mark.parametrize("mode", ["finish", "ignore SIGTERM"])
def test_cancel_wins_over_a_pause_and_a_stop(
    settings: Settings, database: Database, start_supervisor: StartSupervisor, mode: str
) -> None:
    (job_id,) = add_jobs(database, stub={"mode": mode, "work_s": LONG_S})
    start_supervisor(grace_s=2.0)
    job_running(database, settings, job_id, "step" if mode == "finish" else "ignoring")
    for name in ("pause", "stop", "cancel"):
        ask(database, job_id, name)
    job = job_ended(database, job_id)
    assert (job.status, job.model_id) == ("cancelled", None)


@on_sqlite
def test_stopped_then_paused_it_finishes_early_once_resumed(
    database: Database, start_supervisor: StartSupervisor
) -> None:
    (job_id,) = add_jobs(database, stub={"work_s": LONG_S})
    claim_job(database, owner="gone")
    ask(database, job_id, "stop")
    ask(database, job_id, "pause")
    with database.writing() as session:
        session.get_one(Job, job_id).lease_until = 0.0
    start_supervisor()
    becomes(database, job_id, "paused")
    ask(database, job_id, "resume")
    job = job_ended(database, job_id)
    assert (job.status, seen(job)["file"]["finish"], seen(job)["steps"]) == ("succeeded", True, 1)


@on_sqlite
def test_paused_time_does_not_use_up_the_time_of_a_job(
    settings: Settings, database: Database, start_supervisor: StartSupervisor
) -> None:
    (job_id,) = add_jobs(database, stub={"work_s": 1.0}, resources={"max_duration_s": 60})
    ask(database, job_id, "pause")
    with database.writing() as session:
        for stay in stays(database, job_id):
            session.merge(stay).started_at -= 1000
    ask(database, job_id, "resume")
    start_supervisor()
    assert job_ended(database, job_id).status == "succeeded"
