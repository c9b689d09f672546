"""Endpoints of what jobs leave behind: logs, checkpoints, the report."""

from typing import Annotated

from fastapi import APIRouter, Header, Query
from sqlalchemy import select
from starlette.responses import Response, StreamingResponse

from ctune.schema import JsonObject
from service.db import now_s
from service.deps import ReadSession, StorageDep
from service.errors import NotFoundError
from service.files import NOSNIFF, pieces, tail_start, wanted_range, zip_response
from service.jobs import report, service
from service.jobs.schemas import checkpoint_object
from service.pages import PageQuery, list_page
from service.tables import Checkpoint

router = APIRouter(tags=["jobs"])

MAX_TAIL_BYTES = 4 * 2**20
TEXT_PLAIN = "text/plain; charset=utf-8"


@router.get("/jobs/{job_id}/logs", response_model=None)
def get_logs(
    job_id: str,
    session: ReadSession,
    storage: StorageDep,
    attempt: Annotated[int | None, Query(ge=1, le=10_000, description="default: newest")] = None,
    tail: Annotated[int | None, Query(ge=1, le=100_000, description="last lines only")] = None,
    byte_range: Annotated[str | None, Header(alias="range")] = None,
) -> Response:
    """Return what the training process printed; `Range: bytes=…` or `tail` give a part."""
    job = service.get(session, job_id)
    number = attempt or job.attempt
    headers = {**NOSNIFF, "accept-ranges": "bytes", "x-attempt": str(number)}
    log = storage.job_run(job.id, number).log
    try:
        file = log.open("rb")
    except FileNotFoundError:
        if attempt is None or attempt == job.attempt:
            return Response(b"", headers=headers, media_type=TEXT_PLAIN)  # nothing printed yet
        raise NotFoundError(
            f"the job {job_id} has no log of attempt {attempt}; it has {job.attempt} attempts."
        ) from None
    size = log.stat().st_size
    try:
        part = wanted_range(byte_range, size) if tail is None else None
        start, length = part or (0, size)
        if tail is not None:
            start = tail_start(file, size, tail, MAX_TAIL_BYTES)
            length = size - start
    except Exception:
        file.close()
        raise
    headers["content-length"] = str(length)
    if part is not None:
        headers["content-range"] = f"bytes {start}-{start + length - 1}/{size}"
    status = 200 if part is None else 206
    return StreamingResponse(pieces(file, start, length), status, headers, TEXT_PLAIN)


@router.get("/jobs/{job_id}/checkpoints")
def list_checkpoints(job_id: str, session: ReadSession, page: PageQuery) -> JsonObject:
    """List the checkpoints that exist, newest first, with the sha256 of each file."""
    job = service.get(session, job_id)
    wanted = select(Checkpoint).where(Checkpoint.job_id == job.id)
    return list_page(session, wanted, key=Checkpoint.id, page=page, shape=checkpoint_object)


@router.get("/jobs/{job_id}/report")
def get_report(job_id: str, session: ReadSession) -> JsonObject:
    """Return the report: data, config, before and after, last metrics, warnings, durations."""
    now = session.scalar(select(now_s())) or 0.0
    return report.report(session, service.get(session, job_id), now)


@router.get("/checkpoints/{checkpoint_id}/download", response_model=None)
def download_checkpoint(
    checkpoint_id: str, session: ReadSession, storage: StorageDep
) -> StreamingResponse:
    """Return the files of a checkpoint as a zip."""
    found = service.get_checkpoint(session, checkpoint_id)
    return zip_response(storage.absolute(found.path), f"{found.id}.zip")
