"""Many small tensor operations on the CPU: one thread per core, each operation on one core.

Torch splits every operation among its threads and waits for all of them. For operations of a few
microseconds that costs more than it gains, and on a busy machine, where one of the threads waits
for a core, it costs a hundred times more. Independent tasks in threads of their own have no such
waits, and their results do not depend on the number of threads.
"""

import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch


def run_tasks(tasks: Sequence[Callable[[], None]], *, spread: bool) -> None:
    """Run independent tasks with one core per operation; the first error is raised.

    Args:
        tasks: what to do, in any order.
        spread: over as many threads as torch has; else all in one thread, for tasks whose
            operations are so short that threads would only wait for Python's lock.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        _run(tasks)
        return
    shares = [[task] for task in tasks] if spread else [tasks]
    pool = _pool(threads, os.getpid())
    for future in [pool.submit(_run, share) for share in shares]:
        future.result()


def _run(tasks: Sequence[Callable[[], None]]) -> None:
    for task in tasks:
        task()


@functools.cache
def _pool(threads: int, _process: int) -> ThreadPoolExecutor:
    """Make threads in which torch uses one thread each, and leave torch's setting as it is."""
    started = threading.Barrier(threads + 1)

    def begin() -> None:
        torch.get_num_threads()  # the first call in a thread sets it up, and would undo the next
        torch.set_num_threads(1)  # holds for this thread, and for those that begin later
        started.wait()

    pool = ThreadPoolExecutor(threads, "core", begin)
    for _ in range(threads):
        pool.submit(int)
    started.wait()
    torch.set_num_threads(threads)
    return pool
