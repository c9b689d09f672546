"""Endpoints of data sets: upload, list, look, delete."""

from fastapi import APIRouter, Request
from sqlalchemy import select
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse

from ctune.ingest import IngestOptions
from ctune.schema import JsonObject
from service.datasets import service
from service.datasets.schemas import dataset_object
from service.datasets.upload import keep, receive_upload
from service.db import Database
from service.deps import DatabaseDep, ReadSession, SettingsDep, StorageDep
from service.pages import PageQuery, list_page
from service.storage import Storage
from service.tables import Dataset, new_id

router = APIRouter(prefix="/datasets", tags=["datasets"])

_FORM = {
    "type": "object",
    "required": ["file"],
    "properties": {
        "file": {"type": "string", "format": "binary", "description": "zip or tar of images"},
        "name": {"type": "string", "maxLength": 256, "description": "default: the file's name"},
        "options": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": IngestOptions.model_json_schema(),
        },
    },
}
_FORM_DOCS = {
    "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}
}


@router.post("", status_code=202, openapi_extra=_FORM_DOCS, response_model=None)
async def create_dataset(
    request: Request, settings: SettingsDep, storage: StorageDep, database: DatabaseDep
) -> JSONResponse:
    """Take an archive and queue its ingestion; it is written to the storage as it comes."""
    dataset_id = new_id("ds")
    place = storage.upload(dataset_id)
    part = place.with_name(place.name + ".part")
    try:
        received = await receive_upload(request, part, settings.max_upload_bytes)
        dataset = service.described(dataset_id, received, storage)
        shown = await run_in_threadpool(_store, database, storage, dataset)
    finally:
        part.unlink(missing_ok=True)
    announce = BackgroundTask(request.app.state.announcer.announce, "dataset", dataset_id)
    headers = {"location": f"/datasets/{dataset_id}"}
    return JSONResponse(shown, 202, headers, background=announce)


def _store(database: Database, storage: Storage, dataset: Dataset) -> JsonObject:
    """Put the archive in its place and commit its row; without the row, no archive stays."""
    place = storage.upload(dataset.id)
    keep(place.with_name(place.name + ".part"), place)
    try:
        with database.writing() as session:
            service.create(session, dataset)
            return dataset_object(dataset)
    except BaseException:
        place.unlink(missing_ok=True)
        raise


@router.get("")
def list_datasets(session: ReadSession, page: PageQuery) -> JsonObject:
    """List data sets, newest first."""
    return list_page(session, select(Dataset), key=Dataset.id, page=page, shape=dataset_object)


@router.get("/{dataset_id}")
def get_dataset(dataset_id: str, session: ReadSession) -> JsonObject:
    """Return one data set: status, counts per split and class, validation report."""
    return dataset_object(service.get(session, dataset_id))


@router.delete("/{dataset_id}")
def delete_dataset(dataset_id: str, database: DatabaseDep, storage: StorageDep) -> JsonObject:
    """Delete a data set and its files; refused while an unfinished job uses it."""
    with database.writing() as session:
        files = service.delete(session, dataset_id, storage)
    for path in files:
        storage.remove(path)
    return {"id": dataset_id, "object": "dataset", "deleted": True}
