"""Take a multipart upload straight to its place: hashed on the way, never held in memory."""

import errno
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from multipart import (
    MultipartError,
    MultipartSegment,
    ParserLimitReached,
    PushMultipartParser,
    parse_options_header,
)
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request

from ctune.rundir import fsync_directory
from ctune.schema import Fault
from service.errors import (
    ApiError,
    BadRequestError,
    InvalidError,
    StorageFullError,
    TooLargeError,
    UnsupportedTypeError,
)

FILE_FIELD = "file"
TEXT_FIELDS = ("name", "options")
MAX_TEXT_BYTES = 64 * 2**10
MAX_OVERHEAD_BYTES = 2**20
"""What boundaries, headers and text fields may add to the file."""
MAX_PARTS = 16
WRITE_BYTES = 2**20
DRAIN_BYTES = 64 * 2**20
DRAIN_S = 5.0


@dataclass
class Received:
    """What came: the text fields, and the file where `Sink` put it."""

    fields: dict[str, str] = field(default_factory=dict)
    filename: str = ""
    size_bytes: int = 0
    sha256: str = ""
    faults: list[Fault] = field(default_factory=list)


class Sink:
    """Writes the parts of one upload; `flush` does the slow work and belongs into a thread."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.received = Received()
        self.waiting_bytes = 0
        self._path = path
        self._max_bytes = max_bytes
        self._file = path.open("xb")
        self._hash = hashlib.sha256()
        self._waiting: list[bytes] = []
        self._segment: MultipartSegment | None = None
        self._text = bytearray()
        self._files = 0

    def take(self, event: MultipartSegment | bytes | None) -> None:
        """Take one event of the parser.

        Raises:
            InvalidError: something was wrong before the file began.
            TooLargeError: the file or a text field exceeds its limit.
        """
        if isinstance(event, MultipartSegment):
            self._begin(event)
        elif event is None:
            self._end()
        elif self._segment is not None:
            self._add(self._segment, event)

    def _begin(self, segment: MultipartSegment) -> None:
        name = segment.name or ""
        self._segment, self._text = segment, bytearray()
        if name == FILE_FIELD:
            if self.received.faults:  # known before the long part: refuse now
                raise InvalidError(self.received.faults)
            self._files += 1
            self.received.filename = segment.filename or ""
        if name not in (FILE_FIELD, *TEXT_FIELDS):
            known = ", ".join((FILE_FIELD, *TEXT_FIELDS))
            self._fault(name, "unknown_field", f"there is no field {name!r}; there are: {known}.")
        elif self._files > 1 or name in self.received.fields:
            self._fault(name, "repeated", f"the field {name!r} comes twice. Send it once.")

    def _add(self, segment: MultipartSegment, data: bytes) -> None:
        if segment.name == FILE_FIELD:
            self.received.size_bytes += len(data)
            if self.received.size_bytes > self._max_bytes:
                raise too_large(self._max_bytes)
            self._waiting.append(data)
            self.waiting_bytes += len(data)
            return
        self._text += data
        if len(self._text) > MAX_TEXT_BYTES:
            raise TooLargeError(
                f"the field {(segment.name or '')[:64]!r} is longer than {MAX_TEXT_BYTES} bytes."
                f" Only {FILE_FIELD!r} may be long."
            )

    def _end(self) -> None:
        name = self._segment.name if self._segment else None
        self._segment = None
        if name not in TEXT_FIELDS:
            return
        try:
            self.received.fields[name] = self._text.decode("utf-8")
        except UnicodeDecodeError:
            self._fault(name, "invalid_type", f"the field {name!r} is not UTF-8 text.")

    def _fault(self, name: str, code: str, detail: str) -> None:
        self.received.faults.append(Fault(pointer=f"/{name[:64]}", code=code, detail=detail))

    def flush(self) -> None:
        """Hash and write what waits."""
        waiting, self._waiting, self.waiting_bytes = self._waiting, [], 0
        for data in waiting:
            self._hash.update(data)
        with full_disk_is_an_answer():
            self._file.writelines(waiting)

    def finish(self) -> Received:
        """Write the rest and make it survive a power loss."""
        self.flush()
        with full_disk_is_an_answer():
            self._file.flush()
            os.fsync(self._file.fileno())
        self.received.sha256 = self._hash.hexdigest()
        if not self._files:
            self._fault(
                FILE_FIELD,
                "missing",
                f"the field {FILE_FIELD!r} is missing. Send the archive in it.",
            )
        elif not self.received.size_bytes:
            self._fault(FILE_FIELD, "empty", "the archive is empty. Send a zip or tar with images.")
        return self.received

    def close(self) -> None:
        """Close the file; it stays."""
        with full_disk_is_an_answer():
            self._file.close()


async def receive_upload(request: Request, part: Path, max_bytes: int) -> Received:
    """Write the file of a multipart request to `part` and return it with the text fields.

    The caller removes `part`, whatever happens.

    Raises:
        ApiError: the request is no multipart form, breaks off, or exceeds a limit.
        ClientDisconnect: the client left.
    """
    boundary = _boundary(request)
    try:
        _check_length(request, part.parent, max_bytes)
        parser = PushMultipartParser(boundary, max_segment_count=MAX_PARTS)
        sink = Sink(part, max_bytes)
        try:
            await _pump(request, parser, sink)
            return await run_in_threadpool(sink.finish)
        finally:
            sink.close()
    except ParserLimitReached as error:
        raise TooLargeError(
            f"the form is too large: {error}. Send only the known fields."
        ) from error
    except MultipartError as error:
        said = f"the body is not a whole multipart form: {error}. Send it again."
        raise BadRequestError(said, code="invalid_multipart") from error
    except ApiError:
        await _drain(request)
        raise


async def _pump(request: Request, parser: PushMultipartParser, sink: Sink) -> None:
    async for chunk in request.stream():
        if not chunk:
            continue
        for event in parser.parse(chunk):
            sink.take(event)
        if sink.waiting_bytes >= WRITE_BYTES:
            await run_in_threadpool(sink.flush)
    parser.close()


def _boundary(request: Request) -> str:
    sent = request.headers.get("content-type", "")
    kind, options = parse_options_header(sent)
    if kind != "multipart/form-data" or not options.get("boundary"):
        raise UnsupportedTypeError(
            f"the body is sent as {sent[:128] or 'no Content-Type'!r}. Send `multipart/form-data`"
            f" with the archive in the field {FILE_FIELD!r}: `curl -F {FILE_FIELD}=@images.zip`."
        )
    return str(options["boundary"])


def _check_length(request: Request, folder: Path, max_bytes: int) -> None:
    length = request.headers.get("content-length", "")
    announced = int(length) if length.isdecimal() else 0
    if announced > max_bytes + MAX_OVERHEAD_BYTES:
        raise too_large(max_bytes)
    if announced > shutil.disk_usage(folder).free:
        raise _storage_full()


def too_large(max_bytes: int) -> TooLargeError:
    """Return the error for an archive above the limit."""
    return TooLargeError(
        f"the archive is larger than {max_bytes} bytes, the limit of this service. Split it, or ask"
        " the operator to raise CTUNE_MAX_UPLOAD_BYTES."
    )


def _storage_full() -> StorageFullError:
    return StorageFullError(
        "the disk of the service has no room for this archive. Delete data sets and models that are"
        " no longer needed, or ask the operator for space."
    )


@contextmanager
def full_disk_is_an_answer() -> Iterator[None]:
    """Turn "no space left" into its own answer.

    Raises:
        StorageFullError: the disk or the quota is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _storage_full() from error
        raise


async def _drain(request: Request) -> None:
    """Read a while on, so that the client gets to the answer instead of a broken connection."""
    deadline, drained = time.monotonic() + DRAIN_S, 0
    try:
        async for chunk in request.stream():
            drained += len(chunk)
            if drained > DRAIN_BYTES or time.monotonic() > deadline:
                return
    except (ClientDisconnect, RuntimeError):
        return


def keep(part: Path, place: Path) -> None:
    """Give a whole upload its name; it survives a power loss."""
    part.rename(place)
    fsync_directory(place.parent)
