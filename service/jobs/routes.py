"""Endpoints of jobs: make, list, look, cancel, stop, pause, resume, metrics, events."""

from typing import Annotated, Literal

from fastapi import APIRouter, BackgroundTasks, Body, Depends, Header, Query, Request, Response
from fastapi.sse import EventSourceResponse
from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.responses import StreamingResponse

from ctune.schema import Fault, JsonObject
from service.deps import DatabaseDep, ReadSession, SettingsDep, WriteSession
from service.errors import InvalidError
from service.jobs import control, metrics, service, stream
from service.jobs.schemas import JobBody, event_object, job_object, job_summary
from service.pages import PageQuery, Text, list_page
from service.tables import Job, JobEvent

router = APIRouter(prefix="/jobs", tags=["jobs"])

NDJSON = "application/x-ndjson"
SSE = "text/event-stream"
SSE_HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}
Status = Literal["queued", "running", "paused", "succeeded", "failed", "cancelled"]


@router.post("", status_code=201)
def create_job(
    body: Annotated[JobBody, Body()],
    session: WriteSession,
    settings: SettingsDep,
    request: Request,
    response: Response,
    background: BackgroundTasks,
) -> JsonObject:
    """Queue a job. All faults of the body are answered at once, each with its JSON pointer."""
    job = service.create(session, settings, body)
    response.headers["location"] = f"/jobs/{job.id}"
    background.add_task(request.app.state.announcer.announce, "job", job.id)
    return _whole(session, job)


@router.get("")
def list_jobs(
    session: ReadSession,
    page: PageQuery,
    status: Annotated[list[Status] | None, Query(description="only these; may repeat")] = None,
    dataset: Text | None = None,
) -> JsonObject:
    """List jobs, newest first; without their transitions and places in the queue."""
    wanted = select(Job)
    if status:
        wanted = wanted.where(Job.status.in_(status))
    if dataset is not None:
        wanted = wanted.where(Job.dataset_id == dataset)
    return list_page(session, wanted, key=Job.id, page=page, shape=job_summary)


@router.get("/{job_id}")
def get_job(job_id: str, session: ReadSession) -> JsonObject:
    """Return one job: status, progress, place in the queue, history, config, error, result."""
    return _whole(session, service.get(session, job_id))


@router.post("/{job_id}/cancel")
def cancel_job(job_id: str, session: WriteSession) -> JsonObject:
    """Cancel a waiting or paused job at once; ask the worker of a running one to abort it."""
    return _whole(session, service.ask(session, job_id, control.request_cancel))


@router.post("/{job_id}/stop")
def stop_job(job_id: str, session: WriteSession) -> JsonObject:
    """Let a running job finish early: its stage ends now, then it is evaluated and exported."""
    return _whole(session, service.ask(session, job_id, control.request_stop))


@router.post("/{job_id}/pause")
def pause_job(job_id: str, session: WriteSession) -> JsonObject:
    """Take a waiting job out of the queue; let a running one make a checkpoint and stop there."""
    return _whole(session, service.ask(session, job_id, control.request_pause))


@router.post("/{job_id}/resume")
def resume_job(
    job_id: str, session: WriteSession, request: Request, background: BackgroundTasks
) -> JsonObject:
    """Put a paused job back into the queue; it goes on from its last checkpoint."""
    job = service.ask(session, job_id, control.request_resume)
    background.add_task(request.app.state.announcer.announce, "job", job.id)
    return _whole(session, job)


def _metric_filters(
    name: Text | None = None,
    stage: Text | None = None,
    after_step: Annotated[int | None, Query(ge=-1, lt=2**63)] = None,
) -> metrics.Filters:
    return metrics.Filters(name, stage, after_step)


@router.get("/{job_id}/metrics", response_model=None, responses={200: {"content": {NDJSON: {}}}})
def get_metrics(
    job_id: str,
    session: ReadSession,
    database: DatabaseDep,
    request: Request,
    filters: Annotated[metrics.Filters, Depends(_metric_filters)],
    max_points: Annotated[int, Query(ge=4, le=100_000, description="points per series")] = 1000,
) -> JsonObject | StreamingResponse:
    """Return the series in columns, thinned so that lowest and highest values stay.

    With `Accept: application/x-ndjson` every point, one per line.
    """
    job = service.get(session, job_id)
    wanted = metrics.Wanted(job.id, filters)
    if accepts(request, NDJSON):
        return StreamingResponse(metrics.lines(database, wanted), media_type=NDJSON)
    series = metrics.columns(session, wanted, max_points)
    return {"object": "job.metrics", "job": job.id, "series": series}


@router.get("/{job_id}/events", response_model=None, responses={200: {"content": {SSE: {}}}})
def list_events(
    job_id: str,
    session: ReadSession,
    database: DatabaseDep,
    request: Request,
    page: PageQuery,
    last_event_id: Annotated[str | None, Header()] = None,
) -> JsonObject | EventSourceResponse:
    """List events, newest first.

    With `Accept: text/event-stream` those behind `Last-Event-ID` and then new ones as they come,
    up to the event `done`.
    """
    job = service.get(session, job_id)
    if accepts(request, SSE):
        after = event_number(last_event_id, "Last-Event-ID") or 0
        state = request.app.state
        events = stream.stream(database, job.id, after=after, stopping=state.stopping.is_set)
        return EventSourceResponse(events, headers=SSE_HEADERS)
    wanted = select(JobEvent).where(JobEvent.job_id == job.id)
    after_number = event_number(page.after, "after")
    return list_page(
        session, wanted, key=JobEvent.id, page=page, shape=event_object, after=after_number
    )


def accepts(request: Request, media_type: str) -> bool:
    """Return whether the client asks for this representation by name."""
    return media_type in request.headers.get("accept", "").lower()


def event_number(given: str | None, name: str) -> int | None:
    """Return the number in `evt_12` or `12`; an empty id is none.

    Raises:
        InvalidError: it is neither.
    """
    if not given:
        return None
    number = given.removeprefix("evt_")
    if number.isascii() and number.isdecimal() and len(number) <= 18:
        return int(number)
    detail = f"{name} is {given[:64]!r}; it should be an event's id such as evt_12."
    raise InvalidError([Fault(pointer=f"/{name}", code="invalid_value", detail=detail)])


def _whole(session: Session, job: Job) -> JsonObject:
    stays = service.transitions(session, job.id)
    return job_object(job, stays, service.jobs_ahead(session, job))
