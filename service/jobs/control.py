"""What clients ask of a job: cancel, stop, pause, resume. Nothing here commits.

| job is | cancel | stop | pause | resume |
|---|---|---|---|---|
| queued | cancelled | refused | paused | refused |
| running | its worker cancels | its worker lets it finish early | its worker pauses it | refused |
| … and was asked to pause | as above | as above, once it is resumed | nothing new | goes on |
| … and was asked to stop | as above | nothing new | paused; finishes early once resumed | refused |
| … and was asked to cancel | nothing new | refused | refused | refused |
| paused | cancelled | refused | nothing new | queued |
| ended | refused | refused | refused | refused |

Cancel is stronger than pause, pause than stop. A wish to stop stays: an attempt that begins after
it finishes early too.
"""

from sqlalchemy import select
from sqlalchemy.orm import Session

from service.db import now_s
from service.jobs.states import TERMINAL, move, note
from service.tables import Job


class NotFoundError(Exception):
    """There is no row with this id."""


class WrongStateError(Exception):
    """The job's state does not allow what is asked; the text says why and what to do."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


def request_cancel(session: Session, job_id: str) -> Job:
    """Cancel a job that does not run at once; ask the worker of a running one to stop it.

    Raises:
        NotFoundError: no such job.
        WrongStateError: the job has ended already.
    """
    job = _unfinished(session, job_id, "cancelled")
    if job.cancel_requested_at is None:
        job.cancel_requested_at = now_s()
        if job.status == "running":
            note(session, job, "cancelling was asked for")
        else:
            move(session, job, "cancelled", f"cancelled while {job.status}")
    return job


def request_stop(session: Session, job_id: str) -> Job:
    """Ask the worker of a running job to let it finish early, with a model.

    Raises:
        NotFoundError: no such job.
        WrongStateError: the job does not run, or is being cancelled.
    """
    job = _kept(session, job_id, "stopped")
    if job.stop_requested_at is not None:
        return job
    if job.status == "queued":
        raise WrongStateError(
            "job_not_running",
            f"the job {job_id} waits in the queue: there is nothing to finish early. Cancel it"
            f" (POST /jobs/{job_id}/cancel), or stop it once it runs.",
        )
    if job.status == "paused":
        raise WrongStateError(
            "job_paused",
            f"the job {job_id} is paused. Resume it (POST /jobs/{job_id}/resume) and stop it once"
            f" it runs, or cancel it (POST /jobs/{job_id}/cancel).",
        )
    job.stop_requested_at = now_s()
    note(session, job, "finishing early was asked for")
    return job


def request_pause(session: Session, job_id: str) -> Job:
    """Take a waiting job out of the queue; ask the worker of a running one to pause it.

    Raises:
        NotFoundError: no such job.
        WrongStateError: the job has ended, or is being cancelled.
    """
    job = _kept(session, job_id, "paused")
    if job.pause_requested_at is not None:
        return job
    job.pause_requested_at = now_s()
    if job.status == "queued":
        move(session, job, "paused", "paused in the queue")
    else:
        note(session, job, "pausing was asked for")
    return job


def request_resume(session: Session, job_id: str) -> Job:
    """Queue a paused job again, in the place of its priority and age; call off a pause that waits.

    The caller tells the broker after the commit.

    Raises:
        NotFoundError: no such job.
        WrongStateError: nobody has paused the job.
    """
    job = _kept(session, job_id, "resumed")
    if job.pause_requested_at is None:
        raise WrongStateError(
            "job_not_paused",
            f"the job {job_id} is {job.status}, not paused. Nothing needs to be done.",
        )
    job.pause_requested_at = None
    if job.status == "paused":
        job.run_after = 0.0
        job.hint_sent_at = now_s()
        move(session, job, "queued", "resumed")
    else:
        note(session, job, "the pause was called off")
    return job


def _kept(session: Session, job_id: str, what: str) -> Job:
    """Return a job, under its lock, that nobody wants to cancel."""
    job = _unfinished(session, job_id, what)
    if job.cancel_requested_at is not None:
        raise WrongStateError(
            "job_cancelling",
            f"the job {job_id} is being cancelled; it cannot be {what} any more. Create a new job.",
        )
    return job


def _unfinished(session: Session, job_id: str, what: str) -> Job:
    """Return a job, under its lock, that has not ended."""
    wanted = select(Job).where(Job.id == job_id).with_for_update()
    job = session.scalars(wanted.execution_options(populate_existing=True)).one_or_none()
    if job is None:
        raise NotFoundError(f"there is no job {job_id}")
    if job.status in TERMINAL:
        ended = {"cancelled": "been cancelled"}.get(job.status, job.status)
        raise WrongStateError(
            "job_ended",
            f"the job {job_id} has already {ended} and cannot be {what} any more."
            " Nothing needs to be done.",
        )
    return job
