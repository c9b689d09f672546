"""POST /jobs/estimate: the faults of POST /jobs, what is known at once, what workers measured."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import select, update

from ctune.schema import JsonObject
from service.db import Database, now_s
from service.jobs import estimate, lifecycle
from service.jobs.estimate_routes import EXAMPLE
from service.jobs.lifecycle import Ending, Lease
from service.tables import Calibration, Job, WorkerSeen
from tests.measurements import measurement
from tests.service import rows
from tests.service.conftest import Api
from tests.service.jobs.test_create import CASES
from tests.service.problems import faults

KIND = "2 cores of Fastest CPU"


def ready(api: Api) -> str:
    with api.database.writing() as session:
        return rows.add_ready_dataset(session).id


def asked(api: Api, dataset: str, *, wait_s: float = 0.0, **changes: Any) -> JsonObject:
    body = rows.job_body(dataset, **changes)
    answer = api.client.post("/jobs/estimate", json=body, params={"wait_s": wait_s})
    assert answer.status_code == 200, answer.text
    found: JsonObject = answer.json()
    header = answer.headers.get("retry-after")
    assert header == (None if found["retry_after_s"] is None else str(found["retry_after_s"]))
    return found


def add_worker(database: Database, kind: str = KIND, *, gpus: int = 0, silent_s: float = 0) -> None:
    with database.writing() as session:
        info = {"slots": 1, "gpus": gpus, "version": "0", "kind": kind}
        session.merge(WorkerSeen(id=f"worker of {kind}", seen_at=now_s() - silent_s, info=info))


def claimed(database: Database, kind: str = KIND, gpus: tuple[int, int] = (0, 0)) -> Lease:
    """Claim the next calibration as a worker does."""
    with database.writing() as session:
        row = lifecycle.claim(session, Calibration, owner="w", lease_s=60.0, gpus=gpus)
        assert row is not None
        row.worker_kind = kind
    return Lease(Calibration, row.id, row.attempt, "w")


def finish(database: Database, lease: Lease, **ending: Any) -> None:
    with database.writing() as session:
        assert lifecycle.finish(session, lease, Ending(**ending))


def measure(database: Database, kind: str = KIND) -> None:
    """Claim the next calibration and finish it well."""
    result = measurement().model_dump(mode="json")
    finish(database, claimed(database, kind), status="ready", values={"result": result})


def calibrations(database: Database) -> list[Calibration]:
    with database.reading() as session:
        return list(session.scalars(select(Calibration).order_by(Calibration.id)))


@pytest.mark.parametrize("changes", [case[1] for case in CASES], ids=[case[0] for case in CASES])
def test_faults_are_those_of_a_job(sqlite_api: Api, changes: dict[str, Any]) -> None:
    body = rows.job_body(ready(sqlite_api), **changes)
    of_a_job = faults(sqlite_api.client.post("/jobs", json=body))
    assert faults(sqlite_api.client.post("/jobs/estimate", json=body)) == of_a_job
    assert calibrations(sqlite_api.database) == []


def test_several_faults_are_answered_at_once(api: Api) -> None:
    body = rows.job_body("ds_nothing", nmae="x", encoder={"source": "timm", "name": "vit_tinny"})
    found = faults(api.client.post("/jobs/estimate", json=body))
    assert set(found) == {"/nmae", "/dataset", "/encoder/name"}


def test_steps_are_known_at_once_and_the_rest_says_what_it_waits_for(api: Api) -> None:
    dataset = ready(api)
    found = asked(api, dataset)
    assert found["object"] == "job.estimate"
    names = [stage["name"] for stage in found["stages"]]
    assert names == ["contrastive", "probe"]
    assert found["image_passes"] == sum(stage["image_passes"] for stage in found["stages"]) > 0
    # 16 training and 4 test images of up to 40 px: 37 px to train and 32 px to score
    assert found["disk_bytes"]["decoded_images"] == 3 * (16 * 37**2 + 20 * 32**2)
    for key in ("memory_bytes", "duration_s", "measured", "error"):
        assert found[key] is None
    assert "no worker is running" in found["reason"] and "ctune worker" in found["reason"]
    add_worker(api.database)
    assert "as soon as a worker has a free place" in asked(api, dataset)["reason"]
    lease = claimed(api.database)
    running = asked(api, dataset)
    assert "it is being measured" in running["reason"] and running["retry_after_s"] > 0
    assert [row.id for row in calibrations(api.database)] == [lease.id]
    with api.database.reading() as session:
        assert session.query(Job).count() == 0


def test_a_measurement_serves_all_runs_that_take_as_long_per_step(api: Api) -> None:
    dataset = ready(api)
    add_worker(api.database)
    asked(api, dataset)
    measure(api.database)
    found = asked(api, dataset)
    assert found["reason"] is found["retry_after_s"] is found["error"] is None
    assert found["memory_bytes"] == 5000
    contrastive = found["stages"][0]
    assert contrastive["duration_s"] == pytest.approx(contrastive["total_steps"] * 0.5)
    assert found["duration_s"] > contrastive["duration_s"]
    assert found["measured"] == {
        "worker_kind": KIND,
        "device": "cpu x86_64",
        "at": 1_790_000_000,
        "images_per_s": {stage["name"]: stage["images_per_s"] for stage in found["stages"]},
        "encode_images_per_s": 50.0,
        "decode_images_per_s": 100.0,
        "remarks": ["on a quiet machine"],
    }
    longer = {**rows.METHOD, "contrastive": {**rows.METHOD["contrastive"], "epochs": 4}}
    twice = asked(api, dataset, method=longer, seed=9)["stages"][0]
    assert twice["duration_s"] == pytest.approx(2 * contrastive["duration_s"])
    assert len(calibrations(api.database)) == 1
    views = {**rows.METHOD, "contrastive": {**rows.METHOD["contrastive"], "num_views": 3}}
    assert asked(api, dataset, method=views)["duration_s"] is None
    assert len(calibrations(api.database)) == 2


def test_another_kind_of_worker_measures_anew(sqlite_api: Api) -> None:
    dataset = ready(sqlite_api)
    add_worker(sqlite_api.database)
    asked(sqlite_api, dataset)
    measure(sqlite_api.database)
    add_worker(sqlite_api.database, silent_s=3600)
    assert asked(sqlite_api, dataset)["measured"]["worker_kind"] == KIND, "better than nothing"
    add_worker(sqlite_api.database, "64 cores of Another CPU")
    assert asked(sqlite_api, dataset)["measured"] is None
    measure(sqlite_api.database, "64 cores of Another CPU")
    again = asked(sqlite_api, dataset)["measured"]
    assert again["worker_kind"] == "64 cores of Another CPU"
    assert len(calibrations(sqlite_api.database)) == 2


def test_a_config_that_cannot_run_says_so_before_a_job_is_made(api: Api) -> None:
    dataset = ready(api)
    add_worker(api.database)
    asked(api, dataset)
    error = {"code": "out_of_memory", "message": "it does not fit", "hint": "smaller batches"}
    finish(api.database, claimed(api.database), status="failed", error=error)
    found = asked(api, dataset)
    assert found["error"] == error
    assert found["reason"] == "the measurement failed: it does not fit"
    assert found["retry_after_s"] is found["duration_s"] is None
    assert len(calibrations(api.database)) == 1, "the answer holds for a while"
    with api.database.writing() as session:
        session.execute(update(Calibration).values(finished_at=now_s() - 3600))
    assert asked(api, dataset)["error"] is None
    assert [row.status for row in calibrations(api.database)] == ["failed", "queued"]


def test_a_gpu_that_no_worker_has(sqlite_api: Api) -> None:
    add_worker(sqlite_api.database, gpus=0)
    dataset = ready(sqlite_api)
    found = asked(sqlite_api, dataset, resources={"gpus": 1})
    assert "no worker that is running has a GPU" in found["reason"]
    with sqlite_api.database.writing() as session:
        no_room = lifecycle.claim(session, Calibration, owner="w", lease_s=9.0, gpus=(0, 1))
        assert no_room is None, "its GPU is taken"
    assert claimed(sqlite_api.database, gpus=(1, 1)).id


def test_more_gpus_than_any_worker_has(sqlite_api: Api) -> None:
    add_worker(sqlite_api.database, gpus=1)
    dataset = ready(sqlite_api)
    several = {"gpus": 2}
    assert "as soon as" in asked(sqlite_api, dataset, resources=several)["reason"]
    result = measurement().model_dump(mode="json")
    lease = claimed(sqlite_api.database, gpus=(1, 1))
    finish(sqlite_api.database, lease, status="ready", values={"result": result})
    found = asked(sqlite_api, dataset, resources=several)
    assert found["duration_s"] is not None
    assert "no worker that is running has 2 GPUs" in found["reason"]


def test_only_so_many_wait(sqlite_api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "MAX_WAITING", 2)
    dataset = ready(sqlite_api)
    for views in (2, 3, 4):
        method = {**rows.METHOD, "contrastive": {"batch_size": 4, "num_views": views}}
        found = asked(sqlite_api, dataset, method=method)
    assert "2 measurements wait already" in found["reason"]
    assert found["stages"] and found["retry_after_s"] is not None
    assert len(calibrations(sqlite_api.database)) == 2


def test_measurements_that_need_a_gpu_keep_nobody_else_waiting(
    sqlite_api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no worker has one they wait for days."""
    monkeypatch.setattr(estimate, "MAX_WAITING", 1)
    dataset = ready(sqlite_api)
    asked(sqlite_api, dataset, resources={"gpus": 1})
    for resources in ({"gpus": 0}, {"gpus": 0, "gradient_checkpointing": True}):
        found = asked(sqlite_api, dataset, resources=resources)
    assert "wait already" in found["reason"]
    assert [row.gpus for row in calibrations(sqlite_api.database)] == [1, 0]


