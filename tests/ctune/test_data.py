import os
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ctune.data import ImageCache, prefetch
from ctune.errors import CtuneError
from ctune.manifest import DatasetSummary, Split, working_size_px
from ctune.preprocess import Preprocessing
from ctune.store import PackedStore


class FakeStore:
    """Images of assorted shapes; the last is without a label."""

    shapes = [(40, 30), (1, 50), (33, 33), (50, 1), (20, 64), (32, 32)]  # (height, width)

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.images = [
            Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in self.shapes
        ]
        self.decoded: list[int] = []

    def __len__(self) -> int:
        return len(self.images)

    def image(self, n: int) -> Image.Image:
        self.decoded.append(n)
        return self.images[n]

    def indices(self, split: Split) -> np.ndarray:
        return np.array({"train": [0, 2, 4], "val": [], "test": [1, 3, 5]}[split], dtype=np.int64)

    def labels(self, split: Split) -> np.ndarray:
        return np.array({"train": [7, 8, 9], "val": [], "test": [5, 6, -1]}[split], dtype=np.int64)


def make_summary(width_px: tuple[int, int], height_px: tuple[int, int]) -> DatasetSummary:
    return DatasetSummary(
        num_images=1,
        splits={"train": 1},
        classes=[],
        class_counts={},
        width_px=width_px,
        height_px=height_px,
        split_origin="given",
    )


class StoppedError(Exception):
    pass


class StopAtOnce:
    def check(self) -> None:
        raise StoppedError


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[ImageCache]:
    yield ImageCache.build(FakeStore(), [4, 0, 1, 5], 32, tmp_path / "cache", num_threads=2)


# --- cache ---


def test_pixels_are_those_of_serving(cache: ImageCache) -> None:
    serving = Preprocessing(32, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    store = FakeStore()
    expected = torch.stack([serving.to_uint8(store.images[n]) for n in (4, 0, 1, 5)])
    assert torch.equal(cache.batch([0, 1, 2, 3]), expected)
    assert torch.equal(cache.batch(np.array([3, 3, 0])), expected[[3, 3, 0]])


def test_keeps_sizes_and_labels(cache: ImageCache) -> None:
    assert len(cache) == 4
    assert cache.size_px == 32
    assert cache.sizes([0, 2]).tolist() == [[20, 64], [1, 50]]
    assert cache.labels.tolist() == [9, 7, 5, -1]


def test_caches_a_packed_store(store: Path, tmp_path: Path) -> None:
    packed = PackedStore(store)
    numbers = packed.indices("train")
    with_labels = ImageCache.build(packed, numbers, 16, tmp_path / "c", num_threads=2)
    assert with_labels.labels.tolist() == packed.labels("train").tolist()
    for position, n in enumerate(numbers.tolist()):
        expected = torch.tensor(np.array(packed.image(n))).permute(2, 0, 1)
        assert torch.equal(with_labels.batch([position])[0], expected)
    assert working_size_px(packed.manifest.summary, 16) == 16


def test_decodes_each_image_once(tmp_path: Path) -> None:
    store, told = FakeStore(), []
    ImageCache.build(
        store, range(6), 8, tmp_path / "c", progress=lambda done, of: told.append((done, of))
    )
    assert sorted(store.decoded) == list(range(6))
    assert told[-1] == (6, 6)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_covers_all_images_over_many_rounds(tmp_path: Path, num_threads: int) -> None:
    store = FakeStore()
    numbers = np.arange(1000) % 6
    cache = ImageCache.build(store, numbers, 4, tmp_path / "c", num_threads=num_threads)
    first = cache.batch(range(6))
    assert torch.equal(cache.batch(range(1000)), first[torch.as_tensor(numbers)])


def test_a_batch_is_a_copy(cache: ImageCache) -> None:
    before = cache.batch([1]).clone()
    cache.batch([1]).zero_()
    assert torch.equal(cache.batch([1]), before)


@pytest.mark.parametrize("position", [-1, 4])
def test_refuses_positions_outside(cache: ImageCache, position: int) -> None:
    with pytest.raises(IndexError, match="of 4 images"):
        cache.batch([0, position])


def test_another_process_opens_the_same_file(cache: ImageCache) -> None:
    written = pickle.dumps(cache)
    assert len(written) < len(cache) * 3 * cache.size_px**2
    again: ImageCache = pickle.loads(written)
    positions = np.arange(len(cache))
    assert torch.equal(again.batch(positions), cache.batch(positions))
    assert torch.equal(again.sizes(positions), cache.sizes(positions))
    assert again.labels.tolist() == cache.labels.tolist()


def test_empty_cache_and_empty_batch(tmp_path: Path, cache: ImageCache) -> None:
    assert cache.batch([]).shape == (0, 3, 32, 32)
    empty = ImageCache.build(FakeStore(), [], 16, tmp_path / "empty")
    assert len(empty) == 0
    assert empty.batch([]).shape == (0, 3, 16, 16)
    assert empty.pixel_statistics() == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))


