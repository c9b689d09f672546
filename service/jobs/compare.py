"""One table over several jobs: what each was, its scores, and whether they can be compared."""

import json
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Literal

from pydantic import ValidationError
from sqlalchemy import select
from sqlalchemy.orm import Session

from ctune.config import EvaluationConfig
from ctune.events import storable
from ctune.schema import Fault, JsonObject, Schema
from service.errors import InvalidError, NotFoundError
from service.faults import show
from service.jobs.numerals import score_order
from service.jobs.report import comparison, evaluation_of
from service.jobs.service import checked
from service.tables import Dataset, Job

MIN_JOBS, MAX_JOBS = 2, 50
NOT_SETTINGS = ("protocols", "before", "online", "map")
"""Fields of `evaluation` that change what is measured, but no score that two jobs both have."""


class ComparedJob(Schema):
    """A column of the table."""

    id: str
    name: str | None
    status: str
    method: str
    preset: str | None
    encoder: str
    dataset: str
    dataset_name: str | None
    """Null where the data set has been deleted."""
    seed: int | None
    train_s: float | None
    image_passes: int | None
    created_at: int
    report: str
    """Path of its report."""


class ScoreValues(Schema):
    """A score of one job; null where the job does not have it (yet)."""

    before: float | None
    after: float | None


class ScoreRow(Schema):
    """A row of the table: one score of all jobs."""

    protocol: str
    metric: str
    values: list[ScoreValues]
    """In the order of the jobs."""


class Spread(Schema):
    """A score over the seeds of a group."""

    protocol: str
    metric: str
    before_mean: float | None
    before_std: float | None
    """Sample standard deviation; null for fewer than two values."""
    after_mean: float | None
    after_std: float | None
    num_seeds: int
    """Jobs of the group that have the score after tuning."""


class SeedGroup(Schema):
    """Jobs that differ in their seed alone."""

    jobs: list[str]
    seeds: list[int]
    scores: list[Spread]


class ComparisonWarning(Schema):
    """Why the scores, or some of them, cannot be compared."""

    code: Literal["different_data", "different_evaluation", "not_finished", "nothing_scored"]
    message: str
    jobs: list[str]
    """Those it is about."""


class JobsComparison(Schema):
    """Answer of GET /jobs/compare."""

    object: Literal["jobs.comparison"] = "jobs.comparison"
    comparable: bool
    """All jobs were scored on the same data with the same settings."""
    jobs: list[ComparedJob]
    scores: list[ScoreRow]
    groups: list[SeedGroup]
    warnings: list[ComparisonWarning]


def wanted_ids(given: Sequence[str]) -> list[str]:
    """Return the ids of a query: repeated, separated by commas, or both; each once.

    Raises:
        InvalidError: fewer than 2, or more than 50.
    """
    ids = list(dict.fromkeys(part.strip() for text in given for part in text.split(",")))
    ids = [one for one in ids if one]
    if MIN_JOBS <= len(ids) <= MAX_JOBS:
        return ids
    detail = f"ids names {len(ids)} different jobs; name {MIN_JOBS} to {MAX_JOBS} of GET /jobs."
    raise InvalidError([Fault(pointer="/ids", code="wrong_number_of_jobs", detail=detail)])


def compare(session: Session, ids: Sequence[str]) -> JobsComparison:
    """Return the table over the jobs `ids`, in this order.

    Raises:
        NotFoundError: some do not exist; its faults name all of them.
    """
    jobs = _jobs(session, ids)
    wanted = select(Dataset).where(Dataset.id.in_({job.dataset_id for job in jobs}))
    datasets = {dataset.id: dataset for dataset in session.scalars(wanted)}
    tables = [_scores(session, job) for job in jobs]
    places = sorted({place for table in tables for place in table}, key=lambda p: score_order(*p))
    none = ScoreValues(before=None, after=None)
    rows = [
        ScoreRow(protocol=p, metric=m, values=[table.get((p, m), none) for table in tables])
        for p, m in places
    ]
    warnings = _warnings(jobs, datasets, rows)
    different = ("different_data", "different_evaluation")
    return JobsComparison(
        comparable=not any(warning.code in different for warning in warnings),
        jobs=[_compared(job, datasets.get(job.dataset_id)) for job in jobs],
        scores=rows,
        groups=_groups(jobs, datasets, rows),
        warnings=warnings,
    )


def _jobs(session: Session, ids: Sequence[str]) -> list[Job]:
    wanted = select(Job).where(Job.id.in_([checked(one) for one in ids]))
    found = {job.id: job for job in session.scalars(wanted)}
    missing = [one for one in ids if one not in found]
    if not missing:
        return [found[one] for one in ids]
    faults = [
        Fault(pointer="/ids", code="unknown_job", detail=f"there is no job {show(one)}.")
        for one in missing
    ]
    raise NotFoundError(
        f"there is no job {', '.join(show(one) for one in missing)}. GET /jobs lists those there"
        " are.",
        faults=faults,
    )


