"""Engine, transactions and migrations on both kinds of database."""

import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from pydantic import SecretStr
from sqlalchemy import inspect, select, text, update
from sqlalchemy.exc import DBAPIError

from service import db
from service.db import Database, DatabaseSetupError, DatabaseUnavailableError, make_engine, now_s
from service.jobs import control
from service.settings import Settings
from service.tables import Base, Checkpoint, Job, WorkerSeen
from tests.servers import Server
from tests.service import rows


def test_the_migrations_make_the_tables_of_the_code(database: Database) -> None:
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Base.metadata) == []
    db.check_migrated(database)


def test_downgrade_leaves_nothing(database: Database) -> None:
    with database.engine.begin() as connection:
        command.downgrade(db.alembic_config(connection), "base")
    assert set(inspect(database.engine).get_table_names()) == {"alembic_version"}
    with pytest.raises(DatabaseSetupError, match="ctune migrate"):
        db.check_migrated(database)


def test_rows_of_the_first_version_outlive_an_upgrade_and_its_undoing(database: Database) -> None:
    with database.writing() as session:
        job_id = rows.add_job(session).id
        control.request_pause(session, job_id)
        session.add(
            Checkpoint(
                id="ckpt_1", job_id=job_id, attempt=1, name="s-1", stage="s", step=1, path="x",
                files={}, best=True, created_at=0.0,
            )
        )  # fmt: skip
    with database.engine.begin() as connection:
        command.downgrade(db.alembic_config(connection), "20261120_create_tables")
        # The first version knows no paused jobs: they would never run, nor end.
        assert connection.scalar(text("SELECT status FROM jobs")) == "queued"
        command.upgrade(db.alembic_config(connection), "head")
    with database.reading() as session:
        job = session.get_one(Job, job_id)
        assert (job.pause_requested_at, job.stop_requested_at, job.newest_metrics) == (None,) * 3
        assert [found.best for found in session.scalars(select(Checkpoint))] == [False]


def test_two_processes_may_migrate_at_once(tmp_path: Path, killable_postgres: Server) -> None:
    url = killable_postgres.url.replace("postgresql:", "postgresql+psycopg:")
    for settings in (
        Settings(data_dir=tmp_path),
        Settings(data_dir=tmp_path, database_url=SecretStr(url)),
    ):
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(db.migrate, [settings] * 4))
        migrated = Database(make_engine(settings))
        db.check_migrated(migrated)
        migrated.dispose()


def test_many_may_open_a_new_file_at_once(tmp_path: Path) -> None:
    """The switch to the write-ahead log takes a lock for which SQLite does not wait by itself."""

    def open_and_write(settings: Settings) -> None:
        engine = make_engine(settings)
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE IF NOT EXISTS opened (n INTEGER)"))
        engine.dispose()

    with ThreadPoolExecutor(16) as pool:
        for number in range(10):
            list(pool.map(open_and_write, [Settings(data_dir=tmp_path / str(number))] * 16))


def test_the_database_of_a_newer_version_is_refused(settings: Settings, database: Database) -> None:
    with database.writing() as session:
        session.execute(text("UPDATE alembic_version SET version_num = 'from_the_future'"))
    with pytest.raises(DatabaseSetupError, match="from_the_future"):
        db.migrate(settings)


def test_the_clock_of_the_database(database: Database) -> None:
    with database.reading() as session:
        assert session.scalar(select(now_s())) == pytest.approx(time.time(), abs=2)


def test_a_reading_transaction_cannot_write(database: Database) -> None:
    with pytest.raises(DBAPIError, match=r"read-?only"), database.reading() as session:
        session.add(_worker())
        session.flush()
    with database.writing() as session:  # the same pooled connection can
        session.add(_worker())
    with database.reading() as session:
        assert session.get_one(WorkerSeen, "w").info == {"count": 0}


def test_an_error_rolls_back(database: Database) -> None:
    with pytest.raises(ZeroDivisionError), database.writing() as session:
        session.add(_worker())
        session.flush()
        raise ZeroDivisionError
    with database.reading() as session:
        assert session.get(WorkerSeen, "w") is None


