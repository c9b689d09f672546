"""From an archive to a store: layouts, splits, metadata, and that failures leave nothing."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from ctune.child import StopRequest, StopRequested
from ctune.errors import CtuneError, DataError
from ctune.events import Failed, Finished, Stopped, read_events
from ctune.ingest import IngestFile, IngestOptions, ingest
from ctune.rundir import RunDir
from ctune.store import PackedStore
from tests.ctune.ingesting import (
    Bench,
    Files,
    encoded,
    labels_by_path,
    paths_in,
    png,
    pngs,
    remarks,
)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    (tmp_path / "bench").mkdir()
    return Bench(tmp_path / "bench")


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_class_folders_with_splits(bench: Bench, kind: str) -> None:
    files = {
        "my data/train/dog/1.png": png(1),
        "my data/train/cat/1.png": png(2, 10, 4),
        "my data/test/cat/2.png": png(3),
        "my data/valid/dog/x/3.png": png(4),
    }
    manifest, store = bench.run(files, kind)
    assert manifest.report.layout == "class_folders_with_splits"
    summary = manifest.summary
    assert summary.classes == ["cat", "dog"]
    assert summary.splits == {"train": 2, "val": 1, "test": 1}
    assert summary.class_counts == {
        "train": {"cat": 1, "dog": 1}, "val": {"cat": 0, "dog": 1}, "test": {"cat": 1, "dog": 0},
    }  # fmt: skip
    assert (summary.width_px, summary.height_px) == ((8, 10), (4, 6))
    assert summary.split_origin == "given"
    assert [store.read(n) for n in range(4)] == list(files.values())
    assert [store.row(n)["path"] for n in range(4)] == list(files)
    assert store.labels("train").tolist() == [1, 0]
    assert [store.split(n) for n in range(4)] == ["train", "train", "test", "val"]


def test_a_split_is_made_per_class_and_does_not_depend_on_order(bench: Bench) -> None:
    files = pngs("a", 20) | pngs("b", 7, 100) | pngs("c", 2, 200)
    manifest, store = bench.run(files)
    summary = manifest.summary
    assert summary.split_origin == "made"
    assert summary.class_counts["test"] == {"a": 4, "b": 1, "c": 1}
    assert summary.class_counts["train"] == {"a": 16, "b": 6, "c": 1}
    assert "held out" in remarks(manifest)["split_made"]
    held = paths_in(store, "test")
    reordered = dict(random.Random(1).sample(sorted(files.items()), len(files)))
    _, store = bench.run(reordered)
    assert paths_in(store, "test") == held
    manifest, _ = bench.run(files, test_fraction=0.5)
    assert manifest.summary.class_counts["test"] == {"a": 10, "b": 4, "c": 1}
    assert manifest.options == {"test_fraction": 0.5}
    manifest, _ = bench.run(files, test_fraction=0)
    assert manifest.summary.splits["test"] == 0
    assert "nothing can be evaluated" in remarks(manifest)["no_heldout_images"]


def test_flat_is_unlabelled_and_split_too(bench: Bench) -> None:
    manifest, store = bench.run({f"{n}.png": png(n) for n in range(10)})
    assert manifest.report.layout == "flat"
    assert manifest.summary.classes == []
    assert manifest.summary.splits == {"train": 8, "val": 0, "test": 2}
    assert set(store.labels("train").tolist()) == {-1}


def test_metadata_csv(bench: Bench) -> None:
    table = "file_name,label,split,text\n1.png,dog,train,a dog\n2.png,cat,test,a cat\n"
    files = {"w/1.png": png(1), "w/metadata.csv": table.encode(), "w/2.png": png(2)}
    manifest, store = bench.run(files)
    assert manifest.report.layout == "metadata"
    assert labels_by_path(store) == {"w/1.png": "dog", "w/2.png": "cat"}
    assert store.row(1)["text"] == "a cat"
    assert manifest.summary.splits == {"train": 1, "val": 0, "test": 1}


def test_metadata_in_split_folders_and_with_gaps(bench: Bench) -> None:
    lines = [{"file_name": "1.png", "label": 0, "k": [1]}, {"file_name": "2.png", "label": None}]
    files = {
        "train/metadata.jsonl": "\n".join(map(json.dumps, lines)).encode(),
        "train/1.png": png(1),
        "train/2.png": png(2),
        "train/3.png": png(3),
        "test/metadata.csv": b"file_name,label\n4.png,1\n",
        "test/4.png": png(4),
    }
    manifest, store = bench.run(files)
    assert list(labels_by_path(store).values()) == ["0", None, None, "1"]
    assert store.row(0)["k"] == [1]
    assert manifest.summary.splits == {"train": 3, "val": 0, "test": 1}
    assert remarks(manifest)["unlabelled_images"].startswith("2 images")


def test_metadata_with_texts_only_keeps_the_folders_classes(bench: Bench) -> None:
    table = b"file_name,text\ncat/0.png,one\n"
    _, store = bench.run(pngs("cat", 2) | pngs("dog", 2, 9) | {"metadata.csv": table})
    assert labels_by_path(store)["cat/0.png"] == "cat"
    assert store.row(0)["text"] == "one"


def test_a_split_given_for_some_only(bench: Bench) -> None:
    table = b"file_name,split\na/0.png,test\na/1.png,\n"
    manifest, store = bench.run(pngs("a", 4) | {"metadata.csv": table})
    assert [store.split(n) for n in range(4)] == ["test", "train", "train", "train"]
    assert remarks(manifest)["no_split_given"].startswith("3 images")


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (b"file_name,label\n0.png,a\nmissing.png,b\n", "row 3: no image missing.png"),
        (b"file_name,label\n0.png,a\n0.png,b\n", "row 3: a second row for 0.png"),
        (b"nothing\n", "file_name"),
    ],
)
def test_bad_metadata(bench: Bench, table: bytes, reason: str) -> None:
    error = bench.refused({"0.png": png(0), "1.png": png(1), "metadata.csv": table})
    assert error.error_code == "invalid_metadata"
    assert reason in error.message


def test_webdataset(bench: Bench) -> None:
    files: Files = {}
    for n in range(4):
        files[f"{n:04}.cls"] = str(n % 2).encode()
        files[f"{n:04}.jpg"] = encoded(Image.new("RGB", (8, 8), (n, n, n)), "JPEG")
        files[f"{n:04}.txt"] = f"number {n}".encode()
        files[f"{n:04}.json"] = json.dumps({"width": n}).encode()
    manifest, store = bench.run(files, "tar")
    assert manifest.report.layout == "webdataset"
    assert list(labels_by_path(store).values()) == ["0", "1", "0", "1"]
    row = store.row(3)
    assert (row["text"], row["width"], row["path"]) == ("number 3", 3, "0003.jpg")
    assert "ignored_files" not in remarks(manifest)


def test_class_names_are_sorted_by_code_point(bench: Bench) -> None:
    files = {f"{name}/1.png": png(n) for n, name in enumerate(["b", "10", "é", "Z", "9"])}
    manifest, _ = bench.run(files)
    assert manifest.summary.classes == ["10", "9", "Z", "b", "é"]


def test_a_failure_takes_an_older_store_away(bench: Bench) -> None:
    bench.run(pngs("a", 3))
    bench.pack({"a/1.png": b"bad"})
    with pytest.raises(DataError):
        ingest(bench.archive, bench.store_dir)
    assert not bench.store_dir.exists()


def test_a_stop_is_honoured_and_leaves_nothing(bench: Bench) -> None:
    bench.pack(pngs("a", 30))
    stop = StopRequest()
    stop.request("enough")
    with pytest.raises(StopRequested, match="enough"):
        ingest(bench.archive, bench.store_dir, stop=stop)
    assert not bench.store_dir.exists()


@pytest.fixture
def packed(bench: Bench, request: pytest.FixtureRequest) -> bytes:
    table = b"file_name,label\na/0.png,x\na/1.png,x\na/2.png,y\n"
    bench.pack(pngs("a", 3) | {"metadata.csv": table, "a/0.txt": b"text"}, request.param)
    return bench.archive.read_bytes()


@pytest.mark.parametrize("packed", ["zip", "tar", "tar.gz"], indirect=True)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=6),
    keep=st.floats(0.2, 1) | st.just(1.0),
)
def test_random_damage_never_leaves_a_manifest(
    bench: Bench, packed: bytes, changes: list[tuple[float, int]], keep: float
) -> None:
    damaged = bytearray(packed)
    for place, value in changes:
        damaged[min(int(place * len(damaged)), len(damaged) - 1)] = value
    bench.archive.write_bytes(damaged[: int(keep * len(damaged))])
    try:
        ingest(bench.archive, bench.store_dir)
    except CtuneError as error:
        assert error.fault == "user"
        assert not bench.store_dir.exists()
    else:
        store = PackedStore(bench.store_dir)
        assert [store.image(n).mode for n in range(len(store))]


def child(run_dir: RunDir, config: IngestFile) -> "subprocess.Popen[bytes]":
    run_dir.config.write_text(config.model_dump_json())
    return subprocess.Popen(
        [sys.executable, "-m", "ctune.ingest", str(run_dir.root)],
        env={**os.environ, "CTUNE_PARENT_PID": str(os.getpid()), "CTUNE_GRACE_S": "20"},
        start_new_session=True,
    )


def test_as_a_child_process(bench: Bench, tmp_path: Path) -> None:
    bench.pack(pngs("a", 5) | pngs("b", 5, 50))
    run_dir = RunDir(tmp_path / "run").create()
    config = IngestFile(archive=bench.archive, archive_sha256="ab" * 32)
    assert child(run_dir, config).wait() == 0
    events = [event for event, _ in read_events(run_dir.events)]
    assert [event.event for event in events] == ["started", "finished"]
    word = events[-1]
    assert isinstance(word, Finished)
    store = PackedStore(run_dir.root / "store")
    assert word.result == {
        "store_key": config.store_key,
        "manifest": store.manifest.model_dump(mode="json"),
    }
    other = IngestFile(
        archive=bench.archive, archive_sha256="ab" * 32, options=IngestOptions(test_fraction=0.3)
    )
    assert other.store_key != config.store_key


def test_a_child_that_fails_says_why(bench: Bench, tmp_path: Path) -> None:
    bench.archive.write_bytes(b"no archive")
    run_dir = RunDir(tmp_path / "run").create()
    assert child(run_dir, IngestFile(archive=bench.archive, archive_sha256="0" * 64)).wait() == 1
    word = [event for event, _ in read_events(run_dir.events)][-1]
    assert isinstance(word, Failed)
    assert (word.code, word.fault, word.retryable) == ("not_an_archive", "user", False)
    assert not (run_dir.root / "store").exists()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGKILL])
def test_a_child_that_is_stopped_or_killed_leaves_no_manifest(
    bench: Bench, tmp_path: Path, name: signal.Signals
) -> None:
    data = [png(n, 200, 200) for n in range(20)]
    bench.pack({f"a/{n}.png": data[n % 20] + b"%d" % n for n in range(2000)})
    run_dir = RunDir(tmp_path / "run").create()
    process = child(run_dir, IngestFile(archive=bench.archive, archive_sha256="0" * 64))
    images = run_dir.root / "store" / "images.bin"
    wait_for(lambda: images.exists() and images.stat().st_size > 0)
    process.send_signal(name)
    assert process.wait(timeout=30) == (0 if name == signal.SIGTERM else -9)
    assert not (run_dir.root / "store" / "manifest.json").exists()
    if name == signal.SIGTERM:
        assert isinstance([event for event, _ in read_events(run_dir.events)][-1], Stopped)
        assert not (run_dir.root / "store").exists()
    again = child(run_dir, IngestFile(archive=bench.archive, archive_sha256="0" * 64))
    assert again.wait(timeout=120) == 0
    assert len(PackedStore(run_dir.root / "store")) == 2000


def test_the_child_stays_small(bench: Bench, tmp_path: Path) -> None:
    data = [png(n, 256, 256) for n in range(10)]
    bench.pack({f"a/{n}.png": data[n % 10] + b"%d" % n for n in range(1500)})
    run_dir = RunDir(tmp_path / "run").create()
    config = IngestFile(archive=bench.archive, archive_sha256="0" * 64)
    run_dir.config.write_text(config.model_dump_json())
    measure = (  # a small parent: a process inherits the peak of the one that forked it
        "import resource, subprocess, sys\n"
        "subprocess.run([sys.executable, '-m', 'ctune.ingest', sys.argv[1]], check=True)\n"
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)"
    )
    command = [sys.executable, "-c", measure, str(run_dir.root)]
    out = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(out.stdout) < 150


def test_the_child_never_imports_torch(tmp_path: Path) -> None:
    program = "import sys, ctune.ingest; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=tmp_path).returncode == 0
