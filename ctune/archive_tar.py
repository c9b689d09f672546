"""The members of a tar, one after the other, forwards only, in memory that does not grow.

The standard library parses single header blocks; what follows a header (long names, pax records) is
read here, because `tarfile` reads such data whole, whatever size a header claims, and keeps every
member. Never imports torch.
"""

import tarfile
import zlib
from collections.abc import Callable, Iterator
from gzip import BadGzipFile, GzipFile
from pathlib import Path
from typing import BinaryIO

import zstandard

from ctune.archive_rules import (
    CHUNK_BYTES,
    Budget,
    Member,
    bomb,
    corrupt,
    decode_name,
    safe_path,
    unsafe_member,
)
from ctune.errors import ArchiveError

BLOCK = tarfile.BLOCKSIZE
END_BLOCK = bytes(BLOCK)
MAX_HEADER_DATA_BYTES = 2**20
MAX_ZSTD_WINDOW_BYTES = 128 * 2**20
FILE_TYPES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
KINDS = {
    tarfile.LNKTYPE: "hard link",
    tarfile.SYMTYPE: "symbolic link",
    tarfile.CHRTYPE: "device",
    tarfile.BLKTYPE: "device",
    tarfile.FIFOTYPE: "fifo",
    tarfile.GNUTYPE_SPARSE: "sparse file",
}
PAX_KEYS = (b"path", b"size")
Decompress = Callable[[BinaryIO], BinaryIO]


def plain(file: BinaryIO) -> BinaryIO:
    """Read a tar that is not compressed."""
    return file


def gunzip(file: BinaryIO) -> BinaryIO:
    """Read a tar.gz."""
    return GzipFile(fileobj=file)  # type: ignore[return-value]


def unzstd(file: BinaryIO) -> BinaryIO:
    """Read a tar.zst; windows over 128 MiB are refused, they are memory."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW_BYTES)
    return decompressor.stream_reader(file, read_across_frames=True, closefd=False)


def is_tar_header(block: bytes) -> bool:
    """Whether a block is the header of a tar member, or the end of an empty tar."""
    if block == END_BLOCK:
        return True
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


class _Stream:
    """The unpacked bytes of a tar, counted against the budget."""

    def __init__(self, file: BinaryIO, decompress: Decompress, *, budget: Budget) -> None:
        self._packed = file
        self._unpacked = decompress(file)
        self._budget = budget
        self._size = file.seek(0, 2)
        file.seek(0)

    @property
    def position_bytes(self) -> int:
        """How far into the archive we are."""
        return min(self._packed.tell(), self._size)

    def read(self, num_bytes: int) -> bytes:
        """Return up to `num_bytes`, fewer only at the end."""
        parts = []
        while num_bytes:
            try:
                part = self._unpacked.read(min(num_bytes, CHUNK_BYTES))
            except (EOFError, BadGzipFile, zlib.error, zstandard.ZstdError) as error:
                raise corrupt(f"it cannot be unpacked: {error}") from error
            if not part:
                break
            self._budget.unpack(len(part), packed_bytes=max(self._packed.tell(), 1))
            num_bytes -= len(part)
            parts.append(part)
        return b"".join(parts)

    def read_exactly(self, num_bytes: int) -> bytes:
        """Return `num_bytes`."""
        data = self.read(num_bytes)
        if len(data) < num_bytes:
            raise corrupt("it is cut off")
        return data


class _Data:
    """What follows a header: content, then padding to a whole block."""

    def __init__(self, stream: _Stream, size_bytes: int) -> None:
        self._stream = stream
        self._left = size_bytes
        self._padding = -size_bytes % BLOCK

    def chunks(self) -> Iterator[bytes]:
        """Yield the content."""
        while self._left:
            chunk = self._stream.read_exactly(min(self._left, CHUNK_BYTES))
            self._left -= len(chunk)
            yield chunk

    def read(self) -> bytes:
        """Return the content of a header's own data, which is small in any honest archive."""
        if self._left > MAX_HEADER_DATA_BYTES:
            raise bomb(f"a header has {self._left} bytes")
        data = b"".join(self.chunks())
        self.skip()
        return data

    def skip(self) -> None:
        """Go to the next header."""
        for _ in self.chunks():
            pass
        self._stream.read_exactly(self._padding)
        self._padding = 0


