"""Metrics: columns that stay true when they are thinned, and every point as a line."""

import itertools
import json
import math
import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, insert, text

from service.db import Database, make_engine
from service.jobs.metrics import Filters, Wanted, columns
from service.settings import Settings
from service.tables import Metric
from tests.service import rows
from tests.service.conftest import Api
from tests.service.problems import faults


def add_metrics(api: Api, job: str, stage: str, name: str, values: list[float | None]) -> None:
    fixed: dict[str, Any] = {"job_id": job, "stage": stage, "name": name, "attempt": 1}
    points = [
        {**fixed, "created_at": 5.5, "step": step, "value": value}
        for step, value in enumerate(values)
    ]
    with api.database.writing() as session:
        session.execute(insert(Metric), points)


def new_job(api: Api) -> str:
    with api.database.writing() as session:
        return rows.add_job(session).id


def test_series_in_columns(api: Api) -> None:
    job = new_job(api)
    add_metrics(api, job, "contrastive", "loss", [3.0, None, 1.0])
    add_metrics(api, job, "probe", "loss", [0.5])
    add_metrics(api, job, "probe", "accuracy", [0.25, 0.75])

    def series(**query: Any) -> dict[tuple[str, str], tuple[list[int], list[float | None]]]:
        answer = api.client.get(f"/jobs/{job}/metrics", params=query)
        assert answer.status_code == 200, answer.text
        found = answer.json()["series"]
        return {(s["stage"], s["name"]): (s["steps"], s["values"]) for s in found}

    assert series() == {
        ("contrastive", "loss"): ([0, 1, 2], [3.0, None, 1.0]),
        ("probe", "loss"): ([0], [0.5]),
        ("probe", "accuracy"): ([0, 1], [0.25, 0.75]),
    }
    assert set(series(name="loss")) == {("contrastive", "loss"), ("probe", "loss")}
    assert set(series(stage="probe")) == {("probe", "loss"), ("probe", "accuracy")}
    assert series(after_step=1) == {("contrastive", "loss"): ([2], [1.0])}
    assert series(after_step=7) == {}


def test_long_series_are_thinned_on_the_server(api: Api) -> None:
    job = new_job(api)
    values: list[float | None] = [math.sin(n / 50) for n in range(7_000)]
    values[1234], values[4321] = 9.0, -9.0
    add_metrics(api, job, "s", "loss", values)
    found = api.client.get(f"/jobs/{job}/metrics").json()["series"][0]
    assert len(found["steps"]) <= 1000 and found["num_points"] == 7_000
    assert found["last_step"] == 6_999 and found["steps"][-1] == 6_999 and found["steps"][0] == 0
    assert {9.0, -9.0} <= set(found["values"])
    found = api.client.get(f"/jobs/{job}/metrics", params={"max_points": 10_000}).json()
    assert found["series"][0]["values"] == values


def test_every_point_as_a_line(api: Api) -> None:
    job = new_job(api)
    add_metrics(api, job, "a", "loss", [float(n) for n in range(5_000)])  # a look exactly full
    add_metrics(api, job, "b", "loss", [None, 2.5])
    headers = {"accept": "application/x-ndjson"}
    with api.client.stream("GET", f"/jobs/{job}/metrics", headers=headers) as answer:
        assert answer.headers["content-type"] == "application/x-ndjson"
        points = [json.loads(line) for line in answer.iter_lines()]
    assert len(points) == 5_002
    assert [point["step"] for point in points[:5_000]] == list(range(5_000))
    assert [point["value"] for point in points[5_000:]] == [None, 2.5]
    query: dict[str, Any] = {"stage": "b", "after_step": 0}
    answer = api.client.get(f"/jobs/{job}/metrics", headers=headers, params=query)
    last = {"stage": "b", "name": "loss", "step": 1, "value": 2.5, "attempt": 1, "created_at": 5}
    assert answer.json() == last


