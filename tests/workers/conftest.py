"""A supervisor that runs in the test's own process, on real children."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from service.db import Database, make_engine
from service.settings import Settings
from tests.workers.rows import scaled
from workers.supervisor import Supervisor

StartSupervisor = Callable[..., Supervisor]


@pytest.fixture
def start_supervisor(settings: Settings) -> Iterator[StartSupervisor]:
    """Start supervisors on the test's database; all are stopped at the end."""
    started: list[tuple[Supervisor, Database]] = []

    def start(**changes: Any) -> Supervisor:
        own = scaled(settings, **changes)
        database = Database(make_engine(own))
        supervisor = Supervisor(own, database)
        started.append((supervisor, database))
        supervisor.start()
        return supervisor

    yield start
    for supervisor, database in started:
        supervisor.stop()
        assert not supervisor.alive
        assert not supervisor.broken
        database.dispose()
