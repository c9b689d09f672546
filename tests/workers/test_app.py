"""Worker processes as they are run: alone, and as Celery workers on a real Redis."""

import os
import signal
import sqlite3
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from pydantic import SecretStr

from service.db import Database, make_engine
from service.jobs import control
from service.queue import Announcer
from service.settings import Settings
from service.storage import Storage
from tests.servers import Server
from tests.workers.processes import WorkerProcess, children_of
from tests.workers.rows import add_jobs, get_job, scaled, wait_until

StartWorker = Callable[..., WorkerProcess]


@pytest.fixture(params=["alone", "celery"])
def broker(request: pytest.FixtureRequest) -> Server | None:
    """No broker, or a private Redis."""
    if request.param == "alone":
        return None
    server: Server = request.getfixturevalue("killable_redis")
    return server


@pytest.fixture
def settings(sqlite_settings: Settings, broker: Server | None) -> Settings:
    """SQLite, with or without a broker."""
    url = SecretStr(broker.url) if broker else None
    return scaled(sqlite_settings).model_copy(update={"broker_url": url})


@pytest.fixture
def start_worker(tmp_path: Path) -> Iterator[StartWorker]:
    """Start workers and wait until they are ready; all are killed at the end."""
    started: list[WorkerProcess] = []

    def start(settings: Settings, *, ready: str = "slots") -> WorkerProcess:
        worker = WorkerProcess(settings, tmp_path / f"worker{len(started)}.log")
        started.append(worker)
        wait_until(lambda: ready in worker.log.read_text())
        return worker

    yield start
    for worker in started:
        worker.kill()


@pytest.fixture
def worker(settings: Settings, broker: Server | None, start_worker: StartWorker) -> WorkerProcess:
    """A worker that is ready, with its consumer if it has one."""
    return start_worker(settings, ready="ready." if broker else "slots")


def _start_long_job(settings: Settings, database: Database, **stub: object) -> str:
    (job_id,) = add_jobs(database, stub={"work_s": 60.0} | stub)
    run = Storage(settings.data_dir).job_run(job_id, 1).root
    mark = "ignoring" if stub.get("mode") == "ignore SIGTERM" else "step"
    wait_until((run / mark).exists)
    return job_id


def test_sigterm_gives_the_job_back(
    settings: Settings, database: Database, worker: WorkerProcess
) -> None:
    job_id = _start_long_job(settings, database)
    assert worker.terminate(timeout_s=15) == 0
    job = get_job(database, job_id)
    assert (job.status, job.attempt, job.lost_attempts) == ("queued", 1, 0)
    assert children_of(settings.data_dir) == []


def test_sigterm_does_not_wait_for_a_stubborn_child(
    settings: Settings, database: Database, worker: WorkerProcess
) -> None:
    job_id = _start_long_job(settings, database, mode="ignore SIGTERM")
    assert worker.terminate(timeout_s=settings.grace_s + 6) == 0
    assert get_job(database, job_id).status == "queued"
    assert children_of(settings.data_dir) == []


def test_cancel(settings: Settings, database: Database, worker: WorkerProcess) -> None:
    job_id = _start_long_job(settings, database)
    with database.writing() as session:
        control.request_cancel(session, job_id)
    wait_until(lambda: get_job(database, job_id).status == "cancelled")
    assert worker.process.poll() is None


@pytest.mark.slow
def test_a_killed_worker_leaves_no_child_and_its_job_is_repeated(
    settings: Settings, database: Database, worker: WorkerProcess, start_worker: StartWorker
) -> None:
    (job_id,) = add_jobs(database, stub={"work_s": 2.0})
    wait_until(lambda: children_of(settings.data_dir))
    worker.kill()
    wait_until(lambda: not children_of(settings.data_dir), timeout_s=settings.grace_s + 3)
    assert get_job(database, job_id).status == "running"
    successor = start_worker(settings)
    wait_until(lambda: get_job(database, job_id).status == "succeeded", timeout_s=30)
    assert get_job(database, job_id).lost_attempts == 1
    assert successor.terminate(timeout_s=15) == 0


@pytest.mark.slow
def test_a_frozen_worker_loses_its_job_and_its_child(
    settings: Settings, database: Database, worker: WorkerProcess, start_worker: StartWorker
) -> None:
    job_id = _start_long_job(settings, database)
    (child,) = children_of(settings.data_dir)
    _freeze(worker, settings)
    successor = start_worker(settings)
    wait_until(lambda: get_job(database, job_id).attempt == 2, timeout_s=30)
    wait_until(lambda: child not in children_of(settings.data_dir) or _zombie(child))
    os.kill(worker.process.pid, signal.SIGCONT)
    wait_until(lambda: "lost its lease" in worker.log.read_text())
    job = get_job(database, job_id)
    assert (job.status, job.attempt) == ("running", 2)
    assert successor.terminate(timeout_s=15) == 0


def test_a_hint_starts_the_job_at_once(
    sqlite_settings: Settings, killable_redis: Server, start_worker: StartWorker
) -> None:
    settings = scaled(sqlite_settings, poll_s=60.0, reap_s=60.0).model_copy(
        update={"broker_url": SecretStr(killable_redis.url)}
    )
    database = Database(make_engine(settings))
    worker = start_worker(settings, ready="ready.")
    time.sleep(1)  # until it waits for its next poll
    announcer = Announcer(settings)
    (job_id,) = add_jobs(database)
    announcer.announce("job", job_id)
    wait_until(lambda: get_job(database, job_id).status != "queued", timeout_s=3)
    announcer.close()
    assert worker.terminate(timeout_s=70) == 0
    database.dispose()


def test_a_worker_works_and_stops_while_the_broker_is_down(
    sqlite_settings: Settings,
    killable_redis: Server,
    start_worker: StartWorker,
    database: Database,
) -> None:
    settings = scaled(sqlite_settings).model_copy(
        update={"broker_url": SecretStr(killable_redis.url)}
    )
    killable_redis.kill()
    worker = start_worker(settings)
    (job_id,) = add_jobs(database)
    wait_until(lambda: get_job(database, job_id).status == "succeeded")
    assert worker.terminate(timeout_s=20) == 0


def test_a_database_that_is_not_migrated_is_refused(
    tmp_path: Path, start_worker: StartWorker
) -> None:
    worker = start_worker(scaled(Settings(data_dir=tmp_path)), ready="ctune migrate")
    assert worker.process.wait(20) == 1


def _freeze(worker: WorkerProcess, settings: Settings) -> None:
    """Stop a worker between two transactions: SQLite has one writer, and waits for a frozen one."""
    for _ in range(50):
        os.kill(worker.process.pid, signal.SIGSTOP)
        with closing(sqlite3.connect(settings.data_dir / "ctune.sqlite", timeout=0.2)) as probe:
            try:
                probe.execute("BEGIN IMMEDIATE")
                return
            except sqlite3.OperationalError:
                os.kill(worker.process.pid, signal.SIGCONT)
        time.sleep(0.05)
    raise AssertionError("the worker holds the write lock all the time")


def _zombie(pid: int) -> bool:
    shown = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return shown.stdout.startswith("Z")
