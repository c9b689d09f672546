"""/healthz and /readyz: ready means that a job sent now will run."""

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from sqlalchemy import update

from ctune.schema import JsonObject
from service.db import now_s
from service.tables import WorkerSeen
from tests.service.conftest import Api, served
from tests.service.problems import problem


@pytest.fixture
def embedding_port() -> Iterator[int]:
    app = FastAPI()

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        return {"status": "ok"}

    with served(app) as port:
        yield port


def see_a_worker(api: Api) -> None:
    with api.database.writing() as session:
        session.add(WorkerSeen(id="w", seen_at=now_s(), info={}))


def set_embed_url(api: Api, port: int) -> None:
    url = f"http://127.0.0.1:{port}"
    api.app.state.settings = api.settings.model_copy(update={"embed_url": url})


def checks(body: JsonObject) -> dict[str, bool]:
    return {check["name"]: check["ok"] for check in body["checks"]}


def test_alive_says_nothing_of_the_rest(sqlite_api: Api) -> None:
    answer = sqlite_api.client.get("/healthz")
    assert answer.status_code == 200 and answer.json() == {"status": "ok"}


def test_ready_when_everything_is_there(api: Api, embedding_port: int) -> None:
    set_embed_url(api, embedding_port)
    see_a_worker(api)
    answer = api.client.get("/readyz")
    assert answer.status_code == 200, answer.text
    assert answer.json()["status"] == "ready"
    assert set(checks(answer.json())) == {"database", "storage", "workers", "embedding"}
    assert all(checks(answer.json()).values())


def test_what_is_missing_is_said_with_what_to_do(api: Api) -> None:
    body = problem(api.client.get("/readyz"), 503)
    assert checks(body) == {"database": True, "storage": True, "workers": False, "embedding": False}
    assert body["error"]["code"] == "workers_not_ready"
    assert "`ctune worker`" in body["detail"] and "`ctune embed-server`" in body["detail"]


def test_a_worker_that_fell_silent(api: Api, embedding_port: int) -> None:
    set_embed_url(api, embedding_port)
    see_a_worker(api)
    with api.database.writing() as session:
        session.execute(update(WorkerSeen).values(seen_at=now_s() - 100.0))
    body = problem(api.client.get("/readyz"), 503)
    assert checks(body)["workers"] is False and "no worker was seen for 100 s" in body["detail"]


def test_a_database_of_another_version(api: Api, embedding_port: int) -> None:
    set_embed_url(api, embedding_port)
    see_a_worker(api)
    with api.database.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = 'older'")
    body = problem(api.client.get("/readyz"), 503)
    assert checks(body)["database"] is False and "ctune migrate" in body["detail"]
    with api.database.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE workers")
    assert checks(problem(api.client.get("/readyz"), 503))["workers"] is False


def test_a_data_directory_that_is_gone(sqlite_api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(sqlite_api.storage.root / "uploads")
    body: Any = problem(sqlite_api.client.get("/readyz"), 503)
    assert checks(body)["storage"] is False and "cannot be written" in body["detail"]
