"""What a job would take: from its config at once, time and memory from a worker's calibration.

A calibration is a row that a worker claims like a job. It serves every later estimate of runs with
the same key on the same kind of worker. Commits nothing.
"""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import func, or_, select
from sqlalchemy.orm import Session

from ctune.config import RunConfig
from ctune.encoders import ModelEncoder, image_size_px
from ctune.estimate import Measurement, calibration_key, estimate
from ctune.events import storable
from ctune.manifest import DatasetSummary
from ctune.schema import JsonObject
from service.db import now_s
from service.health import silent_after_s
from service.jobs import lifecycle
from service.jobs.schemas import JobCreate, Rejected, seconds
from service.jobs.service import accepted
from service.settings import Settings
from service.tables import Calibration, Dataset, Model, WorkerSeen, new_id

FAILED_KEPT_S = 600.0
"""A calibration that failed is the answer for so long; then it is tried again."""
MAX_WAITING = 16
"""Calibrations that may wait for a worker at a time; as many again for one with a GPU."""
ASK_AGAIN_S = 5
WITHOUT_WORKER_S = 30


@dataclass(frozen=True)
class Wanted:
    """An estimate that was asked for, and the calibration that it rests on."""

    config: RunConfig
    summary: DatasetSummary
    image_size_px: int | None
    calibration: str | None
    """None: too many wait already."""
    is_new: bool


def ask(session: Session, settings: Settings, body: JobCreate | Rejected) -> Wanted:
    """Check a body as POST /jobs does; find the calibration of such runs, or queue one.

    Raises:
        InvalidError: with everything that is wrong with it.
    """
    body, config = accepted(session, settings, body)
    dataset = session.get_one(Dataset, body.dataset)
    summary = DatasetSummary.model_validate(dataset.summary)
    model = None
    if isinstance(config.encoder, ModelEncoder):
        model = session.get_one(Model, config.encoder.id).info
    key = calibration_key(config, summary)
    found = _usable(session, settings, key)
    gpus = min(1, config.resources.gpus) if config.resources.gpus else config.resources.gpus
    is_new = found is None and _waiting(session, gpus) < MAX_WAITING
    if is_new:
        found = Calibration(
            id=new_id("cal"),
            key=key,
            dataset_id=dataset.id,
            config=config.model_dump(mode="json"),
            gpus=gpus,
        )
        lifecycle.enqueue(session, found)
    size_px = image_size_px(config.encoder, model)
    return Wanted(config, summary, size_px, found.id if found else None, is_new)


def answer(session: Session, settings: Settings, wanted: Wanted) -> JsonObject:
    """Return the estimate as far as it is known now."""
    found = session.get(Calibration, wanted.calibration) if wanted.calibration else None
    measurement = None
    if found is not None and found.status == "ready":
        measurement = Measurement.model_validate(found.result)
    known = estimate(
        wanted.config,
        wanted.summary,
        image_size_px=wanted.image_size_px,
        measurement=measurement,
    )
    reason, again_s = _why_not(session, settings, found, gpus=wanted.config.resources.gpus or 0)
    return {
        "object": "job.estimate",
        **known,
        "measured": _measured(known, found, measurement),
        "reason": reason,
        "retry_after_s": again_s,
        "error": storable(found.error) if found is not None else None,
    }


def _usable(session: Session, settings: Settings, key: str) -> Calibration | None:
    """Return the newest calibration that answers for the workers there are, or will soon."""
    kinds = {info.get("kind") for info in _workers(session, settings)}
    fits = Calibration.worker_kind.in_(kinds) if kinds else Calibration.worker_kind.is_not(None)
    recently = Calibration.finished_at > now_s() - FAILED_KEPT_S
    # Data sets that share the key fare alike, but for one that was deleted before its turn.
    failed = (Calibration.status == "failed") & (
        Calibration.error["code"].as_string() != "dataset_gone"
    )
    wanted = select(Calibration).where(
        Calibration.key == key,
        or_(
            Calibration.status.in_(("queued", "running")),
            fits & (Calibration.status == "ready"),
            fits & failed & recently,
        ),
    )
    return session.scalars(wanted.order_by(Calibration.id.desc()).limit(1)).one_or_none()


def _waiting(session: Session, gpus: int | None) -> int:
    """Return how many wait that need a GPU, or how many that need none, as one with `gpus`."""
    needs_gpu = func.coalesce(Calibration.gpus, 0) > 0
    alike = needs_gpu if gpus else ~needs_gpu
    waiting = select(func.count()).where(Calibration.status == "queued", alike)
    return session.scalar(waiting) or 0


def _workers(session: Session, settings: Settings) -> list[dict[str, Any]]:
    """Return what the workers that are alive say of themselves."""
    since = now_s() - silent_after_s(settings)
    return list(session.scalars(select(WorkerSeen.info).where(WorkerSeen.seen_at > since)))


def _why_not(
    session: Session, settings: Settings, found: Calibration | None, *, gpus: int
) -> tuple[str | None, int | None]:
    """Return why time and memory are null, and after how many seconds to ask again.

    Args:
        gpus: that the job asks for; the calibration takes one of them.
    """
    if found is None:
        said = f"{MAX_WAITING} measurements wait already; ask again when they are done"
        return said, WITHOUT_WORKER_S
    if found.status == "failed":
        return f"the measurement failed: {(found.error or {}).get('message')}", None
    workers = _workers(session, settings)
    most = max((worker.get("gpus", 0) for worker in workers), default=gpus)
    if found.status == "ready":
        short = f"no worker that is running has {gpus} GPUs: the job would wait for one"
        return (short if gpus > most else None), None
    if not workers:
        said = "no worker is running, so nothing can be measured; start one: `ctune worker`"
        return said, WITHOUT_WORKER_S
    if found.status == "running":
        return "it is being measured; ask again", ASK_AGAIN_S
    if (found.gpus or 0) > most:
        return "no worker that is running has a GPU; start one that has", WITHOUT_WORKER_S
    return "it is measured as soon as a worker has a free place; ask again", ASK_AGAIN_S


def _measured(
    known: JsonObject, found: Calibration | None, measurement: Measurement | None
) -> JsonObject | None:
    """Return what was measured, on what and when."""
    if found is None or measurement is None:
        return None
    return {
        "worker_kind": found.worker_kind,
        "device": measurement.device,
        "at": seconds(measurement.at),
        "images_per_s": {stage["name"]: stage["images_per_s"] for stage in known["stages"]},
        "encode_images_per_s": measurement.encode_images_per_s,
        "decode_images_per_s": measurement.decode_images_per_s,
        "remarks": measurement.remarks,
    }
