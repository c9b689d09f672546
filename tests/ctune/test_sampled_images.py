"""A sample of a run's images in the place of all of them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ctune import sampled_images
from ctune.backbones import build_encoder
from ctune.child import StopRequest
from ctune.config import RunConfig
from ctune.data import ImageCache
from ctune.events import EventBase
from ctune.rundir import RunDir
from ctune.sampled_images import RepeatedImages, SampledImages
from ctune.store import PackedStore
from tests.squares import tiny_config

CPU = torch.device("cpu")


def test_a_sample_stands_for_all(store: Path, tmp_path: Path) -> None:
    packed = PackedStore(store)
    numbers = packed.indices("train")
    sample = ImageCache.build(packed, numbers[:5], 16, tmp_path / "sample")
    repeated = RepeatedImages(sample, packed.labels("train"))
    assert len(repeated) == len(numbers) == 48
    assert repeated.size_px == 16
    at = np.array([0, 5, 47, 3])
    assert torch.equal(repeated.batch(at), sample.batch([0, 0, 2, 3]))
    assert torch.equal(repeated.sizes(at), sample.sizes([0, 0, 2, 3]))
    assert repeated.pixel_statistics() == sample.pixel_statistics()


@pytest.mark.parametrize("seconds", [0.0, 60.0], ids=["no time", "time enough"])
def test_as_much_is_decoded_and_encoded_as_there_is_time_for(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    monkeypatch.setattr(sampled_images, "DECODING_S", seconds)
    monkeypatch.setattr(sampled_images, "ENCODING_S", seconds)
    told: list[EventBase] = []
    images = SampledImages(
        PackedStore(store),
        RunDir(tmp_path),
        labelled_only=True,
        emit=told.append,
        stop=StopRequest(),
    )
    config = RunConfig.model_validate(tiny_config())
    encoder = build_encoder(config.encoder, pool="mean", encoder_dir=None)
    features = images.encode(encoder, "train", CPU)
    assert features.shape == (48, encoder.embed_dim)
    distinct = 48 if seconds else sampled_images.FIRST_ENCODED
    assert len(torch.unique(features, dim=0)) == distinct
    some = images.encode(encoder, "train", CPU, positions=np.array([3, 1]))
    assert torch.allclose(some, features[[3, 1]], atol=1e-5)
    assert images.encoded == 2
    assert images.decode_images_per_s > 0 and images.encode_images_per_s > 0
    decoded = images.decoded("train", 16)
    assert len(decoded) == 48
    whole = ImageCache.build(PackedStore(store), images.numbers("train"), 16, tmp_path / "whole")
    first = sampled_images.FIRST_DECODED
    at = [first - 1, first, 47]
    same = [first - 1, 0, 47 % first] if not seconds else at
    assert torch.equal(decoded.batch(at), whole.batch(same))
