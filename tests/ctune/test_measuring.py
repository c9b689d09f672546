"""The calibration on real images; numbers are never compared with a time."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from ctune import measuring
from ctune.child import StopRequest
from ctune.config import RunConfig, resolve
from ctune.estimate import Measurement
from ctune.events import EventWriter
from ctune.measuring import (
    Calibration,
    FewerImages,
    calibrate,
    equal_part,
    tensor_bytes,
)
from ctune.methods import METHOD_CONFIGS
from ctune.pipeline import RunFile
from ctune.rundir import RunDir
from ctune.samplers import EpochBatches
from ctune.store import PackedStore
from tests.squares import tiny_config

EVERY_METHOD = pytest.mark.parametrize("name", METHOD_CONFIGS)


def run(store: Path, root: Path, config: dict[str, Any]) -> Measurement:
    run_dir = RunDir(root / "run").create()
    run_dir.config.write_text(json.dumps({"config": config, "data": str(store)}))
    events = EventWriter(run_dir.events)
    try:
        return Measurement.model_validate(calibrate(run_dir, events, StopRequest()))
    finally:
        events.close()


@EVERY_METHOD
def test_every_stage_is_measured(name: str, store: Path, tmp_path: Path) -> None:
    config = tiny_config(name)
    found = run(store, tmp_path, config)
    summary = PackedStore(store).manifest.summary
    planned = resolve(RunConfig.model_validate(config), summary).method.plan(summary)
    assert [stage.name for stage in found.stages] == [stage.name for stage in planned]
    paces = [found.start_s, found.decode_images_per_s, found.encode_images_per_s]
    for value in [*paces, *(stage.step_s for stage in found.stages)]:
        assert math.isfinite(value) and value > 0
    assert found.memory_bytes is not None
    assert found.memory_bytes > 10_000_000, "the process has loaded torch"
    assert found.image_size_px == 16
    for stage in found.stages:
        assert stage.checkpoint_bytes >= found.model_bytes > 10_000
    assert found.device.startswith("cpu")


def test_features_that_a_stage_begins_with_are_noted(store: Path, tmp_path: Path) -> None:
    found = run(store, tmp_path, tiny_config("lacvit"))
    told = [(s.name, s.encodes_train, s.trains_encoder) for s in found.stages]
    assert told == [("contrastive", False, True), ("probe", True, False)]


def test_steps_for_which_there_is_no_time_are_measured_smaller(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "TRAINING_S", 0.0)
    monkeypatch.setattr(measuring, "TRIAL_S", 0.0)
    config = tiny_config("lacvit")
    config["method"]["preset"] = "paper"
    config["method"]["contrastive"] |= {"accumulate_steps": 2}
    found = run(store, tmp_path, config)
    assert found.remarks[0].startswith("contrastive: measured with 4 images per step instead of 24")
    assert found.memory_bytes is None, "a whole step needs more than what was seen"
    assert all(stage.step_s > 0 for stage in found.stages)


def test_a_loss_that_compares_classes_gets_two_of_them(store: Path, tmp_path: Path) -> None:
    config = tiny_config("lacvit")
    config["method"]["contrastive"] |= {"loss": "n_pair"}
    assert run(store, tmp_path, config).stages[0].step_s > 0


def test_several_gpus_share_the_batch(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config("linear_probe")
    file = RunFile.model_validate({"config": config, "data": store})
    events = EventWriter(tmp_path / "events.jsonl")
    sizes: list[int] = []

    class Watched(FewerImages):
        def __init__(self, whole: EpochBatches, batch_size: int) -> None:
            super().__init__(whole, batch_size)
            sizes.append(batch_size)

    monkeypatch.setattr(measuring, "FewerImages", Watched)
    run_dir = RunDir(tmp_path / "run").create()
    run = Calibration(file, run_dir, events=events, stop=StopRequest(), share=2)
    found = Measurement.model_validate(run.execute())
    events.close()
    assert sizes == [4, 8], "first a few to see the pace, then one half of 16"
    assert "1/2 of each batch" in found.remarks[0]
    assert len(found.remarks) == 1


@pytest.mark.parametrize(
    ("whole", "limit", "least", "part"),
    [(256, 137, 2, 128), (256, 256, 2, 256), (12, 5, 2, 4), (13, 12, 2, 13), (1, 4, 1, 1)],
)
def test_equal_parts_of_a_batch(whole: int, limit: int, least: int, part: int) -> None:
    assert equal_part(whole, limit, least=least) == part


def test_a_queue_takes_the_smaller_batches_too(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "TRIAL_IMAGES", 5)
    config = tiny_config("mae_ct")
    config["method"]["stages"] = ["head_init"]
    assert run(store, tmp_path, config).stages[0].step_s > 0


def test_bytes_of_nested_tensors() -> None:
    state = {"a": torch.zeros(3, 2), "b": [torch.zeros(5, dtype=torch.int64), 7], "c": None}
    assert tensor_bytes(state) == 3 * 2 * 4 + 5 * 8
