"""Jobs over HTTP: look, list, cancel."""

from typing import Any

import pytest
from sqlalchemy import insert, update

from service.jobs import lifecycle
from service.jobs.lifecycle import Ending, Lease
from service.tables import Job, new_id
from tests.service import rows
from tests.service.conftest import Api
from tests.service.problems import faults, problem


def test_a_job_on_its_way(api: Api) -> None:
    with api.database.writing() as session:
        job = rows.add_job(session).id
        lease = rows.start(session)
        lifecycle.enter_phase(session, lease, "contrastive")
        progress = {"stage": "contrastive", "step": 3, "total_steps": 9, "fraction": 0.3}
        progress["seconds_remaining"] = float("nan")
        found = session.get_one(Job, job)
        found.progress = progress if api.database.engine.dialect.name == "sqlite" else {"step": 3}
    shown = api.client.get(f"/jobs/{job}").json()
    assert (shown["status"], shown["phase"], shown["attempt"]) == ("running", "contrastive", 1)
    assert shown["queue"] is None and shown["progress"]["step"] == 3
    assert shown["progress"].get("seconds_remaining") is None
    stays = [(stay["status"], stay["phase"]) for stay in shown["transitions"]]
    assert stays == [("queued", None), ("running", None), ("running", "contrastive")]
    assert shown["transitions"][-1]["ended_at"] is None
    with api.database.writing() as session:
        result = {"model": {"embed_dim": 3}, "evaluation": {"before": None, "after": {}}}
        values = {"result": result, "model_id": "mdl_1"}
        assert lifecycle.finish(session, lease, Ending("succeeded", values=values))
    shown = api.client.get(f"/jobs/{job}").json()
    assert shown["status"] == "succeeded" and isinstance(shown["finished_at"], int)
    assert shown["result"]["model"] == "mdl_1" and shown["error"] is None
    assert shown["phase"] is None and shown["transitions"][-1]["phase"] is None


def test_lists_filter(api: Api) -> None:
    with api.database.writing() as session:
        first = rows.add_job(session, "ds_a").id
        rows.start(session)
        second, third = (rows.add_job(session, ds).id for ds in ("ds_a", "ds_b"))

    def ids(**query: Any) -> list[str]:
        return [job["id"] for job in api.client.get("/jobs", params=query).json()["data"]]

    assert set(ids()) == {first, second, third}
    assert ids(status="running") == [first]
    assert set(ids(status=["running", "queued"])) == {first, second, third}
    assert set(ids(dataset="ds_a")) == {first, second}
    assert ids(dataset="ds_a", status="queued") == [second]
    assert set(faults(api.client.get("/jobs", params={"status": "done"}))) == {"/status/0"}


def test_ten_thousand_jobs_page_by_page(api: Api) -> None:
    ids = [new_id("job") for _ in range(10_000)]
    fixed = {"metadata": {}, "config": {"a": 1}, "priority": 0, "run_after": 0.0, "attempt": 0}
    fixed |= {"lost_attempts": 0, "created_at": 1.0, "dataset_id": "ds_x", "status": "queued"}
    with api.database.writing() as session:
        session.execute(insert(Job.__table__), [{"id": id, **fixed} for id in ids])  # type: ignore[arg-type]
    seen: list[str] = []
    query: dict[str, Any] = {"limit": 200}
    while True:
        page = api.client.get("/jobs", params=query).json()
        assert len(page["data"]) <= 200 and page["object"] == "list"
        assert page["first_id"] == page["data"][0]["id"]
        assert page["last_id"] == page["data"][-1]["id"]
        seen += [job["id"] for job in page["data"]]
        if len(seen) == 400:  # new ones do not move the pages behind
            with api.database.writing() as session:
                rows.add_job(session)
        if not page["has_more"]:
            break
        query["after"] = page["last_id"]
    assert seen == sorted(ids, reverse=True)
    last = api.client.get(f"/jobs/{min(ids)}").json()
    assert last["queue"]["jobs_ahead"] == 0


def test_the_last_page_is_not_followed_by_an_empty_one(api: Api) -> None:
    with api.database.writing() as session:
        for _ in range(4):
            rows.add_job(session)
    page = api.client.get("/jobs", params={"limit": 2}).json()
    page = api.client.get("/jobs", params={"limit": 2, "after": page["last_id"]}).json()
    assert len(page["data"]) == 2 and page["has_more"] is False


