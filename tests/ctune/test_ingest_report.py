"""What is said of a data set, and when it is refused."""

from pathlib import Path

import pytest
from PIL import Image

from tests.ctune.ingesting import Bench, Files, encoded, png, pngs, remarks


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    (tmp_path / "bench").mkdir()
    return Bench(tmp_path / "bench")


def test_one_class_only(bench: Bench) -> None:
    manifest, _ = bench.run(pngs("cats", 5))
    assert manifest.summary.classes == ["cats"]
    assert "cats" in remarks(manifest)["one_class"]


def test_a_class_with_one_image_stays_in_train(bench: Bench) -> None:
    manifest, _ = bench.run(pngs("a", 5) | {"b/1.png": png(99)})
    assert manifest.summary.class_counts["train"]["b"] == 1
    assert manifest.summary.class_counts["test"]["b"] == 0
    issue = next(i for i in manifest.report.warnings if i.code == "class_with_one_image")
    assert issue.path == "b/1.png"


def test_a_single_image(bench: Bench) -> None:
    manifest, store = bench.run({"1.png": png(1)})
    assert manifest.summary.splits == {"train": 1, "val": 0, "test": 0}
    assert store.image(0).size == (8, 6)


def test_duplicates_are_stored_once_and_stay_on_one_side(bench: Bench) -> None:
    files = pngs("a", 10) | {f"a/copy{n}.png": png(n) for n in range(10)} | pngs("b", 3, 50)
    manifest, store = bench.run(files)
    assert manifest.report.num_duplicates == 20
    assert manifest.report.num_split_leaks == 0
    assert manifest.summary.num_images == 23
    size = (bench.store_dir / "images.bin").stat().st_size
    assert size == sum(len(png(n)) for n in [*range(10), 50, 51, 52])
    for n in range(10):
        assert store.read(n) == store.read(n + 10)
        assert store.split(n) == store.split(n + 10)


def test_conflicting_labels(bench: Bench) -> None:
    files = pngs("a", 6) | pngs("b", 6, 50) | {"b/same.png": png(0), "b/too.png": png(1)}
    manifest, store = bench.run(files)
    conflicts = [i for i in manifest.report.warnings if i.code == "conflicting_labels"]
    assert [issue.path for issue in conflicts] == ["a/0.png", "a/1.png"]
    assert "a, b" in conflicts[0].detail
    sides: dict[bytes, set[str]] = {}
    for n in range(len(store)):
        sides.setdefault(store.read(n), set()).add(store.split(n))
    assert all(len(splits) == 1 for splits in sides.values())


def test_split_leaks(bench: Bench) -> None:
    files = pngs("train/a", 4) | {"test/a/x.png": png(2), "test/a/y.png": png(77)}
    manifest, _ = bench.run(files)
    assert manifest.report.num_split_leaks == 1
    issue = next(i for i in manifest.report.warnings if i.code == "split_leak")
    assert issue.path == "test/a/x.png"


def test_only_training_or_only_test_images(bench: Bench) -> None:
    manifest, _ = bench.run(pngs("train/a", 3) | pngs("train/b", 3, 9))
    assert manifest.summary.splits == {"train": 6, "val": 0, "test": 0}
    assert "no_heldout_images" in remarks(manifest)
    manifest, _ = bench.run(pngs("test/a", 3) | pngs("test/b", 3, 9))
    assert "no_training_images" in remarks(manifest)


def bad_files() -> Files:
    good = png(1, 60, 60)
    huge = good[:16] + (40_000).to_bytes(4, "big") * 2 + good[24:]
    return {
        "a/text.jpg": b"hello",
        "a/page.png": b"<html></html>",
        "a/empty.jpg": b"",
        "a/cut99.png": good[: len(good) * 99 // 100],
        "a/cut50.png": good[: len(good) // 2],
        "a/cut2.png": good[: len(good) // 50],
        "a/huge.png": huge,
        "a/float.tiff": encoded(Image.new("F", (4, 4)), "TIFF"),
        "a/inner.zip": b"PK\x03\x04" + b"x" * 50,
        "a/photo.heic": b"\0\0\0\x1cftypheic" + b"x" * 30,
    }


def test_unreadable_files_are_left_out_and_listed(bench: Bench) -> None:
    manifest, store = bench.run(pngs("a", 20) | bad_files() | pngs("b", 2, 90))
    assert len(store) == 22
    assert manifest.report.num_unreadable == 10
    found = {issue.path: issue.code for issue in manifest.report.unreadable}
    assert found == {
        "a/text.jpg": "not_an_image",
        "a/page.png": "not_an_image",
        "a/empty.jpg": "empty_file",
        "a/cut99.png": "corrupt",
        "a/cut50.png": "corrupt",
        "a/cut2.png": "corrupt",
        "a/huge.png": "corrupt",  # its header's checksum is wrong too
        "a/float.tiff": "unsupported_depth",
        "a/inner.zip": "nested_archive",
        "a/photo.heic": "unsupported_format",
    }


def test_too_many_unreadable(bench: Bench) -> None:
    error = bench.refused(pngs("a", 20) | bad_files() | {"a/one more.jpg": b"bad"})
    assert error.error_code == "too_many_unreadable"
    assert "11 of 31 images cannot be read, the limit is 10" in error.message
    assert "a/empty.jpg (empty_file: the file is empty)" in error.message


def test_one_percent_of_many(bench: Bench) -> None:
    files = {f"{n}.png": png(n % 5) for n in range(1989)}
    bad = {f"bad{n}.png": b"bad" for n in range(19)}
    manifest, _ = bench.run(files | bad)
    assert manifest.report.num_unreadable == 19
    bad |= {f"worse{n}.png": b"bad" for n in range(2)}
    assert bench.refused(files | bad).error_code == "too_many_unreadable"


def test_a_class_left_empty(bench: Bench) -> None:
    error = bench.refused(pngs("a", 20) | {"b/1.jpg": b"bad", "b/2.jpg": b""})
    assert error.error_code == "class_left_empty"
    assert "b: b/1.jpg (not_an_image" in error.message


def test_a_class_left_empty_by_metadata(bench: Bench) -> None:
    table = b"file_name,label\n0.png,a\nbad.png,b\n"
    error = bench.refused({"0.png": png(0), "bad.png": b"bad", "metadata.csv": table})
    assert error.error_code == "class_left_empty"


def test_no_images(bench: Bench) -> None:
    error = bench.refused({"a/1.jpg": b"bad", "a/2.jpg": b""})
    assert error.error_code == "no_images"
    assert "a/1.jpg" in error.message
    assert bench.refused({"README.md": b"hello"}).error_code == "no_images"
    assert bench.refused({".DS_Store": b""}).error_code == "no_images"
    assert bench.refused({}).error_code == "empty_archive"
