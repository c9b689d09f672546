"""Every rule about archives, each with an archive made here."""

import bz2
import io
import random
import resource
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib
from collections.abc import Callable
from gzip import GzipFile
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctune.archive import ArchiveLimits, MemberError, collision_key, is_archive, open_archive
from ctune.errors import ArchiveError, CtuneError

Files = dict[str, bytes]
Pack = Callable[[Path, Files], None]


def pack_zip(path: Path, files: Files) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def tar_bytes(files: Files, tar_format: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def gz(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with GzipFile(fileobj=buffer, mode="wb") as file:
        file.write(data)
    return buffer.getvalue()


def zst(data: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(data)


def pack_tar(path: Path, files: Files) -> None:
    path.write_bytes(tar_bytes(files))


def pack_tar_gz(path: Path, files: Files) -> None:
    path.write_bytes(gz(tar_bytes(files)))


def pack_tar_zst(path: Path, files: Files) -> None:
    path.write_bytes(zst(tar_bytes(files)))


PACKS = [pack_zip, pack_tar, pack_tar_gz, pack_tar_zst]
every_kind = pytest.mark.parametrize("pack", PACKS)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "archive"


def unpack(path: Path, limits: ArchiveLimits | None = None) -> Files:
    return {m.path: m.read(2**30) for m in open_archive(path, limits=limits)}


def code_of(path: Path, limits: ArchiveLimits | None = None) -> str:
    with pytest.raises(ArchiveError) as caught:
        unpack(path, limits)
    assert caught.value.fault == "user"
    assert caught.value.hint
    return caught.value.error_code


FILES = {"a/1.bin": b"one" * 1000, "a/2.bin": b"", "b/é ü.bin": bytes(range(256)) * 700}


@every_kind
def test_contents(path: Path, pack: Pack) -> None:
    pack(path, FILES)
    assert unpack(path) == FILES
    sizes = {m.path: m.size_bytes for m in open_archive(path)}  # unread members are skipped
    assert sizes == {name: len(data) for name, data in FILES.items()}


@every_kind
def test_positions_grow_towards_the_size(path: Path, pack: Pack) -> None:
    pack(path, {f"{n}.bin": bytes([n]) * 50_000 for n in range(40)})
    positions = [m.position_bytes for m in open_archive(path) if m.read(10**6)]
    assert positions == sorted(positions)
    assert 0 < positions[-1] <= path.stat().st_size


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


@pytest.mark.parametrize(
    "tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]
)
def test_tar_formats_with_long_names(path: Path, tar_format: int) -> None:
    name = "/".join(["f" * 60] * 3) + "/x.bin"
    path.write_bytes(tar_bytes({name: b"1", "short": b"2"}, tar_format))
    assert unpack(path) == {name: b"1", "short": b"2"}
    if tar_format != tarfile.USTAR_FORMAT:
        name = "/".join(["é" * 100] * 5)
        path.write_bytes(tar_bytes({name: b"1", "short": b"2"}, tar_format))
        assert unpack(path) == {name: b"1", "short": b"2"}


def test_several_compressed_frames(path: Path) -> None:
    data = tar_bytes(FILES)
    path.write_bytes(gz(data[:1000]) + gz(data[1000:]))
    assert unpack(path) == FILES
    path.write_bytes(zst(data[:1000]) + zst(data[1000:]))
    assert unpack(path) == FILES


@every_kind
def test_names_are_normalised(path: Path, pack: Pack) -> None:
    pack(path, {"./a//b.bin": b"1", "e\u0301.bin": b"2"})
    assert unpack(path) == {"a/b.bin": b"1", "\u00e9.bin": b"2"}


def test_names_in_old_encodings(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("xx.bin", b"1")
    path.write_bytes(path.read_bytes().replace(b"xx.bin", b"\x81\x84.bin"))
    assert unpack(path) == {"üä.bin": b"1"}
    path.write_bytes(tar_bytes({"ü.bin": b"1"}, tarfile.GNU_FORMAT))
    assert unpack(path) == {"ü.bin": b"1"}


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b"", "not_an_archive"),
        (b"hello", "not_an_archive"),
        (b"\x89PNG\r\n\x1a\n" + b"x" * 5000, "not_an_archive"),
        (b"Rar!\x1a\x07\x00" + b"x" * 5000, "not_an_archive"),
        (b"7z\xbc\xaf\x27\x1c" + b"x" * 5000, "not_an_archive"),
        (bz2.compress(tar_bytes(FILES)), "not_an_archive"),
        (gz(b"no tar in here" * 100), "not_an_archive"),
        (gz(b""), "corrupt_archive"),
        (zst(b"no tar in here" * 100), "not_an_archive"),
        (b"PK\x07\x08PK\x03\x04" + b"x" * 100, "multi_disk"),
        (b"PK\x03\x04" + b"x" * 100, "corrupt_archive"),
        (b"\x1f\x8b" + b"x" * 100, "corrupt_archive"),
        (b"\x28\xb5\x2f\xfd" + b"x" * 100, "corrupt_archive"),
        (zst(tar_bytes(FILES))[:-10], "corrupt_archive"),
    ],
)
def test_what_is_no_archive(path: Path, data: bytes, code: str) -> None:
    path.write_bytes(data)
    assert code_of(path) == code


def test_which_files_inside_are_archives() -> None:
    assert is_archive(b"PK\x03\x04")
    assert is_archive(b"Rar!\x1a\x07")
    assert is_archive(tar_bytes(FILES)[:512])
    assert not is_archive(b"\xff\xd8\xff\xe0")


@every_kind
def test_empty_archives(path: Path, pack: Pack) -> None:
    pack(path, {})
    assert code_of(path) == "empty_archive"


def test_folders_only_are_empty(path: Path) -> None:
    pack_zip(path, {"a/": b"", "a/b/": b""})
    assert code_of(path) == "empty_archive"
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("a")
        info.type = tarfile.DIRTYPE
        archive.addfile(info)
    assert code_of(path) == "empty_archive"


UNSAFE = [
    "../x", "a/../../x", "a/..", "/etc/passwd", "C:/x", "c:x", "a\\b", "..\\x", "a\x01b", "a\x7fb",
    "a\nb", "a\u0085b", "x" * 256, "é" * 128, "d/" * 17 + "x",
]  # fmt: skip


@every_kind
@pytest.mark.parametrize("name", UNSAFE)
def test_unsafe_names(path: Path, pack: Pack, name: str) -> None:
    pack(path, {"fine.bin": b"", name: b"x"})
    assert code_of(path) == "unsafe_path"


def test_a_nul_in_a_name(path: Path) -> None:
    pack_zip(path, {"a?b": b"x"})
    path.write_bytes(path.read_bytes().replace(b"a?b", b"a\0b"))
    assert code_of(path) == "unsafe_path"


def test_the_longest_and_deepest_names_that_pass(path: Path) -> None:
    files = {"d/" * 16 + "x": b"1", "y" * 255: b"2"}
    pack_zip(path, files)
    assert unpack(path) == files


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


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE]
)
def test_tar_links_and_devices(path: Path, kind: bytes) -> None:
    with tarfile.open(path, "w") as archive:
        info = tarfile.TarInfo("link")
        info.type = kind
        info.linkname = "/etc/passwd"
        archive.addfile(info)
    assert code_of(path) == "unsafe_member"


