"""The comparison of jobs as a page."""

from collections.abc import Sequence
from typing import Any

from ctune.schema import JsonObject
from service.jobs.compare import JobsComparison, ScoreRow, SeedGroup, Spread
from service.jobs.html import render
from service.jobs.numerals import duration, meaning, moment, score, words

JOBS_PER_TABLE = 5
"""More columns would not fit on paper."""


def compare_page(found: JobsComparison, now: float) -> str:
    """Return the page."""
    jobs = [
        {
            "number": number,
            "title": job.name or job.id,
            "facts": _facts(job.model_dump()),
            "job": job,
        }
        for number, job in enumerate(found.jobs, start=1)
    ]
    rows = [(row, _best(row) if found.comparable else None) for row in found.scores]
    tables = [
        _table(rows, jobs[start : start + JOBS_PER_TABLE], start)
        for start in range(0, len(jobs), JOBS_PER_TABLE)
    ]
    numbers = {job.id: number for number, job in enumerate(found.jobs, start=1)}
    warnings = [
        {"message": w.message, "jobs": ", ".join(str(numbers[one]) for one in w.jobs)}
        for w in found.warnings
    ]
    groups = [_group(group, numbers) for group in found.groups]
    page = {
        "comparable": found.comparable,
        "jobs": jobs,
        "tables": tables,
        "warnings": warnings,
        "groups": groups,
    }
    return render("compare.html", now, page=page)


def _facts(job: JsonObject) -> list[tuple[str, Any]]:
    passes = job["image_passes"]
    return [
        ("Job", job["id"]),
        ("Status", job["status"]),
        ("Method", " ".join(part for part in (job["method"], job["preset"]) if part)),
        ("Encoder", job["encoder"]),
        ("Data set", job["dataset_name"] or f"{job['dataset']} (deleted)"),
        ("Seed", job["seed"]),
        ("Created", moment(job["created_at"])),
        ("Time", None if job["train_s"] is None else duration(job["train_s"])),
        ("Image passes", None if passes is None else f"{passes:,}"),
    ]


def _table(
    rows: Sequence[tuple[ScoreRow, float | None]], jobs: Sequence[JsonObject], start: int
) -> JsonObject:
    """Return the scores of some jobs; rows come with the best value of all jobs."""
    shown: dict[str, list[JsonObject]] = {}
    for row, best in rows:
        values = row.values[start : start + len(jobs)]
        if all(value.before is None and value.after is None for value in values):
            continue
        cells = [
            {
                "before": score(value.before, row.metric),
                "after": score(value.after, row.metric),
                "known": value.before is not None or value.after is not None,
                "best": best is not None and value.after == best,
            }
            for value in values
        ]
        shown.setdefault(words(row.protocol), []).append(
            {"metric": words(row.metric), "cells": cells}
        )
    return {"jobs": jobs, "groups": shown}


def _best(row: ScoreRow) -> float | None:
    """Return the best value after tuning, where one is better than another."""
    values = [value.after for value in row.values if value.after is not None]
    better = meaning(row.metric).better
    if better is None or len(set(values)) < 2:
        return None
    return max(values) if better == "higher" else min(values)


def _group(group: SeedGroup, numbers: dict[str, int]) -> JsonObject:
    return {
        "jobs": ", ".join(str(numbers[one]) for one in group.jobs),
        "seeds": ", ".join(str(seed) for seed in group.seeds),
        "rows": [
            {
                "protocol": words(one.protocol),
                "metric": words(one.metric),
                "before": _mean_and_std(one, "before"),
                "after": _mean_and_std(one, "after"),
            }
            for one in group.scores
            if one.before_mean is not None or one.after_mean is not None
        ],
    }


def _mean_and_std(one: Spread, when: str) -> str:
    mean, std = getattr(one, f"{when}_mean"), getattr(one, f"{when}_std")
    shown = score(mean, one.metric)
    return shown if std is None else f"{shown} ± {score(std, one.metric)}"
