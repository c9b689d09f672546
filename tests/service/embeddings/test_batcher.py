import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence

import pytest

from service.embeddings.batcher import Batcher, BatchFailedError, Done, QueueFullError

Run = Callable[[str, Sequence[int]], Sequence[int]]
Test = Callable[[Batcher[str, int, int]], Awaitable[None]]


class Recorder:
    """Doubles numbers and remembers the batches; can be held and made to fail."""

    def __init__(self) -> None:
        self.batches: list[tuple[str, list[int]]] = []
        self.free = threading.Event()
        self.free.set()
        self.error: Exception | None = None

    def __call__(self, group: str, items: Sequence[int]) -> list[int]:
        self.batches.append((group, list(items)))
        assert self.free.wait(10)
        if self.error is not None:
            raise self.error
        return [2 * item for item in items]


def check(run: Run, test: Test, *, max_pending: int = 100, max_batch: int = 4) -> None:
    async def whole() -> None:
        batcher = Batcher(run, max_pending=max_pending, max_batch=max_batch)
        batcher.start()
        try:
            await asyncio.wait_for(test(batcher), 20)
        finally:
            await batcher.close()

    asyncio.run(whole())


async def wait_until(met: Callable[[], bool]) -> None:
    while not met():
        await asyncio.sleep(0.001)


def test_calls_share_batches_and_each_gets_its_own_rows() -> None:
    run = Recorder()

    async def test(batcher: Batcher[str, int, int]) -> None:
        calls = [batcher.submit("m", [n, 10 * n]) for n in range(1, 7)]
        done: list[Done[int]] = await asyncio.gather(*calls)
        assert [found.rows for found in done] == [[2 * n, 20 * n] for n in range(1, 7)]
        assert all(found.queue_s >= 0 and found.inference_s > 0 for found in done)

    check(run, test)
    assert [len(items) for _, items in run.batches] == [4, 4, 4]


def test_a_large_call_is_split() -> None:
    run = Recorder()

    async def test(batcher: Batcher[str, int, int]) -> None:
        done = await batcher.submit("m", range(11))
        assert done.rows == [2 * n for n in range(11)]

    check(run, test)
    assert [len(items) for _, items in run.batches] == [4, 4, 3]


def test_groups_are_never_mixed_and_the_oldest_goes_first() -> None:
    run = Recorder()

    async def test(batcher: Batcher[str, int, int]) -> None:
        await asyncio.gather(*(batcher.submit("ab"[n % 2], [n]) for n in range(6)))

    check(run, test)
    assert run.batches == [("a", [0, 2, 4]), ("b", [1, 3, 5])]


def test_no_items() -> None:
    async def test(batcher: Batcher[str, int, int]) -> None:
        assert (await batcher.submit("m", [])).rows == []

    check(Recorder(), test)


def test_a_failure_reaches_every_call_of_the_batch_and_the_next_one_works() -> None:
    run = Recorder()
    run.error = RuntimeError("no memory")

    async def test(batcher: Batcher[str, int, int]) -> None:
        calls = [batcher.submit("m", [n]) for n in range(3)]
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(error, BatchFailedError) for error in found)
        assert {error.__cause__ for error in found if isinstance(error, BaseException)} == {
            run.error
        }
        run.error = None
        assert (await batcher.submit("m", [1])).rows == [2]

    check(run, test)


def test_too_few_rows_are_a_failure_too() -> None:
    async def test(batcher: Batcher[str, int, int]) -> None:
        with pytest.raises(BatchFailedError, match="0 rows for 2 items"):
            await batcher.submit("m", [1, 2])

    check(lambda group, items: [], test)


def test_a_cancelled_call_leaves_the_queue() -> None:
    run = Recorder()
    run.free.clear()

    async def test(batcher: Batcher[str, int, int]) -> None:
        first = asyncio.create_task(batcher.submit("m", [1]))
        await wait_until(lambda: len(run.batches) == 1)
        gone = asyncio.create_task(batcher.submit("m", [2, 3]))
        stays = asyncio.create_task(batcher.submit("m", [4]))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.gather(gone, return_exceptions=True)
        run.free.set()
        assert (await first).rows == [2] and (await stays).rows == [8]

    check(run, test)
    assert run.batches == [("m", [1]), ("m", [4])]


def test_a_call_cancelled_during_its_pass_harms_nobody() -> None:
    run = Recorder()
    run.free.clear()

    async def test(batcher: Batcher[str, int, int]) -> None:
        gone = asyncio.create_task(batcher.submit("m", [1]))
        stays = asyncio.create_task(batcher.submit("m", [2]))
        await wait_until(lambda: len(run.batches) == 1)
        gone.cancel()
        await asyncio.sleep(0)
        run.free.set()
        assert (await stays).rows == [4]

    check(run, test)


def test_places_are_bounded_and_given_back() -> None:
    async def test(batcher: Batcher[str, int, int]) -> None:
        with batcher.reserve(3):
            with pytest.raises(QueueFullError), batcher.reserve(3):
                pass
            with batcher.reserve(2):
                assert batcher.pending == 5
            assert batcher.pending == 3
        with pytest.raises(KeyError), batcher.reserve(5):
            raise KeyError
        assert batcher.pending == 0

    check(Recorder(), test, max_pending=5)


def test_stopping_fails_those_that_wait() -> None:
    run = Recorder()
    run.free.clear()

    async def test(batcher: Batcher[str, int, int]) -> None:
        calls = [asyncio.create_task(batcher.submit(group, [1])) for group in "ab"]
        await wait_until(lambda: len(run.batches) == 1)
        asyncio.get_running_loop().call_later(0.05, run.free.set)
        await batcher.close()
        found = await asyncio.gather(*calls, return_exceptions=True)
        assert all(isinstance(error, BatchFailedError) for error in found)
        assert not batcher.alive
        with pytest.raises(BatchFailedError, match="does not run"):
            await batcher.submit("m", [1])

    check(run, test)
