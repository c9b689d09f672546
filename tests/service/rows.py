"""Rows and files as workers leave them, for tests of the API."""

import io
from collections.abc import Mapping
from typing import Any

from PIL import Image
from sqlalchemy.orm import Session

from ctune.manifest import DatasetSummary, Manifest, Split, ValidationReport
from ctune.schema import JsonObject
from ctune.store import StoreWriter
from service.jobs import lifecycle
from service.jobs.lifecycle import Ending, Lease
from service.storage import Storage
from service.tables import Dataset, Job, JobEvent, Model, new_id

OWNER = "worker-1"
ENCODER: JsonObject = {
    "source": "timm",
    "name": "vit_tiny_patch16_224",
    "pretrained": False,
    "image_size_px": 32,
    "options": {"patch_size": 4, "depth": 2},
}
METHOD: JsonObject = {"name": "lacvit", "contrastive": {"epochs": 2, "batch_size": 4}}


def job_body(dataset_id: str, **changes: Any) -> JsonObject:
    """Return a good body of POST /jobs."""
    return {"dataset": dataset_id, "encoder": ENCODER, "method": METHOD, **changes}


def summary(counts: Mapping[str, int], *, held_out: int = 2) -> DatasetSummary:
    """Return the summary of a data set with `counts` training images per class."""
    classes = sorted(counts)
    return DatasetSummary(
        num_images=sum(counts.values()) + held_out * len(classes),
        splits={"train": sum(counts.values()), "test": held_out * len(classes)},
        classes=classes,
        class_counts={"train": dict(counts), "test": dict.fromkeys(classes, held_out)},
        width_px=(32, 40),
        height_px=(24, 24),
        split_origin="made",
    )


def report() -> ValidationReport:
    """Return a report without remarks."""
    return ValidationReport(
        layout="class_folders",
        num_unreadable=0,
        unreadable=[],
        num_junk=0,
        num_duplicates=0,
        num_split_leaks=0,
        warnings=[],
    )


def add_dataset(session: Session, **columns: Any) -> Dataset:
    """Insert a queued data set."""
    dataset_id = new_id("ds")
    values: dict[str, Any] = {
        "name": "leaves",
        "size_bytes": 10,
        "archive_sha256": "0" * 64,
        "upload": f"uploads/{dataset_id}",
        "options": {},
    }
    dataset = Dataset(id=dataset_id, **(values | columns))
    lifecycle.enqueue(session, dataset)
    return dataset


def add_ready_dataset(
    session: Session, counts: Mapping[str, int] | None = None, *, store: str = "stores/x"
) -> Dataset:
    """Insert a data set that a worker has read."""
    dataset = add_dataset(session)
    session.flush()
    found = lifecycle.claim(session, Dataset, owner=OWNER, lease_s=60.0, gpus=(0, 0))
    assert found is not None and found.id == dataset.id
    values = {
        "store": store,
        "summary": summary(counts or {"oak": 8, "pine": 8}).model_dump(mode="json"),
        "report": report().model_dump(mode="json"),
    }
    lease = Lease(Dataset, dataset.id, found.attempt, OWNER)
    assert lifecycle.finish(session, lease, Ending("ready", values=values))
    return dataset


def fail_dataset(session: Session) -> Dataset:
    """Insert a data set whose ingestion has failed."""
    dataset = add_dataset(session)
    session.flush()
    found = lifecycle.claim(session, Dataset, owner=OWNER, lease_s=60.0, gpus=(0, 0))
    assert found is not None and found.id == dataset.id
    lease = Lease(Dataset, dataset.id, found.attempt, OWNER)
    error = {"code": "invalid_archive", "message": "the archive holds no image", "hint": ""}
    assert lifecycle.finish(session, lease, Ending("failed", error=error))
    return dataset


def add_job(session: Session, dataset_id: str = "ds_x", **columns: Any) -> Job:
    """Insert a queued job."""
    values: dict[str, Any] = {"metadata_": {}, "config": {"encoder": ENCODER, "method": METHOD}}
    job = Job(id=new_id("job"), dataset_id=dataset_id, **(values | columns))
    lifecycle.enqueue(session, job)
    return job


def start(session: Session) -> Lease:
    """Claim the job that is next."""
    session.flush()
    job = lifecycle.claim(session, Job, owner=OWNER, lease_s=60.0, gpus=(0, 0))
    assert job is not None
    return Lease(Job, job.id, job.attempt, OWNER)


def add_event(session: Session, job_id: str, kind: str, data: JsonObject) -> None:
    """Insert a line that a child has said."""
    event = JobEvent(
        job_id=job_id, attempt=1, created_at=1.0, kind=kind, level="info", message="", data=data
    )
    session.add(event)


def add_model(session: Session, storage: Storage, job_id: str | None = None) -> Model:
    """Insert a model and write files for it."""
    model_id = new_id("mdl")
    folder = storage.model(model_id)
    (folder / "reference").mkdir(parents=True)
    (folder / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 4096)
    (folder / "model.json").write_text("{}")
    (folder / "reference" / "000.png").write_bytes(png((3, 3), 7))
    info = {"architecture": "vit_tiny_patch16_224", "embed_dim": 192, "image_size_px": 32}
    info["model_args"] = {"patch_size": 8}
    model = Model(
        id=model_id, name="m", job_id=job_id, created_at=1.5, size_bytes=1_048_576, info=info
    )
    session.add(model)
    return model


def png(size_px: tuple[int, int], grey: int) -> bytes:
    """Return a grey image."""
    target = io.BytesIO()
    Image.new("L", size_px, grey).save(target, "PNG")
    return target.getvalue()


def write_store(storage: Storage, key: str, counts: Mapping[str, int]) -> str:
    """Write a packed store with `counts` training images per class; return its stored name."""
    found = summary(counts)
    with StoreWriter(storage.store(key)) as writer:
        for label, name in enumerate(found.classes):
            for number in range(counts[name] + 2):
                split: Split = "train" if number < counts[name] else "test"
                data = png((40 if label else 32, 24), 10 * label + number)
                row = {"path": f"{name}/{number}.png", "sha256": f"{label}{number}"}
                offset = writer.put(data)
                size_px = (40 if label else 32, 24)
                writer.add(
                    row,
                    offset=offset,
                    length=len(data),
                    size_px=size_px,
                    label=label,
                    split=split,
                )
        writer.finish(Manifest(archive_sha256="0" * 64, summary=found, report=report(), options={}))
    return storage.relative(storage.store(key))
