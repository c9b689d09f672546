"""Engine, transactions and migrations: one synchronous stack for the API and the workers.

SQLite: WAL, `BEGIN IMMEDIATE` for every transaction that may write (the driver's own deferred
transactions lose updates or fail on the upgrade), full sync. Postgres: short statement limits.
"""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import ColumnElement, Connection, Engine, Float, create_engine, event, text
from sqlalchemy import exc as sa_exc
from sqlalchemy.engine import URL, make_url
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session
from sqlalchemy.sql.functions import FunctionElement

from service.settings import Settings

BUSY_TIMEOUT_S = 10.0
STATEMENT_TIMEOUT_S = 10.0
IDLE_TRANSACTION_TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 5
MIGRATION_LOCK = 0x6374756E65  # "ctune"

NETWORK_FILE_SYSTEMS = ("nfs", "cifs", "smb", "lustre", "gpfs", "ceph", "gluster", "afs", "beegfs")
_READ_ONLY = "ctune_read_only"
# Primary result codes of SQLite that say nothing about the statement: busy, locked, input/output
# error, disk full, cannot open, lock protocol.
_SQLITE_UNAVAILABLE = {5, 6, 10, 13, 14, 15}
# Classes and codes of Postgres: connection, resources, operator intervention, lock and deadlock.
_POSTGRES_UNAVAILABLE = ("08", "53", "57", "40001", "40P01", "55P03", "25P03")


class DatabaseUnavailableError(Exception):
    """The database is down, locked for too long or full; the transaction was not committed."""


class DatabaseSetupError(Exception):
    """The database cannot be used as it is; the message says what to do."""


class _Now(FunctionElement[float]):
    type = Float()
    inherit_cache = True


