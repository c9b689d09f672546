"""The watch over the vectors of a contrastive loss."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ctune.methods.collapse import CollapseWatch, UniformLoss

LABELS = torch.tensor([0, 0, 1, 1])
UNIFORM = 0.1 / 0.07 * math.log(7)


def watch(**values: Any) -> CollapseWatch:
    defaults: dict[str, Any] = {
        "uniform": UniformLoss(share=0.01, from_step=20),
        "steps_per_epoch": 10,
        "warmup_epochs": 0,
        "hint": "lower the learning rate",
    }
    return CollapseWatch(**defaults | values)


def spread(scale: float = 1.0) -> Tensor:
    return scale * torch.randn(4, 2, 8, generator=torch.Generator().manual_seed(0))


def observe(
    watcher: CollapseWatch, z: Tensor, loss: float = 1.0, labels: Tensor | None = LABELS
) -> dict[str, Tensor]:
    return watcher.observe(z, labels, loss=torch.tensor(loss), uniform_loss=UNIFORM)


def test_collapsed_vectors_are_told_once_after_fifty_steps() -> None:
    watcher, encoder = watch(), nn.Linear(2, 2)
    codes = []
    for step in range(80):
        observe(watcher, torch.ones(4, 2, 8), loss=9.0)
        codes += [(step, w.code, w.hint) for w in watcher.warnings(step, encoder)]
    assert codes == [(49, "collapse", "lower the learning rate")]


def test_fifty_steps_are_as_many_however_many_batches_a_step_accumulates() -> None:
    watcher, encoder = watch(batches_per_step=4), nn.Linear(2, 2)
    told = []
    for step in range(80):
        for _ in range(4):
            observe(watcher, torch.ones(4, 2, 8), loss=9.0)
        told += [step for _ in watcher.warnings(step, encoder)]
    assert told == [49]


def test_directions_count_and_not_lengths() -> None:
    """Raw vectors, as N-pair has them, may be short or long."""
    for scale in (1e-3, 1e3):
        assert observe(watch(), spread(scale))["z_std"] > 0.1
        lengths = torch.linspace(1, 9, 8).view(4, 2, 1)
        assert observe(watch(), scale * lengths * torch.ones(4, 2, 8))["z_std"] < 1e-6


def told_at(uniform: UniformLoss, losses: list[float]) -> list[int]:
    """Return the steps after which a collapse is told of."""
    watcher, encoder = watch(uniform=uniform), nn.Linear(2, 2)
    steps = []
    for step, loss in enumerate(losses):
        observe(watcher, spread(), loss=loss)
        steps += [step for warning in watcher.warnings(step, encoder)]
    return steps


def test_a_loss_that_stays_at_its_uniform_value_is_a_collapse() -> None:
    near, below, above = 0.995 * UNIFORM, 0.98 * UNIFORM, 1.05 * UNIFORM
    rule = UniformLoss(share=0.01, from_step=20)
    assert told_at(rule, [near] * 90) == [69]
    assert told_at(rule, [above] * 90) == [69], "no better than nothing"
    assert told_at(rule, [below] * 90) == []
    assert told_at(rule, [*[near] * 65, *[below] * 25]) == [], "at the start it may be"
    assert told_at(rule, [*[near] * 40, below, *[near] * 49]) == [], "it passes by"
    assert told_at(UniformLoss(share=0.01, above=False, from_step=20), [above] * 90) == []
    assert told_at(UniformLoss(share=0.01, above=False), [1.005 * UNIFORM] * 90) == [49]
    late = UniformLoss(share=0.01, from_step=25)
    assert told_at(late, [near] * 90) == [79], "checked every ten steps"


def test_the_margin_may_be_a_difference() -> None:
    rule = UniformLoss(margin=0.02, from_step=10, steps=20)
    assert told_at(rule, [UNIFORM - 0.019] * 40) == [29]
    assert told_at(rule, [UNIFORM - 0.021] * 40) == []


def test_few_positives_and_an_encoder_that_stands_still_are_told_after_epoch_one() -> None:
    watcher, encoder = watch(), nn.Linear(2, 2)
    watcher.remember(encoder)
    for _ in range(10):
        observe(watcher, spread(), labels=torch.tensor([0, 1, 2, 3]))
    resumed = watch()
    resumed.load_state_dict(watcher.state_dict())
    assert {w.code for w in resumed.warnings(9, encoder)} == {"few_positives", "no_update"}
    with torch.no_grad():
        encoder.weight.add_(0.1)
    observe(watcher, spread())
    assert {w.code for w in watcher.warnings(9, encoder)} == {"few_positives"}
    assert watcher.warnings(19, encoder) == []


def test_without_labels_nothing_is_said_of_positives() -> None:
    watcher, encoder = watch(), nn.Linear(2, 2)
    for _ in range(10):
        assert set(observe(watcher, spread(), labels=None)) == {"z_std"}
    assert watcher.warnings(9, encoder) == []


def test_a_warm_up_of_one_step_per_epoch_moves_nothing_in_the_first() -> None:
    encoder = nn.Linear(2, 2)
    watcher = watch(steps_per_epoch=1, warmup_epochs=2)
    watcher.remember(encoder)
    observe(watcher, spread())
    assert watcher.warnings(0, encoder) == []
    assert [w.code for w in watcher.warnings(1, encoder)] == ["no_update"]
