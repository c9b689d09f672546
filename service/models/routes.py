"""Endpoints of models: list, look, download, delete."""

from typing import Annotated

from fastapi import APIRouter, Query
from sqlalchemy import select
from starlette.responses import StreamingResponse

from ctune.schema import Fault, JsonObject
from service.deps import DatabaseDep, ReadSession, StorageDep
from service.errors import InvalidError
from service.files import zip_response
from service.models import service
from service.models.schemas import model_object
from service.pages import PageQuery, Text, list_page
from service.tables import Model

router = APIRouter(prefix="/models", tags=["models"])

FORMATS = ("timm", "open_clip", "onnx")


@router.get("")
def list_models(session: ReadSession, page: PageQuery, job: Text | None = None) -> JsonObject:
    """List models, newest first."""
    wanted = select(Model)
    if job is not None:
        wanted = wanted.where(Model.job_id == job)
    return list_page(session, wanted, key=Model.id, page=page, shape=model_object)


@router.get("/{model_id}")
def get_model(model_id: str, session: ReadSession) -> JsonObject:
    """Return one model."""
    return model_object(service.get(session, model_id))


@router.delete("/{model_id}")
def delete_model(model_id: str, database: DatabaseDep, storage: StorageDep) -> JsonObject:
    """Delete a model and its files; refused while an unfinished job starts from it."""
    with database.writing() as session:
        service.delete(session, model_id)
    storage.remove(storage.model(model_id))
    return {"id": model_id, "object": "model", "deleted": True}


@router.get("/{model_id}/download", response_model=None)
def download_model(
    model_id: str,
    session: ReadSession,
    storage: StorageDep,
    wanted: Annotated[str, Query(alias="format", max_length=32)] = "timm",
) -> StreamingResponse:
    """Return the model directory as a zip; `timm.create_model("local-dir:…")` loads it."""
    model = service.get(session, model_id)
    if wanted not in FORMATS:
        detail = f"the format is {wanted!r}; it should be 'timm'."
        raise InvalidError([Fault(pointer="/format", code="invalid_choice", detail=detail)])
    if wanted != "timm":
        detail = f"{wanted!r} is not a format of this model ({_kind(model)}). Use format=timm."
        raise InvalidError([Fault(pointer="/format", code="format_not_available", detail=detail)])
    return zip_response(storage.model(model.id), f"{model.id}.zip")


def _kind(model: Model) -> str:
    return str(model.info.get("architecture", "unknown architecture"))