def test_tar_sparse_and_unknown_types(path: Path) -> None:
    data = bytearray(tar_bytes({"a.bin": b"x" * 10, "b.bin": b"y"}, tarfile.USTAR_FORMAT))

    def with_type(kind: bytes) -> bytes:
        info = tarfile.TarInfo.frombuf(bytes(data[:512]), "utf-8", "strict")
        info.type = kind
        return info.tobuf(tarfile.USTAR_FORMAT) + bytes(data[512:])

    path.write_bytes(with_type(tarfile.GNUTYPE_SPARSE))
    assert code_of(path) == "unsafe_member"
    path.write_bytes(with_type(b"V"))
    members = [(m.path, m.problem and m.problem[0]) for m in open_archive(path)]
    assert members == [("a.bin", "unsupported_member"), ("b.bin", None)]
    path.write_bytes(pax({"GNU.sparse.major": "1"}))
    assert code_of(path) == "unsafe_member"


def pax(headers: dict[str, str]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("a.bin")
        info.pax_headers = headers
        archive.addfile(info)
    return buffer.getvalue()


def test_pax_names_and_sizes(path: Path) -> None:
    path.write_bytes(pax({"path": "../up"}))
    assert code_of(path) == "unsafe_path"
    path.write_bytes(pax({"size": "-5"}))
    assert code_of(path) == "corrupt_archive"
    path.write_bytes(pax({"size": "123456789"}))
    assert code_of(path) == "corrupt_archive"
    data = pax({"path": "x" * 50})
    path.write_bytes(data.replace(b"59 path=", b"99 path="))
    assert code_of(path) == "corrupt_archive"


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_that_claims_gigabytes_is_not_read(path: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("h")
    info.type = kind
    info.size = 10 * 2**30
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 4096)
    assert code_of(path) == "archive_bomb"


def test_many_extended_headers_before_no_member(path: Path) -> None:
    record = b"200 path=" + b"x" * 190 + b"\n"
    info = tarfile.TarInfo("h")
    info.type = tarfile.XHDTYPE
    info.size = len(record)
    path.write_bytes((info.tobuf() + record.ljust(512, b"\0")) * 100 + bytes(1024))
    assert code_of(path, ArchiveLimits(max_members=50)) == "archive_bomb"
    assert code_of(path) == "empty_archive"


ZEROS = {"zeros.bin": bytes(30_000_000)}


@pytest.mark.parametrize("pack", [pack_zip, pack_tar_gz, pack_tar_zst])
def test_bombs_by_ratio(path: Path, pack: Pack) -> None:
    pack(path, ZEROS)
    assert path.stat().st_size < 100_000
    started = time.monotonic()
    assert code_of(path) == "archive_bomb"
    assert time.monotonic() - started < 2


def test_a_bomb_of_one_gibibyte_is_refused_early_and_small(path: Path) -> None:
    """The tar.gz holds 1 GiB; a process that reads it stays small."""
    block = bytes(2**20)
    info = tarfile.TarInfo("zeros.bin")
    info.size = 2**30
    with GzipFile(path, "wb", compresslevel=6) as file:
        file.write(info.tobuf())
        for _ in range(1024):
            file.write(block)
    program = (
        "import resource, sys; from pathlib import Path; from ctune.archive import open_archive\n"
        "from ctune.errors import ArchiveError\n"
        "try:\n    for m in open_archive(Path(sys.argv[1])):\n        m.read(2**40)\n"
        "except ArchiveError as error:\n    print(error.error_code)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    started = time.monotonic()
    command = [sys.executable, "-c", program, str(path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert out[0] == "archive_bomb"
    assert int(out[1]) < 300
    assert time.monotonic() - started < 5


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


def test_limits_on_bytes_and_counts(path: Path) -> None:
    pack_zip(path, FILES)
    total = sum(map(len, FILES.values()))
    assert unpack(path, ArchiveLimits(max_unpacked_bytes=total)) == FILES
    assert code_of(path, ArchiveLimits(max_unpacked_bytes=total - 1)) == "archive_bomb"
    assert code_of(path, ArchiveLimits(max_members=2)) == "archive_bomb"
    assert code_of(path, ArchiveLimits(max_zip_members=2)) == "archive_bomb"
    assert code_of(path, ArchiveLimits(max_zip_directory_bytes=10)) == "archive_bomb"
    pack_tar(path, FILES)
    assert code_of(path, ArchiveLimits(max_unpacked_bytes=total)) == "archive_bomb"  # + headers
    assert code_of(path, ArchiveLimits(max_members=2)) == "archive_bomb"


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
    started = time.monotonic()
    assert code_of(path) == "archive_bomb"
    assert time.monotonic() - started < 1
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


@every_kind
def test_a_member_over_the_limit_is_not_read(path: Path, pack: Pack) -> None:
    pack(path, {"a.bin": b"x" * 1001, "b.bin": b"y"})
    members = open_archive(path)
    with pytest.raises(MemberError) as caught:
        next(members).read(1000)
    assert caught.value.error_code == "file_too_large"
    assert next(members).read(1000) == b"y"


@pytest.mark.parametrize("pack", [pack_zip, pack_tar, pack_tar_gz, pack_tar_zst])
@pytest.mark.parametrize("part", [0.05, 0.3, 0.6, 0.9, 0.999])
def test_truncated_archives(path: Path, pack: Pack, part: float) -> None:
    noise = random.Random(0).randbytes
    pack(path, {f"{n}.bin": noise(3000) for n in range(20)})
    data = path.read_bytes()
    keep = int(len(data) * part)
    if pack is pack_tar:  # the padding at its end may be missing, the end mark may not
        keep = min(keep, data.rstrip(b"\0").__len__())
    path.write_bytes(data[:keep])
    assert code_of(path) == "corrupt_archive"


def test_a_gzip_whose_checksum_is_wrong(path: Path) -> None:
    data = bytearray(gz(tar_bytes(FILES)))
    data[-6] ^= 0xFF
    path.write_bytes(data)
    assert code_of(path) == "corrupt_archive"


def test_keys_of_names_that_collide() -> None:
    assert collision_key("a/\u00c9.png") == collision_key("A/e\u0301.PNG")
    assert collision_key("straße") == collision_key("STRASSE")
    assert collision_key("a") != collision_key("b")


@pytest.fixture(scope="module", params=PACKS)
def packed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("packed") / "archive"
    request.param(path, FILES | {"/".join(["long" * 30] * 3): b"z" * 600})
    return path.read_bytes()


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_random_damage_raises_nothing_but_our_errors(
    packed: bytes, tmp_path: Path, data: st.DataObject
) -> None:
    damaged = bytearray(packed)
    changes = st.lists(
        st.tuples(st.integers(0, len(packed) - 1), st.integers(0, 255)), min_size=1, max_size=12
    )
    for place, value in data.draw(changes):
        damaged[place] = value
    path = tmp_path / "archive"
    path.write_bytes(damaged[: data.draw(st.integers(0, len(damaged)) | st.none())])
    try:
        for member in open_archive(path):
            try:
                member.read(10**6)
            except MemberError as error:
                assert error.error_code in ("corrupt", "file_too_large")
    except CtuneError as error:
        assert error.fault == "user"
        assert isinstance(error, ArchiveError)


def test_crc_is_checked(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.bin", b"stored")
    path.write_bytes(path.read_bytes().replace(b"stored", b"stoReD"))
    with pytest.raises(MemberError, match="CRC32"):
        unpack(path)
    assert zlib.crc32(b"stored")
