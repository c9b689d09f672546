"""The API process as a whole: errors, limits, start, stop, memory."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr
from sqlalchemy import event
from sqlalchemy.orm import Session

from ctune.schema import JsonObject
from service.app import refusal, remove_abandoned_uploads
from service.db import Database, DatabaseUnavailableError, make_engine, migrate
from service.settings import Settings
from tests.servers import Server, free_port
from tests.service import rows
from tests.service.conftest import Api, running_api
from tests.service.problems import faults, problem

START_S = 60.0
HOSTILE_HOSTS = (
    "evil.example",
    "localhost.evil.example",
    "",
    "10.0.0.1:8000",
    "[::2]:80",
    "a@localhost",
)


def environment(settings: Settings) -> dict[str, str]:
    found = {"CTUNE_DATA_DIR": str(settings.data_dir), "CTUNE_DATABASE_URL": settings.database}
    return dict(os.environ) | found


@contextmanager
def api_process(settings: Settings) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """Run the API as a program of its own."""
    port = free_port()
    command = [sys.executable, "-W", "error", "-m", "service.app", "--port", str(port)]
    process = subprocess.Popen(
        command, env=environment(settings), stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    client = httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=60.0)
    try:
        until = time.monotonic() + START_S
        while True:
            assert process.poll() is None and time.monotonic() < until, "the API does not start"
            try:
                client.get("/healthz")
                break
            except httpx.ConnectError:
                time.sleep(0.05)
        yield process, client
    finally:
        client.close()
        process.kill()
        process.communicate()


def test_request_ids(sqlite_api: Api) -> None:
    given = sqlite_api.client.get("/healthz", headers={"x-request-id": "abc-1.2_3"})
    assert given.headers["x-request-id"] == "abc-1.2_3"
    for wrong in ("a b", "x" * 65, "<script>"):
        made = sqlite_api.client.get("/healthz", headers={"x-request-id": wrong})
        assert re.fullmatch(r"req_[0-9a-f]{24}", made.headers["x-request-id"])
    missing = sqlite_api.client.get("/nothing", headers={"x-request-id": "abc"})
    assert problem(missing, 404)["request_id"] == "abc"


@pytest.mark.parametrize("host", HOSTILE_HOSTS)
def test_names_of_other_hosts_are_refused(sqlite_api: Api, host: str) -> None:
    answer = sqlite_api.client.get("/jobs", headers={"host": host})
    assert "localhost" in problem(answer, 400)["detail"]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:9", "[::1]:8000", "[::1]"])
def test_names_of_this_host_are_taken(sqlite_api: Api, host: str) -> None:
    assert sqlite_api.client.get("/jobs", headers={"host": host}).status_code == 200


def test_pages_of_other_sites_are_refused(sqlite_api: Api) -> None:
    for origin in ("https://evil.example", "null", "http://localhost.evil.example", ""):
        files = {"file": ("a.zip", b"x")}
        answer = sqlite_api.client.post("/datasets", files=files, headers={"origin": origin})
        assert problem(answer, 403)["error"]["code"] == "foreign_origin"
    for origin in ("http://localhost:8000", "http://127.0.0.1:3", "http://[::1]"):
        answer = sqlite_api.client.get("/jobs", headers={"origin": origin})
        assert answer.status_code == 200


@pytest.mark.parametrize(
    "path", ["/", "/job", "/jobs/", "/jobs/a/b/c", "/datasets/../../etc", "/%00"]
)
def test_unknown_paths(sqlite_api: Api, path: str) -> None:
    answer = sqlite_api.client.get(httpx.URL(sqlite_api.client.base_url, raw_path=path.encode()))
    assert "GET /docs" in problem(answer, 404)["detail"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/jobs", "GET, POST"),
        ("POST", "/jobs/job_1", "GET"),
        ("GET", "/embed", "POST"),
        ("PATCH", "/models/mdl_1", "DELETE, GET"),
        ("DELETE", "/methods", "GET"),
    ],
)
def test_methods_that_are_not_allowed(
    sqlite_api: Api, method: str, path: str, allowed: str
) -> None:
    answer = sqlite_api.client.request(method, path)
    assert allowed in problem(answer, 405)["detail"]
    assert answer.headers["allow"] == allowed
    assert answer.json()["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize("announced", [True, False])
def test_large_json_bodies_are_refused(sqlite_api: Api, announced: bool) -> None:
    body: Any = b'{"name": "' + b"x" * 2_000_000 + b'"}'
    content = body if announced else iter([body[:1_000_000], body[1_000_000:]])
    headers = {"content-type": "application/json"}
    answer = sqlite_api.client.post("/jobs", content=content, headers=headers)
    assert "1048576 bytes" in problem(answer, 413)["detail"]


def test_mistakes_of_the_service_say_nothing_of_it(
    sqlite_api: Api, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("secret reason")

    monkeypatch.setattr("service.jobs.service.get", broken)
    answer = sqlite_api.client.get("/jobs/job_1", headers={"x-request-id": "abc"})
    assert "secret" not in answer.text
    body = problem(answer, 500)
    assert body["error"]["type"] == "server_error" and "its log" in body["detail"]
    assert "secret reason" in caplog.text and "abc" in caplog.text


def test_a_database_that_does_not_answer(sqlite_api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone() -> None:
        raise DatabaseUnavailableError("postgresql://user:secret@host does not answer")

    monkeypatch.setattr(sqlite_api.app.state.database, "reading", gone)
    answer = sqlite_api.client.get("/jobs")
    assert "secret" not in answer.text and "GET /readyz" in problem(answer, 503)["detail"]
    assert answer.headers["retry-after"] == "5" and answer.headers["x-should-retry"] == "true"


def test_a_postgres_that_dies_and_comes_back(tmp_path: Path, killable_postgres: Server) -> None:
    url = killable_postgres.url.replace("postgresql:", "postgresql+psycopg:")
    settings = Settings(data_dir=tmp_path, database_url=SecretStr(url))
    migrate(settings)
    with running_api(settings, Database(make_engine(settings))) as api:
        assert api.client.get("/jobs").status_code == 200
        killable_postgres.kill()
        problem(api.client.get("/jobs"), 503)
        assert api.client.get("/healthz").status_code == 200
        not_ready = problem(api.client.get("/readyz"), 503)
        assert {c["name"]: c["ok"] for c in not_ready["checks"]}["database"] is False
        killable_postgres.start()
        assert api.client.get("/jobs").status_code == 200
        api.database.dispose()


def test_a_commit_that_fails_is_an_error_and_not_a_201(
    sqlite_api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    with sqlite_api.database.writing() as session:
        dataset = rows.add_ready_dataset(session).id

    def refuse(*_: Any) -> None:
        raise DatabaseUnavailableError("the commit failed")

    event.listen(Session, "before_commit", refuse)
    try:
        answer = sqlite_api.client.post("/jobs", json=rows.job_body(dataset))
    finally:
        event.remove(Session, "before_commit", refuse)
    problem(answer, 503)
    assert sqlite_api.client.get("/jobs").json()["data"] == []


def test_the_description_of_the_api(sqlite_api: Api) -> None:
    described = sqlite_api.client.get("/openapi.json").json()
    assert {"/datasets", "/jobs", "/jobs/{job_id}/events", "/models", "/embed"} <= set(
        described["paths"]
    )
    for path, methods in described["paths"].items():
        for method, operation in methods.items():
            assert operation.get("description"), f"{method} {path} is not described"
            assert "application/problem+json" in operation["responses"]["default"]["content"]
            assert "422" not in operation["responses"], "that would describe another error body"
    forms = {
        path: set(described["paths"][path]["get"]["responses"]["200"]["content"])
        for path in described["paths"]
        if path.startswith(("/jobs/", "/checkpoints/")) and "get" in described["paths"][path]
    }
    assert {path: found for path, found in forms.items() if found != {"application/json"}} == {
        "/jobs/compare": {"application/json", "text/html"},
        "/jobs/{job_id}/events": {"application/json", "text/event-stream"},
        "/jobs/{job_id}/logs": {"text/plain"},
        "/jobs/{job_id}/metrics": {"application/json", "application/x-ndjson"},
        "/jobs/{job_id}/report": {"application/json", "text/html"},
        "/checkpoints/{checkpoint_id}/download": {"application/zip"},
    }


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.com", ""])
def test_only_loopback_is_served(host: str) -> None:
    refused = refusal(host, 8000)
    assert refused is not None and refused[0] == 78
    assert "no API keys" in refused[1] and "127.0.0.1" in refused[1]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.9"])
def test_loopback_is_served(host: str) -> None:
    assert refusal(host, 8000) is None


def test_the_program_refuses_other_hosts_and_databases(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "new")
    for arguments, said in ((["--host", "0.0.0.0"], "API keys"), ([], "ctune migrate")):
        command = [sys.executable, "-m", "service.app", "--port", str(free_port()), *arguments]
        done = subprocess.run(command, env=environment(settings), capture_output=True, text=True)
        assert done.returncode == 78, done.stderr
        assert said in done.stderr and "Traceback" not in done.stderr


def test_half_written_archives_of_a_dead_process_go(api: Api) -> None:
    old, young = (api.storage.upload(f"ds_{age}").with_suffix(".part") for age in ("old", "young"))
    whole = api.storage.upload("ds_whole")
    for path in (old, young, whole):
        path.write_bytes(b"x")
    for path in (old, whole):
        os.utime(path, (1.0, 1.0))
    remove_abandoned_uploads(api.storage)
    assert (old.exists(), young.exists(), whole.exists()) == (False, True, True)


NO_TORCH = """
import asyncio, json, sys
import httpx
from service.app import create_app
from service.settings import Settings

