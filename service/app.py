"""The API process: `python -m service.app --host 127.0.0.1 --port 8000`. Never imports torch."""

import argparse
import logging
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from ipaddress import ip_address
from types import FrameType

import httpx
import uvicorn
from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from ctune import __version__
from service import health
from service.datasets import image_routes
from service.datasets import routes as datasets
from service.db import (
    Database,
    DatabaseSetupError,
    DatabaseUnavailableError,
    check_migrated,
    make_engine,
)
from service.embeddings import routes as embeddings
from service.errors import PROBLEM_DOCS, install_handlers
from service.jobs import estimate_routes, output_routes
from service.jobs import routes as jobs
from service.methods import routes as methods
from service.middleware import LOOPBACK_NAMES, RequestGuard
from service.models import routes as models
from service.queue import Announcer
from service.settings import Settings, get_settings
from service.storage import Storage

EXIT_UNAVAILABLE = 69
EXIT_CONFIG = 78
EMBED_READ_S = 300.0
EMBED_CONNECT_S = 3.0
CLOSE_S = 5
ABANDONED_UPLOAD_S = 24 * 3600.0
ROUTERS = (
    datasets.router,
    image_routes.router,
    methods.router,
    estimate_routes.router,
    output_routes.router,  # before `/jobs/{job_id}`: it has /jobs/compare
    jobs.router,
    models.router,
    embeddings.router,
    health.router,
)
STREAMING = ("/datasets", *embeddings.PATHS)


def create_app(settings: Settings, *, host: str | None = None) -> FastAPI:
    """Return the API for `settings`; nothing is opened before it starts.

    Args:
        host: a further name that clients may call this service by, beside those of loopback.
    """
    app = FastAPI(
        title="ctune",
        version=__version__,
        summary="Contrastive tuning of image encoders, as a service",
        lifespan=_lifespan,
        responses={"default": PROBLEM_DOCS},
        redirect_slashes=False,
    )
    app.state.settings = settings
    app.state.storage = Storage(settings.data_dir)
    app.state.stopping = threading.Event()
    for router in ROUTERS:
        app.include_router(router)
    install_handlers(app)
    app.add_middleware(
        RequestGuard, names=[*LOOPBACK_NAMES, *([host] if host else [])], streaming=STREAMING
    )
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    settings: Settings = app.state.settings
    app.state.storage.create()
    database = Database(make_engine(settings))
    announcer = Announcer(settings)
    limits = httpx.Limits(max_keepalive_connections=32, max_connections=256)
    timeout = httpx.Timeout(EMBED_READ_S, connect=EMBED_CONNECT_S)
    try:
        await run_in_threadpool(check_migrated, database)
        await run_in_threadpool(remove_abandoned_uploads, app.state.storage)
        # trust_env off: the embedding process is never behind a proxy.
        async with httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False) as http:
            app.state.database, app.state.announcer, app.state.http = database, announcer, http
            yield
    finally:
        await run_in_threadpool(announcer.close)
        database.dispose()


def remove_abandoned_uploads(storage: Storage) -> None:
    """Remove half-written archives of an API process that died; live ones are younger."""
    oldest = time.time() - ABANDONED_UPLOAD_S
    for part in (storage.root / "uploads").glob("*.part"):
        if part.stat().st_mtime < oldest:
            storage.remove(part)


class _Server(uvicorn.Server):
    """Tells open event streams that the process stops: it would wait for them otherwise."""

    def __init__(self, config: uvicorn.Config, stopping: threading.Event) -> None:
        super().__init__(config)
        self._stopping = stopping

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._stopping.set()
        super().handle_exit(sig, frame)


def serve(settings: Settings, host: str, port: int) -> int:
    """Serve until a signal; return the exit code."""
    refused = refusal(host, port)
    if refused is None:
        refused = _check_set_up(settings)
    if refused is not None:
        code, message = refused
        print(f"ctune api: {message}", file=sys.stderr)
        return code
    app = create_app(settings, host=host)
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        http="h11",
        ws="none",
        access_log=False,
        log_level="info",
        server_header=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=CLOSE_S,
    )
    server = _Server(config, app.state.stopping)
    server.run()
    return 0 if server.started else 1


def refusal(host: str, port: int) -> tuple[int, str] | None:
    """Return exit code and reason why the API does not listen on `host`; None if it does."""
    if host == "localhost":
        return None
    try:
        if ip_address(host.strip("[]")).is_loopback:
            return None
    except ValueError:
        pass
    return EXIT_CONFIG, (
        f"refusing to listen on {host}: there are no API keys yet, so everybody who reaches this"
        " address could read and change everything. Listen on 127.0.0.1 (the default) and reach it"
        f" through `ssh -L {port}:127.0.0.1:{port} THIS_MACHINE`, or through a proxy that"
        " authenticates and sends `Host: 127.0.0.1` (the service refuses other names)."
    )


def _check_set_up(settings: Settings) -> tuple[int, str] | None:
    try:
        Storage(settings.data_dir).create()
        database = Database(make_engine(settings))
        try:
            check_migrated(database)
        finally:
            database.dispose()
    except DatabaseSetupError as error:
        return EXIT_CONFIG, str(error)
    except DatabaseUnavailableError as error:
        return EXIT_UNAVAILABLE, f"{error}. Start the database, or wait until it is up."
    except OSError as error:
        return EXIT_CONFIG, f"the data directory cannot be used: {error}. Set CTUNE_DATA_DIR."
    return None


def main(arguments: list[str] | None = None) -> int:
    """Read the command line, serve, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m service.app", description="Run the ctune API.")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (loopback only)")
    parser.add_argument("--port", default=8000, type=int, help="port to listen on")
    given = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    for name in ("httpx", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return serve(get_settings(), given.host, given.port)


if __name__ == "__main__":
    sys.exit(main())
