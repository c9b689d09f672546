"""From the packed store to batches on the device: decode once, then gather.

Shapes: N cached images, B images of a batch, S cache side in pixels.
"""

import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ctune.errors import DiskFullError
from ctune.manifest import SPLITS, Split

T = TypeVar("T")
Indices = NDArray[np.int64]
Triple = tuple[float, float, float]

PIXELS = "pixels.u8"
_IMAGES_PER_TASK = 16
_TASKS_PER_THREAD = 4
_STATISTICS_IMAGES = 10_000
_POLL_S = 0.1


class ImageStore(Protocol):
    """What the cache needs of `ctune.store.PackedStore`."""

    def image(self, n: int) -> Image.Image: ...
    def indices(self, split: Split) -> Indices: ...
    def labels(self, split: Split) -> Indices: ...
    def __len__(self) -> int: ...


class StopCheck(Protocol):
    """`ctune.child.StopRequest`: `check` raises when a stop was asked for."""

    def check(self) -> None: ...


class ImageCache:
    """N images as uint8 [N, 3, S, S] in one file; the page cache keeps what fits into memory.

    Built by `build`; immutable afterwards. Pickled it is the path of its file, so that several
    processes can use one.
    """

    def __init__(
        self, folder: Path, pixels: NDArray[np.uint8], *, sizes_px: Tensor, labels: Indices
    ) -> None:
        self._folder = folder
        self._pixels = pixels
        self._sizes_px = sizes_px
        self.labels = labels
        """int64 [N]; -1 where an image has no label."""

    @classmethod
    def build(
        cls,
        store: ImageStore,
        indices: Sequence[int] | Indices,
        size_px: int,
        cache_dir: Path,
        *,
        num_threads: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        stop: StopCheck | None = None,
    ) -> "ImageCache":
        """Decode the images at `indices` and resize each to (S, S) as serving does.

        Args:
            store: where the images are.
            indices: N numbers of images in the store; position i of the cache is indices[i].
            size_px: S.
            cache_dir: directory for the file; an old one is replaced.
            num_threads: threads that decode; None for one per usable core.
            progress: told (images done, N) now and then, in this thread.
            stop: asked now and then, in this thread.

        Raises:
            DiskFullError: the disk does not hold the cache.
            StopRequested: a stop was asked for; nothing is left behind.
        """
        numbers = np.asarray(indices, dtype=np.int64)
        sizes = np.zeros((len(numbers), 2), dtype=np.int64)
        pixels = _allocate(cache_dir, len(numbers), size_px)

        def decode(positions: range) -> None:
            for position in positions:
                image = store.image(int(numbers[position]))
                sizes[position] = (image.height, image.width)
                resized = image.resize((size_px, size_px), Image.Resampling.BILINEAR)
                pixels[position] = np.asarray(resized).transpose(2, 0, 1)

        try:
            _run_in_threads(decode, len(numbers), num_threads, progress=progress, stop=stop)
        except BaseException:
            shutil.rmtree(cache_dir, ignore_errors=True)
            raise
        labels = _all_labels(store)[numbers]
        return cls(cache_dir, pixels, sizes_px=torch.from_numpy(sizes), labels=labels)

    def __reduce__(self) -> tuple[Callable[..., "ImageCache"], tuple[object, ...]]:
        shape = self._pixels.shape
        return _reopen, (self._folder, shape, self._sizes_px.numpy(), self.labels)

    def __len__(self) -> int:
        return len(self._sizes_px)

    @property
    def size_px(self) -> int:
        """S."""
        return int(self._pixels.shape[-1])

    def batch(self, positions: Sequence[int] | Indices) -> Tensor:
        """Return the images at `positions`, uint8 [B, 3, S, S], a copy; pinned where CUDA is.

        Raises:
            IndexError: a position is outside 0 ... N - 1.
        """
        at = np.asarray(positions, dtype=np.int64)
        if at.size and not 0 <= at.min() <= at.max() < len(self):
            raise IndexError(f"positions run from {at.min()} to {at.max()} of {len(self)} images")
        images = torch.empty(
            len(at), *self._pixels.shape[1:], dtype=torch.uint8, pin_memory=_pins_memory()
        )
        np.take(self._pixels, at, axis=0, out=images.numpy(), mode="clip")
        return images

    def sizes(self, positions: Sequence[int] | Indices) -> Tensor:
        """Return the original (height, width) of the images at `positions`, int64 [B, 2]."""
        return self._sizes_px[torch.as_tensor(np.asarray(positions, dtype=np.int64))]

    def pixel_statistics(self) -> tuple[Triple, Triple]:
        """Return mean and standard deviation per channel of all pixels, scaled to [0, 1].

        Beyond 10,000 images, of 10,000 at equal distances. A channel without any contrast gets a
        standard deviation of 1.
        """
        count = min(len(self), _STATISTICS_IMAGES)
        if not count:
            return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        histogram = np.zeros((3, 256), dtype=np.int64)
        for position in np.linspace(0, len(self) - 1, count).astype(np.int64):
            for channel in range(3):
                values = self._pixels[position, channel].ravel()
                histogram[channel] += np.bincount(values, minlength=256)
        share = histogram / histogram.sum(axis=1, keepdims=True)
        levels = np.arange(256) / 255
        mean = share @ levels
        std = np.sqrt((share * (levels - mean[:, None]) ** 2).sum(axis=1))
        std[std == 0] = 1
        return _triple(mean), _triple(std)

    def remove(self) -> None:
        """Delete the file; batches that were handed out stay valid."""
        self._pixels = np.empty((0, *self._pixels.shape[1:]), dtype=np.uint8)
        self._sizes_px = self._sizes_px[:0]
        shutil.rmtree(self._folder, ignore_errors=True)


