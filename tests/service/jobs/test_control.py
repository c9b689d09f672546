"""What clients ask of jobs, on both kinds of database: the table of docs/architecture.md."""

import itertools
import threading
from collections.abc import Callable

import pytest
from sqlalchemy import select
from sqlalchemy.orm import Session

from service.db import Database
from service.jobs import control, lifecycle
from service.jobs.control import NotFoundError, WrongStateError
from service.jobs.lifecycle import Beat, Ending, Lease
from service.tables import Job, JobEvent, JobTransition
from tests.workers.rows import RETRY, add_jobs, claim_job, end_lease, get_job, stays

Request = Callable[[Session, str], Job]
REQUESTS: dict[str, Request] = {
    "cancel": control.request_cancel,
    "stop": control.request_stop,
    "pause": control.request_pause,
    "resume": control.request_resume,
}
PRIORITIES = itertools.count()
ERROR = {"code": "crashed", "message": "it crashed"}


def ask(database: Database, job_id: str, *names: str) -> Job:
    for name in names:
        with database.writing() as session:
            REQUESTS[name](session, job_id)
    return get_job(database, job_id)


def beat(database: Database, lease: Lease) -> Beat:
    with database.writing() as session:
        return lifecycle.beat(session, lease, 60)


def job_in(database: Database, state: str) -> str:
    """Make a job that is in the first column of the table; it is claimed before older ones."""
    (job_id,) = add_jobs(database, priority=next(PRIORITIES))
    status, _, asked = state.partition(", asked to ")
    if status in ("running", "ended"):
        lease = claim_job(database)
    if status == "ended":
        with database.writing() as session:
            lifecycle.finish(session, lease, Ending("succeeded"))
    if status == "paused":
        ask(database, job_id, "pause")
    if asked:
        ask(database, job_id, asked)
    return job_id


TABLE = {
    "queued": ("cancelled", "job_not_running", "paused", "job_not_paused"),
    "running": (Beat.CANCEL, Beat.FINISH, Beat.PAUSE, "job_not_paused"),
    "running, asked to pause": (Beat.CANCEL, Beat.PAUSE, Beat.PAUSE, Beat.GO_ON),
    "running, asked to stop": (Beat.CANCEL, Beat.FINISH, Beat.PAUSE, "job_not_paused"),
    "running, asked to cancel": (
        Beat.CANCEL, "job_cancelling", "job_cancelling", "job_cancelling",
    ),
    "paused": ("cancelled", "job_paused", "paused", "queued"),
    "ended": ("job_ended", "job_ended", "job_ended", "job_ended"),
}  # fmt: skip


@pytest.mark.parametrize("state", TABLE)
def test_every_request_in_every_state(database: Database, state: str) -> None:
    for name, expected in zip(REQUESTS, TABLE[state], strict=True):
        job_id = job_in(database, state)
        before = get_job(database, job_id).status
        if expected.startswith("job_"):
            with pytest.raises(WrongStateError, match=job_id) as refused:
                ask(database, job_id, name)
            assert refused.value.code == expected
            assert get_job(database, job_id).status == before
            continue
        for _ in range(1 if name == "resume" or expected == "cancelled" else 2):  # harmless
            status = ask(database, job_id, name).status
            if not isinstance(expected, Beat):
                assert status == expected
                continue
            assert status == "running"
            assert beat(database, Lease(Job, job_id, 1, "w")) is expected
            with database.reading() as session:
                wishes = lifecycle.wishes_of_clients(session, "w")
            assert wishes.get(job_id, Beat.GO_ON) is expected


def test_there_is_no_such_job(database: Database) -> None:
    for name in REQUESTS:
        with pytest.raises(NotFoundError, match="job_none"):
            ask(database, "job_none", name)


@pytest.mark.parametrize("way", ["release", "requeue", "reap"])
def test_a_running_job_is_paused_however_its_attempt_ends(database: Database, way: str) -> None:
    (job_id,) = add_jobs(database)
    lease = claim_job(database)
    ask(database, job_id, "pause")
    if way == "reap":
        end_lease(database, job_id)
    with database.writing() as session:
        match way:
            case "release":
                assert lifecycle.release(session, lease, "the worker stops")
            case "requeue":
                assert lifecycle.requeue_lost(session, lease, ERROR, RETRY) == "paused"
            case _:
                assert lifecycle.reap(session, Job, RETRY) == [(job_id, "paused")]
        assert lifecycle.reap(session, Job, RETRY) == []
        assert lifecycle.resend(session, Job, -1) == []
    paused = get_job(database, job_id)
    assert (paused.status, paused.owner, paused.lease_until) == ("paused", None, None)
    assert paused.finished_at is None
    assert beat(database, lease) is Beat.LOST
    with database.writing() as session:
        assert lifecycle.claim(session, Job, owner="w", lease_s=9, gpus=(0, 0)) is None
    assert ask(database, job_id, "resume").pause_requested_at is None
    assert claim_job(database).attempt == 2
    history = [stay.status for stay in stays(database, job_id)]
    assert history == ["queued", "running", "paused", "queued", "running"]


