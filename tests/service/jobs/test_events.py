"""Events of a job: the list, and the stream with all that clients rely on."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from sqlalchemy import insert, update

from ctune.client_http import Http, ServerEvent, lines_of, parse_events
from ctune.events import Metrics
from service.jobs import control, lifecycle, stream
from service.jobs.lifecycle import Ending
from service.jobs.recorder import store_events
from service.tables import Job, JobEvent
from tests.service import rows
from tests.service.conftest import Api
from tests.service.problems import faults

STREAM = {"accept": "text/event-stream"}


def add_events(api: Api, job: str, kinds: list[str]) -> None:
    fixed: dict[str, Any] = {"job_id": job, "attempt": 1, "created_at": 2.5, "level": "info"}
    found = [
        {**fixed, "seq": seq, "kind": kind, "message": f"{kind} {seq}", "data": {"n": seq}}
        for seq, kind in enumerate(kinds)
    ]
    with api.database.writing() as session:
        session.execute(insert(JobEvent), found)


def running_job(api: Api) -> tuple[str, lifecycle.Lease]:
    with api.database.writing() as session:
        job = rows.add_job(session).id
        return job, rows.start(session)


def finish(api: Api, lease: lifecycle.Lease, status: str = "succeeded") -> None:
    with api.database.writing() as session:
        assert lifecycle.finish(session, lease, Ending(status, values={"model_id": "mdl_1"}))


def streamed(api: Api, job: str, **headers: str) -> list[ServerEvent]:
    with api.client.stream("GET", f"/jobs/{job}/events", headers=STREAM | headers) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-cache"
        assert answer.headers["x-accel-buffering"] == "no"
        return list(parse_events(lines_of(answer.iter_bytes())))


def test_the_list_is_newest_first_and_paged(api: Api) -> None:
    job, _ = running_job(api)
    add_events(api, job, ["stage", "checkpoint", "evaluation", "warning"])
    path = f"/jobs/{job}/events"
    found = api.client.get(path, params={"limit": 3}).json()
    assert [event["type"] for event in found["data"]] == ["warning", "evaluation", "checkpoint"]
    assert found["has_more"] and found["data"][0]["object"] == "job.event"
    assert found["data"][0]["data"] == {"n": 3} and found["data"][0]["created_at"] == 2
    rest = api.client.get(path, params={"after": found["last_id"]}).json()
    assert [event["type"] for event in rest["data"]] == ["stage", "status", "status"]
    assert not rest["has_more"]
    assert set(faults(api.client.get(path, params={"after": "evt_x"}))) == {"/after"}


def test_an_ended_job_is_streamed_whole_and_ends_with_done(api: Api) -> None:
    job, lease = running_job(api)
    add_events(api, job, ["stage", "checkpoint", "evaluation", "warning"])
    finish(api, lease)
    events = streamed(api, job)
    kinds = [event.kind for event in events]
    said = ["stage", "checkpoint", "evaluation", "warning"]
    assert kinds == ["status", "status", *said, "status", "done"]
    numbers = [int(event.id) for event in events]
    assert numbers == sorted(numbers) and len(set(numbers[:-1])) == len(numbers) - 1
    assert events[-1].data["status"] == "succeeded" and events[-1].data["model"] == "mdl_1"
    assert events[2].data["message"] == "stage 0" and events[2].data["id"] == f"evt_{numbers[2]}"


def test_a_stream_goes_on_behind_the_last_event_seen(api: Api) -> None:
    job, lease = running_job(api)
    add_events(api, job, ["stage", "checkpoint"])
    finish(api, lease)
    events = streamed(api, job)
    behind = streamed(api, job, **{"last-event-id": events[2].id})
    assert behind == events[3:]
    assert streamed(api, job, **{"last-event-id": events[-1].id}) == events[-1:]
    assert streamed(api, job, **{"last-event-id": f"evt_{events[2].id}"}) == events[3:]
    answer = api.client.get(f"/jobs/{job}/events", headers=STREAM | {"last-event-id": "x"})
    assert set(faults(answer)) == {"/Last-Event-ID"}


def test_more_events_than_one_look_takes(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "EVENTS_PER_LOOK", 7)
    job, lease = running_job(api)
    add_events(api, job, ["checkpoint"] * 30)
    finish(api, lease)
    kinds = [event.kind for event in streamed(api, job)]
    assert kinds == ["status"] * 2 + ["checkpoint"] * 30 + ["status", "done"]


def test_events_arrive_while_the_job_runs(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "LOOK_S", 0.02)
    job, lease = running_job(api)
    arrived: list[tuple[float, ServerEvent]] = []

    def read() -> None:
        http = Http(str(api.client.base_url))
        arrived.extend((time.monotonic(), event) for event in http.events(f"/jobs/{job}/events"))
        http.close()

    reader = threading.Thread(target=read)
    reader.start()
    until(lambda: len(arrived) >= 2)
    add_events(api, job, ["checkpoint"])
    sent_at = time.monotonic()
    until(lambda: len(arrived) >= 3)
    assert arrived[2][1].kind == "checkpoint" and arrived[2][0] - sent_at < 2.0
    for fraction in (0.5, 0.5, 0.75):  # an unchanged state is not repeated
        with api.database.writing() as session:
            session.execute(update(Job).values(progress={"fraction": fraction}))
        time.sleep(0.2)
    finish(api, lease)
    reader.join(timeout=20)
    kinds = [event.kind for _, event in arrived]
    assert kinds == ["status", "status", "checkpoint", "progress", "progress", "status", "done"]
    progress = [event for _, event in arrived if event.kind == "progress"]
    assert [event.data["data"]["fraction"] for event in progress] == [0.5, 0.75]
    assert progress[0].id == "" and progress[0].data["status"] == "running"


def test_newest_metrics_come_at_most_once_a_second(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "LOOK_S", 0.02)
    job, lease = running_job(api)

    def tell(*metrics: Metrics) -> None:
        with api.database.writing() as session:
            numbered = [event.model_copy(update={"seq": event.step}) for event in metrics]
            store_events(session, lease, numbered, checkpoints="x", attempt=1)

    tell(*(Metrics(stage="s", step=n, values={"loss": 1.0 / n, "lr": 0.5}) for n in (1, 2)))
    http = Http(str(api.client.base_url))
    events = http.events(f"/jobs/{job}/events")
    first = next(event for event in events if event.kind == "metrics")
    assert first.id == "" and first.data["status"] == "running"
    newest = [{"name": "loss", "step": 2, "value": 0.5}, {"name": "lr", "step": 2, "value": 0.5}]
    assert first.data["data"]["stage"] == "s"
    assert sorted(first.data["data"]["points"], key=lambda point: point["name"]) == newest
    for n in (3, 4, 5):
        tell(Metrics(stage="s", step=n, values={"loss": None if n == 5 else 0.25}))
    finish(api, lease)
    rest = list(events)
    http.close()
    assert [event.kind for event in rest] == ["status", "metrics", "done"]
    assert rest[1].data["data"]["points"] == [{"name": "loss", "step": 5, "value": None}]


def test_the_newest_metrics_are_those_of_the_stage(api: Api) -> None:
    newest = stream.NewestMetrics()
    point = {"step": 1, "value": 0.5}
    first = {"stage": "a", "points": {"loss": point}}
    assert newest.unsaid(None, at_once=True) is None
    assert newest.unsaid(first, at_once=False) == {
        "stage": "a",
        "points": [{"name": "loss", **point}],
    }
    assert newest.unsaid(first, at_once=True) is None, "nothing new"
    second = first | {"stage": "b"}
    assert newest.unsaid(second, at_once=False) is None, "too soon"
    assert newest.unsaid(second, at_once=True) is not None, "the same point of another stage"


def test_a_pause_is_not_the_end_of_a_stream(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "LOOK_S", 0.02)
    job, lease = running_job(api)
    http = Http(str(api.client.base_url))
    events = http.events(f"/jobs/{job}/events")
    with api.database.writing() as session:
        control.request_pause(session, job)
        lifecycle.release(session, lease, "")
    until_paused = [next(events).data["message"] for _ in range(4)]
    assert until_paused[-2:] == ["pausing was asked for", "paused"]
    with api.database.writing() as session:
        control.request_resume(session, job)
        control.request_cancel(session, job)
    assert [event.kind for event in events] == ["status", "status", "done"]
    http.close()


def test_a_quiet_stream_is_kept_alive_and_leaves_no_transaction_open(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "LOOK_S", 0.02)
    monkeypatch.setattr(stream, "PING_S", 0.1)
    job, lease = running_job(api)
    with api.client.stream("GET", f"/jobs/{job}/events", headers=STREAM) as answer:
        pieces = answer.iter_text()
        text = next(pieces)
        while text.count(": ping") < 2:
            text += next(pieces)
        assert "retry: 3000" in text
        pool: Any = api.app.state.database.engine.pool
        held = 0
        for _ in range(50):
            held += pool.checkedout()
            time.sleep(0.003)
        assert held < 40, "a connection is held between two looks"
        finish(api, lease)
        rest = "".join(pieces)
    assert "event: done" in rest


def test_many_streams_do_not_stop_other_requests(
    sqlite_api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, _ = running_job(sqlite_api)
    with httpx.Client(base_url=sqlite_api.client.base_url, trust_env=False) as client:
        streams = [client.stream("GET", f"/jobs/{job}/events", headers=STREAM) for _ in range(60)]
        opened = [one.__enter__() for one in streams]
        assert all(answer.status_code == 200 for answer in opened)
        assert sqlite_api.client.get(f"/jobs/{job}").status_code == 200
        for one in streams:
            one.__exit__(None, None, None)


def test_a_stopping_api_ends_its_streams(sqlite_api: Api) -> None:
    job, _ = running_job(sqlite_api)

    def events() -> Iterator[ServerEvent]:
        with sqlite_api.client.stream("GET", f"/jobs/{job}/events", headers=STREAM) as answer:
            yield from parse_events(lines_of(answer.iter_bytes()))

    found = events()
    next(found)
    sqlite_api.app.state.stopping.set()
    assert [event.kind for event in found] == ["status"]  # no `done`: the client comes back


def until(done: Any, limit_s: float = 15.0) -> None:
    """Wait until `done()`."""
    end = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)
