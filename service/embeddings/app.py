"""The embedding process: `python -m service.embeddings.app --host 127.0.0.1 --port 8001`.

It asks for no key and so answers only on loopback; the API forwards to it.
"""

import argparse
import ipaddress
import logging
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI

from ctune import __version__
from service.embeddings.batcher import Batcher
from service.embeddings.embed_routes import Serving, router
from service.embeddings.engine import Engine, Vectors
from service.errors import install_handlers
from service.middleware import LOOPBACK_NAMES, RequestGuard
from service.settings import Settings, get_settings
from service.storage import Storage

MAX_BODY_BYTES = 256 * 2**20
LARGE_BODIES = ("/embed", "/v1/embeddings", "/classify")
DRAIN_S = 10


def create_embed_app(settings: Settings, *, max_body_bytes: int = MAX_BODY_BYTES) -> FastAPI:
    """Return the ASGI application of the embedding process."""
    app = FastAPI(title="ctune embeddings", version=__version__, lifespan=_serve)
    app.state.settings = settings
    app.state.max_body_bytes = max_body_bytes
    app.include_router(router)
    install_handlers(app)
    app.add_middleware(RequestGuard, names=LOOPBACK_NAMES, streaming=LARGE_BODIES)
    return app


@asynccontextmanager
async def _serve(app: FastAPI) -> AsyncIterator[None]:
    settings: Settings = app.state.settings
    engine = Engine(
        Storage(settings.data_dir),
        cache_bytes=settings.model_cache_bytes,
        max_pixels=settings.max_image_pixels,
    )
    batcher: Batcher[Any, Any, Vectors] = Batcher(
        engine.vectors,
        max_pending=settings.max_pending_images,
        max_batch=settings.max_batch_images,
    )
    batcher.start()
    with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decode") as pool:
        app.state.serving = Serving(
            settings=settings,
            engine=engine,
            batcher=batcher,
            pool=pool,
            max_body_bytes=app.state.max_body_bytes,
        )
        yield
        await batcher.close()


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description="Embed and classify images with exported models.")
    parser.add_argument("--host", default="127.0.0.1", help="a loopback address")
    parser.add_argument("--port", type=int, default=8001)
    given = parser.parse_args()
    if not _is_loopback(given.host):
        parser.error(f"{given.host} is not a loopback address; this process asks for no key")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    uvicorn.run(
        create_embed_app(get_settings()),
        host=given.host,
        port=given.port,
        access_log=False,
        timeout_graceful_shutdown=DRAIN_S,
    )


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


if __name__ == "__main__":
    main()
