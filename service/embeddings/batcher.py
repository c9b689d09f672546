"""Dynamic batching, counted in items: many calls share one forward pass. Knows nothing of models.

A call reserves its items first, so that the number of items that wait, are decoded or run is
bounded. Its items then wait until a batch of their group is full or the oldest has waited long
enough. A failed forward pass fails every call that has an item in it; nothing waits for ever.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

Group = TypeVar("Group")
Item = TypeVar("Item")
Row = TypeVar("Row")

DELAY_S = 0.005
_log = logging.getLogger("ctune.embed")


class QueueFullError(Exception):
    """The items of a call do not fit beside those that wait."""


class BatchFailedError(Exception):
    """The forward pass failed, or the batcher has stopped; the cause says why."""


@dataclass(frozen=True)
class Done(Generic[Row]):
    """What a call gets."""

    rows: list[Row]
    """One per item, in order."""
    queue_s: float
    """Longest wait of an item before its forward pass."""
    inference_s: float
    """Duration of the forward passes that held the call's items."""


@dataclass(frozen=True)
class _Result(Generic[Row]):
    row: Row
    started_at: float
    ended_at: float


@dataclass(eq=False)
class _Waiting(Generic[Group, Item, Row]):
    group: Group
    item: Item
    result: asyncio.Future[_Result[Row]]
    queued_at: float


class Batcher(Generic[Group, Item, Row]):
    """Collects items and runs them in batches, one batch at a time, in a thread of its own.

    Args:
        run: gets a group and items, gives one row per item.
        max_pending: items that may be reserved at once.
        max_batch: items per call of `run`.
    """

    def __init__(
        self,
        run: Callable[[Group, Sequence[Item]], Sequence[Row]],
        *,
        max_pending: int,
        max_batch: int,
        delay_s: float = DELAY_S,
    ) -> None:
        self.max_pending = max_pending
        self._run = run
        self._max_batch = max_batch
        self._delay_s = delay_s
        self._pending = 0
        self._waiting: list[_Waiting[Group, Item, Row]] = []
        self._arrived = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="forward")
        self._worker: asyncio.Task[None] | None = None

    @property
    def alive(self) -> bool:
        """Whether items are being worked on."""
        return self._worker is not None and not self._worker.done()

    @property
    def pending(self) -> int:
        """Items that are reserved now."""
        return self._pending

    def start(self) -> None:
        """Begin to work, on the running event loop."""
        self._worker = asyncio.create_task(self._work())
        self._worker.add_done_callback(self._on_end)

    async def close(self) -> None:
        """Stop after the forward pass under way; calls that wait fail."""
        if self._worker is not None:
            self._worker.cancel()
            with suppress(asyncio.CancelledError):
                await self._worker
        await asyncio.to_thread(self._thread.shutdown)

    @contextmanager
    def reserve(self, count: int) -> Iterator[None]:
        """Hold places for `count` items.

        Raises:
            QueueFullError: there are not enough.
        """
        if self._pending + count > self.max_pending:
            raise QueueFullError
        self._pending += count
        try:
            yield
        finally:
            self._pending -= count

    async def submit(self, group: Group, items: Sequence[Item]) -> Done[Row]:
        """Run reserved items; cancelling the call drops those that still wait.

        Raises:
            BatchFailedError: a forward pass failed, or the batcher has stopped.
        """
        if not self.alive:
            raise BatchFailedError("the batcher does not run")
        loop = asyncio.get_running_loop()
        now = time.monotonic()
        waiting = [_Waiting(group, item, loop.create_future(), now) for item in items]
        self._waiting += waiting
        self._arrived.set()
        results = await asyncio.gather(*(entry.result for entry in waiting))
        passes = {(result.started_at, result.ended_at) for result in results}
        return Done(
            rows=[result.row for result in results],
            queue_s=max((start for start, _ in passes), default=now) - now,
            inference_s=sum(end - start for start, end in passes),
        )

    async def _work(self) -> None:
        while True:
            batch = await self._next_batch()
            items = [entry.item for entry in batch]
            started_at = time.monotonic()
            loop = asyncio.get_running_loop()
            running = loop.run_in_executor(self._thread, self._run, batch[0].group, items)
            try:
                await asyncio.wait([running])
            except asyncio.CancelledError:
                _fail(batch, BatchFailedError("the embedding process stops"))
                raise
            error = running.exception()
            if error is None and len(running.result()) != len(batch):
                error = ValueError(f"{len(running.result())} rows for {len(batch)} items")
            if error is not None:
                _log.error("a batch of %d failed", len(batch), exc_info=error)
                _fail(batch, error)
                continue
            ended_at = time.monotonic()
            for entry, row in zip(batch, running.result(), strict=True):
                if not entry.result.done():
                    entry.result.set_result(_Result(row, started_at, ended_at))

    async def _next_batch(self) -> list[_Waiting[Group, Item, Row]]:
        """Wait for a batch of the group whose item has waited longest."""
        while True:
            self._waiting = [entry for entry in self._waiting if not entry.result.done()]
            self._arrived.clear()
            if not self._waiting:
                await self._arrived.wait()
                continue
            oldest = self._waiting[0]
            same = [entry for entry in self._waiting if entry.group is oldest.group]
            batch = same[: self._max_batch]
            left_s = oldest.queued_at + self._delay_s - time.monotonic()
            if len(batch) == self._max_batch or left_s <= 0:
                taken = set(map(id, batch))
                self._waiting = [entry for entry in self._waiting if id(entry) not in taken]
                return batch
            with suppress(TimeoutError):
                await asyncio.wait_for(self._arrived.wait(), left_s)

    def _on_end(self, worker: asyncio.Task[None]) -> None:
        error = None if worker.cancelled() else worker.exception()
        if error is not None:
            _log.critical("the batcher has ended", exc_info=error)
        _fail(self._waiting, error or BatchFailedError("the embedding process stops"))
        self._waiting = []


def _fail(batch: Sequence[_Waiting[Group, Item, Row]], cause: BaseException) -> None:
    for entry in batch:
        if not entry.result.done():
            failure = BatchFailedError(str(cause))
            failure.__cause__ = cause
            entry.result.set_exception(failure)
