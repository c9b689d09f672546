"""Moves and removals below the data directory, also when several do them at once."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from service.storage import Storage, size_bytes


def fill(folder: Path, files: int) -> Path:
    (folder / "deep").mkdir(parents=True)
    for n in range(files):
        (folder / "deep" / f"{n}").write_bytes(b"xy")
    return folder


def test_a_tree_that_several_remove_is_gone_once_and_without_error(tmp_path: Path) -> None:
    storage = Storage(tmp_path).create()
    with ThreadPoolExecutor(8) as pool:
        for round_ in range(20):
            folder = fill(tmp_path / "jobs" / str(round_), 30)
            list(pool.map(storage.remove, [folder] * 8))
    assert [*(tmp_path / "jobs").iterdir()] == []


def test_what_is_not_there_can_be_removed(tmp_path: Path) -> None:
    storage = Storage(tmp_path).create()
    storage.remove(tmp_path / "jobs" / "none")
    storage.upload("ds_1").write_bytes(b"x")
    storage.remove(storage.upload("ds_1"))
    assert not storage.upload("ds_1").exists()


def test_the_first_store_of_a_key_stays(tmp_path: Path) -> None:
    storage = Storage(tmp_path).create()
    first, second = fill(tmp_path / "a", 1), fill(tmp_path / "b", 2)
    storage.adopt(first, storage.store("key"))
    storage.adopt(second, storage.store("key"))
    assert size_bytes(storage.store("key")) == 2
    assert not first.exists()
    assert not second.exists()


def test_attempts_come_newest_first(tmp_path: Path) -> None:
    storage = Storage(tmp_path).create()
    for attempt in (2, 10, 1):
        storage.job_run("job_1", attempt).create()
    assert [attempt for attempt, _ in storage.job_runs("job_1")] == [10, 2, 1]
