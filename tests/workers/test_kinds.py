"""What trainings and ingestions need, are told and leave behind."""

from pathlib import Path

import pytest

from ctune.ingest import IngestFile
from ctune.pipeline import RunFile
from service.db import Database, make_engine
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
    get_job,
    job_ended,
    job_error,
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
    context = Context(sqlite_settings, database, storage, "w")
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
