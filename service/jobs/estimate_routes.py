"""The endpoint of estimates."""

import asyncio
import time
from typing import Annotated, Any

from fastapi import APIRouter, Body, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from ctune.schema import JsonObject
from service.db import Database
from service.jobs import estimate
from service.jobs.schemas import JobBody, JobCreate, Rejected
from service.settings import Settings

router = APIRouter(prefix="/jobs", tags=["jobs"])

LOOK_S = 0.5
"""Between two looks at a calibration that somebody waits for."""
EXAMPLE: JsonObject = {
    "object": "job.estimate",
    "stages": [
        {
            "name": "contrastive",
            "total_steps": 4680,
            "image_passes": 599_040,
            "images_per_s": 2120.4,
            "duration_s": 282.5,
        },
        {
            "name": "probe",
            "total_steps": 7900,
            "image_passes": 10_000,
            "images_per_s": 1304.0,
            "duration_s": 7.7,
        },
    ],
    "image_passes": 609_040,
    "disk_bytes": {
        "decoded_images": 3_493_888_000,
        "checkpoints": 1_310_000_000,
        "model": 87_000_000,
        "total": 4_890_888_000,
    },
    "memory_bytes": 9_250_000_000,
    "duration_s": 344.0,
    "duration": {
        "start_s": 9.1,
        "decoding_s": 31.4,
        "training_s": 290.2,
        "evaluation_s": 13.3,
        "includes": "start, decoding, training, encoding for the evaluations",
        "does_not_include": "download of weights, what the protocols compute",
    },
    "measured": {
        "worker_kind": "NVIDIA H200, 16 cores of AMD EPYC 9554",
        "device": "cuda NVIDIA H200",
        "at": 1_790_000_000,
        "images_per_s": {"contrastive": 2120.4, "probe": 1304.0},
        "encode_images_per_s": 5480.0,
        "decode_images_per_s": 1120.0,
        "remarks": [],
    },
    "reason": None,
    "retry_after_s": None,
    "error": None,
}
DOCS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "Steps and image passes; time and memory once they are measured",
        "content": {"application/json": {"example": EXAMPLE}},
        "headers": {
            "Retry-After": {
                "description": "Seconds after which to ask again; only while `reason` says so",
                "schema": {"type": "integer"},
            }
        },
    }
}


@router.post("/estimate", responses=DOCS)
async def estimate_job(
    body: Annotated[JobBody, Body()],
    request: Request,
    response: Response,
    wait_s: Annotated[
        float, Query(ge=0, le=60, description="wait so long for a measurement")
    ] = 0.0,
) -> JsonObject:
    """Say what a job would take, without making one; the body and its faults are those of a job.

    Steps, image passes and the size of the decoded images are known at once. Time and memory come
    from a short calibration by a worker; while it has not run they are null, and `reason` says why.
    A config that cannot run, for example for lack of memory, shows in `error`.
    """
    state = request.app.state
    wanted = await run_in_threadpool(_ask, state.database, state.settings, body)
    if wanted.is_new:
        state.announcer.announce("calibration", wanted.calibration)
    until = time.monotonic() + wait_s
    while True:
        found = await run_in_threadpool(_answer, state.database, state.settings, wanted)
        left_s = until - time.monotonic()
        if found["retry_after_s"] is None or left_s <= 0 or state.stopping.is_set():
            break
        await asyncio.sleep(min(LOOK_S, left_s))
    if found["retry_after_s"] is not None:
        response.headers["retry-after"] = str(found["retry_after_s"])
    return found


def _ask(database: Database, settings: Settings, body: JobCreate | Rejected) -> estimate.Wanted:
    with database.writing() as session:
        return estimate.ask(session, settings, body)


def _answer(database: Database, settings: Settings, wanted: estimate.Wanted) -> JsonObject:
    with database.reading() as session:
        return estimate.answer(session, settings, wanted)
