"""Transitions of jobs on both kinds of database: guards, races, history."""

import threading
from collections import Counter

import pytest
from sqlalchemy import select

from service.db import Database
from service.jobs import control, lifecycle
from service.jobs.control import NotFoundError, WrongStateError
from service.jobs.lifecycle import Beat, Ending, Lease, Retry
from service.tables import Job, JobEvent, Model
from tests.workers.rows import (
    RETRY,
    add_job,
    add_jobs,
    claim_job,
    end_lease,
    get_job,
    stays,
)

ERROR = {"code": "crashed", "message": "it crashed"}


def test_a_job_waits_runs_and_succeeds(database: Database) -> None:
    (job_id,) = add_jobs(database)
    lease = claim_job(database)
    running = get_job(database, job_id)
    assert (running.status, running.attempt, running.owner) == ("running", 1, "w")
    assert running.lease_until is not None
    assert running.started_at is not None
    assert running.lease_until == pytest.approx(running.started_at + 60, abs=5)
    model = {"id": "mdl_1", "job_id": job_id, "created_at": 0.0, "size_bytes": 1, "info": {}}
    ending = Ending("succeeded", "done", values={"result": {"a": 1}, "model_id": "mdl_1"})
    with database.writing() as session:
        assert lifecycle.finish(session, lease, Ending(**vars(ending) | {"model": model}))
    done = get_job(database, job_id)
    assert (done.status, done.result, done.owner, done.lease_until) == (
        "succeeded", {"a": 1}, None, None,
    )  # fmt: skip
    assert done.finished_at is not None
    with database.reading() as session:
        assert session.get_one(Model, "mdl_1").job_id == job_id
        said = select(JobEvent.data, JobEvent.kind).where(JobEvent.job_id == job_id)
        events = session.execute(said.order_by(JobEvent.id)).all()
    assert [event.data["status"] for event in events] == ["queued", "running", "succeeded"]
    history = stays(database, job_id)
    assert [stay.status for stay in history] == ["queued", "running", "succeeded"]
    assert [stay.ended_at is None for stay in history] == [False, False, True]
    assert history[0].ended_at == pytest.approx(history[1].started_at, abs=0.5)


def test_claims_follow_priority_then_age(database: Database) -> None:
    with database.writing() as session:
        ids = [add_job(session, priority=priority).id for priority in (0, 5, 0, 5)]
    claimed = [claim_job(database).id for _ in ids]
    assert claimed == [ids[1], ids[3], ids[0], ids[2]]


def test_a_job_waits_for_its_time_and_its_gpus(database: Database) -> None:
    with database.writing() as session:
        add_job(session, run_after=4e9)
        two = add_job(session, gpus=2).id
        unsaid = add_job(session).id
        none = add_job(session, gpus=0).id

    def claimed(free: int, total: int) -> str | None:
        with database.writing() as session:
            row = lifecycle.claim(session, Job, owner="w", lease_s=9, gpus=(free, total))
            return row.id if row else None

    assert [claimed(0, 2), claimed(0, 2)] == [none, None]
    assert claimed(1, 2) is None, "the second GPU is kept for the older job that needs two"
    assert [claimed(1, 1), claimed(1, 1)] == [unsaid, None]
    assert [claimed(2, 2), claimed(2, 2)] == [two, None]


def test_a_job_that_waits_for_gpus_holds_up_only_later_ones_that_need_gpus(
    database: Database,
) -> None:
    with database.writing() as session:
        earlier = add_job(session, gpus=1).id
        add_job(session, gpus=2)
        add_job(session, gpus=1)
        without = add_job(session, gpus=0).id
        urgent = add_job(session, gpus=1, priority=1).id

    def claimed() -> str | None:
        with database.writing() as session:
            row = lifecycle.claim(session, Job, owner="w", lease_s=9, gpus=(1, 2))
            return row.id if row else None

    assert [claimed() for _ in range(4)] == [urgent, earlier, without, None]


