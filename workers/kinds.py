"""What is particular to a training, an ingestion and a calibration: run file, place of a result."""

import json
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy.orm import Session

from ctune.rundir import RunDir, write_atomically
from service.db import Database, now_s
from service.jobs import lifecycle
from service.jobs.lifecycle import Ending, Lease, Retry, Table
from service.jobs.states import AnyRow
from service.settings import Settings
from service.storage import Storage, size_bytes
from service.tables import Calibration, Dataset, Job, RunClaimable, new_id
from workers.outcome import make_error

JsonObject = dict[str, Any]

CALIBRATION_LIMIT_S = 600.0
"""A calibration measures for seconds; what takes long is a first download of weights."""


class CannotRunError(Exception):
    """This attempt cannot begin or its result cannot be used; `error` is for the row."""

    def __init__(self, error: JsonObject) -> None:
        super().__init__(error["message"])
        self.error = error


@dataclass(frozen=True)
class Context:
    """What every attempt of this worker needs."""

    settings: Settings
    database: Database
    storage: Storage
    owner: str

    @property
    def retry(self) -> Retry:
        """When lost attempts are repeated."""
        return Retry(self.settings.max_attempts, self.settings.retry_backoff_s)


class Work(ABC):
    """One claimed row."""

    def __init__(self, context: Context, row: AnyRow) -> None:
        self.context = context
        self.storage = context.storage
        self.lease = Lease(type(row), row.id, row.attempt, context.owner)
        self.run_dir = self._run_dir()
        self.gpus: tuple[str, ...] = ()
        self.max_duration_s: float | None = None
        """How much longer it may run."""

    @property
    def retry(self) -> Retry:
        """When an attempt that was lost, or failed in a way that may pass, is repeated."""
        return self.context.retry

    @property
    @abstractmethod
    def command(self) -> list[str]:
        """The program; the run directory follows as its last argument."""

    def prepare(self) -> None:
        """Make the run directory and write `config.json`.

        Raises:
            CannotRunError: something that the run needs is missing.
            OSError: the directory cannot be written.
        """
        content = self._config()
        for _, run in self.earlier():  # their worker may have died before it could do this
            self.storage.remove(run.cache)
        self.run_dir.create()
        write_atomically(self.run_dir.config, json.dumps(content, indent=2).encode())

    def earlier(self) -> list[tuple[int, RunDir]]:
        """Return the earlier attempts whose run directories can be resumed, oldest first."""
        return []

    @abstractmethod
    def adopt(self, result: JsonObject) -> Ending:
        """Move what the child made to its final place and return what the row is to say.

        Raises:
            CannotRunError: the result is not there.
            OSError: it cannot be moved.
        """

    def clean(self) -> None:
        """Remove what nobody needs once the row says that the work ended, in whatever way."""
        clean_ended(self.storage, self.lease.table, self.lease.id)

    @abstractmethod
    def _run_dir(self) -> RunDir: ...

    @abstractmethod
    def _config(self) -> JsonObject: ...


class ConfiguredWork(Work):
    """What a config describes, on the data set and the encoder that it names."""

    def __init__(self, context: Context, row: Job | Calibration) -> None:
        super().__init__(context, row)
        self._run: RunClaimable = row

    def _config(self) -> JsonObject:
        config = self._run.config
        with self.context.database.reading() as session:
            dataset = session.get(Dataset, self._run.dataset_id)
        if dataset is None or dataset.store is None:
            message = f"the data set {self._run.dataset_id} of this job is gone"
            hint = "upload it again and create a new job"
            raise CannotRunError(make_error("dataset_gone", message, hint=hint, fault="user"))
        return {
            "config": config,
            "data": str(self.storage.absolute(dataset.store)),
            "encoder_dir": self._encoder_dir(config["encoder"]),
            "allow_noncommercial_weights": self.context.settings.allow_noncommercial_weights,
        }

    def _encoder_dir(self, encoder: JsonObject) -> str | None:
        if encoder.get("source") != "model":
            return None
        directory = self.storage.model(encoder["id"])
        if not directory.is_dir():
            message = f"the model {encoder['id']} that this job starts from is gone"
            hint = "create a job that starts from another model"
            raise CannotRunError(make_error("model_gone", message, hint=hint, fault="user"))
        return str(directory)