def _reopen(folder: Path, shape: tuple[int, ...], sizes_px: Indices, labels: Indices) -> ImageCache:
    pixels: NDArray[np.uint8] = np.empty(shape, dtype=np.uint8)
    if pixels.size:
        pixels = np.memmap(folder / PIXELS, dtype=np.uint8, mode="r", shape=shape)
    return ImageCache(folder, pixels, sizes_px=torch.from_numpy(sizes_px), labels=labels)


def _allocate(folder: Path, count: int, size_px: int) -> NDArray[np.uint8]:
    """Reserve the file's blocks at once: a disk that fills up later would kill with SIGBUS."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    shape = (count, 3, size_px, size_px)
    num_bytes = count * 3 * size_px**2
    if not num_bytes:
        return np.empty(shape, dtype=np.uint8)
    path = folder / PIXELS
    try:
        with path.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise DiskFullError(
            f"the cache of {count} decoded images of {size_px} px needs {num_bytes / 2**20:.0f} MiB"
            f" in {folder}: {error.strerror}",
            hint="free space on that disk, or lower the image size",
        ) from error
    return np.memmap(path, dtype=np.uint8, mode="r+", shape=shape)


def _run_in_threads(
    work: Callable[[range], None],
    count: int,
    num_threads: int | None,
    *,
    progress: Callable[[int, int], None] | None,
    stop: StopCheck | None,
) -> None:
    """Call `work` on ranges that cover 0 ... count - 1; between rounds tell and ask."""
    threads = num_threads or len(os.sched_getaffinity(0))
    per_round = threads * _TASKS_PER_THREAD * _IMAGES_PER_TASK
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, count, per_round):
            if stop is not None:
                stop.check()
            end = min(start + per_round, count)
            tasks = range(start, end, _IMAGES_PER_TASK)
            for _ in pool.map(
                lambda at, e=end: work(range(at, min(at + _IMAGES_PER_TASK, e))), tasks
            ):
                pass
            if progress is not None:
                progress(end, count)


def _all_labels(store: ImageStore) -> Indices:
    labels = np.full(len(store), -1, dtype=np.int64)
    for split in SPLITS:
        labels[store.indices(split)] = store.labels(split)
    return labels


def _pins_memory() -> bool:
    return torch.cuda.is_available()


def _triple(values: NDArray[np.float64]) -> Triple:
    first, second, third = (float(v) for v in values)
    return first, second, third


class Prefetched(Generic[T]):
    """Results of `prefetch` in the order of their batches; iterate once."""

    def __init__(self, batches: Iterable[Indices], fetch: Callable[[Indices], T], depth: int):
        self.waited_s = 0.0
        """Time the consumer has spent waiting for data."""
        self._batches = batches
        self._fetch = fetch
        self._ready: queue.Queue[tuple[T] | BaseException | None] = queue.Queue(depth)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[T]:
        while not self._closing.is_set():
            start = time.perf_counter()
            result = self._ready.get()
            self.waited_s += time.perf_counter() - start
            if isinstance(result, tuple):
                yield result[0]
                continue
            self._closing.set()
            if result is not None:
                raise result

    def close(self) -> None:
        """Stop the thread and wait for it; a fetch that is under way is completed."""
        self._closing.set()
        with suppress(queue.Empty):
            while True:
                self._ready.get_nowait()  # a thread that waits for room goes on at once
        self._thread.join()

    def _work(self) -> None:
        try:
            for batch in self._batches:
                if not self._put((self._fetch(batch),)):
                    return
        except BaseException as error:  # noqa: BLE001 - raised again in the consumer
            self._put(error)
        else:
            self._put(None)

    def _put(self, result: tuple[T] | BaseException | None) -> bool:
        while not self._closing.is_set():
            try:
                self._ready.put(result, timeout=_POLL_S)
            except queue.Full:
                continue
            return not self._closing.is_set()
        return False


@contextmanager
def prefetch(
    batches: Iterable[Indices], fetch: Callable[[Indices], T], *, depth: int = 2
) -> Iterator[Prefetched[T]]:
    """Fetch up to `depth` batches ahead in a background thread, in order.

    An exception of `batches` or `fetch` is raised where its batch would have come. Leaving the
    context ends the thread, however far the iteration went.
    """
    prefetched = Prefetched(batches, fetch, depth)
    try:
        yield prefetched
    finally:
        prefetched.close()