@pytest.mark.parametrize(
    "query", [{"max_points": 3}, {"after_step": "x"}, {"after_step": 2**63}, {"name": "\0"}]
)
def test_wrong_queries(api: Api, query: dict[str, Any]) -> None:
    job = new_job(api)
    assert set(faults(api.client.get(f"/jobs/{job}/metrics", params=query))) == {
        f"/{next(iter(query))}"
    }


VALUES = st.one_of(st.none(), st.floats(-1e6, 1e6))
GAPS = st.one_of(st.just(1), st.integers(1, 50), st.just(10**6))
POINTS = st.lists(st.tuples(GAPS, VALUES), min_size=1, max_size=120)


@pytest.fixture(scope="module")
def series(
    migrated_sqlite: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Database, str]]:
    """A database, and a job in it, for many small series one after the other."""
    data_dir = tmp_path_factory.mktemp("series")
    shutil.copy(migrated_sqlite, data_dir / "ctune.sqlite")
    database = Database(make_engine(Settings(data_dir=data_dir)))
    with database.writing() as session:
        job = rows.add_job(session).id
    yield database, job
    database.dispose()


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(points=POINTS, most=st.integers(4, 40))
def test_thinning_keeps_ends_extremes_and_order(
    series: tuple[Database, str], points: list[tuple[int, float | None]], most: int
) -> None:
    database, job = series
    steps = list(itertools.accumulate(gap for gap, _ in points))
    given_points = list(zip(steps, (value for _, value in points), strict=True))
    fixed = {"job_id": job, "stage": "s", "name": "x", "attempt": 1, "created_at": 0.0}
    with database.writing() as session:
        session.execute(delete(Metric))
        found = [{**fixed, "step": step, "value": value} for step, value in given_points]
        session.execute(insert(Metric), found)
    with database.reading() as session:
        (thinned,) = columns(session, Wanted(job, Filters()), most)
    kept = list(zip(thinned["steps"], thinned["values"], strict=True))
    assert len(kept) <= most and set(kept) <= set(given_points)
    assert kept == sorted(kept, key=lambda point: point[0]), "in order, none twice"
    assert kept[0] == given_points[0] and kept[-1] == given_points[-1]
    assert (thinned["num_points"], thinned["last_step"]) == (len(points), steps[-1])
    known = [value for _, value in given_points if value is not None]
    if known:
        assert {min(known), max(known)} <= {value for _, value in kept}
    if len(points) <= most:
        assert kept == given_points


def test_a_gap_stays_a_gap(api: Api) -> None:
    job = new_job(api)
    values: list[float | None] = [float(n % 10) for n in range(3000)]
    values[1001:2001] = [None] * 1000
    add_metrics(api, job, "s", "loss", values)
    found = api.client.get(f"/jobs/{job}/metrics", params={"max_points": 62}).json()["series"][0]
    assert len(found["steps"]) == 52, "10 stretches of 30 hold nothing, 20 a lowest and a highest"
    assert [1001 <= step < 2001 for step in found["steps"]].count(True) == 10
    assert found["values"].count(None) == 10


def test_long_series_are_thinned_by_the_database(api: Api) -> None:
    """Half a million points cost this process next to no memory."""
    job, count = new_job(api), 500_000
    points = f"SELECT '{job}', 's', 'loss', n, abs(n - 123456), 1, 0.0 FROM c"
    last = count - 1
    numbers = f"WITH RECURSIVE c(n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM c WHERE n < {last})"
    names = "(job_id, stage, name, step, value, attempt, created_at)"
    with api.database.writing() as session:
        session.execute(text(f"INSERT INTO metrics {names} {numbers} {points}"))
    tracemalloc.start()
    with api.database.reading() as session:
        (found,) = columns(session, Wanted(job, Filters()), 1000)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 5e6
    assert 990 <= len(found["steps"]) <= 1000
    assert found["num_points"] == count
    assert dict(zip(found["steps"], found["values"], strict=True))[123_456] == 0.0
