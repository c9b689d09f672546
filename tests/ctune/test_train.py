"""The loop: schedules, accumulation, clipping, stopping, and what it says on the way."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctune.child import StopRequest, StopRequested
from ctune.errors import DivergedError
from ctune.events import EventBase, Metrics, Warned
from ctune.methods.base import Batch, FeatureSource, Method, Stage, StepOutput
from ctune.samplers import RandomBatchSampler
from ctune.train import Hooks, fit

IMAGES, BATCH = 10, 4


class Regression(Method):
    """Mean squared distance of w·x to the label; notes every batch and random draw."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.layer.weight)
        self.seen: list[list[float]] = []
        self.draws: list[tuple[float, float]] = []

    def step(self, batch: Batch, generator: torch.Generator) -> StepOutput:
        self.seen.append(batch.inputs[:, 0].tolist())
        self.draws.append((float(torch.rand(())), float(torch.rand((), generator=generator))))
        loss = (self.layer(batch.inputs)[:, 0] - batch.labels).square().mean()
        return StepOutput(loss, {"size": torch.tensor(float(len(batch.labels)))})

    def after_step(self, step: int) -> list[Warned]:
        return [Warned(code="first", message="first step")] if step == 0 else []


def make_stage(**changes: Any) -> Stage:
    method = Regression()
    features = torch.arange(float(IMAGES)).view(-1, 1)
    parts: dict[str, Any] = {
        "method": method,
        "source": FeatureSource(features, torch.zeros(IMAGES, dtype=torch.int64)),
        "sampler": RandomBatchSampler(IMAGES, BATCH, seed=0, drop_last=False),
        "epochs": 2,
        "optimizer": torch.optim.SGD(method.parameters(), lr=1.0),
        "lr_at": lambda step: 1e-3 * (step + 1),
    }
    return Stage(**parts | changes)


def make_hooks(
    emit: Callable[[EventBase], None] = lambda event: None,
    save: Callable[[int], None] = lambda step: None,
    stop: StopRequest | None = None,
    checkpoint_interval_s: float = 1e9,
) -> Hooks:
    return Hooks(
        emit=emit,
        save=save,
        report_progress=lambda step, rate: None,
        stop=stop or StopRequest(),
        checkpoint_interval_s=checkpoint_interval_s,
    )


def weight(stage: Stage) -> Tensor:
    method = stage.method
    assert isinstance(method, Regression)
    return method.layer.weight.detach().clone()


def run(stage: Stage, start_step: int = 0, **hooks: Any) -> list[EventBase]:
    told: list[EventBase] = []
    fit(stage, name="s", seed=3, start_step=start_step, hooks=make_hooks(told.append, **hooks))
    return told


def test_each_epoch_sees_every_image_once_in_another_order() -> None:
    stage = make_stage()
    run(stage)
    assert isinstance(stage.method, Regression)
    assert [len(batch) for batch in stage.method.seen] == [4, 4, 2, 4, 4, 2]
    epochs = [sorted(itertools.chain(*stage.method.seen[i : i + 3])) for i in (0, 3)]
    assert epochs == [list(np.arange(IMAGES))] * 2
    assert stage.method.seen[:3] != stage.method.seen[3:]


def test_metrics_and_warnings_are_told() -> None:
    told = run(make_stage())
    metrics = [event for event in told if isinstance(event, Metrics)]
    assert [event.step for event in metrics] == list(range(6))
    for event in metrics:
        wanted = {"loss", "lr", "grad_norm", "epoch", "images_per_s", "data_wait", "size"}
        assert set(event.values) == wanted
    assert [event.values["lr"] for event in metrics] == [1e-3 * n for n in range(1, 7)]
    assert next(event for event in told if isinstance(event, Warned)).code == "first"


def test_groups_scale_the_learning_rate() -> None:
    method = Regression()
    group = {"params": list(method.parameters()), "lr_scale": 0.5}
    stage = make_stage(method=method, optimizer=torch.optim.SGD([group], lr=1.0))
    run(stage)
    assert stage.optimizer.param_groups[0]["lr"] == pytest.approx(0.5 * 6e-3)


