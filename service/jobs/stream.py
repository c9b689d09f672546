"""The events of a job as they happen: server-sent events."""

import json
import time
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

import anyio
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from sqlalchemy import select
from starlette.concurrency import run_in_threadpool

from ctune.events import storable
from ctune.schema import JsonObject
from service.db import Database
from service.jobs.schemas import event_object, seconds
from service.jobs.states import TERMINAL
from service.tables import Job, JobEvent

LOOK_S = 0.5
METRICS_S = 1.0
"""Seconds between two events `metrics`."""
PING_S = 15.0
RETRY_MS = 3000
EVENTS_PER_LOOK = 500
DONE = "done"


class Look(NamedTuple):
    """What one short transaction saw."""

    events: list[JsonObject]
    last_id: int
    progress: JsonObject | None
    metrics: JsonObject | None
    """`Job.newest_metrics`."""
    job: JsonObject
    ended: bool
    """The job has ended and every event of it is among those seen."""


async def stream(
    database: Database, job_id: str, *, after: int, stopping: Callable[[], bool]
) -> AsyncIterator[bytes]:
    """Yield the events behind `after`, then new ones as they come, until `done`.

    No transaction is open between two looks. `stopping` ends the stream early, without `done`; the
    client then comes back with `Last-Event-ID`. `progress` and `metrics` have no id: they are
    states, not events.
    """
    yield format_sse_event(retry=RETRY_MS, comment=f"events of {job_id}")
    progress: JsonObject | None = None
    metrics = NewestMetrics()
    said_at_s = time.monotonic()
    while not stopping():
        seen = await run_in_threadpool(look, database, job_id, after)
        if seen is None:  # deleted
            return
        pieces = [_event(item, item["type"], item["id"]) for item in seen.events]
        after = seen.last_id
        if seen.progress is not None and seen.progress != progress:
            progress = seen.progress
            pieces.append(_event({**seen.job, "data": progress}, "progress"))
        if points := metrics.unsaid(seen.metrics, at_once=seen.ended):
            pieces.append(_event({**seen.job, "data": points}, "metrics"))
        if seen.ended:
            pieces.append(_event(seen.job, DONE, f"evt_{after}"))
        if not pieces and time.monotonic() - said_at_s >= PING_S:
            pieces.append(KEEPALIVE_COMMENT)
        if pieces:
            yield b"".join(pieces)
            said_at_s = time.monotonic()
        if seen.ended:
            return
        if len(seen.events) < EVENTS_PER_LOOK:
            await anyio.sleep(LOOK_S)


class NewestMetrics:
    """What one stream has said of the newest point of each series, and when."""

    def __init__(self) -> None:
        self._said: JsonObject = {}
        self._at_s = -METRICS_S

    def unsaid(self, newest: JsonObject | None, *, at_once: bool) -> JsonObject | None:
        """Return the points that changed since last time, at most every `METRICS_S`."""
        now_s = time.monotonic()
        if newest is None or (now_s - self._at_s < METRICS_S and not at_once):
            return None
        known = self._said["points"] if self._said.get("stage") == newest["stage"] else {}
        changed = [
            {"name": name, **point}
            for name, point in newest["points"].items()
            if known.get(name) != point
        ]
        if not changed:
            return None
        self._said, self._at_s = newest, now_s
        return {"stage": newest["stage"], "points": changed}


def look(database: Database, job_id: str, after: int) -> Look | None:
    """Return what is new of a job; None when it is gone."""
    state_of = select(
        Job.status,
        Job.phase,
        Job.progress,
        Job.newest_metrics,
        Job.finished_at,
        Job.model_id,
        Job.error,
    )
    wanted = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.id > after)
    with database.reading() as session:
        # The job before its events: an end that is seen has all its events already committed.
        job = session.execute(state_of.where(Job.id == job_id)).one_or_none()
        if job is None:
            return None
        found = session.scalars(wanted.order_by(JobEvent.id).limit(EVENTS_PER_LOOK)).all()
    shown = [event_object(event) for event in found if event.kind != "progress"]
    state = {
        "object": "job.event",
        "job": job_id,
        "status": job.status,
        "phase": job.phase if job.status == "running" else None,
        "finished_at": seconds(job.finished_at),
        "model": job.model_id,
        "error": storable(job.error),
    }
    ended = job.status in TERMINAL and len(found) < EVENTS_PER_LOOK
    last_id = found[-1].id if found else after
    progress, metrics = storable(job.progress), storable(job.newest_metrics)
    return Look(shown, last_id, progress, metrics, state, ended)


def _event(data: JsonObject, name: str, id: str | None = None) -> bytes:
    text = json.dumps(data, allow_nan=False)
    number = None if id is None else id.removeprefix("evt_")
    return format_sse_event(data_str=text, event=name, id=number)
