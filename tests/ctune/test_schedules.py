"""The schedules, value by value; the specifications' own numbers are in tests/conformance."""

import math
import re
from itertools import pairwise
from typing import Any

import pytest

from ctune.schedules import (
    ExponentialDecay,
    WarmupCosine,
    cosine_to_cube,
    scale_learning_rate,
    warmup_steps,
)


def test_cosine_runs_from_the_rate_to_its_decayed_cube() -> None:
    lrs = [*cosine_to_cube(lr=0.5, lr_decay_rate=0.2, epochs=10).values(), 0.5 * 0.2**3]
    assert lrs[0] == 0.5
    assert lrs[5] == pytest.approx((lrs[0] + lrs[10]) / 2)
    assert all(later < earlier for earlier, later in pairwise(lrs))


def test_warm_up_is_linear_then_half_a_cosine() -> None:
    lr = WarmupCosine(total=100, peak=2e-3, end=1e-6, warmup=5)
    assert [lr(0), lr(2.5), lr(5)] == pytest.approx([0, 1e-3, 2e-3])
    assert lr(100) == pytest.approx(1e-6)
    assert lr(52.5) == pytest.approx((2e-3 + 1e-6) / 2)


@pytest.mark.parametrize(
    ("ramp", "values"),
    [
        ("start", [0, 1 / 4, 2 / 4, 3 / 4]),
        ("peak", [1 / 4, 2 / 4, 3 / 4, 1]),
        ("both", [0, 1 / 3, 2 / 3, 1]),
        ("neither", [1 / 5, 2 / 5, 3 / 5, 4 / 5]),
    ],
)
def test_ramps_differ_in_the_ends_that_they_have(ramp: Any, values: list[float]) -> None:
    schedule = WarmupCosine(total=8, peak=1.0, warmup=4, ramp=ramp)
    assert schedule.values()[:5] == pytest.approx([*values, 1])
    shifted = WarmupCosine(total=8, peak=3.0, start=2.0, warmup=4, ramp=ramp)
    assert shifted.values()[:4] == pytest.approx([2 + value for value in values])


@pytest.mark.parametrize(
    ("ramp", "first"), [("start", 0), ("peak", 1), ("both", 0), ("neither", 0.5)]
)
def test_ramps_of_one_step(ramp: Any, first: float) -> None:
    assert WarmupCosine(total=3, peak=1.0, warmup=1, ramp=ramp).values()[:2] == [first, 1]


def test_the_last_step_reaches_the_end_only_when_asked_to() -> None:
    assert WarmupCosine(total=4, peak=1.0).values()[-1] > 0
    assert WarmupCosine(total=4, peak=1.0, reach_end=True).values() == pytest.approx(
        [1, 0.75, 0.25, 0]
    )
    assert WarmupCosine(total=1, peak=1.0, reach_end=True).values() == [1.0]


def test_a_ramp_to_a_constant_and_a_momentum_that_rises() -> None:
    ramp = WarmupCosine(total=3, warmup=3, peak=0.07, end=0.07, start=0.04, ramp="both")
    assert ramp.values() == pytest.approx([0.04, 0.055, 0.07])
    assert ramp(3) == 0.07
    momentum = WarmupCosine(total=10, peak=0.996, end=1.0)
    assert momentum(0) == 0.996 and momentum(10) == 1.0 and momentum(5) == pytest.approx(0.998)


def test_in_steps_warms_up_by_step_and_then_changes_once_per_epoch() -> None:
    epochs = cosine_to_cube(lr=0.1, lr_decay_rate=0.1, epochs=5, warmup_epochs=2)
    lrs = epochs.in_steps(4, per_epoch=True).values()
    assert lrs[:9] == pytest.approx([0.1 * step / 8 for step in range(9)])
    assert lrs[8:12] == [0.1] * 4
    assert lrs[12:16] == [epochs(3)] * 4
    assert lrs[16:] == [epochs(4)] * 4


def test_in_steps_without_epochs_changes_with_every_step() -> None:
    epochs = WarmupCosine(total=3, peak=1.0, warmup=0.5)
    assert epochs.in_steps(4).values() == pytest.approx([epochs(step / 4) for step in range(12)])


def test_exponential_decay_per_epoch() -> None:
    lr = ExponentialDecay(peak=0.1, rate=0.5, hold=2)
    assert [lr(step) for step in range(5)] == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025])


@pytest.mark.parametrize(
    ("changes", "time", "message"),
    [
        ({}, -1, "the time is -1; it must be in [0, 10]"),
        ({}, 10.5, "the time is 10.5"),
        ({}, math.nan, "the time is nan"),
        ({"reach_end": True}, 10, "the time is 10; it must be in [0, 9]"),
        ({"total": 0}, 0, "total is 0"),
        ({"total": math.inf}, 0, "total is inf"),
        ({"warmup": 11}, 0, "warmup is 11; it must be in [0, total = 10]"),
        ({"warmup": -1}, 0, "warmup is -1"),
        ({"peak": -0.1}, 0, "peak is -0.1"),
        ({"end": math.nan}, 0, "end is nan"),
        ({"start": math.inf}, 0, "start is inf"),
        ({"ramp": "linear"}, 0, "ramp is 'linear'"),
        ({"hold": 0}, 0, "hold is 0"),
    ],
)
def test_warmup_cosine_refuses(changes: dict[str, Any], time: float, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        WarmupCosine(**{"total": 10, "peak": 0.1, **changes})(time)


def test_further_refusals() -> None:
    half = WarmupCosine(total=2.5, peak=1.0, warmup=0.5)
    with pytest.raises(ValueError, match=r"total is 2\.5"):
        half.values()
    with pytest.raises(ValueError, match=r"warmup is 0\.5; a value per epoch needs whole epochs"):
        half.in_steps(2, per_epoch=True)
    with pytest.raises(ValueError, match="steps_per_epoch is 0"):
        half.in_steps(0)
    with pytest.raises(ValueError, match="lr is 0"):
        cosine_to_cube(lr=0, lr_decay_rate=0.1, epochs=2)
    with pytest.raises(ValueError, match=r"lr_decay_rate is 1\.5"):
        cosine_to_cube(lr=0.1, lr_decay_rate=1.5, epochs=2)
    with pytest.raises(ValueError, match=r"rate 1\.1"):
        ExponentialDecay(peak=0.1, rate=1.1)
    with pytest.raises(ValueError, match="counts from 0"):
        ExponentialDecay(peak=0.1, rate=0.9)(-1)


def test_steps_of_a_warm_up_and_rates_by_batch() -> None:
    assert [warmup_steps(20, 0.2), warmup_steps(9, 0.2), warmup_steps(3, 0.0)] == [4, 1, 0]
    assert scale_learning_rate(5e-4, 1024) == pytest.approx(2e-3)
    assert scale_learning_rate(0.1, 64, divisor=128) == pytest.approx(0.05)
    with pytest.raises(ValueError, match="each must be positive"):
        scale_learning_rate(0.1, 0)
    with pytest.raises(ValueError, match=re.escape("[0, 1)")):
        warmup_steps(20, 1.0)
