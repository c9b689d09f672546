"""Archives made for tests."""

import io
import tarfile
import zipfile
from collections.abc import Callable
from gzip import GzipFile
from pathlib import Path

import pytest
import zstandard

from ctune.archive import ArchiveLimits, open_archive
from ctune.errors import ArchiveError

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


def unpack(path: Path, limits: ArchiveLimits | None = None) -> Files:
    return {m.path: m.read(2**30) for m in open_archive(path, limits=limits)}


def code_of(path: Path, limits: ArchiveLimits | None = None) -> str:
    with pytest.raises(ArchiveError) as caught:
        unpack(path, limits)
    assert caught.value.fault == "user"
    assert caught.value.hint
    return caught.value.error_code


FILES = {"a/1.bin": b"one" * 1000, "a/2.bin": b"", "b/é ü.bin": bytes(range(256)) * 700}
