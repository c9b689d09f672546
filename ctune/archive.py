"""Stream the members of a hostile archive: zip, tar, tar.gz or tar.zst, told by the first bytes.

Nothing is ever extracted: a member's name is a string, its content a stream, and neither touches
the disk here. Refused as a whole, with these codes of `ArchiveError`:

==================== ============================================================================
`not_an_archive`     none of the four kinds, or a compressed file without a tar in it
`empty_archive`      no file in it
`unsafe_path`        a name that is absolute, leads upwards, has a drive, backslash, control
                     character, or is too long or deep
`unsafe_member`      a symbolic or hard link, device, fifo, sparse file
`archive_bomb`       too many entries, too many bytes, too many bytes from too few
`multi_disk`         one part of a split zip
`corrupt_archive`    damaged or cut off
==================== ============================================================================

Encrypted members and unknown compression come as members with a `problem`; a damaged member of a
zip raises `MemberError` when it is read, and the others can still be read. Never imports torch.
"""

from collections.abc import Iterator
from pathlib import Path

from ctune.archive_rules import ArchiveLimits, Budget, Member, MemberError, collision_key
from ctune.archive_tar import gunzip, is_tar_header, plain, tar_members, unzstd
from ctune.archive_zip import zip_members
from ctune.errors import ArchiveError

__all__ = ["ArchiveLimits", "Member", "MemberError", "collision_key", "is_archive", "open_archive"]

ZIP_MAGIC = (b"PK\x03\x04", b"PK\x05\x06")
SPLIT_ZIP_MAGIC = (b"PK\x07\x08", b"PK00PK")
GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
OTHER_ARCHIVES = (b"Rar!", b"7z\xbc\xaf\x27\x1c", b"BZh", b"\xfd7zXZ\0")
HEAD_BYTES = 512


def open_archive(path: Path, *, limits: ArchiveLimits | None = None) -> Iterator[Member]:
    """Yield the files of an archive in its order; each is read before the next is asked for.

    Raises:
        ArchiveError: the archive is refused as a whole; see the module.
    """
    budget = Budget(limits or ArchiveLimits())
    empty = True
    for member in _members(path, budget):
        empty = False
        yield member
    if empty:
        raise ArchiveError(
            "the archive has no file in it", hint="add the images", code="empty_archive"
        )


def is_archive(head: bytes) -> bool:
    """Whether a file that starts like this is an archive, also one of a kind not accepted."""
    kinds = (*ZIP_MAGIC, *SPLIT_ZIP_MAGIC, GZIP_MAGIC, ZSTD_MAGIC, *OTHER_ARCHIVES)
    return head.startswith(kinds) or head[257:262] == b"ustar"


def _members(path: Path, budget: Budget) -> Iterator[Member]:
    """Choose the reader by the first bytes."""
    with path.open("rb") as file:
        head = file.read(HEAD_BYTES)
    if head.startswith(ZIP_MAGIC):
        return zip_members(path, budget)
    if head.startswith(GZIP_MAGIC):
        return tar_members(path, gunzip, budget=budget)
    if head.startswith(ZSTD_MAGIC):
        return tar_members(path, unzstd, budget=budget)
    if len(head) == HEAD_BYTES and is_tar_header(head):
        return tar_members(path, plain, budget=budget)
    if head.startswith(SPLIT_ZIP_MAGIC):
        raise ArchiveError(
            "the zip is one part of several", hint="make a single file of it", code="multi_disk"
        )
    raise ArchiveError(
        f"the file is no archive: it {f'starts with {head[:8]!r}' if head else 'is empty'}",
        hint="send a zip, tar, tar.gz or tar.zst",
        code="not_an_archive",
    )
