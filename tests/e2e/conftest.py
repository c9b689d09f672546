"""A running service for tests of whole paths."""

from collections.abc import Iterator
from contextlib import closing

import psycopg
import pytest

from tests.e2e.running import Running
from tests.servers import Server


@pytest.fixture(params=["embedded", "servers"], scope="module")
def service(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """A running service, once for each kind of database and broker."""
    environment = {}
    if request.param == "servers":
        postgres: Server = request.getfixturevalue("postgres_server")
        broker: Server = request.getfixturevalue("redis_server")
        name = request.module.__name__.rpartition(".")[2]
        with closing(psycopg.connect(postgres.url, autocommit=True)) as connection:
            connection.execute(f"CREATE DATABASE {name} TEMPLATE template0")
        url = postgres.url.replace("postgresql:", "postgresql+psycopg:")
        url = f"{url.removesuffix('/postgres')}/{name}"
        environment = {"CTUNE_DATABASE_URL": url, "CTUNE_BROKER_URL": broker.url}
    made = Running(tmp_path_factory.mktemp("up") / "data", environment)
    try:
        yield made.wait_ready()
        assert made.stop() == 0, made.log()
        assert "Traceback" not in made.log(), made.log()
    finally:
        made.discard()
