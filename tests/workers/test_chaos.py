"""Random SIGKILLs of workers, children and the broker: every job is done, once.

The invariants are those of the design: I1 accepted jobs are in the database, I2 at most one end per
job, I3 attempts do not overlap, I4 states move along the graph, I5 nothing is stuck, I6 a result's
model exists, I8 no child without a lease. `CTUNE_CHAOS_SEED` repeats a run.

Jobs get 50 attempts here instead of 3: a killed child and a lost worker share one counter, and a
job that chance hits three times would rightly fail. That limit has tests of its own; here every job
must get through, so that I5 holds whatever the seed.
"""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy import func, select

from service.db import Database, make_engine
from service.jobs.states import TERMINAL, TRANSITIONS
from service.queue import Announcer
from service.settings import Settings
from service.storage import Storage
from service.tables import Job, JobEvent, JobTransition, Metric, Model
from tests.servers import Server
from tests.workers.processes import WorkerProcess, children_of
from tests.workers.rows import add_dataset, add_job, scaled, wait_until
from tests.workers.stub_child import STEP_S

GIVEN_SEED = os.environ.get("CTUNE_CHAOS_SEED")  # read now: the tests' fixtures remove `CTUNE_*`
JOBS = 40
WORKERS = 3
SUBMIT_S = 0.4
"""Seconds between two jobs; faults happen as long as jobs come in."""
BROKER_BY = JOBS // 2
"""The disturbance that kills the broker, if none before it has."""
SETTLE_S = 60.0
"""Seconds after the last fault within which everything must be done (I5)."""


class Chaos:
    """A fleet of workers, and what happens to it."""

    def __init__(self, settings: Settings, logs: Path, broker: Server | None) -> None:
        self.random = random.Random(seed := _seed())
        self.seed = seed
        self.counts: Counter[str] = Counter()
        self._disturbances = 0
        self._settings = settings
        self._logs = logs
        self._broker = broker
        self._workers = [self._new_worker() for _ in range(WORKERS)]
        self._broker_back_at: float | None = None

    def disturb(self) -> None:
        """Let one thing go wrong, or nothing."""
        self.mend_broker(time.monotonic())
        name = self.random.choices(["worker", "child", "broker", "nothing"], [2, 2, 1, 5])[0]
        self._disturbances += 1
        if self._disturbances == BROKER_BY and not self.counts["broker"]:
            name = "broker"
        faults: dict[str, Callable[[], bool]] = {
            "worker": self._kill_worker,
            "child": self._kill_child,
            "broker": self._kill_broker,
            "nothing": lambda: True,
        }
        self.counts[name] += faults[name]()

    def mend_broker(self, now: float) -> None:
        """Start the broker again once it was away long enough."""
        if self._broker_back_at is not None and now >= self._broker_back_at:
            assert self._broker is not None
            self._broker.start()
            self._broker_back_at = None

    def stop(self) -> list[int]:
        """Ask all workers to stop; return their exit codes."""
        for worker in self._workers:
            worker.process.send_signal(signal.SIGTERM)
        return [worker.process.wait(20) for worker in self._workers]

    def end(self) -> None:
        """Kill what is left."""
        for worker in self._workers:
            if worker.process.poll() is None:
                worker.kill()

    def _new_worker(self) -> WorkerProcess:
        self.counts["started"] += 1
        return WorkerProcess(self._settings, self._logs / f"worker{self.counts['started']}.log")

    def _kill_worker(self) -> bool:
        victim = self.random.randrange(len(self._workers))
        self._workers[victim].kill()
        self._workers[victim] = self._new_worker()
        return True

    def _kill_child(self) -> bool:
        children = children_of(self._settings.data_dir)
        if children:
            try:
                os.kill(self.random.choice(children), signal.SIGKILL)
            except ProcessLookupError:
                return False
        return bool(children)

    def _kill_broker(self) -> bool:
        if self._broker is None or self._broker_back_at is not None:
            return False
        self._broker.kill()
        self._broker_back_at = time.monotonic() + self.random.uniform(0.5, 3.0)
        return True


@pytest.fixture
def embedded(sqlite_settings: Settings) -> Settings:
    """SQLite, no broker."""
    return sqlite_settings


@pytest.fixture
def grown(postgres_settings: Settings, killable_redis: Server) -> Settings:
    """Postgres, and Redis through Celery with the boot step."""
    return postgres_settings.model_copy(update={"broker_url": SecretStr(killable_redis.url)})


