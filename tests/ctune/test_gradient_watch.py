"""A gradient that leaps up is told once per stage, between two logs and after a resume too."""

import itertools

import pytest
import torch

from ctune.events import Metrics, Warned
from ctune.gradient_watch import FEWEST_NORMS, GradientState, GradientWatch
from ctune.methods.base import Batch, StepOutput
from tests.ctune.test_train import Regression, make_stage, run


def told(watch: GradientWatch, *norms: float, stage: str = "s") -> list[list[str]]:
    """Return the codes of the warnings after each norm, all of them logged."""
    found = []
    for step, norm in enumerate(norms):
        watch.note(torch.tensor(norm))
        found.append([warning.code for warning in watch.warnings(stage, step, norm)])
    return found


def used_to(norms: int = FEWEST_NORMS) -> GradientWatch:
    watch = GradientWatch()
    assert told(watch, *[1.0] * norms) == [[]] * norms
    return watch


def test_more_than_a_hundred_times_the_median_is_told_once_per_stage() -> None:
    watch = used_to()
    assert told(watch, 99.0, 101.0, 500.0) == [[], ["gradient_spike"], []]
    norms = [1.0] * FEWEST_NORMS
    assert told(watch, *norms, 101.0, stage="t")[-1] == ["gradient_spike"]


def test_too_few_norms_and_zeros_say_nothing() -> None:
    assert told(used_to(FEWEST_NORMS - 1), 1000.0) == [[]]
    assert told(GradientWatch(), *[0.0] * FEWEST_NORMS, 1000.0)[-1] == []


def test_a_leap_between_two_logs_is_seen_once() -> None:
    watch = used_to()
    watch.note(torch.tensor(1e6))
    watch.note(torch.tensor(1.0))
    (warning,) = watch.warnings("s", 40, 1.0)
    assert "up to step 40: a gradient norm of 1e+06" in warning.message
    assert told(watch, *[1.0] * 3) == [[]] * 3


@pytest.mark.parametrize("at", [0, 5, FEWEST_NORMS, FEWEST_NORMS + 2])
def test_a_resumed_stage_says_what_the_whole_one_says(at: int) -> None:
    norms = [1.0 + n / 100 for n in range(FEWEST_NORMS)] + [3.0, 200.0, 1.0, 900.0]
    whole = told(GradientWatch(), *norms)
    first, second = GradientWatch(), GradientWatch()
    before = told(first, *norms[:at])
    first.note(torch.tensor(7.0))
    second.resume(GradientState.model_validate_json(first.state.model_dump_json()))
    assert second.state == first.state
    assert before + told(second, *norms[at:]) == whole
    assert sum(map(len, whole)) == 1


def test_what_is_not_finite_can_be_kept() -> None:
    watch = used_to()
    watch.note(torch.tensor(torch.inf))
    GradientState.model_validate_json(watch.state.model_dump_json())
    assert [warning.code for warning in watch.warnings("s", 9, 1.0)] == ["gradient_spike"]


def test_the_loop_tells_it() -> None:
    """2,700 steps log every second one; the leap is in a step that is not logged."""

    class Leaping(Regression):
        def step(self, batch: Batch, generator: torch.Generator) -> StepOutput:
            output = super().step(batch, generator)
            return StepOutput(output.loss * (1e4 if len(self.seen) == 1002 else 1))

    method = Leaping()
    rest = torch.optim.SGD(method.parameters(), lr=0.0)
    events = run(make_stage(method=method, optimizer=rest, epochs=900, lr_at=lambda step: 0.0))
    assert max(e.values["grad_norm"] or 0 for e in events if isinstance(e, Metrics)) < 1000
    pairs = itertools.pairwise(events)
    (before,) = [a for a, b in pairs if isinstance(b, Warned) and b.code == "gradient_spike"]
    assert isinstance(before, Metrics) and before.step == 1002
