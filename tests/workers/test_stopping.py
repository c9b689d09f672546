"""Children that are cancelled, stopped, lost, or do not end by themselves."""

import time
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy import func, select, update

from service.db import Database, make_engine, migrate
from service.jobs import control, lifecycle
from service.settings import Settings
from service.storage import Storage
from service.tables import (
    Job,
    JobTransition,
    Metric,
    WorkerSeen,
)
from tests.servers import Server
from tests.workers.conftest import StartSupervisor
from tests.workers.rows import (
    add_jobs,
    claim_job,
    get_job,
    job_ended,
    job_error,
    job_running,
    scaled,
    wait_until,
)
from workers.supervisor import Supervisor

on_sqlite = pytest.mark.parametrize("settings", ["sqlite"], indirect=True)


@pytest.mark.parametrize("mode", ["finish", "ignore SIGTERM"])
def test_cancel(
    settings: Settings, database: Database, start_supervisor: StartSupervisor, mode: str
) -> None:
    (job_id,) = add_jobs(database, stub={"mode": mode, "work_s": 60.0})
    start_supervisor(beat_s=60.0)
    job_running(database, settings, job_id, "step" if mode == "finish" else "ignoring")
    with database.writing() as session:
        control.request_cancel(session, job_id)
    job = job_ended(database, job_id)
    assert (job.status, job.error, job.attempt) == ("cancelled", None, 1)


@on_sqlite
def test_a_job_that_takes_too_long_fails(
    database: Database, start_supervisor: StartSupervisor
) -> None:
    (job_id,) = add_jobs(database, stub={"work_s": 60.0}, resources={"max_duration_s": 1})
    start_supervisor()
    assert job_error(job_ended(database, job_id))["code"] == "max_duration"


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
    assert job_error(job_ended(database, job_id))["code"] == "max_duration"


@on_sqlite
def test_stopping_gives_the_job_back_and_another_worker_goes_on(
    settings: Settings, database: Database, start_supervisor: StartSupervisor
) -> None:
    (job_id,) = add_jobs(database, stub={"work_s": 2.0})
    supervisor = start_supervisor()
    run = job_running(database, settings, job_id, "step")
    supervisor.stop()
    job = get_job(database, job_id)
    assert (job.status, job.attempt, job.lost_attempts) == ("queued", 1, 0)
    assert '"stopped"' in (run / "events.jsonl").read_text()
    with database.reading() as session:
        assert session.scalars(select(WorkerSeen.id)).all() == []
    start_supervisor()
    assert job_ended(database, job_id).status == "succeeded"


@on_sqlite
def test_stopping_does_not_wait_for_a_child_that_ignores_it(
    settings: Settings, database: Database, start_supervisor: StartSupervisor
) -> None:
    (job_id,) = add_jobs(database, stub={"mode": "ignore SIGTERM"})
    supervisor = start_supervisor()
    job_running(database, settings, job_id, "ignoring")
    supervisor.stop()
    assert get_job(database, job_id).status == "queued"


@on_sqlite
def test_a_worker_that_lost_its_lease_kills_the_child_and_writes_nothing(
    settings: Settings, database: Database, start_supervisor: StartSupervisor
) -> None:
    (job_id,) = add_jobs(database, stub={"mode": "ignore SIGTERM"})
    start_supervisor()
    run = job_running(database, settings, job_id, "ignoring")
    with database.writing() as session:
        session.execute(update(Job).values(owner="another", attempt=2))
    wait_until(lambda: not _holders(run))
    time.sleep(0.3)
    job = get_job(database, job_id)
    assert (job.status, job.owner, job.attempt) == ("running", "another", 2)


def test_a_database_that_is_away_for_a_while_costs_no_attempt(
    tmp_path: Path, killable_postgres: Server
) -> None:
    url = killable_postgres.url.replace("postgresql:", "postgresql+psycopg:")
    settings = scaled(Settings(data_dir=tmp_path, database_url=SecretStr(url)), fence_s=5.0)
    migrate(settings)
    database = Database(make_engine(settings))
    during, before = add_jobs(database, count=2, stub={"work_s": 1.0})
    supervisor = Supervisor(settings, database)
    supervisor.start()
    job_running(database, settings, during, "step")
    killable_postgres.kill()
    time.sleep(2.5)  # the child ends meanwhile
    killable_postgres.start()
    for job_id in (during, before):
        job = job_ended(database, job_id)
        assert (job.status, job.attempt) == ("succeeded", 1)
    with database.reading() as session:
        assert session.scalar(select(func.count()).select_from(Metric)) == 40
    supervisor.stop()
    assert not supervisor.broken
    database.dispose()


@on_sqlite
def test_a_supervisor_that_breaks_says_so_and_gives_its_jobs_back(
    settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    (job_id,) = add_jobs(database, stub={"work_s": 60.0})
    supervisor = Supervisor(scaled(settings), database)
    said: list[bool] = []
    supervisor.on_broken = lambda: said.append(supervisor.broken)
    supervisor.start()
    job_running(database, settings, job_id, "step")
    monkeypatch.setattr(supervisor, "_round", lambda: 1 / 0)
    wait_until(lambda: not supervisor.alive)
    assert said == [True]
    assert get_job(database, job_id).status == "queued"


@on_sqlite
def test_a_child_that_has_finished_but_does_not_end_is_killed(
    database: Database, start_supervisor: StartSupervisor
) -> None:
    (job_id,) = add_jobs(database, stub={"mode": "finish and hang"})
    start_supervisor()
    assert job_ended(database, job_id).status == "succeeded"


@on_sqlite
def test_nothing_of_the_childs_group_is_left(
    settings: Settings, database: Database, start_supervisor: StartSupervisor
) -> None:
    (job_id,) = add_jobs(database, stub={"mode": "leave a helper"})
    start_supervisor()
    assert job_ended(database, job_id).status == "succeeded"
    helper = Storage(settings.data_dir).job_run(job_id, 1).root / "helper"
    wait_until(lambda: not _alive(int(helper.read_text())))


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
