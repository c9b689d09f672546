"""POST /datasets: what arrives, what is refused, and that nothing half-made stays."""

import errno
import hashlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.settings import Settings
from service.tables import Dataset
from tests.service.conftest import Api, running_api
from tests.service.problems import faults, problem

BOUNDARY = "frontier"
FORM = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}


def uploads(api: Api) -> list[str]:
    return sorted(path.name for path in (api.storage.root / "uploads").iterdir())


def nothing_stays(api: Api) -> None:
    assert uploads(api) == []
    with api.database.reading() as session:
        assert session.query(Dataset).count() == 0


def part(name: str, data: bytes, filename: str | None = None) -> bytes:
    named = f'; filename="{filename}"' if filename else ""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{named}\r\n\r\n'
    return head.encode() + data + b"\r\n"


END = f"--{BOUNDARY}--\r\n".encode()


def test_an_upload_is_stored_and_queued(api: Api) -> None:
    data = os.urandom(3_000_000)
    answer = api.client.post(
        "/datasets",
        data={"name": "leaves", "options": json.dumps({"test_fraction": 0.25})},
        files={"file": ("leaves.zip", data)},
    )
    assert answer.status_code == 202, answer.text
    found = answer.json()
    assert answer.headers["location"] == f"/datasets/{found['id']}"
    assert found["object"] == "dataset" and found["status"] == "processing"
    assert found["name"] == "leaves" and found["options"]["test_fraction"] == 0.25
    assert found["size_bytes"] == len(data) and isinstance(found["created_at"], int)
    assert found["archive_sha256"] == hashlib.sha256(data).hexdigest()
    assert uploads(api) == [found["id"]]
    assert api.storage.upload(found["id"]).read_bytes() == data
    assert api.client.get(f"/datasets/{found['id']}").json() == found
    with api.database.reading() as session:
        row = session.get_one(Dataset, found["id"])
        assert row.status == "queued" and row.upload == f"uploads/{found['id']}"


@pytest.mark.parametrize(
    ("filename", "name"),
    [("leaves.tar.gz", "leaves.tar.gz"), ("..\\..\\x.zip", "x.zip"), ("a/b/c.zip", "c.zip")],
)
def test_the_name_is_by_default_that_of_the_file(sqlite_api: Api, filename: str, name: str) -> None:
    answer = sqlite_api.client.post("/datasets", files={"file": (filename, b"x")})
    assert answer.json()["name"] == name


def test_fields_may_stand_behind_the_file(sqlite_api: Api) -> None:
    content = part("file", b"abc", "a.zip") + part("name", "Blätter".encode()) + END
    answer = sqlite_api.client.post("/datasets", content=content, headers=FORM)
    assert answer.status_code == 202 and answer.json()["name"] == "Blätter"


def test_bytes_that_look_like_a_boundary(sqlite_api: Api) -> None:
    data = (b"\r\n--front\r\n--frontie\r--\r\n" * 40_000) + b"\r\n--frontie"
    content = part("file", data, "a.zip") + END

    def trickle() -> Iterator[bytes]:
        for start in range(0, len(content), 65_537):
            yield content[start : start + 65_537]

    answer = sqlite_api.client.post("/datasets", content=trickle(), headers=FORM)
    assert answer.json()["archive_sha256"] == hashlib.sha256(data).hexdigest()


def test_all_faults_of_the_fields_at_once(api: Api) -> None:
    files = {"name": (None, "x" * 257), "options": (None, '{"test_fraction": 2, "test": 1}')}
    found = faults(api.client.post("/datasets", files=files))
    assert {pointer: fault["code"] for pointer, fault in found.items()} == {
        "/file": "missing",
        "/name": "invalid_value",
        "/options/test_fraction": "out_of_range",
        "/options/test": "unknown_field",
    }
    assert "options.test_fraction" in found["/options/test_fraction"]["detail"]
    nothing_stays(api)


@pytest.mark.parametrize(
    ("files", "pointer", "code"),
    [
        ([("nmae", (None, "x")), ("file", ("a.zip", b"x"))], "/nmae", "unknown_field"),
        ([("file", ("a.zip", b"x")), ("file", ("b.zip", b"y"))], "/file", "repeated"),
        ([("name", (None, "x")), ("name", (None, "y"))], "/name", "repeated"),
        ([("file", ("a.zip", b""))], "/file", "empty"),
        ([("name", (None, b"\xff")), ("file", ("a.zip", b"x"))], "/name", "invalid_type"),
        ([("name", (None, "a\0b")), ("file", ("a.zip", b"x"))], "/name", "invalid_value"),
        ([("options", (None, "{")), ("file", ("a.zip", b"x"))], "/options", "invalid_json"),
        ([("options", (None, "[]")), ("file", ("a.zip", b"x"))], "/options", "invalid_type"),
        (
            [("options", (None, '{"test_fraction": NaN}')), ("file", ("a.zip", b"x"))],
            "/options/test_fraction",
            "not_finite",
        ),
    ],
)
def test_a_wrong_form(sqlite_api: Api, files: Any, pointer: str, code: str) -> None:
    found = faults(sqlite_api.client.post("/datasets", files=files))
    assert found[pointer]["code"] == code
    nothing_stays(sqlite_api)


@pytest.mark.parametrize(
    "kind", ["application/json", "multipart/form-data", "multipart/mixed; boundary=x", ""]
)
def test_a_body_that_is_no_form(sqlite_api: Api, kind: str) -> None:
    answer = sqlite_api.client.post("/datasets", content=b"{}", headers={"content-type": kind})
    assert "multipart/form-data" in problem(answer, 415)["detail"]
    nothing_stays(sqlite_api)


