"""The report of a job: what it was, what it gained, what to look at."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from ctune.events import storable
from ctune.schema import JsonObject
from ctune.scores import score_rows
from service.jobs.schemas import event_object, job_object, seconds
from service.jobs.service import transitions
from service.tables import Dataset, Job, JobEvent, JobTransition, Metric, Model

MAX_WARNINGS = 200
SHOWN_ALONE = ("config", "result")


def report(session: Session, job: Job, now: float) -> JsonObject:
    """Return the report; what is not known yet is null or empty."""
    stays = transitions(session, job.id)
    shown = job_object(job, stays)
    model = session.get(Model, job.model_id) if job.model_id else None
    result = job.result or {}
    evaluation = evaluation_of(session, job)
    return {
        "object": "job.report",
        "job": {key: value for key, value in shown.items() if key not in SHOWN_ALONE},
        "dataset": _dataset(session, job.dataset_id),
        "config": storable(job.config),
        "evaluation": evaluation,
        "comparison": comparison(evaluation or {}),
        "last_metrics": _last_metrics(session, job.id),
        "warnings": _warnings(session, job.id),
        "stages": _stages(stays, now),
        "image_passes": result.get("image_passes"),
        "stopped_early": result.get("stopped_early"),
        "train_s": storable(result.get("train_s")),
        "model": model_brief(model) if model else None,
    }


def comparison(evaluation: Mapping[str, Any]) -> list[JsonObject]:
    """Return one row per score: before, after and their difference."""
    before = dict(score_rows(storable(evaluation.get("before") or {})))
    after = dict(score_rows(storable(evaluation.get("after") or {})))
    rows = []
    for place in sorted(before.keys() | after.keys()):
        old, new = before.get(place), after.get(place)
        known = old is not None and new is not None
        rows.append(
            {
                "protocol": place[0],
                "metric": ".".join(place[1:]),
                "before": old,
                "after": new,
                "difference": new - old if known else None,  # type: ignore[operator]
            }
        )
    return rows


def _dataset(session: Session, dataset_id: str) -> JsonObject:
    dataset = session.get(Dataset, dataset_id)
    if dataset is None:
        return {"id": dataset_id, "deleted": True, "name": None, "summary": None}
    return {
        "id": dataset.id,
        "deleted": False,
        "name": dataset.name,
        "archive_sha256": dataset.archive_sha256,
        "summary": storable(dataset.summary),
    }


def evaluation_of(session: Session, job: Job) -> JsonObject | None:
    """Return the scores before and after; of a job without a result what it has said so far."""
    result = storable((job.result or {}).get("evaluation"))
    if result:
        return dict(result)
    wanted = select(JobEvent).where(JobEvent.job_id == job.id, JobEvent.kind == "evaluation")
    said = [storable(event.data) for event in session.scalars(wanted.order_by(JobEvent.id))]
    found = {one["when"]: one["results"] for one in said if "when" in one}
    return {"before": found.get("before"), "after": found.get("after")} if found else None


def versions(session: Session, job_id: str) -> JsonObject:
    """Return what the newest attempt ran with, by name."""
    wanted = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.kind == "started")
    event = session.scalars(wanted.order_by(JobEvent.id.desc()).limit(1)).first()
    return {} if event is None else dict(event.data.get("details") or {})


def _last_metrics(session: Session, job_id: str) -> list[JsonObject]:
    last = (
        select(Metric.stage, Metric.name, func.max(Metric.step).label("step"))
        .where(Metric.job_id == job_id)
        .group_by(Metric.stage, Metric.name)
        .subquery()
    )
    same = (Metric.stage == last.c.stage) & (Metric.name == last.c.name)
    wanted = select(Metric).join(last, same & (Metric.step == last.c.step))
    wanted = wanted.where(Metric.job_id == job_id).order_by(Metric.stage, Metric.name)
    return [
        {"stage": m.stage, "name": m.name, "step": m.step, "value": storable(m.value)}
        for m in session.scalars(wanted)
    ]


def _warnings(session: Session, job_id: str) -> list[JsonObject]:
    wanted = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.kind == "warning")
    found = session.scalars(wanted.order_by(JobEvent.id).limit(MAX_WARNINGS))
    return [event_object(event) for event in found]


def _stages(stays: list[JobTransition], now: float) -> list[JsonObject]:
    """Return how long the job was in each status and phase of running, all attempts together."""
    durations: dict[tuple[str, str | None], float] = {}
    for stay in stays:
        if stay.status not in ("queued", "running", "paused"):
            continue
        place = (stay.status, stay.phase if stay.status == "running" else None)
        ended = stay.ended_at if stay.ended_at is not None else now
        durations[place] = durations.get(place, 0.0) + ended - stay.started_at
    return [
        {"status": status, "phase": phase, "duration_s": round(duration_s, 3)}
        for (status, phase), duration_s in durations.items()
    ]


def model_brief(model: Model) -> JsonObject:
    """Return what a report says of a model."""
    return {
        "id": model.id,
        "name": model.name,
        "size_bytes": model.size_bytes,
        "created_at": seconds(model.created_at),
        **{key: model.info.get(key) for key in ("architecture", "embed_dim", "image_size_px")},
        "download": f"/models/{model.id}/download",
    }