def loaded():
    return sorted(name for name in ("torch", "torchvision", "timm") if name in sys.modules)

async def main():
    before = loaded()
    app = create_app(Settings())
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            for path in ("/methods", "/jobs", "/datasets", "/models", "/readyz", "/openapi.json"):
                await client.get(path)
            await client.post("/jobs", json=json.loads(sys.argv[1]))
            await client.post("/datasets", files={"file": ("a.zip", b"x")})
            await client.post("/embed", json={})
    print(json.dumps([before, loaded()]))

asyncio.run(main())
"""


def test_torch_is_never_imported(sqlite_settings: Settings) -> None:
    body = json.dumps(rows.job_body("ds_x"))
    done = subprocess.run(
        [sys.executable, "-c", NO_TORCH, body],
        env=environment(sqlite_settings),
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == [[], []]


def memory_bytes(pid: int, name: str) -> int:
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    found = re.search(rf"^{name}:\s+(\d+) kB", status, re.MULTILINE)
    assert found is not None
    return int(found.group(1)) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.timeout(600)
def test_the_api_stays_small_while_it_takes_a_large_archive(sqlite_settings: Settings) -> None:
    """One gibibyte as a client would send it; measured: 125 MB at most."""
    size = 2**30
    head = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.tar"\r\n\r\n'
    end = b"\r\n--b--\r\n"

    def content() -> Iterator[bytes]:
        yield head
        block = bytes(2**20)
        for _ in range(size // len(block)):
            yield block
        yield end

    with api_process(sqlite_settings) as (process, client):
        length = str(len(head) + size + len(end))
        headers = {"content-type": "multipart/form-data; boundary=b", "content-length": length}
        answer = client.post("/datasets", content=content(), headers=headers, timeout=500.0)
        assert answer.status_code == 202 and answer.json()["size_bytes"] == size
        with client.stream("GET", "/models") as listed:
            assert listed.status_code == 200
        most = memory_bytes(process.pid, "VmHWM")
    print(f"most memory of the API: {most / 1e6:.0f} MB")
    assert most < 300_000_000


def test_a_signal_ends_the_process_even_with_open_streams(sqlite_settings: Settings) -> None:
    database = Database(make_engine(sqlite_settings))
    with database.writing() as session:
        job = rows.add_job(session).id
    database.dispose()
    headers = {"accept": "text/event-stream"}
    with (
        api_process(sqlite_settings) as (process, client),
        client.stream("GET", f"/jobs/{job}/events", headers=headers) as answer,
    ):
        lines = answer.iter_lines()
        assert any(line.startswith("event: status") for line in lines)
        process.send_signal(signal.SIGTERM)
        assert not any(line.startswith("event: done") for line in lines)  # ends in good order
        process.wait(timeout=20)


def test_faults_are_said_in_the_words_of_the_openai_client(sqlite_api: Api) -> None:
    answer = sqlite_api.client.post("/jobs", json=rows.job_body("ds_x", seed=-1))
    assert set(faults(answer)) == {"/seed", "/dataset"}
    error: JsonObject = answer.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert (error["param"], error["code"]) == ("seed", "out_of_range")