def test_no_update_is_lost_and_nothing_is_locked(database: Database) -> None:
    with database.writing() as session:
        session.add(_worker())

    def count(_: int) -> None:
        for _ in range(25):
            with database.writing() as session:
                wanted = select(WorkerSeen).with_for_update()
                row = session.scalars(wanted).one()
                row.info = {"count": row.info["count"] + 1}

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(count, range(4)))
    with database.reading() as session:
        assert session.get_one(WorkerSeen, "w").info == {"count": 100}


def test_readers_do_not_wait_for_a_writer(database: Database) -> None:
    with database.writing() as writer:
        writer.add(_worker())
        writer.flush()
        with database.reading() as reader:
            assert reader.get(WorkerSeen, "w") is None


def test_sqlite_is_durable_and_checks_references(sqlite_settings: Settings) -> None:
    database = Database(make_engine(sqlite_settings))
    with database.reading() as session:
        found = {
            name: session.scalar(text(f"PRAGMA {name}"))
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    database.dispose()
    assert found == {
        "journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 10000,
    }  # fmt: skip


def test_a_locked_sqlite_is_unavailable(
    sqlite_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(db, "BUSY_TIMEOUT_S", 0.2)
    database = Database(make_engine(sqlite_settings))
    with database.writing() as holder:
        holder.add(_worker())
        holder.flush()
        with pytest.raises(DatabaseUnavailableError, match="locked"), database.writing() as session:
            session.execute(update(WorkerSeen).values(seen_at=0.0))
    database.dispose()


def test_a_dead_postgres_is_unavailable_and_comes_back(
    tmp_path: Path, killable_postgres: Server
) -> None:
    url = killable_postgres.url.replace("postgresql:", "postgresql+psycopg:")
    database = Database(make_engine(Settings(data_dir=tmp_path, database_url=SecretStr(url))))
    with pytest.raises(DatabaseUnavailableError), database.writing() as session:
        session.execute(text("SELECT 1"))
        killable_postgres.kill()
        session.execute(text("SELECT 1"))
    with pytest.raises(DatabaseUnavailableError), database.reading() as session:
        session.execute(text("SELECT 1"))
    killable_postgres.start()
    with database.reading() as session:
        assert session.scalar(text("SELECT 1")) == 1
    database.dispose()


def test_a_slow_statement_ends(postgres_settings: Settings) -> None:
    database = Database(make_engine(postgres_settings))
    with database.reading() as session:
        assert session.scalar(text("SHOW statement_timeout")) == "10s"
        assert session.scalar(text("SHOW idle_in_transaction_session_timeout")) == "30s"
    with pytest.raises(DatabaseUnavailableError), database.writing() as session:
        session.execute(text("SET LOCAL statement_timeout = 100"))
        session.execute(text("SELECT pg_sleep(5)"))
    database.dispose()


def test_other_databases_are_refused(tmp_path: Path) -> None:
    for url in ("mysql://host/name", "sqlite://"):
        with pytest.raises(DatabaseSetupError, match=re.escape("CTUNE_DATABASE_URL")):
            make_engine(Settings(data_dir=tmp_path, database_url=SecretStr(url)))


def test_network_file_systems_are_refused(tmp_path: Path) -> None:
    table = tmp_path / "mountinfo"
    table.write_text(
        "22 1 254:1 / / rw,relatime - ext4 /dev/vda1 rw\n"
        "40 22 0:40 / /mnt/my\\040share rw,relatime shared:7 - nfs4 host:/export rw\n"
    )
    assert db.file_system(Path("/mnt/my share/data/ctune.sqlite"), table) == "nfs4"
    assert db.file_system(Path("/mnt/other/ctune.sqlite"), table) == "ext4"
    assert db.file_system(Path("/mnt"), tmp_path / "no such table") == ""
    assert db.file_system(tmp_path, Path("/proc/self/mountinfo")) != "nfs4"


def test_sessions_of_many_threads(database: Database) -> None:
    errors: list[Exception] = []

    def read() -> None:
        try:
            with database.reading() as session:
                session.scalar(select(now_s()))
        except Exception as error:  # noqa: BLE001 (asserted below)
            errors.append(error)

    threads = [threading.Thread(target=read) for _ in range(25)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def _worker() -> WorkerSeen:
    return WorkerSeen(id="w", seen_at=0.0, info={"count": 0})
