"""Random crops of training images, encoded as the probe's full protocol asks for them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ctune.backbones import Encoder, build_encoder
from ctune.child import StopRequest
from ctune.config import RunConfig
from ctune.features import RunImages
from ctune.store import PackedStore
from tests.squares import tiny_config

CPU = torch.device("cpu")


@pytest.fixture
def encoder() -> Encoder:
    config = RunConfig.model_validate(tiny_config())
    torch.manual_seed(0)
    return build_encoder(config.encoder, pool="auto", encoder_dir=None, drop_path=0.5)


@pytest.fixture
def images(store: Path, tmp_path: Path) -> RunImages:
    return RunImages(
        PackedStore(store), tmp_path, labelled_only=False, emit=lambda event: None,
        stop=StopRequest(),
    )  # fmt: skip


def test_features_are_those_of_the_encoder_in_eval_mode(
    images: RunImages, encoder: Encoder
) -> None:
    features = images.encode(encoder.train(), "train", CPU)
    pixels = images.decoded("train", encoder.image_size_px).batch(np.arange(len(features)))
    with torch.no_grad():
        expected = encoder.eval()(encoder.preprocessing.normalise(pixels))
    torch.testing.assert_close(features, expected)


def test_random_views_depend_on_seed_and_step_alone(images: RunImages, encoder: Encoder) -> None:
    crops = images.random_views(encoder, CPU, seed=0)
    rows = torch.tensor([3, 0, 7])
    first = crops(rows, 5)
    assert first.shape == (3, encoder.embed_dim)
    encoder.train()
    assert torch.equal(crops(rows, 5), first), "the encoder is in eval mode whatever it was before"
    assert torch.equal(images.random_views(encoder, CPU, seed=0)(rows, 5), first)
    for other in (crops(rows, 6), images.random_views(encoder, CPU, seed=1)(rows, 5)):
        assert not torch.allclose(other, first)


def test_random_views_are_of_the_rows_asked_for(
    images: RunImages, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = images.random_views(encoder, CPU, seed=0)(torch.arange(9), 0)
    monkeypatch.setattr("ctune.features.ENCODE_IMAGES", 4)
    in_parts = images.random_views(encoder, CPU, seed=0)(torch.arange(9), 0)
    torch.testing.assert_close(in_parts, whole, rtol=1e-4, atol=1e-5)
    assert len(torch.unique(whole.round(decimals=3), dim=0)) == 9


def test_random_views_are_of_the_split_and_of_the_kind_asked_for(
    images: RunImages, encoder: Encoder
) -> None:
    rows = torch.arange(4)
    held = images.random_views(encoder, CPU, seed=0, split="test")
    byol = images.random_views(encoder, CPU, seed=0, split="test", preset="byol")
    train = images.random_views(encoder, CPU, seed=0)
    assert torch.equal(
        held(rows, 1), images.random_views(encoder, CPU, seed=0, split="test")(rows, 1)
    )
    for other in (train(rows, 1), byol(rows, 1)):
        assert not torch.allclose(held(rows, 1), other)
    with pytest.raises(IndexError):
        held(torch.tensor([18]), 0)