def test_replaces_an_old_cache(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    folder.mkdir()
    (folder / "pixels.u8").write_bytes(b"remains of a killed run")
    cache = ImageCache.build(FakeStore(), [5], 32, folder)
    assert torch.equal(
        cache.batch([0])[0], torch.tensor(np.array(FakeStore().images[5])).permute(2, 0, 1)
    )


def test_pixel_statistics_equal_those_of_all_pixels(cache: ImageCache) -> None:
    pixels = cache.batch(range(4)).double() / 255
    mean, std = cache.pixel_statistics()
    torch.testing.assert_close(torch.tensor(mean).double(), pixels.mean(dim=(0, 2, 3)))
    expected = pixels.std(dim=(0, 2, 3), correction=0)
    torch.testing.assert_close(torch.tensor(std).double(), expected)


def test_flat_images_get_a_usable_std(tmp_path: Path) -> None:
    store = FakeStore()
    store.images = [Image.new("RGB", (8, 8), (10, 20, 30)) for _ in store.images]
    assert ImageCache.build(store, [0], 8, tmp_path / "c").pixel_statistics()[1] == (1, 1, 1)


def test_remove_deletes_the_file_and_spares_batches(tmp_path: Path, cache: ImageCache) -> None:
    images = cache.batch([0])
    kept = images.clone()
    cache.remove()
    assert not (tmp_path / "cache").exists()
    assert torch.equal(images, kept)
    with pytest.raises(IndexError):
        cache.batch([0])


def test_stopping_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        ImageCache.build(FakeStore(), range(6), 8, tmp_path / "c", stop=StopAtOnce())
    assert not (tmp_path / "c").exists()


def test_a_full_disk_is_said_before_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    store = FakeStore()
    with pytest.raises(CtuneError, match="No space left on device") as caught:
        ImageCache.build(store, range(6), 8, tmp_path / "c")
    assert caught.value.error_code == "disk_full"
    assert not store.decoded
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("widths", "heights", "image_size_px", "expected"),
    [
        ((32, 32), (32, 32), 32, 32),
        ((32, 32), (32, 32), 224, 32),
        ((100, 500), (80, 400), 224, 256),
        ((100, 240), (80, 200), 224, 240),
        ((28, 48), (28, 64), 32, 37),
        ((1, 1), (1, 1), 16, 1),
    ],
)
def test_working_size(
    widths: tuple[int, int], heights: tuple[int, int], image_size_px: int, expected: int
) -> None:
    assert working_size_px(make_summary(widths, heights), image_size_px) == expected


# --- prefetch ---


def batches(count: int) -> list[np.ndarray]:
    return [np.array([n]) for n in range(count)]


def test_prefetch_keeps_the_order() -> None:
    with prefetch(batches(50), lambda batch: int(batch[0]) * 2) as fetched:
        assert list(fetched) == list(range(0, 100, 2))
        assert list(fetched) == []
    assert fetched.waited_s >= 0


def test_prefetch_stays_within_depth() -> None:
    calls: list[int] = []

    def fetch(batch: np.ndarray) -> int:
        calls.append(int(batch[0]))
        return calls[-1]

    with prefetch(batches(50), fetch, depth=2) as fetched:
        assert next(iter(fetched)) == 0
        time.sleep(0.3)
        assert len(calls) <= 4  # one taken, two ready, one waiting for room


def test_prefetch_measures_waiting() -> None:
    def fetch(batch: np.ndarray) -> int:
        time.sleep(0.1)
        return int(batch[0])

    with prefetch(batches(5), fetch) as slow_data:
        list(slow_data)
    assert slow_data.waited_s >= 0.4
    with prefetch(batches(5), lambda batch: 0) as slow_consumer:
        for _ in slow_consumer:
            time.sleep(0.02)
    assert slow_consumer.waited_s < 0.4


def test_prefetch_raises_where_the_batch_would_have_come() -> None:
    def fetch(batch: np.ndarray) -> int:
        if batch[0] == 3:
            raise ValueError("broken")
        return int(batch[0])

    got: list[int] = []
    with prefetch(batches(5), fetch) as fetched, pytest.raises(ValueError, match="broken"):
        got.extend(fetched)
    assert got == [0, 1, 2]


def test_leaving_early_ends_the_thread() -> None:
    before = threading.active_count()
    with pytest.raises(StoppedError), prefetch(batches(1000), lambda batch: batch) as fetched:
        for _ in fetched:
            raise StoppedError
    assert threading.active_count() == before
    assert list(fetched) == []


def test_prefetched_batches_equal_direct_ones(cache: ImageCache) -> None:
    order = [np.array([0, 2]), np.array([3, 1]), np.array([1])]
    with prefetch(order, cache.batch) as fetched:
        for got, positions in zip(fetched, order, strict=True):
            assert torch.equal(got, cache.batch(positions))
