"""What a MAE-CT run says before its first step and at its end."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ctune.methods.mae_ct.advice import FeatureChange, advise, start_warnings
from tests.ctune.methods.test_contract import Bench

FITTING: dict[str, Any] = {
    "encoder_is_mae": True,
    "queue_size": 512,
    "num_images": 512,
    "temperatures": {"head_init": 0.05, "contrastive_tuning": 1.0},
}


@pytest.mark.parametrize(
    ("change", "codes"),
    [
        ({}, []),
        ({"encoder_is_mae": False}, ["encoder_not_mae"]),
        ({"num_images": 511}, ["queue_exceeds_dataset"]),
        ({"temperatures": {"head_init": 0.04}}, ["unusual_temperature"]),
        ({"temperatures": {"head_init": 0.1, "contrastive_tuning": 1.1}}, ["unusual_temperature"]),
    ],
)
def test_before_the_first_step(change: dict[str, Any], codes: list[str]) -> None:
    assert [warning.code for warning in start_warnings(**FITTING | change)] == codes


def scores(knn: float, head: float | None = None) -> dict[str, Any]:
    return {"knn": {"top1": knn}} | ({} if head is None else {"nnclr_head": {"knn_top1": head}})


@pytest.mark.parametrize(
    ("before", "after", "codes"),
    [
        (scores(0.5), scores(0.6, 0.55), []),
        (scores(0.5), scores(0.5, 0.51), []),
        (scores(0.5), scores(0.49, 0.51), ["no_gain"]),
        (scores(0.5), scores(0.6, 0.5), ["head_not_informative"]),
        (scores(0.5), scores(0.4, 0.3), ["head_not_informative", "no_gain"]),
        ({"knn": {"top1": 0.5, "k1": {"top1": 0.4}}}, scores(0.6, 0.45), []),
        ({"knn": {"top1": 0.5, "k1": {"top1": 0.6}}}, scores(0.6, 0.6), ["head_not_informative"]),
        (scores(1.0), scores(1.0, 1.0), []),
        (scores(0.5), scores(0.6), []),
        (None, scores(0.1, 0.1), []),
        ({}, {}, []),
    ],
)
def test_at_the_end(before: Any, after: Any, codes: list[str]) -> None:
    assert [warning.code for warning in advise(before, after)] == codes


def test_an_encoder_that_hardly_moved_is_told_also_after_a_resume(
    store: Path, tmp_path: Path
) -> None:
    bench = Bench("mae", store, tmp_path)
    encoder, context = bench.encoder, bench.context()
    unborn = FeatureChange(48, encoder.embed_dim)
    assert unborn.warnings(context) == [], "the stage never began"
    change = FeatureChange(48, encoder.embed_dim)
    change.remember(context)
    torch.testing.assert_close(change.start[0], bench.encode()[0])
    start = change.start.clone()
    weights = {name: value.clone() for name, value in encoder.state_dict().items()}
    block = encoder.get_parameter("backbone.blocks.1.mlp.fc2.weight")
    noise = torch.randn(block.shape, generator=torch.Generator().manual_seed(0))
    told = {}
    for scale in (0.0, 1e-6, 1e-2):
        encoder.load_state_dict(weights)
        with torch.no_grad():
            block.add_(scale * noise)
        resumed = FeatureChange(48, encoder.embed_dim)
        resumed.load_state_dict(change.state_dict())
        resumed.remember(context)
        assert torch.equal(resumed.start, start), "noted once"
        told[scale] = [warning.code for warning in resumed.warnings(context)]
    assert told == {0.0: ["ema_too_slow"], 1e-6: ["ema_too_slow"], 1e-2: []}


def test_images_of_the_working_size_are_made_to_fit(store: Path, tmp_path: Path) -> None:
    bench = Bench("mae", store, tmp_path)
    encoder, context = bench.encoder, bench.context()

    class Large:
        def batch(self, positions: Any) -> torch.Tensor:
            return bench.cache.batch(positions).repeat_interleave(2, 2).repeat_interleave(2, 3)

    large: Any = Large
    whole, half = (FeatureChange(48, encoder.embed_dim) for _ in range(2))
    whole.remember(context)
    half.remember(replace(context, train_images=large))
    assert (half.start - whole.start).norm() < 0.2 * whole.start.norm()
