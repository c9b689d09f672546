"""The stages of a run, one after the other."""

from pathlib import Path

import pytest

from ctune.checkpoint import find_checkpoints, load_checkpoint
from ctune.child import StopRequest, StopRequested
from ctune.events import EventBase, Metrics
from ctune.rundir import RunDir
from ctune.schema import JsonObject
from tests.ctune.test_early_end import assert_same_weights, run
from tests.ctune.test_pipeline import prepare, series
from tests.squares import tiny_config

LAST_STEP = 11


def test_the_last_look_is_taken_again_where_a_stop_cut_it_short(
    tmp_path: Path, store: Path
) -> None:
    config = tiny_config("simclr", evaluation={"knn_k": 5, "online": {"select": "best"}})
    whole = prepare(tmp_path / "whole", store, config)
    expected = run(whole)

    def stop_at_the_end(event: EventBase, stop: StopRequest) -> None:
        if isinstance(event, Metrics) and "loss" in event.values and event.step == LAST_STEP:
            stop.request("asked to stop")

    first = prepare(tmp_path / "a1", store, config)
    with pytest.raises(StopRequested):
        run(first, stop_at_the_end)
    last_look = ("contrastive", "online_knn_top1", LAST_STEP + 1)
    assert last_look not in series(first)
    second = prepare(tmp_path / "a2", store, config, (first.root,))
    assert run(second)["selected"] == expected["selected"]
    assert series(second)[last_look] == series(whole)[last_look]
    assert_same_weights(second, whole)


def gradients(run_dir: RunDir) -> JsonObject:
    state = load_checkpoint(find_checkpoints([run_dir.checkpoints])[0])[1]["gradients"]
    assert isinstance(state, dict)
    return state


def test_a_resumed_run_remembers_the_gradients_of_its_stage(tmp_path: Path, store: Path) -> None:
    whole = prepare(tmp_path / "whole", store, tiny_config("simclr"))
    run(whole)
    assert len(gradients(whole)["norms"]) == LAST_STEP + 1

    def stop_midway(event: EventBase, stop: StopRequest) -> None:
        if isinstance(event, Metrics) and "loss" in event.values and event.step == LAST_STEP // 2:
            stop.request("asked to stop")

    first = prepare(tmp_path / "a1", store, tiny_config("simclr"))
    with pytest.raises(StopRequested):
        run(first, stop_midway)
    second = prepare(tmp_path / "a2", store, tiny_config("simclr"), (first.root,))
    run(second)
    assert gradients(second) == gradients(whole)
