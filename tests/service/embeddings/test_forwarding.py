"""/embed and /classify in the API: passed on as they are, with an answer when nobody is there."""

import asyncio
import hashlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator

import pytest
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, StreamingResponse

from service.settings import Settings
from tests.servers import free_port
from tests.service.conftest import Api, running_api, served
from tests.service.problems import problem


def stand_in() -> FastAPI:
    """Return an embedding process that tells what it was sent."""
    app = FastAPI()

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/embed")
    async def embed(request: Request) -> JSONResponse:
        digest, size = hashlib.sha256(), 0
        async for chunk in request.stream():
            digest.update(chunk)
            size += len(chunk)
        names = ("content-type", "accept", "x-request-id", "cookie")
        seen = {name: request.headers.get(name) for name in names}
        headers = {"X-Queue-Time": "1.5", "X-Request-Id": "theirs", "Set-Cookie": "a=b"}
        return JSONResponse({"sha256": digest.hexdigest(), "size": size, **seen}, headers=headers)

    @app.post("/classify")
    async def classify() -> JSONResponse:
        headers = {"retry-after": "1", "x-should-retry": "true"}
        body = {"status": 429, "detail": "too many images wait"}
        return JSONResponse(body, 429, headers, "application/problem+json")

    @app.post("/v1/embeddings")
    async def rows() -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            for number in range(3):
                yield bytes([number]) * 100_000
                await asyncio.sleep(0.01)

        return StreamingResponse(pieces(), media_type="application/octet-stream")

    return app


@pytest.fixture
def forwarding(sqlite_settings: Settings, sqlite_api: Api) -> Iterator[Api]:
    with served(stand_in()) as port:
        url = f"http://127.0.0.1:{port}"
        settings = sqlite_settings.model_copy(update={"embed_url": url})
        with running_api(settings, sqlite_api.database) as api:
            yield api


def test_body_and_headers_pass_both_ways(forwarding: Api) -> None:
    data = bytes(range(256)) * 40_000  # 10 MB: above the limit of other JSON bodies
    headers = {"content-type": "application/json", "cookie": "secret", "x-request-id": "mine-1"}
    answer = forwarding.client.post("/embed", content=data, headers=headers)
    found = answer.json()
    assert found["size"] == len(data) and found["sha256"] == hashlib.sha256(data).hexdigest()
    assert found["content-type"] == "application/json" and found["cookie"] is None
    assert found["x-request-id"] == "mine-1" and answer.headers["x-request-id"] == "mine-1"
    assert answer.headers["x-queue-time"] == "1.5" and "set-cookie" not in answer.headers


def test_a_body_of_unknown_length(forwarding: Api) -> None:
    answer = forwarding.client.post("/embed", content=iter([b"a" * 70_000, b"b" * 70_000]))
    assert answer.json()["size"] == 140_000


def test_refusals_pass_unchanged(forwarding: Api) -> None:
    answer = forwarding.client.post("/classify", json={})
    assert answer.status_code == 429 and answer.headers["retry-after"] == "1"
    assert answer.headers["x-should-retry"] == "true"
    assert answer.headers["content-type"] == "application/problem+json"
    assert json.loads(answer.text)["detail"] == "too many images wait"


def test_answers_are_streamed(forwarding: Api) -> None:
    with forwarding.client.stream("POST", "/v1/embeddings", json={}) as answer:
        assert answer.headers["content-type"] == "application/octet-stream"
        assert sum(len(piece) for piece in answer.iter_bytes()) == 300_000


@pytest.mark.parametrize("path", ["/embed", "/classify", "/v1/embeddings"])
def test_nobody_there(sqlite_settings: Settings, sqlite_api: Api, path: str) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    settings = sqlite_settings.model_copy(update={"embed_url": url})
    with running_api(settings, sqlite_api.database) as api:
        answer = api.client.post(path, json={"model": "mdl_1", "input": []})
        said = problem(answer, 503)
        assert "ctune embed-server" in said["detail"]
        assert said["error"]["code"] == "embedding_unavailable"
        assert answer.headers["x-should-retry"] == "true" and answer.headers["retry-after"] == "5"
        answer = api.client.post(path, content=bytes(8_000_000))
        problem(answer, 503)


def test_an_embedding_process_that_breaks_off(sqlite_settings: Settings, sqlite_api: Api) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closing = threading.Thread(target=lambda: listener.accept()[0].close())
        closing.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        settings = sqlite_settings.model_copy(update={"embed_url": url})
        with running_api(settings, sqlite_api.database) as api:
            problem(api.client.post("/embed", json={}), 503)
        closing.join()
