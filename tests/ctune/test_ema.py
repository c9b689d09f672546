"""Moving averages: what is averaged, what is copied, and that a checkpoint keeps them."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ctune.checkpoint import load_checkpoint, optimizer_state, save_checkpoint
from ctune.ema import ema_update, make_average
from ctune.events import Warned
from ctune.methods.base import Batch, FeatureSource, Method, Stage, StepOutput
from ctune.optim import make_optimizer
from ctune.samplers import RandomBatchSampler
from ctune.schedules import WarmupCosine
from ctune.train import fit
from tests.ctune.test_train import make_hooks

TOTAL_STEPS = 6


class Student(Method):
    """A layer with batch norm that follows the mean of the inputs; its teacher is an average."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        self.teacher = make_average(self.student)
        self.momentum = WarmupCosine(total=TOTAL_STEPS, peak=0.5, end=1.0)

    def step(self, batch: Batch, generator: torch.Generator) -> StepOutput:
        target = self.teacher(batch.inputs)
        return StepOutput((self.student(batch.inputs) - target - 1).square().mean())

    def after_step(self, step: int) -> list[Warned]:
        ema_update(
            self.student.state_dict(), self.teacher.state_dict(), momentum=self.momentum(step)
        )
        return []


def make_stage(method: Student) -> Stage:
    features = torch.randn(12, 2, generator=torch.Generator().manual_seed(1))
    return Stage(
        method=method,
        source=FeatureSource(features, torch.zeros(12, dtype=torch.int64)),
        sampler=RandomBatchSampler(12, 4, seed=0),
        epochs=2,
        optimizer=make_optimizer("adamw", [*method.student.parameters()], lr=0.1),
        lr_at=lambda step: 0.1,
    )


def test_the_average_in_a_checkpoint_goes_on_bit_for_bit(tmp_path: Path) -> None:
    whole = Student()
    stage = make_stage(whole)

    def save(step: int) -> None:
        state = {"modules": whole.state_dict(), "optimizer": stage.optimizer.state_dict()}
        save_checkpoint(tmp_path, state, stage="s", stage_index=0, step=step)

    def train(stage: Stage, start_step: int, **hooks: Any) -> None:
        hooks = make_hooks(checkpoint_interval_s=0, **hooks)  # type: ignore[assignment]
        fit(stage, name="s", seed=1, start_step=start_step, hooks=hooks)  # type: ignore[arg-type]

    train(stage, 0, save=save)
    _, state = load_checkpoint(tmp_path / "s-00000003")
    again = Student()
    again.load_state_dict(state["modules"])
    resumed = make_stage(again)
    resumed.optimizer.load_state_dict(optimizer_state(state["optimizer"]))
    assert not torch.equal(again.teacher[0].weight, whole.teacher[0].weight)  # type: ignore[arg-type]
    train(resumed, 3)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert not torch.equal(whole.teacher[0].weight, whole.student[0].weight)  # type: ignore[arg-type]


def state(**values: Any) -> dict[str, Tensor]:
    return {name.replace("__", "."): torch.tensor(value) for name, value in values.items()}


def test_parameters_are_averaged_statistics_and_integers_copied() -> None:
    online = state(weight=[1.0], bn__running_mean=[4.0], bn__num_batches_tracked=3, index=[7])
    target = state(weight=[0.0], bn__running_mean=[0.0], bn__num_batches_tracked=0, index=[0])
    ema_update(online, target, momentum=0.75)
    expected = state(weight=[0.25], bn__running_mean=[4.0], bn__num_batches_tracked=3, index=[7])
    assert target == expected


@pytest.mark.parametrize(("momentum", "changed"), [(1.0, False), (0.0, True)])
def test_momentum_one_keeps_and_zero_copies_exactly(momentum: float, changed: bool) -> None:
    online, target = {"w": torch.randn(50)}, {"w": torch.randn(50)}
    wanted = (online if changed else target)["w"].clone()
    ema_update(online, target, momentum=momentum)
    assert torch.equal(target["w"], wanted)


def test_equal_values_stay_exactly_as_they_are() -> None:
    online = {"w": torch.randn(50)}
    target = {"w": online["w"].clone()}
    ema_update(online, target, momentum=0.996)
    assert torch.equal(target["w"], online["w"])


def test_an_average_shares_nothing_and_is_not_trained() -> None:
    layer = nn.Linear(2, 2)
    average = make_average(layer)
    assert average.weight.data_ptr() != layer.weight.data_ptr()
    assert not any(p.requires_grad for p in average.parameters())
    assert layer.weight.requires_grad


@pytest.mark.parametrize(
    ("online", "momentum", "message"),
    [
        ({"w": [1.0]}, 1.1, "momentum is 1.1"),
        ({"v": [1.0]}, 0.5, "online and target differ in ['v', 'w']"),
        ({"w": [1.0, 2.0]}, 0.5, "online and target differ in ['w']"),
    ],
)
def test_it_refuses(online: dict[str, Any], momentum: float, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ema_update(state(**online), state(w=[0.0]), momentum=momentum)
