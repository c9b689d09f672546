"""Files as answers: a part of one file, or a folder as one zip; never a whole file in memory."""

import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from starlette.responses import StreamingResponse

from service.errors import NotFoundError, RangeError

PIECE_BYTES = 2**18
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
NOSNIFF = {"x-content-type-options": "nosniff"}


def pieces(file: BinaryIO, start: int, length: int) -> Iterator[bytes]:
    """Yield `length` bytes of `file` from `start` on, then close it."""
    with file:
        file.seek(start)
        while length > 0 and (data := file.read(min(PIECE_BYTES, length))):
            length -= len(data)
            yield data


def wanted_range(header: str | None, size: int) -> tuple[int, int] | None:
    """Return (start, length) of the one range that `header` asks for; None for the whole file.

    A header of another form, or with several ranges, is left aside, as RFC 9110 allows.

    Raises:
        RangeError: the range begins behind the end.
    """
    match = _RANGE.fullmatch(header.replace(" ", "")) if header else None
    if match is None or match.group(0) == "bytes=-":
        return None
    first, last = match.groups()
    if not first:
        length = min(int(last), size)
        start = size - length
    else:
        start = int(first)
        end = min(int(last), size - 1) if last else size - 1
        if last and int(last) < start:
            return None
        length = end - start + 1
    if length <= 0:
        raise RangeError(
            f"the range {header!r} begins behind the last of {size} bytes. Ask from {size} on again"
            " when more has been written.",
            headers={"content-range": f"bytes */{size}", "accept-ranges": "bytes"},
        )
    return start, length


def tail_start(file: BinaryIO, size: int, lines: int, max_bytes: int) -> int:
    """Return where the last `lines` lines begin, looking back at most `max_bytes`."""
    position, found = size, 0
    floor = max(0, size - max_bytes)
    while position > floor:
        step = min(PIECE_BYTES, position - floor)
        file.seek(position - step)
        block = file.read(step)
        end = len(block)
        if position == size and block.endswith(b"\n"):
            end -= 1  # the newline of the last line opens no further one
        while (at := block.rfind(b"\n", 0, end)) >= 0:
            found += 1
            if found == lines:
                return position - step + at + 1
            end = at
        position -= step
    return floor


class _Sink:
    """What `zipfile` writes to; it cannot seek, so sizes and sums stand behind the data."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._position = 0

    def write(self, data: bytes) -> int:
        self._parts.append(bytes(data))
        self._position += len(data)
        return len(data)

    def tell(self) -> int:
        return self._position

    def flush(self) -> None:
        pass

    def take(self) -> bytes:
        parts, self._parts = self._parts, []
        return b"".join(parts)


def zip_response(folder: Path, filename: str) -> StreamingResponse:
    """Return the files below `folder` as a zip that is made while it is sent.

    Raises:
        NotFoundError: the files are not there (any more).
    """
    # Opened before the answer begins: what is deleted from now on still arrives whole.
    stack = ExitStack()
    with stack:
        names = sorted(
            path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()
        )
        try:
            files = [(p.relative_to(folder), stack.enter_context(p.open("rb"))) for p in names]
        except FileNotFoundError:
            files = []
        if not files:
            raise NotFoundError(
                f"the files of {filename!r} are gone from the storage.", code="gone"
            )
        kept = stack.pop_all()
    headers = {"content-disposition": f'attachment; filename="{filename}"', **NOSNIFF}
    return StreamingResponse(_zipped(files, kept), headers=headers, media_type="application/zip")


def _zipped(files: Sequence[tuple[Path, BinaryIO]], opened: ExitStack) -> Iterator[bytes]:
    sink = _Sink()
    with opened, zipfile.ZipFile(sink, "w", zipfile.ZIP_STORED) as archive:  # type: ignore[call-overload]
        for name, file in files:
            member = zipfile.ZipInfo(name.as_posix())
            member.external_attr = 0o644 << 16
            with archive.open(member, "w", force_zip64=True) as target:
                while data := file.read(PIECE_BYTES):
                    target.write(data)
                    yield sink.take()
            yield sink.take()
    yield sink.take()
