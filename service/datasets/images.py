"""What a data set holds, looked at through its packed store."""

import io
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps

from ctune.images import decode_rgb, image_format
from ctune.manifest import SPLITS, Split
from ctune.schema import Fault, JsonObject
from ctune.store import INDEX, NO_LABEL, PackedStore, StoreError
from service.errors import InvalidError, NotFoundError, UnavailableError
from service.faults import show
from service.tables import Dataset

RECORDS_PER_LOOK = 65_536
THUMBNAIL_PX = 256
THUMBNAIL_QUALITY = 85
MAX_PIXELS_IN_MEMORY = 16_000_000

_one_at_a_time = threading.Lock()
"""One large decode at a time keeps the API process small."""


class Filter(NamedTuple):
    """Which images are asked for."""

    split: Split | None
    label: str | None
    after: int


def open_store(path: Path) -> PackedStore:
    """Return the store at `path`; let go of it soon, its files are mapped into memory.

    Raises:
        UnavailableError: its files are gone or damaged.
    """
    try:
        return PackedStore(path)
    except (StoreError, OSError) as error:
        raise UnavailableError(
            f"the files of this data set cannot be read: {error}. Check the data directory, or"
            " delete the data set and upload it again.",
            code="store_damaged",
        ) from error


def list_images(store: PackedStore, dataset_id: str, wanted: Filter, limit: int) -> JsonObject:
    """Return up to `limit` images behind number `after`, in the order of the store."""
    label = None if wanted.label is None else _label_number(store, wanted.label)
    split = None if wanted.split is None else SPLITS.index(wanted.split)
    index = np.load(store.path / INDEX, mmap_mode="r")  # mapped anew: it goes with this answer
    numbers: list[int] = []
    start = wanted.after + 1
    while start < len(store) and len(numbers) <= limit:
        records = index[start : start + RECORDS_PER_LOOK]
        fits = np.ones(len(records), bool)
        if split is not None:
            fits &= records["split"] == split
        if label is not None:
            fits &= records["label"] == label
        numbers += (np.flatnonzero(fits)[: limit + 1 - len(numbers)] + start).tolist()
        start += RECORDS_PER_LOOK
    shown = [_image(store, dataset_id, number) for number in numbers[:limit]]
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": len(numbers) > limit,
    }


def _label_number(store: PackedStore, label: str) -> int:
    classes = store.manifest.summary.classes
    if label in classes:
        return classes.index(label)
    known = f"it has {', '.join(classes[:20])}" if classes else "it has no classes"
    more = f" and {len(classes) - 20} more" if len(classes) > 20 else ""
    detail = f"the data set has no class {show(label)}; {known}{more}."
    raise InvalidError([Fault(pointer="/label", code="unknown_label", detail=detail)])


def _image(store: PackedStore, dataset_id: str, number: int) -> JsonObject:
    row, label = store.row(number), store.label(number)
    width_px, height_px = store.size_px(number)
    return {
        "id": number,
        "object": "dataset.image",
        "path": row.get("path"),
        "sha256": row.get("sha256"),
        "split": store.split(number),
        "label": None if label == NO_LABEL else store.manifest.summary.classes[label],
        "width_px": width_px,
        "height_px": height_px,
        "thumbnail": f"/datasets/{dataset_id}/images/{number}/thumbnail",
    }


def thumbnail(store: PackedStore, dataset: Dataset, number: int) -> bytes:
    """Return image `number` as a JPEG of at most `THUMBNAIL_PX` a side.

    Raises:
        NotFoundError: there is no such image.
        InvalidError: it is too large to be decoded here.
    """
    if number >= len(store):
        raise NotFoundError(
            f"the data set {dataset.id} has no image {number}; it has {len(store)}, counted from 0."
        )
    width_px, height_px = store.size_px(number)
    with _one_at_a_time:
        image = _decoded(store.read(number), width_px * height_px)
        image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    target = io.BytesIO()
    image.save(target, "JPEG", quality=THUMBNAIL_QUALITY)
    return target.getvalue()


def _decoded(data: bytes, pixels: int) -> Image.Image:
    if pixels <= MAX_PIXELS_IN_MEMORY:
        return decode_rgb(data)
    if image_format(data[:16]) != "JPEG":
        detail = f"the image has {pixels} pixels, too many for a thumbnail; only JPEG may have more"
        detail += f" than {MAX_PIXELS_IN_MEMORY}."
        raise InvalidError([Fault(pointer="", code="image_too_large", detail=detail)])
    # A JPEG of any size is decoded at an eighth of its side or more.
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        image.draft("RGB", (THUMBNAIL_PX, THUMBNAIL_PX))
        return ImageOps.exif_transpose(image).convert("RGB")
