"""Rules about zips."""

import io
import resource
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import pytest

from ctune.archive import ArchiveLimits, MemberError, open_archive
from ctune.errors import ArchiveError
from tests.ctune.archives import FILES, code_of, pack_zip, tar_bytes, unpack


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "archive"


ZEROS = {"zeros.bin": bytes(30_000_000)}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
@pytest.mark.parametrize("streamed", [False, True])
def test_zip_methods_also_written_to_a_pipe(path: Path, method: int, streamed: bool) -> None:
    class Pipe(io.RawIOBase):
        data = b""

        def writable(self) -> bool:
            return True

        def write(self, data: bytes) -> int:  # type: ignore[override]
            self.data += bytes(data)
            return len(data)

    target: Pipe | io.BytesIO = Pipe() if streamed else io.BytesIO()
    with zipfile.ZipFile(target, "w", method) as archive:
        for name, data in FILES.items():
            archive.writestr(name, data)
    path.write_bytes(target.data if isinstance(target, Pipe) else target.getvalue())
    assert unpack(path) == FILES


def test_zip64(path: Path) -> None:
    with (
        zipfile.ZipFile(path, "w") as archive,
        archive.open("big.bin", "w", force_zip64=True) as file,
    ):
        file.write(b"x" * 1000)
    assert unpack(path) == {"big.bin": b"x" * 1000}
    pack_zip(path, {f"{n}": b"" for n in range(66_000)})  # needs the ZIP64 end record
    assert len(unpack(path)) == 66_000


def test_zip_with_bytes_in_front_and_a_comment(path: Path) -> None:
    pack_zip(path, FILES)
    data = path.read_bytes()
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"hello"
    assert unpack(path) == FILES
    path.write_bytes(b"PK\x03\x04 something else in front " + data)
    assert unpack(path) == FILES


def test_names_in_old_encodings(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("xx.bin", b"1")
    path.write_bytes(path.read_bytes().replace(b"xx.bin", b"\x81\x84.bin"))
    assert unpack(path) == {"üä.bin": b"1"}
    path.write_bytes(tar_bytes({"ü.bin": b"1"}, tarfile.GNU_FORMAT))
    assert unpack(path) == {"ü.bin": b"1"}


def test_a_nul_in_a_name(path: Path) -> None:
    pack_zip(path, {"a?b": b"x"})
    path.write_bytes(path.read_bytes().replace(b"a?b", b"a\0b"))
    assert code_of(path) == "unsafe_path"


def test_an_unsafe_folder(path: Path) -> None:
    pack_zip(path, {"a.bin": b"", "../b/": b""})
    assert code_of(path) == "unsafe_path"


@pytest.mark.parametrize("mode", [0o120777, 0o020666, 0o060666, 0o010666, 0o140666])
def test_zip_links_and_devices(path: Path, mode: int) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.bin", b"x")
        info = zipfile.ZipInfo("link")
        info.external_attr = mode << 16
        archive.writestr(info, "/etc/passwd")
    members = open_archive(path)
    with pytest.raises(ArchiveError) as caught:
        next(members)  # before the first member is handed out
    assert caught.value.error_code == "unsafe_member"


def test_a_zip_that_lies_about_its_sizes(path: Path) -> None:
    pack_zip(path, ZEROS)
    size = struct.pack("<L", 30_000_000)
    path.write_bytes(path.read_bytes().replace(size, struct.pack("<L", 1000)))
    assert code_of(path) == "archive_bomb"  # found while it comes out
    with pytest.raises(MemberError):
        unpack(path, ArchiveLimits(ratio_free_bytes=2**30))


def test_overlapping_entries(path: Path) -> None:
    """Many directory entries on one kernel: the ratio counts what comes out."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.bin", bytes(5_000_000))
        info = archive.infolist()[0]
        archive.filelist.extend([info] * 50)
    assert code_of(path) == "archive_bomb"


def test_a_million_entries_are_refused_before_they_are_read(path: Path) -> None:
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", *[0] * 6, 0, 0, 0, 1, *[0] * 4, 0, 0) + b"x"
    directory = entry * 1_000_000
    count, size = 1_000_000, len(directory)
    with path.open("wb") as file:
        file.write(b"PK\3\4" + bytes(100) + directory)
        place = file.tell()
        end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, 104)
        locator = struct.pack("<4sLQL", b"PK\6\7", 0, place, 1)
        end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, size, 104, 0)
        file.write(end64 + locator + end)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert code_of(path) == "archive_bomb"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


def test_a_directory_that_holds_more_than_it_says(path: Path) -> None:
    pack_zip(path, FILES)
    data = path.read_bytes()
    end = data.rfind(b"PK\5\6")
    path.write_bytes(data[: end + 8] + struct.pack("<HH", 1, 1) + data[end + 12 :])
    assert code_of(path) == "corrupt_archive"


def test_a_zip_split_over_disks(path: Path) -> None:
    pack_zip(path, FILES)
    data = path.read_bytes()
    end = data.rfind(b"PK\5\6")
    path.write_bytes(data[: end + 4] + struct.pack("<HH", 2, 0) + data[end + 8 :])
    assert code_of(path) == "multi_disk"


def problems(path: Path) -> list[tuple[str, str | None]]:
    return [(m.path, m.problem[0] if m.problem else None) for m in open_archive(path)]


def test_encrypted_and_unknown_methods_are_said_and_the_rest_is_read(path: Path) -> None:
    pack_zip(path, {"a.bin": b"a" * 100, "b.bin": b"b" * 100})
    data = path.read_bytes()
    entry = data.find(b"PK\1\2")
    path.write_bytes(data[: entry + 8] + b"\x01" + data[entry + 9 :])
    assert problems(path) == [("a.bin", "encrypted"), ("b.bin", None)]
    path.write_bytes(data[: entry + 10] + struct.pack("<H", 99) + data[entry + 12 :])
    assert problems(path) == [("a.bin", "unsupported_compression"), ("b.bin", None)]


def test_a_damaged_member_of_a_zip_leaves_the_others(path: Path) -> None:
    pack_zip(path, {"a.bin": bytes(range(256)), "b.bin": b"b" * 100})
    data = bytearray(path.read_bytes())
    data[60] ^= 0xFF
    path.write_bytes(data)
    results = {}
    for member in open_archive(path):
        try:
            results[member.path] = member.read(1000)
        except MemberError as error:
            results[member.path] = error.error_code.encode()
    assert results == {"a.bin": b"corrupt", "b.bin": b"b" * 100}


def test_a_local_name_that_differs_from_the_directory(path: Path) -> None:
    pack_zip(path, {"a.bin": b"a"})
    path.write_bytes(path.read_bytes().replace(b"a.bin", b"b.bin", 1))
    with pytest.raises(MemberError, match="another name"):
        unpack(path)


def test_crc_is_checked(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.bin", b"stored")
    path.write_bytes(path.read_bytes().replace(b"stored", b"stoReD"))
    with pytest.raises(MemberError, match="CRC32"):
        unpack(path)
    assert zlib.crc32(b"stored")