def test_claimers_never_share_a_job(database: Database) -> None:
    ids = add_jobs(database, count=60)
    taken: list[str] = []

    def claim_all(owner: str) -> None:
        while True:
            with database.writing() as session:
                row = lifecycle.claim(session, Job, owner=owner, lease_s=60, gpus=(0, 0))
            if row is None:
                return
            taken.append(row.id)

    threads = [threading.Thread(target=claim_all, args=(f"w{n}",)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(taken) == Counter(ids)


def test_a_beat_renews_only_what_is_held(database: Database) -> None:
    (job_id,) = add_jobs(database)
    lease = claim_job(database, lease_s=5)
    with database.writing() as session:
        assert lifecycle.beat(session, lease, 900) is Beat.GO_ON
    renewed = get_job(database, job_id)
    assert renewed.lease_until is not None
    assert renewed.started_at is not None
    assert renewed.lease_until - renewed.started_at > 800
    with database.writing() as session:
        for other in (
            Lease(Job, job_id, 1, "another"),
            Lease(Job, job_id, 2, "w"),
            Lease(Job, "job_none", 1, "w"),
        ):
            assert lifecycle.beat(session, other, 60) is Beat.LOST
    end_lease(database, job_id)
    with database.writing() as session:
        assert lifecycle.beat(session, lease, 60) is Beat.LOST


def test_one_that_was_given_up_writes_nothing(database: Database) -> None:
    (job_id,) = add_jobs(database)
    zombie = claim_job(database, owner="zombie")
    end_lease(database, job_id)
    with database.writing() as session:
        assert lifecycle.reap(session, Job, RETRY) == [(job_id, "queued")]
        assert lifecycle.reap(session, Job, RETRY) == []
    successor = claim_job(database, owner="successor")
    assert successor.attempt == 2
    with database.writing() as session:
        assert lifecycle.beat(session, zombie, 60) is Beat.LOST
        assert not lifecycle.finish(session, zombie, Ending("succeeded"))
        assert not lifecycle.release(session, zombie, "")
        assert lifecycle.requeue_lost(session, zombie, ERROR, RETRY) is None
        lifecycle.enter_phase(session, zombie, "haunting")
    job = get_job(database, job_id)
    assert (job.status, job.owner, job.attempt, job.phase) == ("running", "successor", 2, None)
    with database.writing() as session:
        assert lifecycle.finish(session, successor, Ending("succeeded"))
        assert not lifecycle.finish(session, successor, Ending("failed", error=ERROR))
    assert get_job(database, job_id).status == "succeeded"


def test_lost_attempts_are_repeated_later_and_later_then_fail(database: Database) -> None:
    (job_id,) = add_jobs(database)
    retry = Retry(max_attempts=3, backoff_s=1000.0)
    delays = []
    for _ in range(2):
        lease = claim_job(database)
        with database.writing() as session:
            assert lifecycle.requeue_lost(session, lease, ERROR, retry) == "queued"
        job = get_job(database, job_id)
        assert job.error == ERROR
        assert job.hint_sent_at is None
        delays.append(job.run_after - job.created_at)
        with database.writing() as session:
            assert lifecycle.claim(session, Job, owner="w", lease_s=9, gpus=(0, 0)) is None
            session.get_one(Job, job_id).run_after = 0.0
    assert delays == [pytest.approx(1000, abs=9), pytest.approx(2000, abs=9)]
    lease = claim_job(database)
    end_lease(database, job_id)
    with database.writing() as session:
        assert lifecycle.reap(session, Job, retry) == [(job_id, "failed")]
    job = get_job(database, job_id)
    assert job.error is not None
    assert (job.status, job.error["code"], job.lost_attempts) == ("failed", "lost", 3)


def test_a_released_attempt_does_not_count(database: Database) -> None:
    (job_id,) = add_jobs(database)
    for attempt in range(1, 6):
        lease = claim_job(database)
        assert lease.attempt == attempt
        with database.writing() as session:
            assert lifecycle.release(session, lease, "the worker stops")
    job = get_job(database, job_id)
    assert (job.status, job.lost_attempts, job.attempt) == ("queued", 0, 5)


def test_cancelling_a_waiting_job_is_immediate(database: Database) -> None:
    (job_id,) = add_jobs(database)
    with database.writing() as session:
        assert control.request_cancel(session, job_id).status == "cancelled"
    with database.writing() as session:
        assert lifecycle.claim(session, Job, owner="w", lease_s=9, gpus=(0, 0)) is None
        with pytest.raises(WrongStateError, match="already been cancelled"):
            control.request_cancel(session, job_id)
        with pytest.raises(NotFoundError, match="job_none"):
            control.request_cancel(session, "job_none")


@pytest.mark.parametrize("way", ["release", "requeue", "reap", "finish"])
def test_a_cancelled_running_job_is_not_repeated(database: Database, way: str) -> None:
    (job_id,) = add_jobs(database)
    lease = claim_job(database)
    with database.writing() as session:
        assert control.request_cancel(session, job_id).status == "running"
        control.request_cancel(session, job_id)  # twice is harmless
        assert lifecycle.wishes_of_clients(session, "w") == {job_id: Beat.CANCEL}
        assert lifecycle.beat(session, lease, 60) is Beat.CANCEL
    if way == "reap":
        end_lease(database, job_id)
    with database.writing() as session:
        match way:
            case "release":
                lifecycle.release(session, lease, "the worker stops")
            case "requeue":
                lifecycle.requeue_lost(session, lease, ERROR, RETRY)
            case "reap":
                lifecycle.reap(session, Job, RETRY)
            case _:
                lifecycle.finish(session, lease, Ending("succeeded"))  # it was faster
    expected = "succeeded" if way == "finish" else "cancelled"
    job = get_job(database, job_id)
    assert (job.status, job.error) == (expected, None)
    with database.writing() as session, pytest.raises(WrongStateError):
        control.request_cancel(session, job_id)


def test_cancel_races_with_the_end_and_one_of_them_wins(database: Database) -> None:
    for job_id in add_jobs(database, count=10):
        lease = claim_job(database)
        assert lease.id == job_id
        start = threading.Barrier(2)

        def cancel(job_id: str = job_id, start: threading.Barrier = start) -> None:
            start.wait()
            with database.writing() as session:
                control.request_cancel(session, job_id)

        canceller = threading.Thread(target=cancel)
        canceller.start()
        start.wait()
        with database.writing() as session:
            lifecycle.release(session, lease, "the worker stops")
        canceller.join()
        assert get_job(database, job_id).status == "cancelled"


def test_hints_are_sent_again_once_they_are_old(database: Database) -> None:
    (job_id,) = add_jobs(database)
    with database.writing() as session:
        assert lifecycle.resend(session, Job, 30) == []
        session.get_one(Job, job_id).hint_sent_at = None
    with database.writing() as session:
        assert lifecycle.resend(session, Job, 30) == [job_id]
        assert lifecycle.resend(session, Job, 30) == []
        assert lifecycle.resend(session, Job, -1) == [job_id]


def test_what_is_not_in_the_graph_is_refused(database: Database) -> None:
    (job_id,) = add_jobs(database)
    lease = claim_job(database)
    with pytest.raises(ValueError, match="running to queueing"), database.writing() as session:
        lifecycle.finish(session, lease, Ending("queueing"))
    assert get_job(database, job_id).status == "running"


def test_phases_are_stays_and_their_time_adds_up(database: Database) -> None:
    (job_id,) = add_jobs(database)
    lease = claim_job(database)
    with database.writing() as session:
        for phase in ("before", "contrastive", "contrastive", "after"):
            lifecycle.enter_phase(session, lease, phase)
    history = [(stay.status, stay.phase) for stay in stays(database, job_id)]
    assert history == [
        ("queued", None),
        ("running", None),
        ("running", "before"),
        ("running", "contrastive"),
        ("running", "after"),
    ]
    with database.writing() as session:
        for stay in stays(database, job_id):
            session.merge(stay).started_at -= 10
        lifecycle.release(session, lease, "")
        assert lifecycle.run_seconds(session, job_id) == pytest.approx(40, abs=1)
