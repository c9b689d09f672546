"""What trainings and ingestions need, are told and leave behind."""

import threading
import time
from pathlib import Path

import pytest

from ctune.ingest import IngestFile
from ctune.pipeline import RunFile
from ctune.rundir import RunDir
from service.db import Database, make_engine
from service.jobs import control, lifecycle
from service.settings import Settings
from service.storage import Storage
from service.tables import (
    Dataset,
    Job,
)
from tests.workers.conftest import StartSupervisor
from tests.workers.rows import (
    add_dataset,
    add_job,
    add_jobs,
    claim_job,
    get_job,
    job_ended,
    job_error,
    job_running,
    upload,
    wait_until,
)
from workers.kinds import Context, Ingestion, Training

on_sqlite = pytest.mark.parametrize("settings", ["sqlite"], indirect=True)


@on_sqlite
def test_what_a_job_needs_may_be_gone(
    database: Database, start_supervisor: StartSupervisor
) -> None:
    with database.writing() as session:
        without_data = add_job(session, "ds_gone").id
    (without_model,) = add_jobs(database)
    with database.writing() as session:
        job = session.get_one(Job, without_model)
        job.config = job.config | {"encoder": {"source": "model", "id": "mdl_gone"}}
    start_supervisor()
    assert job_error(job_ended(database, without_data))["code"] == "dataset_gone"
    assert job_error(job_ended(database, without_model))["code"] == "model_gone"


def test_run_files_are_what_the_children_read(sqlite_settings: Settings, tmp_path: Path) -> None:
    database = Database(make_engine(sqlite_settings))
    storage = Storage(sqlite_settings.data_dir).create()
    settings = sqlite_settings.model_copy(update={"allow_noncommercial_weights": True})
    context = Context(settings, database, storage, "w")
    encoder = {"source": "model", "id": "mdl_1"}
    storage.model("mdl_1").mkdir()
    with database.writing() as session:
        row = session.get_one(Dataset, upload(session, storage, b"x", mode="finish"))
        row.options = {"test_fraction": 0.1}
        job = add_job(session, add_dataset(session).id)
        job.config = {"encoder": encoder, "method": {"name": "linear_probe"}}
    ingestion, training = Ingestion(context, row), Training(context, job)
    ingestion.prepare()
    ingest_file = IngestFile.model_validate_json(ingestion.run_dir.config.read_text())
    assert ingest_file.options.test_fraction == 0.1
    training.prepare()
    run_file = RunFile.model_validate_json(training.run_dir.config.read_text())
    assert run_file.encoder_dir == storage.model("mdl_1")
    assert run_file.allow_noncommercial_weights
    database.dispose()


def test_a_data_set_becomes_ready_beside_a_running_job(
    settings: Settings, database: Database, start_supervisor: StartSupervisor
) -> None:
    (job_id,) = add_jobs(database, stub={"work_s": 60.0})
    start_supervisor(slots=1)
    wait_until(lambda: get_job(database, job_id).status == "running")
    storage = Storage(settings.data_dir)
    with database.writing() as session:
        first = upload(session, storage, b"archive")
        second = upload(session, storage, b"archive")

    def data_set(row_id: str) -> Dataset:
        with database.reading() as session:
            return session.get_one(Dataset, row_id)

    for row_id in (first, second):
        wait_until(lambda row_id=row_id: data_set(row_id).status == "ready")  # type: ignore[misc]
        row = data_set(row_id)
        assert (row.summary, row.report) == ({"num_images": 1}, {"layout": "flat"})
        assert row.store is not None
        assert (storage.absolute(row.store) / "manifest.json").exists()
        wait_until(lambda row=row: not storage.absolute(row.upload).exists())  # type: ignore[misc]
        wait_until(lambda row=row: not (storage.root / "runs" / row.id).exists())  # type: ignore[misc]
    assert data_set(first).store == data_set(second).store


