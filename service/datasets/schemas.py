"""What data sets look like on the wire."""

import json
from typing import Any

from pydantic import ValidationError

from ctune.events import storable
from ctune.ingest import IngestOptions
from ctune.schema import Fault, JsonObject
from service.faults import body_faults, show, unstorable_faults
from service.jobs.schemas import seconds
from service.tables import Dataset

MAX_NAME = 256
STATUS = {"queued": "processing", "running": "processing", "ready": "ready"}


def parse_options(text: str | None) -> tuple[IngestOptions, list[Fault]]:
    """Return the options in a form field, with everything that is wrong with it."""
    under = ("options",)
    try:
        given: Any = {} if text is None or not text.strip() else json.loads(text)
    except (ValueError, RecursionError) as error:
        detail = f'`options` is not JSON: {error}. Send an object such as {{"test_fraction": 0.2}}.'
        return IngestOptions(), [Fault(pointer="/options", code="invalid_json", detail=detail)]
    faults = unstorable_faults(given, under)
    try:
        options = IngestOptions.model_validate(given)
    except ValidationError as error:
        options = IngestOptions()
        faults = body_faults(error.errors(include_url=False), IngestOptions, under)
    return options, faults


def parse_name(given: str | None, filename: str) -> tuple[str, list[Fault]]:
    """Return the data set's name, by default the archive's, with what is wrong with it."""
    name = (given or "").strip() or filename.replace("\\", "/").rsplit("/", 1)[-1].strip()
    name = name or "data set"
    if len(name) <= MAX_NAME and name.isprintable():
        return name, []
    detail = f"`name` is {show(name)}; it should be at most {MAX_NAME} printable characters."
    return name, [Fault(pointer="/name", code="invalid_value", detail=detail)]


def dataset_object(dataset: Dataset) -> JsonObject:
    """Return a data set; `summary` and `report` are null until it is ready, `progress` then."""
    return {
        "id": dataset.id,
        "object": "dataset",
        "name": dataset.name,
        "status": STATUS.get(dataset.status, "failed"),
        "size_bytes": dataset.size_bytes,
        "archive_sha256": dataset.archive_sha256,
        "options": dataset.options,
        "created_at": seconds(dataset.created_at),
        "started_at": seconds(dataset.started_at),
        "finished_at": seconds(dataset.finished_at),
        "progress": storable(dataset.progress) if dataset.status == "running" else None,
        "summary": storable(dataset.summary),
        "report": storable(dataset.report),
        "error": storable(dataset.error),
    }
