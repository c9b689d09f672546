"""Endpoints of the images in a data set."""

from typing import Annotated

from fastapi import APIRouter, Path, Query
from starlette.responses import Response

from ctune.manifest import Split
from ctune.schema import JsonObject
from service.datasets import images, service
from service.deps import ReadSession, StorageDep
from service.files import NOSNIFF
from service.pages import DEFAULT_LIMIT, MAX_LIMIT, Text

router = APIRouter(prefix="/datasets", tags=["datasets"])

CACHED = {"cache-control": "private, max-age=86400, immutable", **NOSNIFF}


@router.get("/{dataset_id}/images")
def list_images(
    dataset_id: str,
    session: ReadSession,
    storage: StorageDep,
    split: Split | None = None,
    label: Annotated[Text | None, Query(description="a class name")] = None,
    after: Annotated[int, Query(ge=-1, lt=2**62, description="`last_id` of the page before")] = -1,
    limit: Annotated[int, Query(ge=1, le=MAX_LIMIT)] = DEFAULT_LIMIT,
) -> JsonObject:
    """List images in the order of the store, by split and class where asked."""
    dataset = service.get_ready(session, dataset_id)
    store = images.open_store(storage.absolute(str(dataset.store)))
    return images.list_images(store, dataset.id, images.Filter(split, label, after), limit)


@router.get("/{dataset_id}/images/{number}/thumbnail", response_model=None)
def get_thumbnail(
    dataset_id: str,
    number: Annotated[int, Path(ge=0, lt=2**62)],
    session: ReadSession,
    storage: StorageDep,
) -> Response:
    """Return one image as a small JPEG, made anew from its pixels."""
    dataset = service.get_ready(session, dataset_id)
    store = images.open_store(storage.absolute(str(dataset.store)))
    return Response(images.thumbnail(store, dataset, number), 200, CACHED, "image/jpeg")