@on_sqlite
def test_an_ingestion_that_fails(
    settings: Settings, database: Database, start_supervisor: StartSupervisor
) -> None:
    with database.writing() as session:
        row_id = upload(session, Storage(settings.data_dir), b"archive", mode="fail")
    start_supervisor()

    def row() -> Dataset:
        with database.reading() as session:
            return session.get_one(Dataset, row_id)

    wait_until(lambda: row().status == "failed")
    error = row().error
    assert error is not None
    assert error["code"] == "data_error"
    _no_trace(Storage(settings.data_dir), row_id)


@on_sqlite
def test_an_ingestion_keeps_its_archive_until_it_is_not_repeated_any_more(
    settings: Settings, database: Database, start_supervisor: StartSupervisor
) -> None:
    storage = Storage(settings.data_dir)
    with database.writing() as session:
        row_id = upload(session, storage, b"archive", mode="flaky")

    def state() -> tuple[str, int]:
        with database.reading() as session:
            row = session.get_one(Dataset, row_id)
        return row.status, row.attempt

    start_supervisor(max_attempts=2, retry_backoff_s=1.0)
    wait_until(lambda: state() == ("queued", 1))
    assert storage.upload(row_id).read_bytes() == b"archive"
    assert storage.ingest_run(row_id, 1).events.exists()
    wait_until(lambda: state() == ("failed", 2))
    _no_trace(storage, row_id)


def _no_trace(storage: Storage, row_id: str) -> None:
    """Wait until an ingestion has left neither archive nor run directory nor store."""
    wait_until(lambda: not storage.upload(row_id).exists())
    wait_until(lambda: not (storage.root / "runs" / row_id).exists())
    assert list((storage.root / "stores").iterdir()) == []


@on_sqlite
@pytest.mark.parametrize("status", ["succeeded", "failed", "cancelled"])
def test_an_ended_training_leaves_no_decoded_images(
    settings: Settings, database: Database, start_supervisor: StartSupervisor, status: str
) -> None:
    work_s = 1.0 if status == "succeeded" else 60.0
    limit = {"max_duration_s": 1} if status == "failed" else {}
    (job_id,) = add_jobs(database, stub={"work_s": work_s}, resources=limit)
    lease = claim_job(database)
    with database.writing() as session:
        lifecycle.release(session, lease, "the worker stops")
    storage = Storage(settings.data_dir)
    runs = [storage.job_run(job_id, attempt) for attempt in (1, 2)]
    _cache(runs[0])
    start_supervisor()
    wait_until((runs[1].root / "step").exists)
    assert not runs[0].cache.exists(), "the next attempt has one of its own"
    _cache(runs[1])
    if status == "cancelled":
        with database.writing() as session:
            control.request_cancel(session, job_id)
    assert job_ended(database, job_id).status == status
    wait_until(lambda: not any(run.cache.exists() for run in runs))
    assert runs[0].checkpoints.is_dir()
    assert all(path.exists() for path in (runs[1].log, runs[1].events, runs[1].checkpoints))


@on_sqlite
def test_a_job_that_is_cancelled_as_its_worker_stops_leaves_no_decoded_images(
    settings: Settings, database: Database, start_supervisor: StartSupervisor
) -> None:
    (job_id,) = add_jobs(database, stub={"mode": "ignore SIGTERM"})
    supervisor = start_supervisor(beat_s=60.0)
    run = RunDir(job_running(database, settings, job_id, "ignoring"))
    _cache(run)
    stopping = threading.Thread(target=supervisor.stop)
    stopping.start()
    time.sleep(0.3)  # the child was asked to end; it has a second
    with database.writing() as session:
        control.request_cancel(session, job_id)
    stopping.join()
    assert get_job(database, job_id).status == "cancelled"
    assert not run.cache.exists()
    assert run.log.exists()


def _cache(run: RunDir) -> None:
    """Leave decoded images in a run directory."""
    run.create()
    (run.cache / "train-16").mkdir(parents=True)
    (run.cache / "train-16" / "pixels").touch()
