"""Several processes as one: every collective with two gloo processes, and none with one."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from ctune.distributed import World
from tests.ctune.methods.test_contract import same
from tests.ctune.shared_training import CASES, compute, start_ranks


def test_one_process_sends_nothing() -> None:
    world = World()
    tensor = torch.ones(3, 2, requires_grad=True)
    layer = nn.Linear(2, 1)
    layer(tensor).sum().backward()
    gradient = layer.weight.grad
    world.average_gradients(layer.parameters())
    assert layer.weight.grad is gradient
    assert world.gather(tensor) is tensor
    assert world.mean(tensor) is tensor
    assert world.broadcast("what") == "what"
    assert (world.any(True), world.any(False)) == (True, False)
    assert world.gather_rows(tensor) is tensor
    assert world.on_main(lambda: 3) == 3
    assert world.any_each(True, False) == [True, False]
    assert world.is_main


def test_without_torchrun_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with World.from_environment(gpu=False) as world:
        assert world == World()


@pytest.mark.parametrize(("count", "size"), [(12, 3), (13, 3), (3, 3), (7, 2)])
def test_shares_cover_all_rows_in_order(count: int, size: int) -> None:
    shares = [World(rank, size).share(count) for rank in range(size)]
    rows = [row for share in shares for row in range(count)[share]]
    assert rows == list(range(count))
    sizes = [len(range(count)[share]) for share in shares]
    assert max(sizes) - min(sizes) <= 1


def test_fewer_rows_than_ranks_are_not_divided() -> None:
    assert [World(rank, 4).share(3) for rank in range(4)] == [slice(0, 3)] * 4


@pytest.fixture(scope="module")
def found(store: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two processes found, and at the end what one alone does.

    The two also check every collective, before and after: see `collectives.py`.
    """
    folder = tmp_path_factory.mktemp("shared")
    ranks = start_ranks("tests.ctune.shared_training", str(store), str(folder))
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)
    alone = compute(store, folder / "alone", World())
    return [*(torch.load(folder / f"{rank}.pt") for rank in range(2)), alone]


@pytest.mark.parametrize("case", [*CASES, "sharded supcon", "nnclr head", "transformer heads"])
def test_two_processes_find_the_loss_and_the_gradients_of_one(
    found: list[dict[str, Any]], case: str
) -> None:
    first, second, alone = (results[case] for results in found)
    for other in (first, second):
        torch.testing.assert_close(other["loss"], alone["loss"], rtol=1e-6, atol=1e-6)
        assert other["gradients"].keys() == alone["gradients"].keys()
        largest = max(float(gradient.abs().max()) for gradient in alone["gradients"].values())
        for name, gradient in alone["gradients"].items():
            torch.testing.assert_close(
                other["gradients"][name], gradient, rtol=0, atol=1e-5 * largest
            )


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_like_one(found: list[dict[str, Any]], case: str) -> None:
    first, second, alone = (results[case] for results in found)
    torch.testing.assert_close(first["losses"], alone["losses"], rtol=1e-4, atol=1e-4)
    for name, weight in alone["weights"].items():
        one, two = first["weights"][name], second["weights"][name]
        rounding = 1 if weight.dtype == torch.uint8 else 2e-4  # pixels of a picture, or weights
        torch.testing.assert_close(one, weight, rtol=1e-3, atol=rounding, equal_nan=True)
        assert same(one, two), name


def test_two_processes_fill_the_queue_like_one(found: list[dict[str, Any]]) -> None:
    """Same rows, pointer and statistics of batch norm, and replicas bit for bit."""
    first, second, alone = (results["nnclr head"]["state"] for results in found)
    assert alone["queue.ids"].tolist() == [*range(12), *range(6, 18)]
    for name, value in alone.items():
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-5)
        assert torch.equal(first[name], second[name]), name


def test_two_processes_encode_like_one(found: list[dict[str, Any]]) -> None:
    """Bit for bit: each batch is encoded as one process would, by one of them."""
    first, second, alone = (results["encode"] for results in found)
    for split, count in (("train", 48), ("test", 18)):
        assert alone[split].shape == (count, 24)
        assert torch.equal(first[split], alone[split])
        assert torch.equal(second[split], alone[split])