@pytest.mark.parametrize(
    ("query", "pointer"),
    [
        ({"limit": 0}, "/limit"),
        ({"limit": 201}, "/limit"),
        ({"limit": "many"}, "/limit"),
        ({"after": "a b"}, "/after"),
        ({"after": "\0"}, "/after"),
        ({"dataset": "\0"}, "/dataset"),
    ],
)
def test_wrong_queries(sqlite_api: Api, query: dict[str, Any], pointer: str) -> None:
    assert set(faults(sqlite_api.client.get("/jobs", params=query))) == {pointer}


def test_cancel_a_waiting_job(api: Api) -> None:
    with api.database.writing() as session:
        job = rows.add_job(session).id
    shown = api.client.post(f"/jobs/{job}/cancel")
    assert shown.status_code == 200 and shown.json()["status"] == "cancelled"
    assert api.client.get(f"/jobs/{job}").json()["status"] == "cancelled"
    said = problem(api.client.post(f"/jobs/{job}/cancel"), 409)
    assert job in said["detail"] and "cancelled" in said["detail"]
    assert said["error"]["code"] == "job_ended"


def test_cancel_a_running_job(api: Api) -> None:
    with api.database.writing() as session:
        job = rows.add_job(session).id
        rows.start(session)
    for _ in range(2):  # asking twice changes nothing
        shown = api.client.post(f"/jobs/{job}/cancel").json()
        assert shown["status"] == "running" and shown["cancel_requested_at"] is not None


def test_stop_pause_and_resume(api: Api) -> None:
    with api.database.writing() as session:
        job = rows.add_job(session).id

    def ask(what: str, status: int = 200) -> dict[str, Any]:
        answer = api.client.post(f"/jobs/{job}/{what}")
        if status == 200:
            assert answer.status_code == 200, answer.text
            return dict(answer.json())
        assert answer.headers["x-should-retry"] == "false"
        return problem(answer, status)

    said = ask("stop", 409)
    assert said["error"]["code"] == "job_not_running" and f"/jobs/{job}/cancel" in said["detail"]
    assert ask("resume", 409)["error"]["code"] == "job_not_paused"
    paused = ask("pause")
    assert paused["status"] == "paused" and paused["queue"] is None
    assert isinstance(paused["pause_requested_at"], int)
    listed = api.client.get("/jobs", params={"status": "paused"}).json()["data"]
    assert [found["id"] for found in listed] == [job]
    assert f"/jobs/{job}/resume" in ask("stop", 409)["detail"]
    resumed = ask("resume")
    assert resumed["status"] == "queued" and resumed["queue"]["position"] == 1
    assert resumed["pause_requested_at"] is None
    with api.database.writing() as session:
        rows.start(session)
    stopping = ask("stop")
    assert stopping["status"] == "running" and isinstance(stopping["stop_requested_at"], int)
    assert ask("stop")["stop_requested_at"] == stopping["stop_requested_at"]
    ask("cancel")
    for what in ("stop", "pause", "resume"):
        assert ask(what, 409)["error"]["code"] == "job_cancelling"


@pytest.mark.parametrize("status", ["succeeded", "failed"])
def test_an_ended_job_cannot_be_cancelled(api: Api, status: str) -> None:
    with api.database.writing() as session:
        job = rows.add_job(session).id
        lease = rows.start(session)
        error = {"code": "crashed", "message": "killed"} if status == "failed" else None
        assert lifecycle.finish(session, lease, Ending(status, error=error))
    said = problem(api.client.post(f"/jobs/{job}/cancel"), 409)
    assert status in said["detail"] and said["error"]["code"] == "job_ended"


@pytest.mark.parametrize(
    "path",
    [
        "", "/cancel", "/stop", "/pause", "/resume", "/metrics", "/events", "/logs",
        "/checkpoints", "/report",
    ],
)  # fmt: skip
def test_an_unknown_job_is_not_found(api: Api, path: str) -> None:
    method = "POST" if path in ("/cancel", "/stop", "/pause", "/resume") else "GET"
    for id in ("job_nothing", "%00", "x" * 5000, "%ED%A0%80", "..%2f.."):
        answer = api.client.request(method, f"/jobs/{id}{path}")
        assert "GET /" in problem(answer, 404)["detail"]


def test_a_job_that_will_be_repeated(api: Api) -> None:
    with api.database.writing() as session:
        job = rows.add_job(session).id
        lease = rows.start(session)
        error = {"code": "lost", "message": "the worker died", "fault": "system"}
        lifecycle.requeue_lost(session, lease, error, lifecycle.Retry(3, 0.0))
    shown = api.client.get(f"/jobs/{job}").json()
    assert shown["status"] == "queued" and shown["error"]["code"] == "lost"
    assert shown["queue"]["position"] == 1
    with api.database.writing() as session:
        session.execute(update(Job).values(priority=1))
        assert isinstance(rows.start(session), Lease)
