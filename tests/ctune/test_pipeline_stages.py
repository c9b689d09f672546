"""A run of three stages, stopped in each of them."""

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ctune.events import Stopped
from tests.ctune.test_pipeline import (
    assert_same_outcome,
    end_when,
    events,
    finish,
    prepare,
    saved,
)
from tests.squares import tiny_config


@pytest.mark.slow
def test_stopped_in_each_stage_it_ends_like_an_uninterrupted_run(
    tmp_path: Path, store: Path
) -> None:
    """Queue, both averages and watches included: they are in the head and the metrics."""
    config = tiny_config("mae_ct", evaluation={"protocols": ["knn"], "knn_k": 5})
    whole = prepare(tmp_path / "whole", store, config)
    reference = whole, finish(whole)
    stopped = prepare(tmp_path / "stopped", store, config)
    for stage, step in (("mae", 3), ("head_init", 5), ("contrastive_tuning", 3)):
        end_when(stopped, saved(stage, step), signal.SIGTERM)
        assert isinstance(events(stopped)[-1], Stopped), stage
    assert_same_outcome(reference, stopped)
    head, expected = (load_file(r.model / "nnclr_head.safetensors") for r in (stopped, whole))
    assert all(torch.equal(head[name], expected[name]) for name in expected)
