"""The members of a zip, one after the other, in memory that does not grow with the archive.

The central directory is read first and in a stream: it alone says what is a link or encrypted, and
lets the whole archive be refused before anything is unpacked. Each member is then unpacked by
`stream_unzip` behind a header made from the directory, so that sizes and CRC are the directory's.
Never imports torch.
"""

import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from stream_unzip import stream_unzip

from ctune.archive_rules import (
    CHUNK_BYTES,
    Budget,
    Member,
    MemberError,
    bomb,
    check_size,
    corrupt,
    decode_name,
    safe_path,
    unsafe_member,
)
from ctune.errors import ArchiveError, CtuneError

LOCAL = struct.Struct("<4s5H3L2H")
ENTRY = struct.Struct("<4s6H3L5H2L")
END = struct.Struct("<4s4H2LH")
END64_LOCATOR = struct.Struct("<4sLQL")
END64 = struct.Struct("<4sQ2H2L4Q")
MAX_COMMENT_BYTES = 0xFFFF
IN_ZIP64 = 0xFFFFFFFF
FLAG_ENCRYPTED = 0x1
FLAGS_UNSUPPORTED = 0x20 | 0x40 | 0x2000
FLAG_UTF8 = 0x800
METHODS = {0: "stored", 8: "deflate", 9: "deflate64", 12: "bzip2"}
KINDS = {
    stat.S_IFLNK: "symbolic link",
    stat.S_IFCHR: "device",
    stat.S_IFBLK: "device",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


@dataclass(frozen=True)
class _Directory:
    """Where the central directory lies."""

    offset: int
    num_bytes: int
    num_entries: int
    base: int
    """Bytes in front of the zip, as in a self-extracting one."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """One entry of the central directory."""

    raw_name: bytes
    path: str
    is_folder: bool
    flags: int
    method: int
    crc: int
    packed_bytes: int
    unpacked_bytes: int
    offset: int


def zip_members(path: Path, budget: Budget) -> Iterator[Member]:
    """Yield the files of a zip; what is wrong with the whole is found before the first.

    Raises:
        ArchiveError: `unsafe_path`, `unsafe_member`, `archive_bomb`, `corrupt_archive`,
            `multi_disk`.
    """
    with path.open("rb") as file, path.open("rb") as directory_file:
        directory = _find_directory(file, budget)
        _check_all(directory_file, directory, budget=budget)
        position = 0
        packed = _Packed()
        for entry in _entries(directory_file, directory, budget=budget):
            position += entry.packed_bytes
            if not entry.is_folder:
                chunks = _contents(file, entry, base=directory.base, budget=budget, packed=packed)
                yield Member(
                    path=entry.path,
                    size_bytes=entry.unpacked_bytes,
                    position_bytes=min(position, directory.offset),
                    problem=_problem(entry),
                    chunks=chunks,
                )


def _find_directory(file: BinaryIO, budget: Budget) -> _Directory:
    """Read the end of the file and check what it claims."""
    size = file.seek(0, 2)
    tail_start = max(0, size - END.size - MAX_COMMENT_BYTES)
    file.seek(tail_start)
    tail = file.read()
    found = tail.rfind(b"PK\5\6")
    if found < 0 or len(tail) < found + END.size:
        raise corrupt("its central directory is missing, it is cut off")
    end = tail_start + found
    _, disk, first_disk, here, count, num_bytes, offset, _ = END.unpack_from(tail, found)
    if 0xFFFF in (count, here) or IN_ZIP64 in (num_bytes, offset):
        found64 = _end64(file, end)
        if found64 is not None:
            end, (disk, first_disk, here, count, num_bytes, offset) = found64
    if disk != first_disk or here != count or disk not in (0, 0xFFFF):
        raise ArchiveError(
            "the zip is one part of several", hint="make a single file of it", code="multi_disk"
        )
    limits = budget.limits
    if count > min(limits.max_zip_members, limits.max_members):
        raise bomb(f"the zip has {count} entries, the limit is {limits.max_zip_members}")
    if num_bytes > limits.max_zip_directory_bytes:
        raise bomb(f"the zip's central directory has {num_bytes} bytes")
    base = end - num_bytes - offset
    if base < 0:
        raise corrupt("its central directory is not where it should be")
    return _Directory(offset + base, num_bytes, count, base)


def _end64(file: BinaryIO, end: int) -> tuple[int, tuple[int, ...]] | None:
    """Return place and fields of the ZIP64 end record, if there is one."""
    start = end - END64_LOCATOR.size
    if start < 0:
        return None
    file.seek(start)
    signature, _, offset, _ = END64_LOCATOR.unpack(file.read(END64_LOCATOR.size))
    if signature != b"PK\6\7":
        return None
    for place in (offset, start - END64.size):  # the second: with bytes in front of the zip
        if 0 <= place <= start - END64.size:
            file.seek(place)
            fields = END64.unpack(file.read(END64.size))
            if fields[0] == b"PK\6\6":
                return place, fields[4:]
    raise corrupt("its ZIP64 record is missing")


def _entries(file: BinaryIO, directory: _Directory, *, budget: Budget) -> Iterator[_Entry]:
    file.seek(directory.offset)
    left = directory.num_bytes
    for _ in range(directory.num_entries):
        fixed = file.read(ENTRY.size)
        if left < ENTRY.size or len(fixed) < ENTRY.size or not fixed.startswith(b"PK\1\2"):
            raise corrupt("its central directory is cut off")
        fields = ENTRY.unpack(fixed)
        lengths = fields[10:13]
        variable = file.read(sum(lengths))
        left -= ENTRY.size + sum(lengths)
        if left < 0 or len(variable) < sum(lengths):
            raise corrupt("its central directory is cut off")
        yield _entry(fields, variable, budget=budget)
    if left:
        raise corrupt("its central directory holds more than it says")


def _entry(fields: tuple[int, ...], variable: bytes, *, budget: Budget) -> _Entry:
    """Check and return one entry of the central directory."""
    _, _, _, flags, method, _, _, crc, packed, unpacked, name_length, extra_length = fields[:12]
    raw_name = variable[:name_length]
    extra = variable[name_length : name_length + extra_length]
    unpacked, packed, offset = _sizes64(extra, [unpacked, packed, fields[16]])
    name = decode_name(raw_name, "cp437")
    path = safe_path(name, budget.limits)
    mode = stat.S_IFMT(fields[15] >> 16)
    if mode in KINDS:
        raise unsafe_member(path, KINDS[mode])
    return _Entry(
        raw_name=raw_name,
        path=path,
        is_folder=name.endswith("/") or mode == stat.S_IFDIR or not path,
        flags=flags,
        method=method,
        crc=crc,
        packed_bytes=packed,
        unpacked_bytes=unpacked,
        offset=offset,
    )


def _sizes64(extra: bytes, numbers: list[int]) -> list[int]:
    """Return unpacked size, packed size and offset, from the ZIP64 field where they are there."""
    if IN_ZIP64 not in numbers:
        return numbers
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            wide = iter(
                struct.unpack_from(f"<{min(length, len(extra) - at - 4) // 8}Q", extra, at + 4)
            )
            numbers = [next(wide, n) if n == IN_ZIP64 else n for n in numbers]
        at += 4 + length
    return numbers


def _check_all(file: BinaryIO, directory: _Directory, *, budget: Budget) -> None:
    """Go through the directory once: names, kinds, and the sizes it declares."""
    unpacked = 0
    for entry in _entries(file, directory, budget=budget):
        budget.count_member()
        if not entry.is_folder:
            unpacked += entry.unpacked_bytes
            check_size(unpacked, directory.offset, limits=budget.limits)


def _problem(entry: _Entry) -> tuple[str, str] | None:
    if entry.flags & FLAG_ENCRYPTED:
        return "encrypted", "the file is encrypted"
    if entry.flags & FLAGS_UNSUPPORTED or entry.method not in METHODS:
        detail = f"compression method {entry.method} is not supported; use deflate"
        return "unsupported_compression", detail
    return None


class _Packed:
    """Packed bytes read so far."""

    num_bytes = 0


def _contents(
    file: BinaryIO, entry: _Entry, *, base: int, budget: Budget, packed: _Packed
) -> Iterator[bytes]:
    """Yield a member's content, checked against the directory's sizes and CRC."""
    try:
        _, _, chunks = next(stream_unzip(_packed_bytes(file, entry, base=base, packed=packed)))
        for chunk in chunks:
            budget.unpack(len(chunk), packed_bytes=packed.num_bytes)
            yield chunk
    except (CtuneError, OSError, MemoryError):
        raise
    except Exception as error:  # unpacking hostile bytes raises nearly anything
        raise MemberError(f"the file is damaged in the archive: {type(error).__name__}") from error


def _packed_bytes(file: BinaryIO, entry: _Entry, *, base: int, packed: _Packed) -> Iterator[bytes]:
    """Yield a local header made from the directory's entry, then the member's packed bytes."""
    file.seek(base + entry.offset)
    local = file.read(LOCAL.size)
    if len(local) < LOCAL.size or not local.startswith(b"PK\3\4"):
        raise MemberError("the file is not where the archive's directory says")
    name_length, extra_length = LOCAL.unpack(local)[9:]
    if file.read(name_length) != entry.raw_name:
        raise MemberError("the file has another name than in the archive's directory")
    file.seek(extra_length, 1)
    extra = struct.pack("<HHQQ", 1, 16, entry.unpacked_bytes, entry.packed_bytes)
    yield LOCAL.pack(
        b"PK\3\4", 45, FLAG_UTF8, entry.method, 0, 0, entry.crc, IN_ZIP64, IN_ZIP64, 0, len(extra)
    ) + extra  # fmt: skip
    left = entry.packed_bytes
    while left:
        chunk = file.read(min(left, CHUNK_BYTES))
        if not chunk:
            return
        left -= len(chunk)
        packed.num_bytes += len(chunk)
        yield chunk
