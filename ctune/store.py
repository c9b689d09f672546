"""The packed image store: encoded images and their index, memory-mapped. Never imports torch.

A store is a directory, immutable once its `manifest.json` is there:

============== ==================================================================================
`images.bin`   the encoded bytes of every distinct image, one after the other
`index.npy`    one `INDEX_DTYPE` record per image
`rows.jsonl`   one JSON object per image: `path`, `sha256`, further columns
`manifest.json` `ctune.manifest.Manifest`, written last
============== ==================================================================================

Opening a store reads the manifest only. `labels` and `indices` cost one pass over the index; all
else is a seek. An open store may be shared by threads and by forked processes.
"""

import io
import json
import mmap
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError

from ctune.errors import CtuneError
from ctune.images import decode_rgb
from ctune.manifest import SPLITS, Manifest, Split
from ctune.rundir import fsync_directory, write_atomically
from ctune.schema import JsonObject

INDEX_DTYPE = np.dtype(
    [
        ("offset", "<u8"),
        ("length", "<u4"),
        ("width", "<u2"),
        ("height", "<u2"),
        ("label", "<i4"),
        ("split", "u1"),
        ("row", "<u8"),
    ]
)
NO_LABEL = -1
IMAGES, INDEX, ROWS, MANIFEST = "images.bin", "index.npy", "rows.jsonl", "manifest.json"
FLUSH_RECORDS = 65_536


class StoreError(CtuneError):
    """A packed store is incomplete or damaged."""

    code = "store_damaged"


class StoreWriter:
    """Makes one store; nothing can open it before `finish`.

    Use as a context manager: left without `finish`, it removes what it wrote.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        (path / MANIFEST).unlink(missing_ok=True)
        self._images = (path / IMAGES).open("wb")
        self._index = (path / INDEX).open("wb")
        self._rows = (path / ROWS).open("wb")
        self._records: list[tuple[int, int, int, int, int, int, int]] = []
        self._num_images = 0
        self._image_end = 0
        self._row_end = 0
        self._finished = False
        self._write_header()

    def __enter__(self) -> "StoreWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if not self._finished:
            self.abandon()

    def put(self, data: bytes) -> int:
        """Append encoded bytes and return their offset; pass each distinct content once."""
        offset = self._image_end
        self._images.write(data)
        self._image_end += len(data)
        return offset

    def add(
        self,
        row: Mapping[str, Any],
        *,
        offset: int,
        length: int,
        size_px: tuple[int, int],
        label: int,
        split: Split,
    ) -> None:
        """Append one image, whose bytes `put` took, with its row (`path`, `sha256`, columns).

        `size_px` is (width, height) after EXIF transposition; `label` -1 means none.
        """
        line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        record = (offset, length, *size_px, label, SPLITS.index(split), self._row_end)
        self._records.append(record)
        self._rows.write(line)
        self._row_end += len(line)
        self._num_images += 1
        if len(self._records) >= FLUSH_RECORDS:
            self._write_records()

    def finish(self, manifest: Manifest) -> None:
        """Write everything to the disk, the manifest last: now the store exists."""
        if manifest.summary.num_images != self._num_images:
            raise ValueError(f"{self._num_images} images, but {manifest.summary.num_images} said")
        self._write_records()
        self._index.seek(0)
        self._write_header()
        for file in (self._images, self._index, self._rows):
            file.flush()
            os.fsync(file.fileno())
            file.close()
        fsync_directory(self.path)
        write_atomically(self.path / MANIFEST, manifest.model_dump_json(indent=1).encode())
        self._finished = True

    def abandon(self) -> None:
        """Remove what was written."""
        (self.path / MANIFEST).unlink(missing_ok=True)
        for file in (self._images, self._index, self._rows):
            file.close()
            Path(file.name).unlink(missing_ok=True)
        if not any(self.path.iterdir()):
            self.path.rmdir()

    def _write_header(self) -> None:
        """Write the array header; numpy pads it so that its length does not depend on the count."""
        header = io.BytesIO()
        description = np.lib.format.dtype_to_descr(INDEX_DTYPE)
        shape = {"descr": description, "fortran_order": False, "shape": (self._num_images,)}
        np.lib.format.write_array_header_1_0(header, shape)
        self._index.write(header.getvalue())

    def _write_records(self) -> None:
        self._index.write(np.array(self._records, dtype=INDEX_DTYPE).tobytes())
        self._records.clear()


class PackedStore:
    """Reads a store.

    Raises:
        StoreError: the directory holds no complete store.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        try:
            data = (self.path / MANIFEST).read_bytes()
            self.manifest = Manifest.model_validate_json(data)
            self._index: NDArray[np.void] = np.load(self.path / INDEX, mmap_mode="r")
            self._images = _map(self.path / IMAGES)
            self._rows = _map(self.path / ROWS)
        except FileNotFoundError as error:
            raise StoreError(f"{error.filename} is missing", hint="ingest again") from error
        except (ValidationError, ValueError) as error:
            raise StoreError(f"{path} is damaged: {error}", hint="ingest again") from error
        self._check()

    def _check(self) -> None:
        expected = self.manifest.summary.num_images
        if self._index.dtype != INDEX_DTYPE or len(self._index) != expected:
            raise StoreError(
                f"{self.path / INDEX} has {len(self._index)} records, the manifest says {expected}",
                hint="ingest again",
            )
        last = self._index[-1]
        if int(last["row"]) >= len(self._rows) or (
            int(last["offset"]) + int(last["length"]) > len(self._images)
        ):
            raise StoreError(f"{self.path} is cut off", hint="ingest again")

    def __len__(self) -> int:
        return len(self._index)

    def indices(self, split: Split) -> NDArray[np.int64]:
        """Return the numbers n of a split's images, ascending, shape (N,)."""
        return np.flatnonzero(self._index["split"] == SPLITS.index(split)).astype(np.int64)

    def labels(self, split: Split) -> NDArray[np.int64]:
        """Return the labels of a split's images in the order of `indices`; -1 is none; (N,)."""
        labels: NDArray[np.int64] = self._index["label"][self.indices(split)].astype(np.int64)
        return labels

    def read(self, n: int) -> bytes:
        """Return the encoded bytes of image n, as they were uploaded."""
        record = self._index[n]
        offset = int(record["offset"])
        return self._images[offset : offset + int(record["length"])]

    def image(self, n: int) -> Image.Image:
        """Return image n in RGB."""
        width, height = self.size_px(n)
        return decode_rgb(self.read(n), max_pixels=width * height, max_side_px=max(width, height))

    def size_px(self, n: int) -> tuple[int, int]:
        """Return (width, height) of image n, after EXIF transposition, without decoding it."""
        record = self._index[n]
        return int(record["width"]), int(record["height"])

    def row(self, n: int) -> JsonObject:
        """Return what is known of image n: `path`, `sha256`, further columns."""
        start = int(self._index[n]["row"])
        row: JsonObject = json.loads(self._rows[start : self._rows.find(b"\n", start)])
        return row

    def label(self, n: int) -> int:
        """Return the label of image n; -1 is none."""
        return int(self._index[n]["label"])

    def split(self, n: int) -> Split:
        """Return the split of image n."""
        return SPLITS[int(self._index[n]["split"])]


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
