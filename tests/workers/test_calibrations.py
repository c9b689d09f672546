"""Calibrations: claimed like jobs, measured by real children, kept for a while."""

import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select, update

from ctune.config import RunConfig, resolve
from ctune.estimate import Measurement
from ctune.ingest import ingest
from ctune.store import PackedStore
from service.db import Database, now_s
from service.jobs import lifecycle
from service.queue import Announcer
from service.settings import Settings
from service.storage import Storage
from service.tables import Calibration, new_id
from tests.squares import tiny_config, write_archive
from tests.workers.conftest import StartSupervisor
from tests.workers.rows import add_dataset, add_jobs, get_job, scaled, wait_until
from workers.kinds import Context
from workers.machine import describe_machine
from workers.sweep import Sweeper, purge

REAL: dict[str, Any] = {
    "calibrate_command": [sys.executable, "-m", "ctune.calibrate"],
    "gpus": "none",
    "lease_s": 60.0,
    "fence_s": 45.0,
}
"""The real child, which may load torch for longer than the stub's lease."""
on_sqlite = pytest.mark.parametrize("settings", ["sqlite"], indirect=True)


@pytest.fixture
def dataset(settings: Settings, database: Database, tmp_path: Path) -> str:
    """A ready data set whose packed store lies where the worker looks."""
    storage = Storage(settings.data_dir).create()
    place = storage.store("squares")
    ingest(write_archive(tmp_path / "squares.zip"), place)
    summary = PackedStore(place).manifest.summary.model_dump(mode="json")
    with database.writing() as session:
        return add_dataset(session, store=storage.relative(place), summary=summary).id


def add_calibration(database: Database, config: dict[str, Any], dataset: str = "ds_none") -> str:
    """Insert a waiting calibration."""
    with database.writing() as session:
        row = Calibration(id=new_id("cal"), key="k", dataset_id=dataset, config=config, gpus=0)
        lifecycle.enqueue(session, row)
        return row.id


def add_stubbed(database: Database, **stub: Any) -> str:
    """Insert a waiting calibration whose child does what `stub` says."""
    with database.writing() as session:
        dataset = add_dataset(session).id
    config = {"stub": {"mode": "finish"} | stub, "encoder": {"source": "timm"}, "resources": {}}
    return add_calibration(database, config, dataset)


def get(database: Database, row_id: str) -> Calibration:
    with database.reading() as session:
        return session.get_one(Calibration, row_id)


def ended(database: Database, row_id: str, timeout_s: float = 60.0) -> Calibration:
    wait_until(lambda: get(database, row_id).status in ("ready", "failed"), timeout_s)
    return get(database, row_id)


def resolved(**changes: Any) -> dict[str, Any]:
    config = resolve(RunConfig.model_validate(tiny_config() | changes))
    return config.model_dump(mode="json")


def test_a_worker_measures_a_config_on_real_images(
    settings: Settings, database: Database, dataset: str, start_supervisor: StartSupervisor
) -> None:
    row_id = add_calibration(database, resolved(), dataset)
    start_supervisor(**REAL)
    row = ended(database, row_id)
    assert row.error is None
    found = Measurement.model_validate(row.result)
    assert [stage.name for stage in found.stages] == ["contrastive", "probe"]
    assert found.memory_bytes is not None and found.memory_bytes > 0
    assert row.worker_kind == describe_machine([])
    folder = Storage(settings.data_dir).root / "calibrations"
    wait_until(lambda: list(folder.iterdir()) == [])


@on_sqlite
def test_a_config_that_cannot_run_fails_with_its_reason(
    database: Database, dataset: str, start_supervisor: StartSupervisor
) -> None:
    config = resolved()
    config["encoder"]["options"]["no_such_option"] = 3
    row_id = add_calibration(database, config, dataset)
    start_supervisor(**REAL)
    error = ended(database, row_id).error
    assert error is not None
    assert (error["code"], error["fault"]) == ("unknown_option", "user")
    assert "no_such_option" in error["message"]


@on_sqlite
@pytest.mark.parametrize(
    ("stub", "code"),
    [({"mode": "die"}, "crashed"), ({"mode": "flaky"}, "flaky"), ({"mode": "finish"}, "no_result")],
    ids=["killed", "error that may pass", "nothing measured"],
)
def test_a_failure_is_not_repeated(
    database: Database, start_supervisor: StartSupervisor, stub: dict[str, Any], code: str
) -> None:
    row_id = add_stubbed(database, **stub)
    start_supervisor()
    row = ended(database, row_id)
    assert (row.status, row.attempt) == ("failed", 1)
    assert row.error is not None and row.error["code"] == code
    assert row.worker_kind == describe_machine([])


@on_sqlite
def test_it_takes_the_place_of_a_job_and_goes_first(
    database: Database, start_supervisor: StartSupervisor
) -> None:
    (job_id,) = add_jobs(database, stub={"work_s": 60.0})
    first = add_stubbed(database, work_s=1.0)
    start_supervisor(slots=1)
    wait_until(lambda: get(database, first).status == "running")
    assert get_job(database, job_id).status == "queued"
    ended(database, first)
    wait_until(lambda: get_job(database, job_id).status == "running")
    second = add_stubbed(database)
    wait_until(lambda: get_job(database, job_id).progress is not None)
    assert get(database, second).status == "queued"


@pytest.fixture
def context(settings: Settings, database: Database) -> Context:
    return Context(scaled(settings), database, Storage(settings.data_dir).create(), "w")


def test_a_lost_one_is_taken_back_and_old_ones_go(context: Context, database: Database) -> None:
    lost, old, waiting = (add_calibration(database, {}) for _ in range(3))
    with database.writing() as session:
        row = lifecycle.claim(session, Calibration, owner="w", lease_s=60.0, gpus=(0, 0))
        assert row is not None and row.id == lost
    with database.writing() as session:
        session.execute(
            update(Calibration).where(Calibration.id == lost).values(lease_until=now_s() - 1)
        )
        forty_days = update(Calibration).where(Calibration.id == old)
        session.execute(forty_days.values(created_at=now_s() - 40 * 86_400))
    Sweeper(context, Announcer(context.settings), wake=lambda: None).sweep()
    assert (get(database, lost).status, get(database, lost).lost_attempts) == ("queued", 1)
    left = context.storage.calibration_run("cal_gone", 1).create().root.parent
    purge(context, young_s=0.0)
    with database.reading() as session:
        assert set(session.scalars(select(Calibration.id))) == {lost, waiting}
    assert not left.exists()