@pytest.mark.parametrize("setup", ["embedded", "grown"])
def test_every_job_is_done_once(request: pytest.FixtureRequest, tmp_path: Path, setup: str) -> None:
    settings = scaled(
        request.getfixturevalue(setup), slots=3, max_attempts=50, poll_s=0.2, beat_s=1.0, reap_s=1.0
    )
    broker = request.getfixturevalue("killable_redis") if setup == "grown" else None
    database = Database(make_engine(settings))
    begun = time.monotonic()
    with _fleet(settings, tmp_path, broker) as chaos:
        accepted = _submit(settings, database, chaos)
        disturbed_s = time.monotonic() - begun
        chaos.mend_broker(float("inf"))
        wait_until(lambda: _ended(database) == JOBS, SETTLE_S)
        settled_s = time.monotonic() - begun - disturbed_s
        assert chaos.stop() == [0] * WORKERS
    assert children_of(settings.data_dir) == []  # I8
    figures = _check(settings, database, accepted)
    print(
        f"{setup} seed={chaos.seed} {dict(chaos.counts)} {figures}"
        f" disturbed={disturbed_s:.1f}s settled={settled_s:.1f}s"
    )
    assert chaos.counts["worker"] + chaos.counts["child"] >= 5, "hardly any chaos"
    assert setup == "embedded" or chaos.counts["broker"] >= 1, "the broker was never away"
    database.dispose()


@contextmanager
def _fleet(settings: Settings, logs: Path, broker: Server | None) -> Iterator[Chaos]:
    chaos = Chaos(settings, logs, broker)
    print(f"seed {chaos.seed}")
    try:
        yield chaos
    finally:
        chaos.end()


def _seed() -> int:
    return int(GIVEN_SEED or random.SystemRandom().randrange(10**6))


def _submit(settings: Settings, database: Database, chaos: Chaos) -> dict[str, float]:
    """Submit jobs one by one, disturbing meanwhile; return what each was to work, by id."""
    announcer = Announcer(settings)
    accepted = {}
    with database.writing() as session:
        dataset_id = add_dataset(session).id
    for _ in range(JOBS):
        work_s = round(chaos.random.uniform(0.3, 1.0), 2)
        with database.writing() as session:
            job_id = add_job(session, dataset_id, stub={"work_s": work_s}).id
        announcer.announce("job", job_id)
        accepted[job_id] = work_s
        time.sleep(SUBMIT_S)
        chaos.disturb()
    announcer.close()
    return accepted


def _ended(database: Database) -> int:
    with database.reading() as session:
        counted = select(func.count()).select_from(Job).where(Job.status.in_(TERMINAL))
        return session.scalar(counted) or 0


def _check(settings: Settings, database: Database, accepted: dict[str, float]) -> dict[str, int]:
    storage = Storage(settings.data_dir)
    with database.reading() as session:
        jobs = session.scalars(select(Job)).all()
        models = session.scalars(select(Model)).all()
        lost = session.scalars(
            select(JobEvent.message).where(JobEvent.message.contains("will be repeated"))
        ).all()
        steps = Counter(session.scalars(select(Metric.job_id)))
        history: dict[str, list[JobTransition]] = {job.id: [] for job in jobs}
        for stay in session.scalars(select(JobTransition).order_by(JobTransition.id)):
            history[stay.job_id].append(stay)
    assert {job.id for job in jobs} == accepted.keys()  # I1
    assert Counter(job.status for job in jobs) == {"succeeded": JOBS}  # I5
    assert Counter(model.job_id for model in models) == Counter(accepted.keys())  # I2
    for job in jobs:
        assert job.model_id is not None
        assert (storage.model(job.model_id) / "model.json").exists()  # I6
        assert steps[job.id] == round(accepted[job.id] / STEP_S)
        _check_history(history[job.id])
    return {
        "done": len(jobs),
        "attempts": sum(job.attempt for job in jobs),
        "reaped": sum("was not heard of" in message for message in lost),
        "crashed": sum("SIGKILL" in message for message in lost),
    }


def _check_history(stays: list[JobTransition]) -> None:
    assert [stay.status for stay in stays].count("succeeded") == 1  # I2
    assert stays[-1].status == "succeeded"
    for earlier, later in pairwise(stays):
        assert earlier.ended_at is not None
        assert earlier.ended_at <= later.started_at + 1e-3  # I3
        if (earlier.status, later.status) == ("running", "running"):
            assert earlier.attempt == later.attempt  # another phase
        else:
            assert later.status in TRANSITIONS[earlier.status]  # I4
        if later.status == "running" and earlier.status == "queued":
            assert later.attempt == earlier.attempt + 1
