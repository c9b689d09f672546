"""Endpoints of what jobs leave behind: logs, checkpoints, the report, their comparison."""

from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from sqlalchemy import select
from starlette.responses import PlainTextResponse, Response, StreamingResponse

from ctune.figures_file import read_figures
from ctune.schema import JsonObject
from service.db import now_s
from service.deps import DatabaseDep, ReadSession, StorageDep
from service.errors import NotFoundError
from service.files import NOSNIFF, pieces, tail_start, wanted_range, zip_response
from service.jobs import compare, html, metrics, report, service
from service.jobs.compare import JobsComparison
from service.jobs.compare_page import compare_page
from service.jobs.page import Sources, report_page
from service.jobs.schemas import checkpoint_object
from service.pages import PageQuery, list_page
from service.tables import Checkpoint

router = APIRouter(tags=["jobs"])

MAX_TAIL_BYTES = 4 * 2**20
CURVE_POINTS = 300
TEXT_PLAIN = "text/plain; charset=utf-8"


@router.get("/jobs/compare", response_model=None, responses=html.docs(JobsComparison))
def compare_jobs(
    ids: Annotated[
        list[str], Query(max_length=200, description="2 to 50 jobs: repeated, or with commas")
    ],
    session: ReadSession,
    request: Request,
    format: html.Format = None,
) -> JsonObject | Response:
    """Return one table over jobs: what they were, their scores, mean and spread over seeds.

    `warnings` says where jobs were scored on other data or with other settings. With
    `Accept: text/html` or `format=html` a page.
    """
    found = compare.compare(session, compare.wanted_ids(ids))
    if not html.wants_html(request, format):
        return found.model_dump(mode="json")
    now = session.scalar(select(now_s())) or 0.0
    return html.page_response(compare_page(found, now))


@router.get("/jobs/{job_id}/logs", response_model=None, response_class=PlainTextResponse)
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


@router.get("/jobs/{job_id}/report", response_model=None, responses=html.docs())
def get_report(
    job_id: str,
    database: DatabaseDep,
    storage: StorageDep,
    request: Request,
    format: html.Format = None,
) -> JsonObject | Response:
    """Return the report: data, config, before and after, last metrics, warnings, durations.

    With `Accept: text/html` or `format=html` a page with pictures that loads nothing from anywhere.
    """
    as_page = html.wants_html(request, format)
    with database.reading() as session:
        now = session.scalar(select(now_s())) or 0.0
        job = service.get(session, job_id)
        found = report.report(session, job, now)
        if not as_page:
            return found
        wanted = metrics.Wanted(job.id, metrics.Filters())
        series = metrics.columns(session, wanted, CURVE_POINTS)
        versions = report.versions(session, job.id)
    figures = (read_figures(run.figures) for _, run in storage.job_runs(job.id))
    sources = Sources(
        report=found,
        figures=next((file for file in figures if file is not None), None),
        series=series,
        versions=versions,
        base_url=str(request.base_url).rstrip("/"),
    )
    return html.page_response(report_page(sources, now))


@router.get(
    "/checkpoints/{checkpoint_id}/download",
    response_model=None,
    response_class=StreamingResponse,
    responses={200: {"content": {"application/zip": {}}}},
)
def download_checkpoint(
    checkpoint_id: str, session: ReadSession, storage: StorageDep
) -> StreamingResponse:
    """Return the files of a checkpoint as a zip."""
    found = service.get_checkpoint(session, checkpoint_id)
    return zip_response(storage.absolute(found.path), f"{found.id}.zip")
