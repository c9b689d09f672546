"""Runs that are asked to finish early: which stages end, what is kept, what a resumed run does."""

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ctune.child import StopRequest, StopRequested
from ctune.early_end import EarlyEnd, EarlyState
from ctune.events import (
    CheckpointSaved,
    EventBase,
    EventWriter,
    Finished,
    Metrics,
    Progress,
    StageStarted,
)
from ctune.methods.base import Stage, StagePlan
from ctune.pipeline import Run, RunFile
from ctune.rundir import RunDir
from tests.ctune.test_pipeline import end_when, events, finish, prepare, saved, series, start
from tests.squares import tiny_config

LONG = tiny_config()
LONG["method"]["contrastive"]["epochs"] = 2000
LONG["resources"]["checkpoint_interval_s"] = 0.2


def never() -> Stage:
    raise AssertionError("not to be started")


PLANS = [
    StagePlan("first", 10, 100, never),
    StagePlan("second", 20, 400, never),
    StagePlan("probe", 30, 50, never, finishing=True),
]


def early_end(*wishes: bool) -> tuple[EarlyEnd, list[EventBase]]:
    told: list[EventBase] = []
    answers = iter(wishes)
    return EarlyEnd(lambda: next(answers), emit=told.append), told


def test_the_stage_that_trains_ends_and_only_finishing_ones_follow() -> None:
    early, told = early_end(False, False, True)
    assert not early.leaves_out(PLANS[0], 0, is_first=True)
    assert [early.ends(PLANS[0], step) for step in (3, 4, 5)] == [False, True, False]
    assert early.ended == {"stage": "first", "step": 4, "total_steps": 10}
    assert early.leaves_out(PLANS[1], 0, is_first=False)
    assert not early.leaves_out(PLANS[2], 0, is_first=False)
    assert not early.ends(PLANS[2], 7), "the wish has had its effect"
    assert early.image_passes(PLANS) == 40 + 50
    assert [event.model_dump()["code"] for event in told] == ["stopped_early"]


def test_between_two_stages_the_next_is_left_out() -> None:
    early, _ = early_end(True)
    assert early.leaves_out(PLANS[1], 0, is_first=False)
    assert early.ended == {"stage": "second", "step": 0, "total_steps": 20}
    assert early.image_passes(PLANS) == 100 + 50


def test_the_first_stage_makes_a_step_at_least() -> None:
    early, _ = early_end(True, True)
    assert not early.leaves_out(PLANS[0], 0, is_first=True)
    assert early.ends(PLANS[0], 1)


def test_a_finishing_stage_that_has_not_begun_is_done_whole() -> None:
    early, told = early_end(True)
    assert not early.leaves_out(PLANS[2], 0, is_first=True)
    assert not early.ends(PLANS[2], 1)
    assert (early.ended, told, early.image_passes(PLANS)) == (None, [], 550)


def test_what_was_decided_survives_in_a_checkpoint() -> None:
    early, _ = early_end(True)
    assert early.ends(PLANS[0], 4)
    resumed, told = early_end()
    resumed.state = EarlyState.model_validate(json.loads(early.state.model_dump_json()))
    assert resumed.leaves_out(PLANS[0], 4, is_first=True)
    assert resumed.leaves_out(PLANS[1], 0, is_first=False)
    assert not resumed.leaves_out(PLANS[2], 12, is_first=False)
    assert resumed.ended == early.ended
    assert told == []


def test_a_wish_that_came_after_the_checkpoint_ends_its_stage_there() -> None:
    for plan in (PLANS[0], PLANS[2]):
        early, _ = early_end(True)
        assert early.leaves_out(plan, 6, is_first=True)
        assert early.ended == {"stage": plan.name, "step": 6, "total_steps": plan.total_steps}


# --- whole runs ---


class Watched(EventWriter):
    """Calls `react` after each event."""

    def __init__(self, run_dir: RunDir, react: Callable[[EventBase], None]) -> None:
        super().__init__(run_dir.events)
        self._react = react

    def write(self, event: EventBase) -> None:
        super().write(event)
        self._react(event)


def run(
    run_dir: RunDir, react: Callable[[EventBase, StopRequest], None] = lambda event, stop: None
) -> dict[str, Any]:
    """Do a run in this process; `react` may ask for something at any of its events."""
    stop = StopRequest()
    writer = Watched(run_dir, lambda event: react(event, stop))
    try:
        file = RunFile.model_validate_json(run_dir.config.read_bytes())
        return Run(file, run_dir, events=writer, stop=stop).execute()
    finally:
        writer.close()


def finish_at(stage: str, step: int) -> Callable[[EventBase, StopRequest], None]:
    """Ask to finish early when the loss of a step is told: the next step is the last."""

    def react(event: EventBase, stop: StopRequest) -> None:
        if isinstance(event, Metrics) and "loss" in event.values:
            stop.finish_requested |= (event.stage, event.step) == (stage, step)

    return react


def steps_of(run_dir: RunDir, stage: str) -> list[int]:
    """Return the steps that one attempt trained."""
    return [step for where, name, step in series(run_dir) if (where, name) == (stage, "loss")]


def weights(run_dir: RunDir) -> dict[str, torch.Tensor]:
    return load_file(run_dir.model / "model.safetensors")


def assert_same_weights(one: RunDir, other: RunDir) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory, store: Path) -> tuple[RunDir, dict[str, Any]]:
    """A run that was asked to finish after step 5 of 12 of its first stage."""
    run_dir = prepare(tmp_path_factory.mktemp("stopped") / "a1", store, tiny_config())
    return run_dir, run(run_dir, finish_at("contrastive", 4))


