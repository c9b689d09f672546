"""Rules about every kind of archive, each with an archive made here."""

import bz2
import random
import subprocess
import sys
import tarfile
from gzip import GzipFile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctune.archive import ArchiveLimits, MemberError, collision_key, is_archive, open_archive
from ctune.errors import ArchiveError, CtuneError
from tests.ctune.archives import (
    FILES,
    PACKS,
    Pack,
    code_of,
    every_kind,
    gz,
    pack_tar,
    pack_tar_gz,
    pack_tar_zst,
    pack_zip,
    tar_bytes,
    unpack,
    zst,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "archive"


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


@every_kind
def test_names_are_normalised(path: Path, pack: Pack) -> None:
    pack(path, {"./a//b.bin": b"1", "e\u0301.bin": b"2"})
    assert unpack(path) == {"a/b.bin": b"1", "\u00e9.bin": b"2"}


@pytest.mark.parametrize(
    ("data", "code"),
    [
        pytest.param(b"", "not_an_archive", id="empty"),
        pytest.param(b"hello", "not_an_archive", id="text"),
        pytest.param(b"\x89PNG\r\n\x1a\n" + b"x" * 5000, "not_an_archive", id="png"),
        pytest.param(b"Rar!\x1a\x07\x00" + b"x" * 5000, "not_an_archive", id="rar"),
        pytest.param(b"7z\xbc\xaf\x27\x1c" + b"x" * 5000, "not_an_archive", id="7z"),
        pytest.param(bz2.compress(tar_bytes(FILES)), "not_an_archive", id="tar.bz2"),
        pytest.param(gz(b"no tar in here" * 100), "not_an_archive", id="gzip of text"),
        pytest.param(gz(b""), "corrupt_archive", id="gzip of nothing"),
        pytest.param(zst(b"no tar in here" * 100), "not_an_archive", id="zstd of text"),
        pytest.param(b"PK\x07\x08PK\x03\x04" + b"x" * 100, "multi_disk", id="split zip"),
        pytest.param(b"PK\x03\x04" + b"x" * 100, "corrupt_archive", id="zip signature only"),
        pytest.param(b"\x1f\x8b" + b"x" * 100, "corrupt_archive", id="gzip signature only"),
        pytest.param(b"\x28\xb5\x2f\xfd" + b"x" * 100, "corrupt_archive", id="zstd signature only"),
        pytest.param(zst(tar_bytes(FILES))[:-10], "corrupt_archive", id="cut tar.zst"),
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


def test_the_longest_and_deepest_names_that_pass(path: Path) -> None:
    files = {"d/" * 16 + "x": b"1", "y" * 255: b"2"}
    pack_zip(path, files)
    assert unpack(path) == files


ZEROS = {"zeros.bin": bytes(30_000_000)}


@pytest.mark.parametrize("pack", [pack_zip, pack_tar_gz, pack_tar_zst])
def test_bombs_by_ratio(path: Path, pack: Pack) -> None:
    pack(path, ZEROS)
    assert path.stat().st_size < 100_000
    assert code_of(path) == "archive_bomb"


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
        "import sys; from pathlib import Path; from ctune.archive import open_archive\n"
        "from ctune.errors import ArchiveError\n"
        "try:\n    for m in open_archive(Path(sys.argv[1])):\n        m.read(2**40)\n"
        "except ArchiveError as error:\n    print(error.error_code)\n"
        "status = Path('/proc/self/status').read_text()\n"  # getrusage counts the parent's too
        "print(int(status.partition('VmHWM:')[2].split()[0]) // 1024)"
    )
    command = [sys.executable, "-c", program, str(path)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert out[0] == "archive_bomb"
    assert int(out[1]) < 300


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
