"""The HTTP client against a small scripted server: retries, uploads, events, downloads, errors."""

import base64
import hashlib
import io
import json
import threading
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from ctune import client_http
from ctune.client import Client, data_uri
from ctune.client_archive import unpack_model, zip_folder
from ctune.client_http import (
    ApiError,
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    OverloadedError,
    ServerEvent,
    ServiceUnreachableError,
    UnsuccessfulError,
    delay_s,
    lines_of,
    parse_events,
)
from ctune.errors import DataError

Answer = tuple[int, dict[str, str], bytes]
PNG = b"\x89PNG\r\n\x1a\nrest"


class Script:
    """A server that gives prepared answers in turn and keeps what it was asked."""

    def __init__(self) -> None:
        self.answers: list[Answer | Callable[[BaseHTTPRequestHandler], None]] = []
        self.asked: list[tuple[str, str, dict[str, str], bytes]] = []
        script = self

        class Handler(BaseHTTPRequestHandler):
            def handle_any(self) -> None:
                length = int(self.headers.get("content-length", 0))
                body = self.rfile.read(length)
                headers = {key.lower(): value for key, value in self.headers.items()}
                script.asked.append((self.command, self.path, headers, body))
                answer = script.answers.pop(0)
                if callable(answer):
                    answer(self)
                    return
                status, sent, content = answer
                self.send_response(status)
                for key, value in sent.items():
                    self.send_header(key, value)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = do_DELETE = handle_any

            def log_message(self, format: str, *args: Any) -> None:
                """Print nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def say(self, status: int, body: Any, **headers: str) -> None:
        """Prepare a JSON answer."""
        named = {key.replace("_", "-"): value for key, value in headers.items()}
        self.answers.append((status, named, json.dumps(body).encode()))

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    monkeypatch.setattr(client_http, "FIRST_DELAY_S", 0.01)
    made = Script()
    yield made
    made.close()


@pytest.fixture
def client(script: Script) -> Iterator[Client]:
    with Client(script.url) as made:
        yield made


def test_busy_service_is_asked_again(script: Script, client: Client) -> None:
    script.say(429, {"title": "busy"}, retry_after="0")
    script.say(503, {"title": "starting"}, retry_after="0")
    script.say(201, {"id": "job_1"})
    assert client.jobs.create({"dataset": "ds_1"}) == {"id": "job_1"}
    assert [json.loads(body) for *_, body in script.asked] == [{"dataset": "ds_1"}] * 3


def test_an_estimate_is_asked_for_again_while_there_is_time(
    script: Script, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ctune.client.ESTIMATE_WAIT_S", 0.05)
    script.say(200, {"duration_s": None, "retry_after_s": 5})
    script.say(200, {"duration_s": None, "retry_after_s": 5})
    script.say(200, {"duration_s": 7.0, "retry_after_s": None})
    assert client.jobs.estimate({"dataset": "ds_1"}, wait_s=60)["duration_s"] == 7.0
    paths = [path for _, path, _, _ in script.asked]
    assert paths == ["/jobs/estimate?wait_s=0.05"] * 3
    script.say(200, {"duration_s": None, "retry_after_s": 5})
    assert client.jobs.estimate({"dataset": "ds_1"})["duration_s"] is None
    assert script.asked[-1][1] == "/jobs/estimate?wait_s=0.0"


def test_after_all_retries_the_problem_is_an_error(script: Script, client: Client) -> None:
    for _ in range(client_http.RETRIES + 1):
        script.say(503, {"detail": "not ready: no worker"}, retry_after="0")
    with pytest.raises(OverloadedError, match="no worker"):
        client.jobs.list()


def test_nobody_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_http, "FIRST_DELAY_S", 0.001)
    with Client("http://127.0.0.1:1") as client, pytest.raises(ServiceUnreachableError) as caught:
        client.datasets.list()
    assert "ctune up" in caught.value.hint


def test_post_is_not_repeated_when_it_may_have_arrived(script: Script, client: Client) -> None:
    script.answers.append(lambda handler: handler.connection.close())
    with pytest.raises(ServiceUnreachableError):
        client.jobs.create({})
    assert len(script.asked) == 1


def test_get_is_repeated_after_a_broken_answer(script: Script, client: Client) -> None:
    script.answers.append(lambda handler: handler.connection.close())
    script.say(200, {"id": "job_1", "status": "queued"})
    assert client.jobs.get("job_1")["status"] == "queued"


def test_error_shows_every_fault(script: Script, client: Client) -> None:
    faults = [
        {
            "pointer": "/method/contrastive/temperature",
            "code": "out_of_range",
            "detail": "0 is bad",
        },
        {"pointer": "/dataset", "code": "missing", "detail": "send it"},
    ]
    problem = {
        "detail": "2 faults",
        "errors": faults,
        "request_id": "req_1",
        "error": {"code": "x"},
    }
    script.say(422, problem)
    with pytest.raises(InvalidRequestError) as caught:
        client.jobs.create({})
    text = str(caught.value)
    assert "/method/contrastive/temperature: 0 is bad" in text
    assert "/dataset: send it" in text
    assert (caught.value.request_id, caught.value.error_code) == ("req_1", "x")
    assert [fault.code for fault in caught.value.faults] == ["out_of_range", "missing"]


@pytest.mark.parametrize(
    ("status", "kind"), [(404, NotFoundError), (409, ConflictError), (500, ApiError)]
)
def test_status_decides_the_class(
    script: Script, client: Client, status: int, kind: type[ApiError]
) -> None:
    script.answers.append((status, {}, b"<html>not json"))
    with pytest.raises(kind, match="not json"):
        client.jobs.get("job_1")


def test_other_program_on_the_port(script: Script, client: Client) -> None:
    script.answers.append((200, {}, b"<html>hello"))
    with pytest.raises(ApiError, match="no answer of ctune"):
        client.jobs.list()


def test_upload_streams_the_file(script: Script, client: Client, tmp_path: Path) -> None:
    content = b"0123456789abcdef" * 2**18  # 4 MiB
    archive = tmp_path / "leaves.zip"
    archive.write_bytes(content)
    script.say(503, {}, retry_after="0")  # the second try must send the whole file again
    script.say(202, {"id": "ds_1"})
    told: list[tuple[int, int]] = []
    made = client.datasets.push(
        archive, options={"test_fraction": 0.1}, on_progress=lambda *at: told.append(at)
    )
    assert made == {"id": "ds_1"}
    assert told[-1] == (len(content), len(content))
    for _, path, headers, body in script.asked:
        assert path == "/datasets"
        assert headers["content-type"].startswith("multipart/form-data; boundary=")
        assert int(headers["content-length"]) == len(body)
        assert b'name="file"; filename="leaves.zip"' in body
        assert b'name="name"\r\n\r\nleaves.zip\r\n' in body
        assert b'name="options"\r\n\r\n{"test_fraction": 0.1}\r\n' in body
        assert content in body


def test_upload_does_not_hold_the_file_in_memory(tmp_path: Path) -> None:
    size = 64 * 2**20
    archive = tmp_path / "large.zip"
    with archive.open("wb") as file:
        file.truncate(size)
    with Client("http://127.0.0.1:1") as client, archive.open("rb") as opened:
        request = client.http.build("POST", "/datasets", files={"file": ("large.zip", opened)})
        tracemalloc.start()
        assert isinstance(request.stream, httpx.SyncByteStream)
        sent = sum(len(piece) for piece in request.stream)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert sent > size
    assert peak < 4 * 2**20


def test_folder_becomes_a_zip(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(PNG)
    with zip_folder(tmp_path) as file, zipfile.ZipFile(file) as archive:
        assert archive.namelist() == ["a/1.png"]
        assert archive.read("a/1.png") == PNG


def event_bytes(number: int, kind: str, data: dict[str, Any]) -> bytes:
    return f"id: {number}\nevent: {kind}\ndata: {json.dumps(data)}\n\n".encode()


def test_watching_goes_on_after_a_lost_stream(script: Script, client: Client) -> None:
    sent = {"content-type": "text/event-stream"}
    script.answers.append((200, sent, b": ping\n\n" + event_bytes(1, "stage", {"n": 1})))
    script.answers.append((200, sent, event_bytes(2, "done", {"n": 2})))
    found = list(client.jobs.watch("job_1"))
    assert found == [ServerEvent("1", "stage", {"n": 1}), ServerEvent("2", "done", {"n": 2})]
    assert "last-event-id" not in script.asked[0][2]
    assert script.asked[1][2]["last-event-id"] == "1"
    assert script.asked[1][2]["accept"] == "text/event-stream"


def test_event_lines_end_only_at_line_feeds() -> None:
    text = 'data: {"said":\ndata: "a\u2028b"}\r\n\r\n'.encode()
    pieces = [text[:9], text[9:20], text[20:]]
    assert list(parse_events(lines_of(pieces))) == [
        ServerEvent("", "message", {"said": "a\u2028b"})
    ]


def test_waiting_ends_well_or_with_the_reason(script: Script, client: Client) -> None:
    script.say(200, {"id": "ds_1", "status": "processing"})
    script.say(200, {"id": "ds_1", "status": "ready"})
    assert client.datasets.wait("ds_1", poll_s=0.001)["status"] == "ready"
    error = {"code": "diverged", "message": "the loss is nan", "hint": "lower lr"}
    script.say(200, {"id": "job_1", "status": "failed", "error": error})
    with pytest.raises(UnsuccessfulError, match=r"job job_1 failed: the loss is nan \(lower lr\)"):
        client.jobs.wait("job_1")


def test_embed_sends_data_uris_and_decodes_rows(script: Script, client: Client) -> None:
    vectors = np.array([[1.5, -2.0], [0.25, 3.0]], np.float32)
    rows = [{"embedding": base64.b64encode(row.tobytes()).decode()} for row in vectors]
    script.say(200, {"data": rows})
    found = client.embed("mdl_1", [PNG, b"\xff\xd8\xff..."])
    np.testing.assert_array_equal(found, vectors)
    asked = json.loads(script.asked[0][3])
    assert asked["input"][0] == f"data:image/png;base64,{base64.b64encode(PNG).decode()}"
    assert asked["input"][1].startswith("data:image/jpeg;")


def test_faults_of_images_are_counted_over_all_requests(script: Script, client: Client) -> None:
    vector = base64.b64encode(np.zeros(2, np.float32).tobytes()).decode()
    script.say(200, {"data": [{"embedding": vector}] * 64})
    faults = [{"pointer": "/input/3", "code": "corrupt", "detail": "image 3: damaged"}]
    script.say(422, {"errors": faults})
    with pytest.raises(InvalidRequestError) as caught:
        client.embed("mdl_1", [PNG] * 70)
    assert [fault.pointer for fault in caught.value.faults] == ["/input/67"]
    assert [len(json.loads(body)["input"]) for *_, body in script.asked] == [64, 6]


def test_unknown_bytes_stay_unknown() -> None:
    assert data_uri(b"hello") == "data:application/octet-stream;base64,aGVsbG8="


def model_zip(files: dict[str, bytes], sums: dict[str, str] | None = None) -> io.BytesIO:
    sums = sums or {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        archive.writestr("model.json", json.dumps({"files": sums}))
    file.seek(0)
    return file


def test_model_is_pulled_and_checked(script: Script, client: Client, tmp_path: Path) -> None:
    content = model_zip({"config.json": b"{}", "reference/000.png": PNG}).getvalue()
    script.answers.append((200, {"content-type": "application/zip"}, content))
    place = client.models.pull("mdl_1", tmp_path / "model")
    assert (place / "reference" / "000.png").read_bytes() == PNG
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    with pytest.raises(FileExistsError, match="not empty"):
        client.models.pull("mdl_1", place)


@pytest.mark.parametrize(
    ("archive", "said"),
    [
        (model_zip({"../evil": b"x"}), "unsafe name"),
        (model_zip({"/evil": b"x"}), "unsafe name"),
        (model_zip({"config.json": b"x"}, {"config.json": "00"}), "damaged"),
        (model_zip({"config.json": b"x"}, {"model.safetensors": "00"}), "has no model.safetensors"),
        (io.BytesIO(b"no zip"), "not a zip"),
    ],
)
def test_bad_download_leaves_nothing(archive: io.BytesIO, said: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=said):
        unpack_model(archive, tmp_path / "inside" / "model")
    assert list((tmp_path / "inside").iterdir()) == []
    assert [p.name for p in tmp_path.iterdir()] == ["inside"]


def test_delays_double_up_to_a_limit_and_follow_the_service() -> None:
    assert delay_s(0, "7") == 7
    assert delay_s(0, "99999") == client_http.LONGEST_DELAY_S
    assert delay_s(1, "Fri, 13 Nov 2026 10:00:00 GMT") <= 2 * client_http.FIRST_DELAY_S
    assert delay_s(30) <= client_http.LONGEST_DELAY_S