def test_a_stopped_run_gives_an_evaluated_model(stopped: tuple[RunDir, dict[str, Any]]) -> None:
    run_dir, result = stopped
    assert result["stopped_early"] == {"stage": "contrastive", "step": 6, "total_steps": 12}
    assert result["evaluation"]["after"]["classifier"]["top1"] >= 0.8, "the probe is trained"
    assert set(result["evaluation"]["after"]) >= set(result["evaluation"]["before"])
    assert [w["code"] for w in result["warnings"]].count("stopped_early") == 1
    assert result["image_passes"] == 48 * 2 * 3 // 2 + 48
    model = json.loads((run_dir.model / "model.json").read_text())
    assert model["provenance"]["stopped_early"] == result["stopped_early"]
    assert steps_of(run_dir, "contrastive") == list(range(6))
    assert steps_of(run_dir, "probe") == list(range(9))
    last = [event for event in events(run_dir) if isinstance(event, Progress)][-1]
    assert (last.stage, last.step, last.fraction) == ("probe", 9, 1.0)
    kept = [event for event in events(run_dir) if isinstance(event, CheckpointSaved)][-1].kept
    assert "contrastive-00000006" in kept


@pytest.mark.parametrize("point", ["evaluating", "probe"])
def test_paused_after_the_stop_it_does_not_train_on(
    tmp_path: Path, store: Path, stopped: tuple[RunDir, dict[str, Any]], point: str
) -> None:
    """The second attempt is not told of the wish: the checkpoint knows."""
    first = prepare(tmp_path / "a1", store, tiny_config())
    finishing = finish_at("contrastive", 4)

    def react(event: EventBase, stop: StopRequest) -> None:
        finishing(event, stop)
        begun = isinstance(event, StageStarted) and event.stage == point
        if begun and stop.finish_requested:
            stop.request("asked to stop")

    with pytest.raises(StopRequested):
        run(first, react)
    second = prepare(tmp_path / "a2", store, tiny_config(), (first.root,))
    result = run(second)
    assert result["stopped_early"] == stopped[1]["stopped_early"]
    assert result["evaluation"] == stopped[1]["evaluation"]
    assert steps_of(second, "contrastive") == []
    assert_same_weights(second, stopped[0])


def test_stopped_in_a_finishing_stage_that_one_ends(tmp_path: Path, store: Path) -> None:
    run_dir = prepare(tmp_path / "a1", store, tiny_config("linear_probe"))
    result = run(run_dir, finish_at("probe", 3))
    assert result["stopped_early"] == {"stage": "probe", "step": 5, "total_steps": 9}
    assert "classifier" in result["evaluation"]["after"]


def test_a_later_attempt_is_told_of_the_wish(
    tmp_path: Path, store: Path, stopped: tuple[RunDir, dict[str, Any]]
) -> None:
    """The worker died after the wish and before the child could act on it."""
    first = prepare(tmp_path / "a1", store, tiny_config())

    def react(event: EventBase, stop: StopRequest) -> None:
        if saved("contrastive", 6)(event):
            stop.request("killed")

    with pytest.raises(StopRequested):
        run(first, react)
    second = prepare(tmp_path / "a2", store, tiny_config(), (first.root,))
    told = RunFile.model_validate_json(second.config.read_text())
    second.config.write_text(told.model_copy(update={"finish": True}).model_dump_json())
    result = run(second)
    at = max(steps_of(first, "contrastive")) + 1
    assert result["stopped_early"] == {"stage": "contrastive", "step": at, "total_steps": 12}
    assert steps_of(second, "contrastive") == []


def finish_when_it_trains(run_dir: RunDir) -> Callable[[EventBase], bool]:
    """Tell a child, by the file that the worker makes, as soon as it trains; true once it ends."""

    def completes(event: EventBase) -> bool:
        if isinstance(event, Metrics) and event.stage == "contrastive" and event.step > 0:
            run_dir.finish.touch()
        return isinstance(event, StageStarted) and event.stage == "probe"

    return completes


def test_killed_after_the_stop(tmp_path: Path, store: Path) -> None:
    first = prepare(tmp_path / "a1", store, LONG)
    end_when(first, finish_when_it_trains(first), signal.SIGKILL)
    second = prepare(tmp_path / "a2", store, LONG, (first.root,))
    ended = finish(second).result["stopped_early"]
    assert ended["stage"] == "contrastive" and 1 < ended["step"] < ended["total_steps"] == 8000
    assert steps_of(second, "contrastive") == []
    assert (second.model / "model.safetensors").exists()


@pytest.mark.slow
def test_two_processes_end_a_stage_together(tmp_path: Path, store: Path) -> None:
    run_dir = prepare(tmp_path / "a1", store, LONG)
    launcher = start(run_dir, "tests.ctune.two_ranks")
    completes, deadline = finish_when_it_trains(run_dir), time.monotonic() + 120
    while launcher.poll() is None:
        assert time.monotonic() < deadline, run_dir.log.read_text()
        any(completes(event) for event in events(run_dir))
        time.sleep(0.05)
    last = events(run_dir)[-1]
    assert isinstance(last, Finished), run_dir.log.read_text()
    ended = last.result["stopped_early"]
    assert ended["stage"] == "contrastive" and 1 < ended["step"] < ended["total_steps"] == 8000
    assert max(steps_of(run_dir, "contrastive")) < ended["step"]
    assert max(steps_of(run_dir, "probe")) == 8
