"""Fixtures of the service and its workers: real databases, built by the migrations."""

import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
from pydantic import SecretStr

from service.db import Database, make_engine, migrate
from service.settings import Settings
from tests import servers

_numbers = itertools.count()


@pytest.fixture(scope="session", autouse=True)
def _no_settings_from_outside() -> Iterator[None]:
    """Keep the developer's own `CTUNE_*` variables out of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("CTUNE_")]:
            patch.delenv(name)
        yield


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[servers.Server]:
    """A private Postgres for the whole session, with a migrated template database."""
    with servers.needed(), servers.postgres() as server:
        url = _create_database(server, "migrated", template="template0")
        migrate(Settings(database_url=SecretStr(url)))
        yield server


@pytest.fixture(scope="session")
def redis_server() -> Iterator[servers.Server]:
    """A private Redis for the whole session."""
    with servers.needed(), servers.redis() as server:
        yield server


@pytest.fixture
def killable_postgres() -> Iterator[servers.Server]:
    """A private Postgres, empty, that the test may kill."""
    with servers.needed(), servers.postgres() as server:
        yield server


@pytest.fixture
def killable_redis() -> Iterator[servers.Server]:
    """A private Redis that the test may kill."""
    with servers.needed(), servers.redis() as server:
        yield server


@pytest.fixture
def sqlite_settings(tmp_path: Path, migrated_sqlite: Path) -> Settings:
    """Settings of a data directory of its own with a migrated SQLite database."""
    data_dir = tmp_path / "data"
    data_dir.mkdir()
    shutil.copy(migrated_sqlite, data_dir / "ctune.sqlite")
    return Settings(data_dir=data_dir)


@pytest.fixture
def postgres_settings(tmp_path: Path, postgres_server: servers.Server) -> Settings:
    """Settings of a data directory of its own with a migrated Postgres database."""
    url = _create_database(postgres_server, f"test_{next(_numbers)}", template="migrated")
    return Settings(data_dir=tmp_path / "data", database_url=SecretStr(url))


@pytest.fixture(params=["sqlite", "postgres"])
def settings(request: pytest.FixtureRequest) -> Settings:
    """Settings with a migrated database, once for each kind of database."""
    found: Settings = request.getfixturevalue(f"{request.param}_settings")
    return found


@pytest.fixture
def database(settings: Settings) -> Iterator[Database]:
    """The migrated database of `settings`, once for each kind."""
    opened = Database(make_engine(settings))
    yield opened
    opened.dispose()


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite file made by the migrations, to be copied."""
    settings = Settings(data_dir=tmp_path_factory.mktemp("migrated"))
    migrate(settings)
    return settings.data_dir / "ctune.sqlite"


def _create_database(server: servers.Server, name: str, *, template: str) -> str:
    with closing(psycopg.connect(server.url, autocommit=True)) as connection:
        connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"'.encode())
    return server.url.replace("postgresql://", "postgresql+psycopg://").replace(
        "/postgres", f"/{name}"
    )