@pytest.mark.parametrize(
    "content",
    [
        part("file", b"abc", "a.zip"),
        part("file", b"abc", "a.zip")[:-8],
        b"nothing of a form",
        b"",
        f"--{BOUNDARY}\r\nContent-Disposition: attachment\r\n\r\nx\r\n".encode() + END,
        f"--{BOUNDARY}\nContent-Disposition: form-data; name=file\n\nx\n".encode() + END,
    ],
)
def test_a_form_that_is_not_whole(sqlite_api: Api, content: bytes) -> None:
    answer = sqlite_api.client.post("/datasets", content=content, headers=FORM)
    assert "Send it again" in problem(answer, 400)["detail"]
    nothing_stays(sqlite_api)


def test_too_many_parts_and_too_long_headers(sqlite_api: Api) -> None:
    for content in (
        part("name", b"x") * 20 + END,
        f"--{BOUNDARY}\r\nX-A: {'a' * 10_000}\r\n\r\nx\r\n".encode() + END,
        part("name", b"x" * 70_000) + END,
    ):
        answer = sqlite_api.client.post("/datasets", content=content, headers=FORM)
        problem(answer, 413)
    nothing_stays(sqlite_api)


@pytest.fixture
def small_api(sqlite_settings: Settings, sqlite_api: Api) -> Iterator[Api]:
    limited = sqlite_settings.model_copy(update={"max_upload_bytes": 100_000})
    with running_api(limited, sqlite_api.database) as api:
        yield api


def test_an_archive_at_the_limit_is_taken(small_api: Api) -> None:
    answer = small_api.client.post("/datasets", files={"file": ("a.zip", bytes(100_000))})
    assert answer.status_code == 202


@pytest.mark.parametrize("size", [100_001, 1_000_000, 30_000_000])
@pytest.mark.parametrize("announced", [True, False])
def test_a_larger_one_is_refused(small_api: Api, size: int, announced: bool) -> None:
    content = part("file", bytes(size), "a.zip") + END

    def pieces() -> Iterator[bytes]:
        for start in range(0, len(content), 65_536):
            yield content[start : start + 65_536]

    body: Any = content if announced else pieces()
    answer = small_api.client.post("/datasets", content=body, headers=FORM)
    said = problem(answer, 413)["detail"]
    assert "100000" in said and "CTUNE_MAX_UPLOAD_BYTES" in said
    nothing_stays(small_api)


@pytest.mark.parametrize("chunked", [True, False])
def test_an_upload_that_breaks_off_leaves_nothing(sqlite_api: Api, chunked: bool) -> None:
    content = part("file", os.urandom(5_000_000), "a.zip")[:-2]
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(content) * 2}"
    head = f"POST /datasets HTTP/1.1\r\nHost: localhost\r\nContent-Type: {FORM['content-type']}\r\n"
    with socket.create_connection(("127.0.0.1", sqlite_api.port)) as connection:
        connection.sendall(f"{head}{length}\r\n\r\n".encode())
        if chunked:
            content = f"{len(content):x}\r\n".encode() + content
        connection.sendall(content)
        until(lambda: any(name.endswith(".part") for name in uploads(sqlite_api)))
        until(lambda: written(sqlite_api) > 4_000_000)
    until(lambda: uploads(sqlite_api) == [])
    nothing_stays(sqlite_api)


def test_a_full_disk_is_said(sqlite_api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("service.datasets.upload.os.fsync", full)
    answer = sqlite_api.client.post("/datasets", files={"file": ("a.zip", b"abc")})
    assert "no room" in problem(answer, 507)["detail"]
    nothing_stays(sqlite_api)


def test_an_archive_larger_than_the_disk_is_refused_at_once(
    sqlite_api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 100

    monkeypatch.setattr("service.datasets.upload.shutil.disk_usage", lambda _path: Usage)
    answer = sqlite_api.client.post("/datasets", files={"file": ("a.zip", bytes(1000))})
    problem(answer, 507)
    nothing_stays(sqlite_api)


def test_without_a_row_no_archive_stays(sqlite_api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("secret reason")

    monkeypatch.setattr("service.datasets.service.create", broken)
    answer = sqlite_api.client.post("/datasets", files={"file": ("a.zip", b"abc")})
    assert "secret" not in answer.text
    problem(answer, 500)
    nothing_stays(sqlite_api)


def test_other_requests_are_answered_while_an_upload_hangs(sqlite_api: Api) -> None:
    head = f"POST /datasets HTTP/1.1\r\nHost: localhost\r\nContent-Type: {FORM['content-type']}\r\n"
    with socket.create_connection(("127.0.0.1", sqlite_api.port)) as connection:
        connection.sendall(f"{head}Content-Length: 1000000\r\n\r\n".encode())
        connection.sendall(part("file", b"x" * 1000, "a.zip"))
        with httpx.Client(base_url=sqlite_api.client.base_url, trust_env=False) as other:
            assert other.get("/jobs").status_code == 200
            answer = other.post("/datasets", files={"file": ("a.zip", b"abc")})
            assert answer.status_code == 202


def written(api: Api) -> int:
    paths: list[Path] = list((api.storage.root / "uploads").iterdir())
    return sum(path.stat().st_size for path in paths)


def until(done: Any, limit_s: float = 15.0) -> None:
    """Wait until `done()`."""
    end = time.monotonic() + limit_s
    while not done():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.01)
