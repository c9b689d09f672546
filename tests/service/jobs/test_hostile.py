"""POST /jobs with whatever JSON can hold: an answer, never a mistake of the service."""

import copy
import json
import time
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.service import rows
from tests.service.conftest import Api
from tests.service.problems import problem

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.sampled_from([10**100, -(10**30), 1e-320, "auto", "", "mdl_x", "\0", "\ud800", "1e5"])
    | st.text(st.characters(codec=None), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
HEADERS = {"content-type": "application/json"}


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of everything in a body."""
    found = [path] if path else []
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        below = isinstance(value, dict | list)
        found += places(value, (*path, key)) if below else [(*path, key)]
    return found


def put(body: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        body = body[key]
    body[path[-1]] = value


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_value_at_any_place(api: Api, data: st.DataObject) -> None:
    if not hasattr(api, "dataset"):
        with api.database.writing() as session:
            api.dataset = rows.add_ready_dataset(session).id  # type: ignore[attr-defined]
    whole = api.client.get("/methods/lacvit").json()["defaults"]["small"]
    evaluation = {"protocols": ["knn"], "before": True, "knn_k": 3, "knn_temperature": 0.1}
    resources = {"gpus": 0, "max_duration_s": 5, "checkpoint_interval_s": 1.5}
    body = rows.job_body(
        api.dataset,  # type: ignore[attr-defined]
        method=whole, evaluation=evaluation, resources=resources, seed=1, name="n",
        metadata={"a": "b"}, priority=0,
    )  # fmt: skip
    body = copy.deepcopy(body)
    for path in data.draw(st.lists(st.sampled_from(places(body)), min_size=1, max_size=2)):
        try:
            put(body, path, data.draw(JSON))
        except (KeyError, TypeError, IndexError):
            continue
    answer = api.client.post("/jobs", content=json.dumps(body), headers=HEADERS)
    if answer.status_code != 201:
        problem(answer, 422)
        return
    shown = api.client.get(answer.headers["location"])
    assert shown.status_code == 200 and shown.json() == answer.json()


def test_nested_as_deep_as_the_parser_goes(sqlite_api: Api) -> None:
    for depth in (50, 70, 400, 900, 990, 5_000):
        body = rows.job_body("ds_x")
        text = json.dumps(body).replace('"depth": 2', '"depth": ' + "[" * depth + "]" * depth)
        answer = sqlite_api.client.post("/jobs", content=text, headers=HEADERS)
        assert answer.status_code in (400, 422), answer.text[:500]
        problem(answer, answer.status_code)


def test_workers_are_told_after_the_commit(api: Api) -> None:
    told: list[tuple[str, str, int]] = []

    class Announcer:
        def announce(self, kind: str, id: str) -> None:
            told.append((kind, id, api.client.get(f"/{kind}s/{id}").status_code))

        def close(self) -> None:
            pass

    api.app.state.announcer = Announcer()
    with api.database.writing() as session:
        dataset = rows.add_ready_dataset(session).id
    job = api.client.post("/jobs", json=rows.job_body(dataset)).json()["id"]
    upload = api.client.post("/datasets", files={"file": ("a.zip", b"x")}).json()["id"]
    api.client.post("/jobs", json=rows.job_body("ds_x"))
    end = time.monotonic() + 10.0
    while len(told) < 2 and time.monotonic() < end:  # hints go out behind the answer
        time.sleep(0.01)
    assert sorted(told) == [("dataset", upload, 200), ("job", job, 200)]
