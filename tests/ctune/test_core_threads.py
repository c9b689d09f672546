import threading
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from ctune.core_threads import run_tasks


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("spread", [False, True])
def test_runs_every_task_with_one_core_per_operation(spread: bool) -> None:
    seen: list[tuple[int, int]] = []

    def record(n: int) -> None:
        seen.append((n, torch.get_num_threads()))

    tasks = [partial(record, n) for n in range(20)]
    run_tasks(tasks, spread=spread)
    assert sorted(seen) == [(n, 1) for n in range(20)]


def test_leaves_the_setting_of_other_threads() -> None:
    run_tasks([lambda: None], spread=True)
    assert torch.get_num_threads() == 2
    found: list[int] = []
    other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    other.start()
    other.join()
    assert found == [2]


def test_spread_tasks_run_at_the_same_time() -> None:
    meeting = threading.Barrier(2, timeout=10)

    def meet() -> None:
        meeting.wait()

    run_tasks([meet, meet], spread=True)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("spread", [False, True])
def test_raises_the_first_error(threads: int, spread: bool) -> None:
    torch.set_num_threads(threads)

    def fail() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        run_tasks([lambda: None, fail], spread=spread)
    run_tasks([], spread=spread)
