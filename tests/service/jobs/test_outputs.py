"""What jobs leave behind: logs, checkpoints, the report."""

import hashlib
import io
import zipfile
from typing import Any

import pytest
from sqlalchemy import insert

from service.jobs import control, lifecycle
from service.jobs.lifecycle import Ending
from service.jobs.report import comparison
from service.tables import Checkpoint, JobEvent, Metric, new_id
from tests.service import rows
from tests.service.conftest import Api
from tests.service.problems import problem

LOG = b"".join(b"line %d\n" % n for n in range(100_000))


def running_job(api: Api) -> tuple[str, lifecycle.Lease]:
    with api.database.writing() as session:
        job = rows.add_job(session).id
        return job, rows.start(session)


def write_log(api: Api, job: str, data: bytes, attempt: int = 1) -> None:
    run = api.storage.job_run(job, attempt).create()
    run.log.write_bytes(data)


def test_a_job_without_a_log_has_an_empty_one(sqlite_api: Api) -> None:
    job, _ = running_job(sqlite_api)
    answer = sqlite_api.client.get(f"/jobs/{job}/logs")
    assert answer.status_code == 200 and answer.content == b""
    assert (
        "attempt 2"
        in problem(sqlite_api.client.get(f"/jobs/{job}/logs", params={"attempt": 2}), 404)["detail"]
    )


def test_the_whole_log(api: Api) -> None:
    job, _ = running_job(api)
    write_log(api, job, LOG)
    answer = api.client.get(f"/jobs/{job}/logs")
    assert answer.content == LOG and answer.status_code == 200
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["x-attempt"] == "1" and answer.headers["accept-ranges"] == "bytes"


@pytest.mark.parametrize(
    ("header", "start", "end"),
    [
        ("bytes=0-9", 0, 10),
        ("bytes=10-", 10, None),
        ("bytes=-7", -7, None),
        ("bytes=5-99999999999", 5, None),
        ("bytes= 3 - 3", 3, 4),
        ("bytes=-99999999999", 0, None),
    ],
)
def test_a_part_of_the_log(sqlite_api: Api, header: str, start: int, end: int | None) -> None:
    job, _ = running_job(sqlite_api)
    write_log(sqlite_api, job, LOG)
    answer = sqlite_api.client.get(f"/jobs/{job}/logs", headers={"range": header})
    assert answer.status_code == 206 and answer.content == LOG[start:end]
    first = start % len(LOG) if start < 0 else start
    last = first + len(answer.content) - 1
    assert answer.headers["content-range"] == f"bytes {first}-{last}/{len(LOG)}"


@pytest.mark.parametrize("header", ["lines=1-2", "bytes=5-2", "bytes=-", "bytes=0-1,4-5", "x"])
def test_ranges_that_are_left_aside(sqlite_api: Api, header: str) -> None:
    job, _ = running_job(sqlite_api)
    write_log(sqlite_api, job, b"abc\n")
    answer = sqlite_api.client.get(f"/jobs/{job}/logs", headers={"range": header})
    assert answer.status_code == 200 and answer.content == b"abc\n"


@pytest.mark.parametrize("header", ["bytes=4-", "bytes=9-12", "bytes=-0"])
def test_a_range_behind_the_end(sqlite_api: Api, header: str) -> None:
    job, _ = running_job(sqlite_api)
    write_log(sqlite_api, job, b"abc\n")
    answer = sqlite_api.client.get(f"/jobs/{job}/logs", headers={"range": header})
    assert "4 bytes" in problem(answer, 416)["detail"]
    assert answer.headers["content-range"] == "bytes */4"


@pytest.mark.parametrize("tail", [1, 2, 30_000, 99_999, 100_000])
def test_the_last_lines(sqlite_api: Api, tail: int) -> None:
    job, _ = running_job(sqlite_api)
    for log in (LOG, LOG + b"unfinished"):
        write_log(sqlite_api, job, log)
        found = sqlite_api.client.get(f"/jobs/{job}/logs", params={"tail": tail}).content
        assert found == b"".join(log.splitlines(keepends=True)[-tail:])


def test_the_last_lines_of_odd_logs(sqlite_api: Api) -> None:
    job, _ = running_job(sqlite_api)
    for log in (b"", b"\n", b"\n\n\n", b"a", b"a\nb", b"x" * 600_000):
        write_log(sqlite_api, job, log)
        found = sqlite_api.client.get(f"/jobs/{job}/logs", params={"tail": 2}).content
        assert found == b"".join(log.splitlines(keepends=True)[-2:])


def test_a_log_that_grows_while_it_is_sent(sqlite_api: Api) -> None:
    job, _ = running_job(sqlite_api)
    write_log(sqlite_api, job, LOG * 10)
    with sqlite_api.client.stream("GET", f"/jobs/{job}/logs") as answer:
        with sqlite_api.storage.job_run(job, 1).log.open("ab") as log:
            log.write(b"more")
        assert answer.read() == LOG * 10


def test_the_log_of_an_earlier_attempt(sqlite_api: Api) -> None:
    job, lease = running_job(sqlite_api)
    with sqlite_api.database.writing() as session:
        assert lifecycle.release(session, lease, "the worker stops")
        rows.start(session)
    write_log(sqlite_api, job, b"one", attempt=1)
    write_log(sqlite_api, job, b"two", attempt=2)
    path = f"/jobs/{job}/logs"
    assert sqlite_api.client.get(path).content == b"two"
    assert sqlite_api.client.get(path, params={"attempt": 1}).content == b"one"


