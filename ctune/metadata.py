"""Labels, splits and further columns that files beside the images give. Never imports torch.

`metadata.csv` and `metadata.jsonl` follow the image-folder convention: one row per image,
`file_name` relative to the file's own folder, optional `label` and `split`, all else is kept. A
WebDataset sample has sidecar files: `.cls` holds the label, `.txt` becomes the column `text`,
`.json` an object whose keys become columns (`label` or `cls`, and `split`, keep their meaning).
"""

import csv
import io
import json
import posixpath
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ctune.errors import DataError
from ctune.layouts import split_named
from ctune.manifest import Split
from ctune.schema import JsonObject

MAX_CELL_BYTES = 64 * 2**10
MAX_LINE_CHARACTERS = 2**20
MAX_LABEL_BYTES = 255
MAX_FAULTS = 20
RESERVED = {"path": "metadata_path", "sha256": "metadata_sha256"}
"""Columns that a store's rows use themselves, and what such a column is called instead."""


@dataclass(frozen=True)
class Values:
    """What is said of one image beside its bytes."""

    label: str | None = None
    split: Split | None = None
    columns: JsonObject = field(default_factory=dict)


@dataclass(frozen=True)
class MetadataRow:
    """One row of a metadata file."""

    path: str
    """The image's path in the archive."""
    line: int
    values: Values


class _RowError(ValueError):
    """A row is not usable; the text says why."""


def read_metadata(path: str, chunks: Iterable[bytes]) -> Iterator[MetadataRow]:
    """Yield the rows of a metadata file, in little memory.

    Raises:
        DataError: `invalid_metadata`, with the first 20 rows that are wrong and why.
    """
    faults: list[str] = []
    try:
        file = io.BufferedReader(_Chunks(chunks))
        with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
            rows = _csv_rows(text) if path.lower().endswith(".csv") else _json_rows(text)
            for line, row in rows:
                try:
                    yield _metadata_row(path, line, row=row)
                except _RowError as error:
                    faults.append(f"row {line}: {error}")
                    if len(faults) == MAX_FAULTS:
                        break
    except (UnicodeDecodeError, csv.Error, _RowError) as error:
        faults.append(str(error))
    if faults:
        raise invalid_metadata(path, "; ".join(faults))


def invalid_metadata(path: str, reason: str) -> DataError:
    """Return the refusal of a metadata or sidecar file."""
    return DataError(
        f"{path}: {reason}",
        hint="each row needs a file_name that exists; label and split are optional",
        code="invalid_metadata",
    )


def sidecar_values(path: str, content: bytes) -> Values:
    """Return what one sidecar file says.

    Raises:
        DataError: `invalid_metadata`.
    """
    try:
        text = content.decode("utf-8-sig")
        if path.lower().endswith(".cls"):
            return Values(label=_label(text.strip()))
        if path.lower().endswith(".txt"):
            return _values({"text": text.strip()})
        row = _json_object(text)
        row.setdefault("label", row.pop("cls", None))
        return _values(row)
    except (UnicodeDecodeError, _RowError) as error:
        raise invalid_metadata(path, str(error)) from error


class _Chunks(io.RawIOBase):
    """A file over an iterator of bytes."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self._rest = b""

    def readable(self) -> bool:
        """Files for text wrappers say so."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer from the next chunk."""
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = chunk
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


def _lines(text: io.TextIOWrapper) -> Iterator[str]:
    while line := text.readline(MAX_LINE_CHARACTERS + 1):
        if len(line) > MAX_LINE_CHARACTERS:
            raise _RowError(f"a line is longer than {MAX_LINE_CHARACTERS} characters")
        yield line


def _csv_rows(text: io.TextIOWrapper) -> Iterator[tuple[int, JsonObject]]:
    reader = csv.reader(_lines(text), strict=True)
    header = next(reader, [])
    if "file_name" not in header or len(set(header)) < len(header):
        raise _RowError(f"the header {header[:20]} needs a column file_name and no name twice")
    for cells in reader:
        if not cells:
            continue
        if len(cells) != len(header):
            raise _RowError(f"row {reader.line_num}: {len(cells)} cells for {len(header)} columns")
        row: JsonObject = dict(zip(header, cells, strict=True))
        for key in ("label", "split"):
            row[key] = row.get(key) or None
        yield reader.line_num, row


def _json_rows(text: io.TextIOWrapper) -> Iterator[tuple[int, JsonObject]]:
    for number, line in enumerate(_lines(text), start=1):
        if line.strip():
            try:
                yield number, _json_object(line)
            except _RowError as error:
                raise _RowError(f"row {number}: {error}") from error


def _json_object(text: str) -> JsonObject:
    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        row = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise _RowError(f"not JSON: {error}") from error
    if not isinstance(row, dict):
        raise _RowError("not a JSON object")
    return row


def _metadata_row(path: str, line: int, *, row: JsonObject) -> MetadataRow:
    name = row.pop("file_name", None)
    if not isinstance(name, str) or not name:
        raise _RowError("no file_name")
    folder = posixpath.dirname(path)
    target = posixpath.normpath(posixpath.join(folder, unicodedata.normalize("NFC", name)))
    if target.startswith(("/", "../")) or "\\" in name:
        raise _RowError(f"file_name {name[:200]!r} is not a path inside the archive")
    return MetadataRow(target, line, _values(row))


def _values(row: JsonObject) -> Values:
    label = _label(row.pop("label", None))
    split_value = row.pop("split", None)
    split = split_named(split_value) if isinstance(split_value, str) else None
    if split_value is not None and split is None:
        raise _RowError(f"split {split_value!r} is not train, val or test")
    columns = {RESERVED.get(key, key): value for key, value in row.items()}
    for key, value in columns.items():
        try:
            size = len(json.dumps(value, ensure_ascii=False, allow_nan=False).encode())
            key.encode()
        except (UnicodeEncodeError, ValueError, RecursionError) as error:
            raise _RowError(f"column {key!r} cannot be stored: {error}") from error
        if size > MAX_CELL_BYTES:
            raise _RowError(f"column {key!r} has more than {MAX_CELL_BYTES} bytes")
    return Values(label, split, columns)


def _label(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _RowError(f"label {value!r:.200} is neither a text nor an integer")
    label = unicodedata.normalize("NFC", str(value))
    if not label.isprintable() or not label.strip() or len(label.encode()) > MAX_LABEL_BYTES:
        raise _RowError(f"label {label[:200]!r} is empty, unprintable or too long")
    return label