def test_a_pause_that_is_called_off_too_late_costs_only_the_way_back(database: Database) -> None:
    (job_id,) = add_jobs(database)
    lease = claim_job(database)
    ask(database, job_id, "pause", "resume")
    with database.writing() as session:  # the child had stopped already
        assert lifecycle.release(session, lease, "the pause was called off")
    assert get_job(database, job_id).status == "queued"


def test_a_resumed_job_takes_the_place_of_its_priority_and_age(database: Database) -> None:
    ids = [*add_jobs(database, 2), *add_jobs(database, 1, priority=5)]
    ask(database, ids[0], "pause")
    ask(database, ids[0], "resume")
    assert [claim_job(database).id for _ in ids] == [ids[2], ids[0], ids[1]]


def test_a_resumed_job_does_not_wait_for_an_old_backoff(database: Database) -> None:
    (job_id,) = add_jobs(database)
    lease = claim_job(database)
    with database.writing() as session:
        late = lifecycle.Retry(max_attempts=3, backoff_s=1000.0)
        assert lifecycle.requeue_lost(session, lease, ERROR, late) == "queued"
    ask(database, job_id, "pause", "resume")
    assert claim_job(database).id == job_id


def test_a_wish_to_stop_outlives_its_attempt(database: Database) -> None:
    (job_id,) = add_jobs(database)
    lease = claim_job(database)
    ask(database, job_id, "stop", "pause")
    with database.writing() as session:
        lifecycle.release(session, lease, "")
    assert ask(database, job_id, "stop").status == "paused", "asked before: unchanged"
    ask(database, job_id, "resume")
    assert beat(database, claim_job(database)) is Beat.FINISH


def test_paused_time_is_no_run_time(database: Database) -> None:
    (job_id,) = add_jobs(database)
    lease = claim_job(database)
    ask(database, job_id, "pause")
    with database.writing() as session:
        lifecycle.release(session, lease, "")
        begun = {"queued": 5000.0, "running": 4000.0, "paused": 3990.0}
        for stay in session.scalars(select(JobTransition)):
            stay.started_at -= begun[stay.status]
            if stay.ended_at is not None:
                stay.ended_at = stay.started_at + (10 if stay.status == "running" else 1000)
    ask(database, job_id, "resume")
    with database.reading() as session:
        assert lifecycle.run_seconds(session, job_id) == pytest.approx(10)
    paused = stays(database, job_id)[2]
    assert paused.ended_at is not None
    assert paused.ended_at - paused.started_at > 3900


def test_what_was_asked_is_told(database: Database) -> None:
    (job_id,) = add_jobs(database)
    lease = claim_job(database)
    ask(database, job_id, "stop", "stop", "pause", "resume", "pause")
    with database.writing() as session:
        lifecycle.release(session, lease, "")
    ask(database, job_id, "resume", "cancel")
    with database.reading() as session:
        said = select(JobEvent.message).where(JobEvent.job_id == job_id).order_by(JobEvent.id)
        assert session.scalars(said).all() == [
            "accepted",
            "attempt 1 starts",
            "finishing early was asked for",
            "pausing was asked for",
            "the pause was called off",
            "pausing was asked for",
            "paused",
            "resumed",
            "cancelled while queued",
        ]


def test_pausing_races_with_claiming_and_nothing_is_lost(database: Database) -> None:
    for job_id in add_jobs(database, 10):
        start = threading.Barrier(2)

        def pause(job_id: str = job_id, start: threading.Barrier = start) -> None:
            start.wait()
            ask(database, job_id, "pause")

        pauser = threading.Thread(target=pause)
        pauser.start()
        start.wait()
        with database.writing() as session:
            row = lifecycle.claim(session, Job, owner="w", lease_s=60, gpus=(0, 0))
        pauser.join()
        job = get_job(database, job_id)
        if job.status == "paused":
            assert row is None or row.id != job_id
        else:
            assert beat(database, Lease(Job, job_id, 1, "w")) is Beat.PAUSE
        ask(database, job_id, "cancel")
        if job.status == "running":
            with database.writing() as session:
                lifecycle.release(session, Lease(Job, job_id, 1, "w"), "")
        assert get_job(database, job_id).status == "cancelled"