def test_accumulation_steps_on_the_short_last_group_with_the_mean_of_its_losses() -> None:
    """3 batches in groups of 2: steps on (4, 4) and on (2) alone; gradients average per batch."""
    stage = make_stage(accumulate_steps=2, epochs=1)
    saves: list[int] = []
    run(stage, save=saves.append)
    assert isinstance(stage.method, Regression)
    first, second, third = (torch.tensor(batch) for batch in stage.method.seen)
    w = torch.ones(())
    for lr, group in ((1e-3, (first, second)), (2e-3, (third,))):
        w = w - lr * torch.stack([2 * w * x.square().mean() for x in group]).mean()
    assert float(weight(stage)) == pytest.approx(float(w), rel=1e-6)
    assert saves == [2]


def test_an_epoch_goes_on_where_its_accumulated_batches_ended() -> None:
    stages = [make_stage(accumulate_steps=2, epochs=2) for _ in range(2)]
    run(stages[0])
    run(stages[1], start_step=1)
    whole, resumed = (stage.method for stage in stages)
    assert isinstance(whole, Regression) and isinstance(resumed, Regression)
    assert resumed.seen == whole.seen[2:]
    assert resumed.draws == whole.draws[2:]


def test_clipping_limits_the_step() -> None:
    free, clipped = make_stage(epochs=1), make_stage(epochs=1, clip_grad_norm=1e-3)
    run(free)
    run(clipped)
    assert float((1 - weight(clipped)).abs()) < 1e-4 < float((1 - weight(free)).abs())


def test_clipping_per_tensor_tells_the_norm_before() -> None:
    free, clipped = make_stage(epochs=1), make_stage(epochs=1, clip_tensor_norm=1e-3)
    norms = [
        [event.values["grad_norm"] for event in run(stage) if isinstance(event, Metrics)]
        for stage in (free, clipped)
    ]
    assert norms[0][0] == norms[1][0]
    lrs = [1e-3 * n for n in range(1, 4)]
    assert float(weight(clipped)) == pytest.approx(1 - 1e-3 * sum(lrs), abs=1e-6)


def test_weight_decay_follows_its_schedule_where_a_group_is_decayed() -> None:
    method = Regression()
    other = nn.Parameter(torch.ones(1))
    groups = [
        {"params": list(method.parameters()), "decayed": True},
        {"params": [other], "decayed": False},
    ]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    run(make_stage(method=method, optimizer=optimizer, weight_decay_at=lambda step: 0.1 * step))
    assert [g["weight_decay"] for g in optimizer.param_groups] == pytest.approx([0.5, 0.0])


def test_randomness_depends_on_the_step_alone() -> None:
    whole, rest = make_stage(), make_stage()
    run(whole)
    run(rest, start_step=4)
    assert isinstance(whole.method, Regression)
    assert isinstance(rest.method, Regression)
    assert whole.method.draws[4:] == rest.method.draws
    assert whole.method.seen[4:] == rest.method.seen
    assert len(set(whole.method.draws)) == 6


def test_checkpoints_come_at_their_interval_and_at_the_end() -> None:
    saves: list[int] = []
    run(make_stage(), save=saves.append, checkpoint_interval_s=0)
    assert saves == [1, 2, 3, 4, 5, 6]
    saves.clear()
    run(make_stage(), save=saves.append)
    assert saves == [6]


def test_a_stop_request_saves_first() -> None:
    stop, saves = StopRequest(), list[int]()

    def emit(event: EventBase) -> None:
        if isinstance(event, Metrics) and event.step == 1:
            stop.request("asked to stop")

    with pytest.raises(StopRequested, match="asked to stop"):
        fit(
            make_stage(),
            name="s",
            seed=3,
            start_step=0,
            hooks=make_hooks(emit, saves.append, stop, 1e9),
        )
    assert saves in ([2], [3])


def test_no_checkpoint_holds_a_value_that_is_not_finite() -> None:
    """2,500 steps log every second one: the NaN between two logs is seen before it is saved."""
    stage = make_stage(epochs=900, lr_at=lambda step: float("nan") if step == 1000 else 0.0)
    saves: list[int] = []
    with pytest.raises(DivergedError, match="step 1000"):
        run(stage, save=saves.append, checkpoint_interval_s=0)
    assert max(saves) == 1000
