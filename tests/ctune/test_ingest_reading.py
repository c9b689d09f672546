"""What is taken from an archive, what is left out, and why."""

import io
import tarfile
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ctune.errors import ArchiveError
from ctune.events import Progress
from ctune.ingest import IngestLimits, ingest
from tests.ctune.ingesting import Bench, encoded, png, pngs, remarks


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    (tmp_path / "bench").mkdir()
    return Bench(tmp_path / "bench")


def test_junk_and_other_files_are_ignored_and_counted(bench: Bench) -> None:
    junk = {
        "__MACOSX/a/._0.png": b"x", "a/.DS_Store": b"x", "a/Thumbs.db": b"x",
        ".ipynb_checkpoints/0.png": png(1), "a/._1.png": b"x",
    }  # fmt: skip
    other = {"README.md": b"hello", "LICENSE": b"free", "notes.txt": b"n", "a/labels.xml": b"<a/>"}
    manifest, store = bench.run(pngs("a", 3) | junk | other)
    assert len(store) == 3
    assert manifest.report.num_junk == 5
    assert manifest.report.num_unreadable == 0
    for kind in ("1 md", "1 no suffix", "1 txt", "1 xml"):
        assert kind in remarks(manifest)["ignored_files"]


def test_images_are_told_by_their_bytes(bench: Bench) -> None:
    jpeg = encoded(Image.new("RGB", (9, 9)), "JPEG")
    manifest, store = bench.run(pngs("a", 2) | {"a/noname": png(5), "a/wrong.png": jpeg})
    assert len(store) == 4
    assert manifest.report.num_unreadable == 0


def test_limits_on_images(bench: Bench) -> None:
    noise = png(7, 100, 100)
    limits = IngestLimits(max_image_bytes=len(noise) - 1, max_image_pixels=5000)
    small = encoded(Image.new("RGB", (100, 100)))
    manifest, store = bench.run(
        pngs("a", 3) | {"a/long.png": noise, "a/wide.png": small}, limits=limits
    )
    assert len(store) == 3
    codes = {issue.path: issue.code for issue in manifest.report.unreadable}
    assert codes == {"a/long.png": "file_too_large", "a/wide.png": "image_too_large"}
    error = bench.refused(pngs("a", 3), limits=IngestLimits(max_images=2))
    assert error.error_code == "archive_bomb"
    error = bench.refused(pngs("a", 3), limits=IngestLimits(max_unpacked_bytes=200))
    assert error.error_code == "archive_bomb"


def test_a_store_that_the_operators_limit_let_in_can_be_read_later(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, store = bench.run({"1.png": png(1, 100, 100)})
    monkeypatch.setattr("ctune.images.DEFAULT_MAX_PIXELS", 10)
    assert store.image(0).size == (100, 100)


def test_unsafe_archives_are_refused_as_a_whole(bench: Bench) -> None:
    assert bench.refused(pngs("a", 3) | {"../x.png": png(1)}).error_code == "unsafe_path"
    bench.archive.write_bytes(b"no archive")
    with pytest.raises(ArchiveError) as caught:
        ingest(bench.archive, bench.store_dir)
    assert caught.value.error_code == "not_an_archive"
    with tarfile.open(bench.archive, "w") as tar:
        for name, data in pngs("a", 3).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        info = tarfile.TarInfo("a/link.png")
        info.type = tarfile.SYMTYPE
        tar.addfile(info)
    with pytest.raises(ArchiveError) as caught:
        ingest(bench.archive, bench.store_dir)
    assert caught.value.error_code == "unsafe_member"
    assert not bench.store_dir.exists()


@pytest.mark.parametrize(
    ("first", "second"), [("a/\u00e9.png", "a/e\u0301.png"), ("a/X.png", "A/x.PNG")]
)
def test_names_that_collide(bench: Bench, first: str, second: str) -> None:
    error = bench.refused({first: png(1), second: png(2)})
    assert error.error_code == "name_collision"
    manifest, store = bench.run({first: png(1), second: png(1), "a/other.png": png(2)})
    assert len(store) == 2
    assert remarks(manifest)["duplicate_names"].startswith("1 files")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_the_same_name_twice(bench: Bench) -> None:
    def pack(second: bytes) -> None:
        with zipfile.ZipFile(bench.archive, "w") as archive:
            for data in (png(1), second, png(3)):
                archive.writestr("a/1.png" if data != png(3) else "a/3.png", data)

    pack(png(2))
    with pytest.raises(ArchiveError) as caught:
        ingest(bench.archive, bench.store_dir)
    assert caught.value.error_code == "name_collision"
    pack(png(1))
    assert ingest(bench.archive, bench.store_dir).summary.num_images == 2


def test_encrypted_and_damaged_members_are_left_out(bench: Bench) -> None:
    bench.pack(pngs("a", 5))
    data = bytearray(bench.archive.read_bytes())
    entries = [at for at in range(len(data)) if data[at : at + 4] == b"PK\1\2"]
    data[entries[0] + 8] |= 1
    second = data.find(b"PK\3\4", 40)
    data[second + 100] ^= 0xFF
    bench.archive.write_bytes(data)
    manifest = ingest(bench.archive, bench.store_dir)
    codes = {issue.path: issue.code for issue in manifest.report.unreadable}
    assert codes == {"a/0.png": "encrypted", "a/1.png": "corrupt"}
    assert manifest.summary.num_images == 3


def test_conversions_are_counted(bench: Bench) -> None:
    grey16 = encoded(Image.fromarray(np.full((4, 4), 40_000, dtype=np.uint16)))
    clear = encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 0)))
    manifest, store = bench.run(pngs("a", 2) | {"a/grey.png": grey16, "a/clear.png": clear})
    assert remarks(manifest)["converted_depth_16"].startswith("1 images")
    assert remarks(manifest)["converted_alpha"].startswith("1 images")
    by_path = {store.row(n)["path"]: store.image(n).getpixel((0, 0)) for n in range(len(store))}
    assert by_path["a/grey.png"] == (156, 156, 156)
    assert by_path["a/clear.png"] == (255, 255, 255)
    assert "converted_cmyk" not in remarks(manifest)


def test_orientation_is_in_the_index(bench: Bench) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (40, 20)).save(buffer, "JPEG", exif=exif)
    _, store = bench.run({"1.jpg": buffer.getvalue()})
    assert store.size_px(0) == store.image(0).size == (20, 40)


def test_progress_grows_to_one(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctune.ingest_reading.PROGRESS_S", 0.0)
    bench.pack(pngs("a", 60))
    said: list[Progress] = []
    ingest(bench.archive, bench.store_dir, progress=said.append)
    fractions = [event.fraction for event in said]
    assert fractions == sorted(fractions)
    assert fractions[0] < 0.2
    assert 0.95 < fractions[-1] <= 1.0
    assert {event.stage for event in said} == {"read", "write"}
    assert said[-1].total_steps == 60


def test_memory_does_not_grow_with_the_archive(bench: Bench) -> None:
    def peak(count: int) -> int:
        data = [png(n, 50, 50) for n in range(10)]
        bench.pack({f"a/{n}.png": data[n % 10] + b"%d" % n for n in range(count)})
        tracemalloc.start()
        ingest(bench.archive, bench.store_dir)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    assert peak(2000) < peak(200) + 2_000_000