def _scores(session: Session, job: Job) -> dict[tuple[str, str], ScoreValues]:
    rows = comparison(evaluation_of(session, job) or {})
    return {
        (row["protocol"], row["metric"]): ScoreValues(before=row["before"], after=row["after"])
        for row in rows
    }


def _compared(job: Job, dataset: Dataset | None) -> ComparedJob:
    config, result = job.config, storable(job.result or {})
    encoder, method = config.get("encoder", {}), config.get("method", {})
    return ComparedJob(
        id=job.id,
        name=job.name,
        status=job.status,
        method=method.get("name", ""),
        preset=method.get("preset"),
        encoder=str(next((encoder[k] for k in ("name", "id", "path") if encoder.get(k)), "")),
        dataset=job.dataset_id,
        dataset_name=None if dataset is None else dataset.name,
        seed=config.get("seed"),
        train_s=result.get("train_s"),
        image_passes=result.get("image_passes"),
        created_at=int(job.created_at),
        report=f"/jobs/{job.id}/report",
    )


# --- what can be compared ---


def _warnings(
    jobs: Sequence[Job], datasets: Mapping[str, Dataset], rows: Sequence[ScoreRow]
) -> list[ComparisonWarning]:
    found = []
    everybody = [job.id for job in jobs]
    if len({_data_key(job, datasets) for job in jobs}) > 1:
        message = "the jobs were scored on different data: their scores are not comparable"
        found.append(ComparisonWarning(code="different_data", message=message, jobs=everybody))
    if len({_settings_key(job) for job in jobs}) > 1:
        message = (
            "the jobs were scored with different evaluation settings: their scores are not"
            " comparable"
        )
        found.append(
            ComparisonWarning(code="different_evaluation", message=message, jobs=everybody)
        )
    unfinished = [job.id for job in jobs if job.status != "succeeded"]
    if unfinished:
        message = "these jobs have not succeeded (yet): scores after tuning are missing"
        found.append(ComparisonWarning(code="not_finished", message=message, jobs=unfinished))
    blank = [
        job.id
        for place, job in enumerate(jobs)
        if job.status == "succeeded" and all(row.values[place].after is None for row in rows)
    ]
    if blank:
        message = "these jobs have no scores: nothing was held out, or no protocol fitted"
        found.append(ComparisonWarning(code="nothing_scored", message=message, jobs=blank))
    return found


def _data_key(job: Job, datasets: Mapping[str, Dataset]) -> str:
    """Return what two jobs on the same images and splits share; uploads of equal bytes do."""
    dataset = datasets.get(job.dataset_id)
    return job.dataset_id if dataset is None else dataset.store or dataset.id


def _settings_key(job: Job) -> str:
    evaluation: JsonObject = job.config.get("evaluation") or {}
    try:  # a job of an earlier version has no fields that came later
        evaluation = EvaluationConfig.model_validate(evaluation).model_dump(mode="json")
    except ValidationError:
        evaluation = {"unknown": evaluation}
    kept = {key: value for key, value in evaluation.items() if key not in NOT_SETTINGS}
    return json.dumps(kept, sort_keys=True)


# --- seeds ---


def _groups(
    jobs: Sequence[Job], datasets: Mapping[str, Dataset], rows: Sequence[ScoreRow]
) -> list[SeedGroup]:
    places: dict[str, list[int]] = {}
    for place, job in enumerate(jobs):
        config = {k: v for k, v in job.config.items() if k not in ("seed", "resources")}
        key = json.dumps([_data_key(job, datasets), config], sort_keys=True)
        places.setdefault(key, []).append(place)
    return [
        SeedGroup(
            jobs=[jobs[place].id for place in group],
            seeds=[jobs[place].config.get("seed", 0) for place in group],
            scores=[_spread(row, group) for row in rows],
        )
        for group in places.values()
        if len(group) > 1
    ]


def _spread(row: ScoreRow, group: Sequence[int]) -> Spread:
    values = [row.values[place] for place in group]
    before = [value.before for value in values if value.before is not None]
    after = [value.after for value in values if value.after is not None]
    return Spread(
        protocol=row.protocol,
        metric=row.metric,
        before_mean=mean(before) if before else None,
        before_std=stdev(before) if len(before) > 1 else None,
        after_mean=mean(after) if after else None,
        after_std=stdev(after) if len(after) > 1 else None,
        num_seeds=len(after),
    )