def test_a_data_set_that_was_deleted_says_nothing_about_others(api: Api) -> None:
    asked(api, ready(api))
    error = {"code": "dataset_gone", "message": "the data set is gone"}
    finish(api.database, claimed(api.database), status="failed", error=error)
    assert asked(api, ready(api))["error"] is None
    assert [row.status for row in calibrations(api.database)] == ["failed", "queued"]


@contextmanager
def meanwhile(work: Any, *arguments: Any) -> Iterator[None]:
    """Do something in another thread, soon."""
    thread = threading.Timer(0.6, work, arguments)
    thread.start()
    yield
    thread.join()


def test_a_client_can_wait_for_the_measurement(api: Api) -> None:
    dataset = ready(api)
    add_worker(api.database)
    asked(api, dataset)
    with meanwhile(measure, api.database):
        found = asked(api, dataset, wait_s=30)
    assert found["duration_s"] is not None


def test_waiting_ends_with_its_time_and_with_the_server(sqlite_api: Api) -> None:
    dataset = ready(sqlite_api)
    assert asked(sqlite_api, dataset, wait_s=0.1)["duration_s"] is None
    begun = time.monotonic()
    with meanwhile(sqlite_api.app.state.stopping.set):
        assert asked(sqlite_api, dataset, wait_s=60)["duration_s"] is None
    assert time.monotonic() - begun < 50
    too_long = sqlite_api.client.post("/jobs/estimate", json={}, params={"wait_s": 61})
    assert "/wait_s" in faults(too_long)


def test_it_is_no_job(sqlite_api: Api) -> None:
    assert sqlite_api.client.get("/jobs/estimate").status_code == 404
    described = sqlite_api.client.get("/openapi.json").json()["paths"]["/jobs/estimate"]["post"]
    example = described["responses"]["200"]["content"]["application/json"]["example"]
    assert example["stages"]
    assert set(EXAMPLE) == set(asked(sqlite_api, ready(sqlite_api)))
