"""What jobs look like on the wire."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple

from pydantic import Field, ValidationError, WrapValidator

from ctune.config import RunConfig
from ctune.events import storable
from ctune.schema import Fault, JsonObject
from service.errors import UnsupportedTypeError
from service.faults import body_faults, unstorable_faults
from service.tables import Checkpoint, Job, JobEvent, JobTransition

Key = Annotated[str, Field(min_length=1, max_length=64)]
Value = Annotated[str, Field(max_length=512)]


class JobCreate(RunConfig):
    """Body of POST /jobs: a run, the data set it runs on, and how to find it again."""

    dataset: Annotated[str, Field(max_length=64)]
    """Id of a ready data set, `ds_…`."""
    name: Annotated[str, Field(max_length=256)] | None = None
    """For people."""
    metadata: Annotated[dict[Key, Value], Field(max_length=16)] = {}
    """Up to 16 keys of up to 64 characters with values of up to 512."""
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    """Higher runs first; equal ones in the order of their making."""

    def run_config(self) -> RunConfig:
        """Return the part that decides the outcome."""
        return RunConfig.model_validate(self.model_dump(include=set(RunConfig.model_fields)))


class Rejected(NamedTuple):
    """A body that is no `JobCreate`, with what is wrong; the rest of it is still checked."""

    body: Any
    faults: list[Fault]


def _keep_faults(body: Any, validate: Callable[[Any], JobCreate]) -> JobCreate | Rejected:
    if isinstance(body, bytes):  # FastAPI parses only what is sent as JSON
        raise UnsupportedTypeError(
            "the body is not JSON: send it as `Content-Type: application/json`."
        )
    unstorable = unstorable_faults(body)
    try:
        job = validate(body)
    except ValidationError as error:
        found = body_faults(error.errors(include_url=False), JobCreate)
        known = {fault.pointer for fault in found}
        return Rejected(body, found + [f for f in unstorable if f.pointer not in known])
    return Rejected(body, unstorable) if unstorable else job


JobBody = Annotated[JobCreate, WrapValidator(_keep_faults)]
"""A `JobCreate`, or `Rejected`: so that all faults of a request are answered at once."""


def job_summary(job: Job) -> JsonObject:
    """Return a job as lists show it."""
    return {
        "id": job.id,
        "object": "job",
        "name": job.name,
        "status": job.status,
        "phase": _phase(job),
        "dataset": job.dataset_id,
        "priority": job.priority,
        "attempt": job.attempt,
        "created_at": seconds(job.created_at),
        "started_at": seconds(job.started_at),
        "finished_at": seconds(job.finished_at),
        "cancel_requested_at": seconds(job.cancel_requested_at),
        "pause_requested_at": seconds(job.pause_requested_at),
        "stop_requested_at": seconds(job.stop_requested_at),
        "progress": storable(job.progress),
        "metadata": job.metadata_,
        "config": storable(job.config),
        "error": storable(job.error),
        "result": _result(job),
    }


def job_object(
    job: Job, transitions: list[JobTransition], jobs_ahead: int | None = None
) -> JsonObject:
    """Return a job with its history and, while queued, its place in the queue."""
    place = None
    if jobs_ahead is not None:
        place = {"position": jobs_ahead + 1, "jobs_ahead": jobs_ahead}
    shown = [_transition(transition) for transition in transitions]
    return {**job_summary(job), "queue": place, "transitions": shown}


def event_object(event: JobEvent) -> JsonObject:
    """Return an event; its number is that of the server-sent event."""
    return {
        "id": f"evt_{event.id}",
        "object": "job.event",
        "created_at": seconds(event.created_at),
        "attempt": event.attempt,
        "type": event.kind,
        "level": event.level,
        "message": event.message,
        "data": storable(event.data),
    }


def checkpoint_object(checkpoint: Checkpoint) -> JsonObject:
    """Return a checkpoint with the sums of its files."""
    return {
        "id": checkpoint.id,
        "object": "job.checkpoint",
        "job": checkpoint.job_id,
        "name": checkpoint.name,
        "attempt": checkpoint.attempt,
        "stage": checkpoint.stage,
        "step": checkpoint.step,
        "best": checkpoint.best,
        "created_at": seconds(checkpoint.created_at),
        "size_bytes": sum(file.get("size_bytes", 0) for file in checkpoint.files.values()),
        "files": checkpoint.files,
        "download": f"/checkpoints/{checkpoint.id}/download",
    }


def _phase(row: Job | JobTransition) -> str | None:
    """Return what a running job does; where it ended badly, its error says in which phase."""
    return row.phase if row.status == "running" else None


def _transition(transition: JobTransition) -> JsonObject:
    return {
        "status": transition.status,
        "phase": _phase(transition),
        "attempt": transition.attempt,
        "started_at": seconds(transition.started_at),
        "ended_at": seconds(transition.ended_at),
        "message": transition.message,
    }


def _result(job: Job) -> JsonObject | None:
    if job.result is None:
        return None
    stored: Mapping[str, Any] = storable(job.result)
    return {**stored, "model": job.model_id}


def seconds(time_s: float | None) -> int | None:
    """Return a time as whole Unix seconds."""
    return None if time_s is None else int(time_s)