def add_checkpoint(api: Api, job: str, name: str, step: int) -> dict[str, bytes]:
    files = {"state.safetensors": bytes(range(256)) * 5_000, "meta.json": b"{}"}
    folder = api.storage.job_run(job, 1).create().checkpoints / name
    folder.mkdir()
    for file, data in files.items():
        (folder / file).write_bytes(data)
    sums = {
        file: {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}
        for file, data in files.items()
    }
    place = api.storage.relative(folder)
    found = Checkpoint(
        id=new_id("ckpt"), job_id=job, attempt=1, name=name, stage="contrastive", step=step,
        path=place, files=sums, created_at=7.5,
    )  # fmt: skip
    with api.database.writing() as session:
        session.add(found)
    return files


def test_checkpoints_are_listed_and_downloaded(api: Api) -> None:
    job, _ = running_job(api)
    files = add_checkpoint(api, job, "contrastive-10", 10)
    add_checkpoint(api, job, "contrastive-20", 20)
    found = api.client.get(f"/jobs/{job}/checkpoints").json()
    assert {item["step"] for item in found["data"]} == {10, 20} and found["object"] == "list"
    first = next(item for item in found["data"] if item["step"] == 10)
    assert first["size_bytes"] == 256 * 5_000 + 2
    answer = api.client.get(first["download"])
    assert answer.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.testzip() is None
        assert {name: archive.read(name) for name in archive.namelist()} == files
        for name, data in files.items():
            assert hashlib.sha256(data).hexdigest() == first["files"][name]["sha256"]


def test_a_checkpoint_that_is_gone(sqlite_api: Api) -> None:
    job, _ = running_job(sqlite_api)
    add_checkpoint(sqlite_api, job, "a", 1)
    path = sqlite_api.client.get(f"/jobs/{job}/checkpoints").json()["data"][0]["download"]
    sqlite_api.storage.remove(sqlite_api.storage.job_run(job, 1).checkpoints / "a")
    assert "gone" in problem(sqlite_api.client.get(path), 404)["detail"]
    problem(sqlite_api.client.get("/checkpoints/ckpt_nothing/download"), 404)


def test_the_report_of_a_finished_job(api: Api) -> None:
    with api.database.writing() as session:
        dataset = rows.add_ready_dataset(session).id
        job = rows.add_job(session, dataset).id
        lease = rows.start(session)
        lifecycle.enter_phase(session, lease, "contrastive")
        model = rows.add_model(session, api.storage, job).id
        fixed: dict[str, Any] = {"job_id": job, "attempt": 1, "created_at": 1.0}
        points = [{"stage": "s", "name": "loss", "step": n, "value": 9.0 - n} for n in range(3)]
        session.execute(insert(Metric), [fixed | point for point in points])
        warning = {"kind": "warning", "level": "warning", "message": "few images", "data": {}}
        session.execute(insert(JobEvent), [fixed | warning | {"seq": 3}])
        evaluation = {"before": {"knn": {"top1": 0.25}}, "after": {"knn": {"top1": 0.75}}}
        result = {"evaluation": evaluation, "image_passes": 640, "train_s": 2.5, "model": {}}
        values = {"model_id": model, "result": result}
        assert lifecycle.finish(session, lease, Ending("succeeded", values=values))
    found = api.client.get(f"/jobs/{job}/report").json()
    assert found["object"] == "job.report" and found["job"]["status"] == "succeeded"
    assert found["dataset"]["summary"]["classes"] == ["oak", "pine"]
    row = {"protocol": "knn", "metric": "top1", "before": 0.25, "after": 0.75, "difference": 0.5}
    assert found["comparison"] == [row]
    assert found["last_metrics"] == [{"stage": "s", "name": "loss", "step": 2, "value": 7.0}]
    assert [warning["message"] for warning in found["warnings"]] == ["few images"]
    phases = [(stage["status"], stage["phase"]) for stage in found["stages"]]
    assert phases == [("queued", None), ("running", None), ("running", "contrastive")]
    assert all(stage["duration_s"] >= 0 for stage in found["stages"])
    assert found["model"]["id"] == model and found["model"]["embed_dim"] == 192
    assert (found["image_passes"], found["train_s"]) == (640, 2.5)


def test_the_report_of_a_job_that_has_just_begun(api: Api) -> None:
    job, _ = running_job(api)
    found = api.client.get(f"/jobs/{job}/report").json()
    assert found["dataset"]["deleted"] and found["comparison"] == [] and found["model"] is None


def test_the_comparison_of_what_is_only_on_one_side() -> None:
    evaluation = {
        "before": {"knn": {"top1": 0.5, "k": {"5": 0.25}, "ok": True}},
        "after": {"knn": {"top1": float("nan")}, "probe": {"top1": 0.5}},
    }
    found = {(row["protocol"], row["metric"]): row for row in comparison(evaluation)}
    assert set(found) == {("knn", "top1"), ("knn", "k.5"), ("probe", "top1")}
    assert found["knn", "top1"]["after"] is None and found["knn", "top1"]["difference"] is None
    assert found["probe", "top1"]["before"] is None
    assert comparison({"before": None, "after": {}}) == []


def test_the_report_of_a_paused_job(api: Api) -> None:
    with api.database.writing() as session:
        job = rows.add_job(session).id
        lease = rows.start(session)
        lifecycle.enter_phase(session, lease, "contrastive")
        control.request_pause(session, job)
        lifecycle.release(session, lease, "")
    found = api.client.get(f"/jobs/{job}/report").json()
    stays = [(stage["status"], stage["phase"]) for stage in found["stages"]]
    assert stays[-2:] == [("running", "contrastive"), ("paused", None)]
    page = api.client.get(f"/jobs/{job}/report", headers={"accept": "text/html"}).text
    assert "The job is paused" in page