@compiles(_Now, "sqlite")
def _now_sqlite(*_: Any, **__: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(_Now, "postgresql")
def _now_postgres(*_: Any, **__: Any) -> str:
    return "CAST(extract(epoch FROM clock_timestamp()) AS double precision)"


def now_s() -> ColumnElement[float]:
    """Return the SQL expression of the database clock: seconds since the epoch."""
    return _Now()


class Database:
    """Transactions of one engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._reader = engine.execution_options(**{_READ_ONLY: True})
        if engine.dialect.name == "postgresql":
            self._reader = self._reader.execution_options(postgresql_readonly=True)

    @contextmanager
    def writing(self) -> Iterator[Session]:
        """Open a transaction that may write; it commits at the end of the block.

        Raises:
            DatabaseUnavailableError: nothing was written, or (connection lost during the commit)
                it is unknown whether it was.
        """
        with (
            unavailable_is_one_error(),
            Session(self.engine, expire_on_commit=False) as session,
            session.begin(),
        ):
            yield session

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """Open a read-only transaction; a statement that writes fails.

        Raises:
            DatabaseUnavailableError: the database does not answer.
        """
        with (
            unavailable_is_one_error(),
            Session(self._reader, expire_on_commit=False, autoflush=False) as session,
        ):
            yield session

    def dispose(self) -> None:
        """Close the pooled connections."""
        self.engine.dispose()


@contextmanager
def unavailable_is_one_error() -> Iterator[None]:
    """Turn what says that the database is down or busy into `DatabaseUnavailableError`.

    Raises:
        DatabaseUnavailableError: the block ended with such an error.
    """
    try:
        yield
    except (sa_exc.DBAPIError, sa_exc.TimeoutError) as error:
        if _is_unavailable(error):
            raise DatabaseUnavailableError(f"the database does not answer: {error}") from error
        raise


def _is_unavailable(error: sa_exc.DBAPIError | sa_exc.TimeoutError) -> bool:
    if isinstance(error, sa_exc.TimeoutError):
        return True
    if error.connection_invalidated:
        return True
    if isinstance(error.orig, sqlite3.Error):
        return getattr(error.orig, "sqlite_errorcode", 0) & 0xFF in _SQLITE_UNAVAILABLE
    if isinstance(error.orig, psycopg.Error):
        if error.orig.sqlstate is None:
            return isinstance(error.orig, psycopg.OperationalError)
        return error.orig.sqlstate.startswith(_POSTGRES_UNAVAILABLE)
    return False


def make_engine(settings: Settings) -> Engine:
    """Return an engine for the database of `settings`; nothing is connected yet.

    Raises:
        DatabaseSetupError: an unknown kind of database, or SQLite on a network file system.
    """
    url = make_url(settings.database)
    if url.get_backend_name() == "sqlite":
        if settings.database_url is None:
            refuse_network_file_system(_sqlite_file(url))
        return _sqlite_engine(url)
    if url.get_backend_name() == "postgresql":
        return _postgres_engine(url)
    raise DatabaseSetupError(
        f"CTUNE_DATABASE_URL names {url.get_backend_name()!r}."
        " Use sqlite:///PATH or postgresql+psycopg://USER@HOST/NAME."
    )


def _sqlite_file(url: URL) -> Path:
    if not url.database or url.database == ":memory:":
        raise DatabaseSetupError("SQLite needs a file: CTUNE_DATABASE_URL=sqlite:///PATH.")
    return Path(url.database).absolute()


def _sqlite_engine(url: URL) -> Engine:
    _sqlite_file(url).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(
        url,
        pool_size=10,
        max_overflow=30,
        pool_timeout=BUSY_TIMEOUT_S,
        # isolation_level None: the driver begins nothing by itself, `_begin_sqlite` does.
        connect_args={"timeout": BUSY_TIMEOUT_S, "isolation_level": None},
    )
    event.listen(engine, "connect", _set_up_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _set_up_sqlite(connection: sqlite3.Connection, _record: object) -> None:
    _use_wal(connection)
    for pragma in ("synchronous = FULL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}").close()


def _use_wal(connection: sqlite3.Connection) -> None:
    """Switch to the write-ahead log; for this SQLite does not wait for a lock by itself."""
    until = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL").close()
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
        time.sleep(0.01)


def _begin_sqlite(connection: Connection) -> None:
    read_only = connection.get_execution_options().get(_READ_ONLY, False)
    connection.exec_driver_sql(f"PRAGMA query_only = {'ON' if read_only else 'OFF'}")
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


def _postgres_engine(url: URL) -> Engine:
    limits = (
        f"-c statement_timeout={STATEMENT_TIMEOUT_S * 1000:.0f}"
        f" -c idle_in_transaction_session_timeout={IDLE_TRANSACTION_TIMEOUT_S * 1000:.0f}"
    )
    return create_engine(
        url.set(drivername="postgresql+psycopg"),
        pool_size=10,
        max_overflow=20,
        pool_timeout=STATEMENT_TIMEOUT_S,
        pool_pre_ping=True,
        connect_args={
            "options": limits,
            "connect_timeout": CONNECT_TIMEOUT_S,
            "tcp_user_timeout": int(STATEMENT_TIMEOUT_S * 1000),
        },
    )


def refuse_network_file_system(file: Path) -> None:
    """Refuse a place where SQLite's write-ahead log does not work.

    An explicit `CTUNE_DATABASE_URL=sqlite:///…` is not checked: it is how one insists. Only Linux
    tells the kind of file system; elsewhere every place is taken.

    Raises:
        DatabaseSetupError: `file` would lie on a network file system.
    """
    kind = file_system(file, Path("/proc/self/mountinfo"))
    if any(name in kind for name in NETWORK_FILE_SYSTEMS):
        raise DatabaseSetupError(
            f"{file} lies on a network file system ({kind}), where SQLite can lose data."
            " Set CTUNE_DATABASE_URL to sqlite:///PATH on a local disk, or to a Postgres database."
        )


def file_system(path: Path, mount_table: Path) -> str:
    """Return the kind of file system that holds `path`, or an empty string where unknown."""
    if not mount_table.exists():
        return ""
    place = path.resolve()
    deepest, kind = -1, ""
    for line in mount_table.read_text(encoding="utf-8").splitlines():
        mount, _, source = line.partition(" - ")
        point = Path(mount.split()[4].encode().decode("unicode_escape"))
        if place.is_relative_to(point) and len(point.parts) >= deepest:
            deepest, kind = len(point.parts), source.split()[0]
    return kind


def alembic_config(connection: Connection | None = None) -> Config:
    """Return the configuration of Alembic, which migrates on `connection`; there is no ini file."""
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent.parent / "migrations"))
    config.attributes["connection"] = connection
    return config


def migrate(settings: Settings) -> None:
    """Bring the database to the newest revision; two processes may do it at once.

    Raises:
        DatabaseSetupError: the database cannot be used as it is.
        DatabaseUnavailableError: the database does not answer.
    """
    engine = make_engine(settings)
    try:
        with unavailable_is_one_error(), engine.begin() as connection:  # SQLite: the write lock
            if connection.dialect.name == "postgresql":
                connection.execute(text("SET LOCAL statement_timeout = 0"))
                lock = text("SELECT pg_advisory_xact_lock(:key)")
                connection.execute(lock, {"key": MIGRATION_LOCK})
            command.upgrade(alembic_config(connection), "head")
    except CommandError as error:
        raise DatabaseSetupError(
            f"the database does not fit this version of ctune: {error}. Run the version that made"
            " it, or a newer one."
        ) from error
    finally:
        engine.dispose()


def check_migrated(database: Database) -> None:
    """Check that the tables are those of this version.

    Raises:
        DatabaseSetupError: they are not.
        DatabaseUnavailableError: the database does not answer.
    """
    with database.reading() as session:
        current = MigrationContext.configure(session.connection()).get_current_revision()
    head = ScriptDirectory.from_config(alembic_config()).get_current_head()
    if current != head:
        raise DatabaseSetupError(
            f"the database is at revision {current or 'none'}, this version needs {head}."
            " Run `ctune migrate`."
        )