class Training(ConfiguredWork):
    """A job: one attempt of `ctune.run`."""

    def __init__(self, context: Context, row: Job) -> None:
        super().__init__(context, row)
        self._row = row

    def limit(self, session: Session) -> None:
        """Work out how much longer the job may run, from what its earlier attempts took."""
        allowed_s = self._row.config.get("resources", {}).get("max_duration_s")
        if allowed_s is not None:
            self.max_duration_s = allowed_s - lifecycle.run_seconds(session, self._row.id)

    @property
    def command(self) -> list[str]:
        return self.context.settings.train_command

    def earlier(self) -> list[tuple[int, RunDir]]:
        runs = self.storage.job_runs(self.lease.id)
        return [(attempt, run) for attempt, run in runs if attempt < self.lease.attempt][::-1]

    def adopt(self, result: JsonObject) -> Ending:
        made = self.run_dir.model
        if not made.is_dir() or "model" not in result:
            raise CannotRunError(
                make_error("no_result", "the run said it is finished but left no model behind")
            )
        model = {
            "id": new_id("mdl"),
            "name": self._row.name,
            "job_id": self._row.id,
            "created_at": now_s(),
            "size_bytes": size_bytes(made),
            "info": result["model"],
        }
        _adopt(self.storage, made, self.storage.model(model["id"]))
        values = {"result": result, "model_id": model["id"]}
        return Ending("succeeded", "done", values=values, model=model)

    def _run_dir(self) -> RunDir:
        return self.storage.job_run(self.lease.id, self.lease.attempt)

    def _config(self) -> JsonObject:
        return super()._config() | {
            "resume_from": [str(run.root) for _, run in reversed(self.earlier())],
            "job_id": self._row.id,
            "finish": self._row.stop_requested_at is not None,
        }


class Measuring(ConfiguredWork):
    """A calibration: one attempt of `ctune.calibrate`.

    A crash is its result too, most often that memory is short, so it is not repeated.
    """

    def __init__(self, context: Context, row: Calibration) -> None:
        super().__init__(context, row)
        self.max_duration_s = CALIBRATION_LIMIT_S

    @property
    def retry(self) -> Retry:
        return Retry(max_attempts=1, backoff_s=0.0)

    @property
    def command(self) -> list[str]:
        return self.context.settings.calibrate_command

    def adopt(self, result: JsonObject) -> Ending:
        if "stages" not in result:
            raise CannotRunError(
                make_error("no_result", "the calibration said it is finished but measured nothing")
            )
        return Ending("ready", "done", values={"result": result})

    def _run_dir(self) -> RunDir:
        return self.storage.calibration_run(self.lease.id, self.lease.attempt)


class Ingestion(Work):
    """A data set: one attempt of `ctune.ingest`."""

    def __init__(self, context: Context, row: Dataset) -> None:
        super().__init__(context, row)
        self._row = row
        self._archive = self.storage.absolute(row.upload)

    @property
    def command(self) -> list[str]:
        return self.context.settings.ingest_command

    def adopt(self, result: JsonObject) -> Ending:
        made = self.run_dir.root / "store"
        if not made.is_dir() or not {"store_key", "manifest"} <= result.keys():
            raise CannotRunError(
                make_error("no_result", "the ingestion said it is finished but left no store")
            )
        place = self.storage.store(result["store_key"])
        _adopt(self.storage, made, place)
        manifest = result["manifest"]
        values = {
            "store": self.storage.relative(place),
            "summary": manifest["summary"],
            "report": manifest["report"],
        }
        return Ending("ready", "done", values=values)

    def _run_dir(self) -> RunDir:
        return self.storage.ingest_run(self.lease.id, self.lease.attempt)

    def _config(self) -> JsonObject:
        if not self._archive.is_file():
            message = "the uploaded archive is gone"
            hint = "upload it again"
            raise CannotRunError(make_error("upload_gone", message, hint=hint))
        settings = self.context.settings
        return {
            "archive": str(self._archive),
            "archive_sha256": self._row.archive_sha256,
            "options": self._row.options,
            "limits": {
                "max_unpacked_bytes": settings.max_unpacked_bytes,
                "max_image_bytes": settings.max_image_bytes,
                "max_image_pixels": settings.max_image_pixels,
                "max_images": settings.max_images,
            },
        }


def clean_ended(storage: Storage, table: Table, row_id: str) -> None:
    """Remove what nobody needs of a row that has ended.

    Of an ingestion the archive and the run directories, of a calibration these; of a training the
    decoded images of its attempts, while logs, events and checkpoints can be asked for.
    """
    if table is Calibration:
        storage.remove(storage.calibration_run(row_id, 0).root.parent)
        return
    if table is Dataset:
        storage.remove(storage.upload(row_id))
        storage.remove(storage.ingest_run(row_id, 0).root.parent)
        return
    for _, run in storage.job_runs(row_id):
        storage.remove(run.cache)


def _adopt(storage: Storage, made: Path, place: Path) -> None:
    """Move a directory and make it young: the sweeper leaves young ones without a row alone."""
    storage.adopt(made, place)
    os.utime(place)
