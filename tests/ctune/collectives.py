"""Checks of `World` that run inside two ranks (`shared_training.py`)."""

import os
from dataclasses import replace

import pytest
import torch
from torch import nn

from ctune.child import StopRequest, StopRequested
from ctune.distributed import World
from ctune.errors import RankLostError
from ctune.events import EventBase, Metrics
from ctune.train import fit
from tests.ctune.test_train import Regression, make_hooks, make_stage


def check_gathering(world: World) -> None:
    own = torch.full((2, 3), float(world.rank), requires_grad=True)
    everyone = world.gather(own)
    assert everyone.tolist() == [[0.0] * 3] * 2 + [[1.0] * 3] * 2
    weights = torch.arange(4.0).view(4, 1) * (world.rank + 1)
    torch.autograd.backward((everyone * weights).sum())
    rows = torch.arange(4.0)[2 * world.rank : 2 * world.rank + 2]
    assert own.grad is not None
    assert torch.equal(own.grad, (rows * (1 + 2)).view(2, 1).expand(2, 3)), "sum of both ranks'"
    labels = world.gather(torch.tensor([world.rank, 7]))
    assert labels.tolist() == [0, 7, 1, 7]
    uneven = world.gather_rows(torch.full((world.rank + 1, 2), float(world.rank)))
    assert uneven.tolist() == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]


def check_gradients_and_weights(world: World) -> None:
    torch.manual_seed(world.rank)
    layer = nn.Linear(2, 1)
    unused = nn.Parameter(torch.ones(1))
    world.unite(layer)
    torch.manual_seed(0)
    expected = nn.Linear(2, 1)
    assert torch.equal(layer.weight, expected.weight)
    torch.autograd.backward(layer(torch.full((1, 2), float(world.rank + 1))).sum())
    double = nn.Parameter(torch.ones(3, dtype=torch.float64))
    double.grad = torch.full((3,), float(world.rank), dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ctune.distributed.BUCKET_BYTES", 8)
        world.average_gradients([unused, *layer.parameters(), double])
    assert layer.weight.grad is not None
    assert layer.weight.grad.tolist() == [[1.5, 1.5]]
    assert layer.bias.grad is not None
    assert layer.bias.grad.tolist() == [1.0]
    assert unused.grad is None
    assert double.grad.tolist() == [0.5] * 3
    assert float(world.mean(torch.tensor(float(world.rank)))) == 0.5


def check_decisions(world: World) -> None:
    assert world.any(world.rank == 1)
    assert not world.any(False)
    assert world.any_each(world.rank == 0, False) == [True, False]
    assert world.broadcast({"rank": world.rank}) == {"rank": 0}
    assert world.on_main(lambda: [world.rank]) == [0]
    stop = StopRequest()
    world.check(stop)
    if world.rank == 1:
        stop.request("asked to stop")
    with pytest.raises(StopRequested):
        world.check(stop)


def check_a_stage(world: World) -> None:
    """10 images in batches of 4, 4 and 2; rank 1 alone is asked to stop, in its second step."""
    stage, stop, saves = make_stage(), StopRequest(), list[int]()
    told: list[Metrics] = []

    def emit(event: EventBase) -> None:
        if isinstance(event, Metrics):
            told.append(event)
            if event.step == 1 and world.rank == 1:
                stop.request("asked to stop")

    hooks = replace(make_hooks(emit, saves.append, stop), world=world)
    with pytest.raises(StopRequested):
        fit(stage, name="s", seed=3, start_step=0, hooks=hooks)
    assert saves == [3], "on both: the next vote comes with the third step"
    assert [event.values["size"] for event in told] == [2.0, 2.0, 1.0], "mean of the shares"
    assert isinstance(stage.method, Regression)
    seen = world.gather(torch.tensor(stage.method.seen[:2])).tolist()
    batches = stage.sampler.batches(0)[:2]
    assert [a + b for a, b in zip(seen[:2], seen[2:], strict=True)] == [b.tolist() for b in batches]
    draws = torch.tensor(stage.method.draws)
    first, second = world.gather(draws).chunk(2)
    assert torch.equal(first[:, 1], second[:, 1]), "views are drawn for the global batch"
    assert not bool((first[:, 0] == second[:, 0]).any()), "other rows drop other paths"


def check_the_end_of_another(world: World) -> None:
    """Rank 1 ends; rank 0 notices instead of waiting for ever, in forward and in backward."""
    own = torch.ones(1, requires_grad=True)
    everyone = world.gather(own)
    if world.rank == 1:
        os._exit(0)
    with pytest.raises(RankLostError, match="lost each other"):
        torch.autograd.backward(everyone.sum())
    with pytest.raises(RankLostError):
        world.any(False)
    os._exit(0)  # nobody is left to say goodbye to