def tar_members(path: Path, decompress: Decompress, *, budget: Budget) -> Iterator[Member]:
    """Yield the files of a tar.

    Raises:
        ArchiveError: `not_an_archive`, `unsafe_path`, `unsafe_member`, `archive_bomb`,
            `corrupt_archive`.
    """
    with path.open("rb") as file:
        stream = _Stream(file, decompress, budget=budget)
        for header, name in _headers(stream, budget):
            data = _Data(stream, header.size)
            member_path = safe_path(name, budget.limits)
            if header.type in KINDS:
                raise unsafe_member(member_path, KINDS[header.type])
            if member_path and not header.isdir():
                known = header.type in FILE_TYPES
                problem = None if known else ("unsupported_member", f"tar type {header.type!r}")
                yield Member(
                    path=member_path,
                    size_bytes=header.size,
                    position_bytes=stream.position_bytes,
                    problem=problem,
                    chunks=data.chunks(),
                )
            data.skip()


def _headers(stream: _Stream, budget: Budget) -> Iterator[tuple[tarfile.TarInfo, str]]:
    """Yield each member's header with its full name; extended headers are applied."""
    extended: dict[str, bytes] = {}
    first = True
    while (block := stream.read(BLOCK)) != END_BLOCK:
        if first and block and not (len(block) == BLOCK and is_tar_header(block)):
            raise ArchiveError(
                "the compressed file holds no tar",
                hint="send a zip, tar, tar.gz or tar.zst",
                code="not_an_archive",
            )
        first = False
        header = _parse(block)
        budget.count_member()
        if header.type in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE):
            extended |= _pax_records(_Data(stream, header.size).read())
        elif header.type == tarfile.XGLTYPE:
            _Data(stream, header.size).read()
        elif header.type == tarfile.GNUTYPE_LONGNAME:
            extended["path"] = _Data(stream, header.size).read().rstrip(b"\0")
        elif header.type == tarfile.GNUTYPE_LONGLINK:
            _Data(stream, header.size).read()
        else:
            yield _extend(header, extended)
            extended = {}
    while stream.read(CHUNK_BYTES):  # to the end: only then is a checksum compared
        pass


def _parse(block: bytes) -> tarfile.TarInfo:
    if len(block) < BLOCK:
        raise corrupt("it has no end mark, it is cut off")
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        raise corrupt(f"a header is unreadable: {error}") from error
    if header.size < 0:
        raise corrupt("a member has a negative size")
    if header.isdir():  # some writers put the size of what is inside here
        header.size = 0
    return header


def _extend(header: tarfile.TarInfo, extended: dict[str, bytes]) -> tuple[tarfile.TarInfo, str]:
    """Apply a long name and size; return the header and the name."""
    raw_name = extended.get("path", header.name.encode("utf-8", "surrogateescape"))
    name = decode_name(raw_name, "latin-1")
    if "sparse" in extended:
        raise unsafe_member(name, "sparse file")
    size = extended.get("size", b"")
    if size:
        if not size.isdigit() or len(size) > 20:
            raise corrupt(f"a member has the size {size[:30]!r}")
        header.size = int(size)
    return header, name


def _pax_records(data: bytes) -> dict[str, bytes]:
    """Return those of an extended header's `length key=value` records that matter here."""
    records: dict[str, bytes] = {}
    at = 0
    while at < len(data) and data[at : at + 1] != b"\0":
        length_digits, _, _ = data[at : at + 20].partition(b" ")
        length = int(length_digits) if length_digits.isdigit() else 0
        record = data[at + len(length_digits) + 1 : at + length]
        key, equals, value = record.partition(b"=")
        if not equals or not value.endswith(b"\n") or at + length > len(data):
            raise corrupt("an extended header is unreadable")
        if key in PAX_KEYS:
            records[key.decode()] = value[:-1]
        elif key.startswith(b"GNU.sparse"):
            records["sparse"] = b""
        at += length
    return records
