"""What every kind of archive has in common: limits, members, the budget, safe names.

Never imports torch.
"""

import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field

from ctune.errors import ArchiveError, DataError
from ctune.schema import PositiveInt, Schema

CHUNK_BYTES = 64 * 2**10
DRIVE = re.compile(r"[A-Za-z]:")
CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


class ArchiveLimits(Schema):
    """What an archive may ask for before it is refused as a whole."""

    max_unpacked_bytes: PositiveInt = 100 * 2**30
    """Largest sum of the members."""
    max_members: PositiveInt = 10_000_000
    """Most members, folders and ignored files included."""
    max_ratio: PositiveInt = 100
    """Most unpacked bytes per packed byte, once `ratio_free_bytes` are unpacked."""
    ratio_free_bytes: PositiveInt = 10 * 2**20
    """Unpacked bytes up to which the ratio does not matter."""
    max_zip_members: PositiveInt = 200_000
    """Most entries of a zip, whose directory must be read first; tar has `max_members`."""
    max_zip_directory_bytes: PositiveInt = 64 * 2**20
    """Largest central directory of a zip."""
    max_name_bytes: PositiveInt = 255
    """Longest part of a path between slashes, in UTF-8."""
    max_depth: PositiveInt = 16
    """Most folders around a file."""


class MemberError(DataError):
    """One member cannot be read; the rest of the archive can."""

    code = "corrupt"


@dataclass
class Member:
    """One file of an archive, to be read before the next one is asked for, or not at all."""

    path: str
    """Safe, relative, with forward slashes, in Unicode form NFC."""
    size_bytes: int
    """Size the archive declares; reading fails when it is wrong."""
    position_bytes: int
    """Bytes of the archive behind us, out of its size."""
    problem: tuple[str, str] | None = None
    """Why it cannot be read (code, detail): `encrypted`, `unsupported_compression`, …"""
    chunks: Iterator[bytes] = field(default_factory=lambda: iter(()))
    """The content, in pieces of at most about 64 KiB."""

    def read(self, max_bytes: int) -> bytes:
        """Return the content.

        Raises:
            MemberError: it is longer than `max_bytes` (`file_too_large`) or damaged.
        """
        if self.size_bytes > max_bytes:
            raise MemberError(
                f"the file has {self.size_bytes} bytes, the limit is {max_bytes}",
                code="file_too_large",
            )
        return b"".join(self.chunks)


class Budget:
    """Counts what has been taken out of an archive and refuses what is too much."""

    def __init__(self, limits: ArchiveLimits) -> None:
        self.limits = limits
        self.num_members = 0
        self.unpacked_bytes = 0

    def count_member(self) -> None:
        """Count one entry of any kind.

        Raises:
            ArchiveError: `archive_bomb`, too many entries.
        """
        self.num_members += 1
        if self.num_members > self.limits.max_members:
            raise bomb(f"it has more than {self.limits.max_members} entries")

    def unpack(self, num_bytes: int, *, packed_bytes: int) -> None:
        """Count bytes that came out; `packed_bytes` is what went in so far, in total.

        Raises:
            ArchiveError: `archive_bomb`, too many bytes or too much from too little.
        """
        self.unpacked_bytes += num_bytes
        check_size(self.unpacked_bytes, packed_bytes, limits=self.limits)


def check_size(unpacked_bytes: int, packed_bytes: int, *, limits: ArchiveLimits) -> None:
    """Refuse too many unpacked bytes, or too many for so few packed ones.

    Raises:
        ArchiveError: `archive_bomb`.
    """
    if unpacked_bytes > limits.max_unpacked_bytes:
        raise bomb(f"it unpacks to more than {limits.max_unpacked_bytes} bytes")
    allowed_bytes = max(limits.ratio_free_bytes, limits.max_ratio * packed_bytes)
    if unpacked_bytes > allowed_bytes:
        raise bomb(f"it unpacks to more than {limits.max_ratio} times its size")


def bomb(reason: str) -> ArchiveError:
    """Return the refusal of an archive that asks for too much."""
    return ArchiveError(
        f"the archive is too large: {reason}",
        hint="split it, or send a tar, whose entries are not limited by a directory",
        code="archive_bomb",
    )


def corrupt(reason: str) -> ArchiveError:
    """Return the refusal of a damaged archive."""
    return ArchiveError(
        f"the archive is damaged: {reason}", hint="make it again", code="corrupt_archive"
    )


def unsafe_member(path: str, kind: str) -> ArchiveError:
    """Return the refusal of an archive with a link, device or the like in it."""
    return ArchiveError(
        f"{path!r} is a {kind}; only files and folders are accepted",
        hint="pack the files themselves, for example with `tar --dereference` or `zip` without -y",
        code="unsafe_member",
    )


def decode_name(raw: bytes, fallback: str) -> str:
    """Return a member's name: UTF-8 where it is that, else in the `fallback` encoding."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw.decode(fallback)


def safe_path(name: str, limits: ArchiveLimits) -> str:
    """Return a member's name as a relative path in form NFC, empty for the root folder.

    Raises:
        ArchiveError: `unsafe_path`: absolute, upwards, with a drive, a backslash or a control
            character, too long or too deep.
    """
    fault = _path_fault(name)
    parts = [
        part for part in unicodedata.normalize("NFC", name).split("/") if part not in ("", ".")
    ]
    if not fault and len(parts) > limits.max_depth + 1:
        fault = f"is more than {limits.max_depth} folders deep"
    if not fault and any(len(part.encode()) > limits.max_name_bytes for part in parts):
        fault = f"has a part longer than {limits.max_name_bytes} bytes"
    if fault:
        raise ArchiveError(
            f"the name {name[:300]!r} in the archive {fault}",
            hint="pack the folder itself, with relative names",
            code="unsafe_path",
        )
    return "/".join(parts)


def _path_fault(name: str) -> str:
    """Return what makes a name unsafe, or nothing."""
    if name.startswith("/"):
        return "is absolute"
    if DRIVE.match(name):
        return "starts with a drive letter"
    if "\\" in name:
        return "has a backslash"
    if CONTROL.search(name):
        return "has a control character"
    if ".." in name.split("/"):
        return "leads out of its folder"
    return ""


def collision_key(path: str) -> str:
    """Return what two paths share that some file systems do not tell apart: NFC and case."""
    return unicodedata.normalize("NFC", path.casefold())
