"""Fixtures of the API: a real server on a real socket, once for each kind of database."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from service.app import create_app
from service.db import Database, make_engine
from service.settings import Settings
from service.storage import Storage

START_S = 20.0


@dataclass
class Api:
    """A running API and what stands behind it."""

    client: httpx.Client
    app: FastAPI
    settings: Settings
    database: Database
    storage: Storage
    port: int


@contextmanager
def served(app: FastAPI) -> Iterator[int]:
    """Serve `app` on a free port of this machine, from a thread; yield the port."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(app, http="h11", ws="none", log_config=None, access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        until = time.monotonic() + START_S
        while not server.started:
            assert thread.is_alive() and time.monotonic() < until, "the server does not start"
            time.sleep(0.01)
        yield listener.getsockname()[1]
    finally:
        if hasattr(app.state, "stopping"):
            app.state.stopping.set()
        server.should_exit = True
        thread.join()
        listener.close()


@contextmanager
def running_api(settings: Settings, database: Database) -> Iterator[Api]:
    """Run the API of `settings`."""
    app = create_app(settings)
    with (
        served(app) as port,
        httpx.Client(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=30.0) as client,
    ):
        yield Api(client, app, settings, database, Storage(settings.data_dir), port)


@pytest.fixture
def api(settings: Settings, database: Database) -> Iterator[Api]:
    """The API, once for each kind of database."""
    with running_api(settings, database) as found:
        yield found


@pytest.fixture
def sqlite_api(sqlite_settings: Settings) -> Iterator[Api]:
    """The API on SQLite alone, for what does not depend on the database."""
    database = Database(make_engine(sqlite_settings))
    with running_api(sqlite_settings, database) as found:
        yield found
    database.dispose()
