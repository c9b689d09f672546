"""Rules about tars."""

import io
import tarfile
from pathlib import Path

import pytest

from ctune.archive import ArchiveLimits, open_archive
from tests.ctune.archives import (
    FILES,
    code_of,
    gz,
    tar_bytes,
    unpack,
    zst,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "archive"


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


def test_a_gzip_whose_checksum_is_wrong(path: Path) -> None:
    data = bytearray(gz(tar_bytes(FILES)))
    data[-6] ^= 0xFF
    path.write_bytes(data)
    assert code_of(path) == "corrupt_archive"
