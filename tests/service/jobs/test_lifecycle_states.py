"""Random histories of jobs against a model of the state graph, on a real SQLite."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from sqlalchemy.orm import Session

from service.db import Database, make_engine, migrate
from service.jobs import control, lifecycle
from service.jobs.control import WrongStateError
from service.jobs.lifecycle import Beat, Ending, Lease, Retry
from service.jobs.states import TERMINAL
from service.settings import Settings
from service.tables import Job, Model
from tests.workers.rows import add_job, end_lease, get_job, stays

RETRY = Retry(max_attempts=2, backoff_s=0.0)
ERROR = {"code": "crashed", "message": "it crashed"}


@dataclass
class Known:
    """What a job must be."""

    status: str = "queued"
    attempt: int = 0
    lost: int = 0
    cancel: bool = False
    pause: bool = False
    stop: bool = False

    def back(self) -> None:
        self.status = "cancelled" if self.cancel else "paused" if self.pause else "queued"

    def wish(self) -> Beat:
        wishes = {Beat.CANCEL: self.cancel, Beat.PAUSE: self.pause, Beat.FINISH: self.stop}
        return next((wish for wish, asked in wishes.items() if asked), Beat.GO_ON)

    def lose(self) -> None:
        self.lost += 1
        if self.lost >= RETRY.max_attempts and not self.cancel:
            self.status = "failed"
        else:
            self.back()


class Lives(RuleBasedStateMachine):
    """Workers, a client and the reaper do as they like."""

    leases = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        migrated = Settings(data_dir=Path(self.folder.name))
        migrate(migrated)
        self.database = Database(make_engine(migrated))
        self.known: dict[str, Known] = {}

    def teardown(self) -> None:
        self.database.dispose()
        self.folder.cleanup()

    @rule()
    def submit(self) -> None:
        with self.database.writing() as session:
            self.known[add_job(session).id] = Known()

    @rule(target=leases, owner=st.sampled_from("ab"))
    def claim(self, owner: str) -> Lease | None:
        with self.database.writing() as session:
            row = lifecycle.claim(session, Job, owner=owner, lease_s=60, gpus=(0, 0))
        waiting = sorted(job_id for job_id, job in self.known.items() if job.status == "queued")
        assert (row.id if row else None) == next(iter(waiting), None)
        if row is None:
            return None
        job = self.known[row.id]
        job.status, job.attempt = "running", job.attempt + 1
        return Lease(Job, row.id, row.attempt, owner)

    @rule(lease=leases)
    def beat(self, lease: Lease | None) -> None:
        if lease is not None:
            with self.database.writing() as session:
                beat = lifecycle.beat(session, lease, 60)
            job = self.known[lease.id]
            assert beat is (job.wish() if self._holds(lease) else Beat.LOST)

    @rule(lease=leases, status=st.sampled_from(["succeeded", "failed"]))
    def finish(self, lease: Lease | None, status: str) -> None:
        if lease is not None:
            model = {"id": f"mdl_{lease.id}", "created_at": 0.0, "size_bytes": 0, "info": {}}
            with self.database.writing() as session:
                ending = Ending(status, model=model if status == "succeeded" else None)
                assert lifecycle.finish(session, lease, ending) == self._holds(lease)
            if self._holds(lease):
                self.known[lease.id].status = status

    @rule(lease=leases)
    def release(self, lease: Lease | None) -> None:
        if lease is not None:
            with self.database.writing() as session:
                assert lifecycle.release(session, lease, "") == self._holds(lease)
            if self._holds(lease):
                self.known[lease.id].back()

    @rule(lease=leases)
    def crash(self, lease: Lease | None) -> None:
        if lease is not None:
            holds = self._holds(lease)
            with self.database.writing() as session:
                status = lifecycle.requeue_lost(session, lease, ERROR, RETRY)
            if holds:
                self.known[lease.id].lose()
            assert status == (self.known[lease.id].status if holds else None)

    @rule(lease=consumes(leases))
    def lose(self, lease: Lease | None) -> None:
        if lease is not None and self._holds(lease):
            end_lease(self.database, lease.id)
            with self.database.writing() as session:
                assert [job_id for job_id, _ in lifecycle.reap(session, Job, RETRY)] == [lease.id]
            self.known[lease.id].lose()

    @rule(number=st.integers(0, 9))
    def cancel(self, number: int) -> None:
        job = self._ask(number, control.request_cancel, lambda job: True)
        if job is not None:
            job.cancel = True
            if job.status != "running":
                job.status = "cancelled"

    @rule(number=st.integers(0, 9))
    def stop(self, number: int) -> None:
        job = self._ask(
            number,
            control.request_stop,
            lambda job: not job.cancel and (job.stop or job.status == "running"),
        )
        if job is not None:
            job.stop = True

    @rule(number=st.integers(0, 9))
    def pause(self, number: int) -> None:
        job = self._ask(number, control.request_pause, lambda job: not job.cancel)
        if job is not None:
            job.pause = True
            if job.status == "queued":
                job.status = "paused"

    @rule(number=st.integers(0, 9))
    def resume(self, number: int) -> None:
        job = self._ask(number, control.request_resume, lambda job: not job.cancel and job.pause)
        if job is not None:
            job.pause = False
            if job.status == "paused":
                job.status = "queued"

    def _ask(
        self,
        number: int,
        request: Callable[[Session, str], Job],
        allowed: Callable[[Known], bool],
    ) -> Known | None:
        """Ask something of a job; return it if that was granted, which `allowed` foretells."""
        if not self.known:
            return None
        job_id = sorted(self.known)[number % len(self.known)]
        job = self.known[job_id]
        granted = True
        try:
            with self.database.writing() as session:
                request(session, job_id)
        except WrongStateError:
            granted = False
        assert granted == (job.status not in TERMINAL and allowed(job))
        return job if granted else None

    @invariant()
    def rows_are_as_known(self) -> None:
        for job_id, known in self.known.items():
            job = get_job(self.database, job_id)
            assert (job.status, job.attempt, job.lost_attempts) == (
                known.status, known.attempt, known.lost,
            )  # fmt: skip
            assert (job.owner is None) == (known.status != "running")
            assert (job.finished_at is not None) == (known.status in TERMINAL)
            history = stays(self.database, job_id)
            assert history[-1].status == known.status
            assert [stay.ended_at is None for stay in history].count(True) == 1
            with self.database.reading() as session:
                model = session.get(Model, f"mdl_{job_id}")
            assert (model is not None) == (known.status == "succeeded")

    def _holds(self, lease: Lease) -> bool:
        job = self.known[lease.id]
        return job.status == "running" and job.attempt == lease.attempt


TestLives = Lives.TestCase
TestLives.settings = settings(
    max_examples=15,
    stateful_step_count=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
