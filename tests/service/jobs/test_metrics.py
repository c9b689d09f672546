"""Metrics: columns that stay true when they are thinned, and every point as a line."""

import json
import math
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import insert

from service.jobs.metrics import Point, thin
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


@given(st.lists(VALUES, min_size=1, max_size=400), st.integers(4, 60))
def test_thinning_keeps_ends_extremes_and_order(values: list[float | None], most: int) -> None:
    points: list[Point] = list(enumerate(values))
    kept = thin(points, len(points), most)
    assert len(kept) <= most and set(kept) <= set(points)
    assert kept == sorted(kept, key=lambda point: point[0])
    assert kept[0] == points[0] and kept[-1] == points[-1]
    known = [value for value in values if value is not None]
    if known:
        assert {min(known), max(known)} <= {value for _, value in kept}
    if len(points) <= most:
        assert kept == points


def test_thinning_uses_what_it_may() -> None:
    points: list[Point] = [(n, random.Random(n).random()) for n in range(100_000)]
    assert 990 <= len(thin(points, len(points), 1_000)) <= 1_000


def test_points_that_come_while_looking_are_left_for_the_next_look() -> None:
    points: list[Point] = [(n, float(n)) for n in range(20)]
    assert thin(points, 10, 4)[-1] == (9, 9.0)
