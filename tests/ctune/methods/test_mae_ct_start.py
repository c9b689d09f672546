"""What the stages of MAE-CT start from: encoders that do not fit, heads of other runs."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ctune
from ctune.backbones import build_encoder
from ctune.encoders import TimmEncoder
from ctune.errors import ConfigError
from ctune.methods.mae_ct.config import HEAD
from ctune.methods.mae_ct.method import build
from ctune.methods.mae_ct.stage_config import TuningConfig
from ctune.methods.mae_ct.stages import freeze_lower_blocks
from ctune.rundir import RunDir
from ctune.schema import JsonObject
from tests.ctune.methods.test_mae_ct import bench, copies, modules, train
from tests.squares import tiny_config


@pytest.mark.parametrize(
    ("encoder", "mask_ratio", "said"),
    [({"reg_tokens": 1}, 0.5, "no register tokens"), ({}, 0.9, "leaves none of 4 patches")],
)
@pytest.mark.parametrize("stage", ["head_init", "contrastive_tuning"])
def test_a_mask_that_does_not_fit_is_refused_before_any_stage(
    encoder: JsonObject, mask_ratio: float, said: str, stage: str, store: Path, tmp_path: Path
) -> None:
    whole = bench(store, tmp_path)
    options = whole.config.encoder.model_dump()["options"] | encoder
    timm = whole.config.encoder.model_copy(update={"options": options})
    context = replace(whole.context(), encoder=build_encoder(timm, pool="cls", encoder_dir=None))
    block: Any = whole.config.method
    masked = getattr(block, stage).model_copy(update={"mask_ratio": mask_ratio})
    with pytest.raises(ConfigError, match=said):
        build(block.model_copy(update={stage: masked}), context)


def test_more_frozen_blocks_than_there_are(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"num_frozen_blocks is 2, but \w+ has 2 blocks"):
        bench(store, tmp_path, contrastive_tuning={"num_frozen_blocks": 2})


def test_an_encoder_without_blocks_is_refused_with_a_hint() -> None:
    encoder = build_encoder(
        TimmEncoder(name="test_resnet", pretrained=False, image_size_px=32),
        pool="auto",
        encoder_dir=None,
    )
    with pytest.raises(ConfigError, match="0 blocks") as error:
        freeze_lower_blocks(encoder, TuningConfig())
    assert "vision transformer" in error.value.hint


def test_nothing_below_frozen_blocks_drops_anything() -> None:
    options = {"patch_size": 8, "depth": 3, "embed_dim": 24, "num_heads": 2, "pos_drop_rate": 0.5}
    encoder = build_encoder(
        TimmEncoder(
            name="vit_tiny_patch16_224", pretrained=False, image_size_px=16, options=options
        ),
        pool="cls",
        encoder_dir=None,
    )
    half = freeze_lower_blocks(encoder, TuningConfig())
    backbone: Any = encoder.backbone
    assert {backbone.patch_embed, backbone.pos_drop, backbone.blocks[0]} <= {*half}
    assert not {backbone.blocks[1], backbone.norm} & {*half}
    assert freeze_lower_blocks(encoder, TuningConfig(num_frozen_blocks=0)) == []


def test_a_queue_of_another_data_set_hides_no_image(store: Path, tmp_path: Path) -> None:
    first = bench(store, tmp_path)
    train(first, 0)
    kept = copies(modules(first)[HEAD])
    context = replace(first.context(), start_head=lambda name: kept, has_start_data=False)
    method: Any = first.config.method.model_copy(update={"stages": ["contrastive_tuning"]})
    found: Any = build(method, context).modules[HEAD]
    assert torch.equal(found.queue.features, kept["queue.features"])
    assert set(found.queue.ids.tolist()) == set(found.queue.labels.tolist()) == {-1}
    same: Any = build(method, replace(context, has_start_data=True)).modules[HEAD]
    assert torch.equal(same.queue.ids, kept["queue.ids"])


def test_a_head_that_a_run_left_untrained_is_none(store: Path, tmp_path: Path) -> None:
    """A run that was asked to finish early in its stage `mae` keeps the head it began with."""
    first = bench(store, tmp_path)
    unborn = copies(modules(first)[HEAD])
    context = replace(first.context(), start_head=lambda name: unborn)
    method: Any = first.config.method.model_copy(update={"stages": ["contrastive_tuning"]})
    with pytest.raises(ConfigError, match="no trained head"):
        build(method, context)
    build(method.model_copy(update={"allow_random_head": True}), context)


def test_a_run_that_ends_before_its_head_keeps_none(store: Path, tmp_path: Path) -> None:
    RunDir(tmp_path).create().finish.touch()
    config = tiny_config("mae_ct", evaluation={"protocols": ["knn"], "knn_k": 5})
    result = ctune.run(config, store, tmp_path)
    assert result["stopped_early"]["stage"] == "mae"
    assert not (tmp_path / "model" / f"{HEAD}.safetensors").exists()
    assert (tmp_path / "model" / "model.safetensors").exists()
