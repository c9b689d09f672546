"""Liveness, and readiness with reasons: ready means that a job sent now will run."""

import asyncio
import tempfile
from collections.abc import Callable, Coroutine
from typing import Any, NamedTuple

import httpx
from fastapi import APIRouter, Request
from sqlalchemy import func, select
from sqlalchemy.exc import DBAPIError
from starlette.concurrency import run_in_threadpool

from ctune.schema import Fault, JsonObject
from service.db import Database, DatabaseSetupError, DatabaseUnavailableError, check_migrated, now_s
from service.errors import UnavailableError
from service.settings import Settings
from service.storage import Storage
from service.tables import WorkerSeen

SILENT_AFTER_S = 30.0
EMBED_TIMEOUT_S = 2.0

router = APIRouter(tags=["health"])


class Finding(NamedTuple):
    """What one check found."""

    name: str
    ok: bool
    detail: str


@router.get("/healthz")
async def healthz() -> JsonObject:
    """Say that the process answers; looks at nothing else."""
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(request: Request) -> JsonObject:
    """Answer 200 when jobs can run, else 503 with the reasons."""
    findings = await look(request.app.state)
    checks = [finding._asdict() for finding in findings]
    bad = [finding for finding in findings if not finding.ok]
    if not bad:
        return {"status": "ready", "checks": checks}
    raise UnavailableError(
        f"not ready: {'; '.join(finding.detail.rstrip('.') for finding in bad)}.",
        code="not_ready",
        faults=[
            Fault(pointer="", code=f"{bad_.name}_not_ready", detail=bad_.detail) for bad_ in bad
        ],
        members={"checks": checks},
    )


async def look(state: Any) -> list[Finding]:
    """Run all checks at once."""
    checks: list[Coroutine[Any, Any, Finding]] = [
        run_in_threadpool(_database, state.database),
        run_in_threadpool(_storage, state.storage),
        run_in_threadpool(_workers, state.database, state.settings),
        _embedding(state.http, state.settings),
    ]
    return list(await asyncio.gather(*checks))


def _database(database: Database) -> Finding:
    return _found("database", lambda: check_migrated(database), "at the newest revision")


def _storage(storage: Storage) -> Finding:
    def write() -> None:
        with tempfile.TemporaryFile(dir=storage.root / "uploads") as file:
            file.write(b"ctune")

    return _found("storage", write, "writable")


def _found(name: str, check: Callable[[], None], good: str) -> Finding:
    try:
        check()
    except DatabaseSetupError as error:
        return Finding(name, False, str(error))
    except DatabaseUnavailableError:
        return Finding(name, False, "the database does not answer; start it or wait.")
    except OSError as error:
        said = (
            f"the data directory cannot be written: {error.strerror}; free space or fix its owner."
        )
        return Finding(name, False, said)
    return Finding(name, True, good)


def silent_after_s(settings: Settings) -> float:
    """Return after how long without a sign of life a worker counts as gone."""
    return max(SILENT_AFTER_S, 3 * settings.poll_s)


def _workers(database: Database, settings: Settings) -> Finding:
    limit_s = silent_after_s(settings)
    silence = now_s() - func.max(WorkerSeen.seen_at)
    try:
        with database.reading() as session:
            silent_s = session.scalar(select(silence))
            alive = session.scalar(
                select(func.count()).where(WorkerSeen.seen_at > now_s() - limit_s)
            )
    except DatabaseUnavailableError:
        return Finding("workers", False, "unknown, because the database does not answer.")
    except DBAPIError:  # no tables yet
        return Finding("workers", False, "unknown, because the database is not at this version.")
    if silent_s is None:
        return Finding("workers", False, "no worker was ever seen; start one: `ctune worker`.")
    if not alive:
        said = f"no worker was seen for {silent_s:.0f} s; start one: `ctune worker`."
        return Finding("workers", False, said)
    return Finding("workers", True, f"{alive} seen within {limit_s:.0f} s")


async def _embedding(http: httpx.AsyncClient, settings: Settings) -> Finding:
    url = settings.embed_url.rstrip("/")
    try:
        answer = await http.get(f"{url}/healthz", timeout=EMBED_TIMEOUT_S)
    except httpx.HTTPError as error:
        said = f"the embedding process at {url} does not answer ({type(error).__name__})"
        return Finding("embedding", False, f"{said}; start one: `ctune embed-server`.")
    if answer.status_code != 200:
        return Finding(
            "embedding", False, f"{url}/healthz answers {answer.status_code}; look at its log."
        )
    return Finding("embedding", True, f"answers at {url}")
