"""What contrastive methods share: views, embeddings, gradient caching."""

from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from ctune.augment import Shard, ViewConfig, ViewPipeline
from ctune.losses.contrastive import nt_xent_loss
from ctune.methods.base import Batch
from ctune.methods.collapse import CollapseWatch, UniformLoss
from ctune.methods.contrastive import (
    ContrastiveLoss,
    ContrastiveMethod,
    Embedding,
    Images,
    grad_cache_warnings,
)


class MeanColour(nn.Module):
    """An encoder whose vector is the mean colour: it tells which image a view was made of."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.largest = 0

    def forward(self, images: Tensor) -> Tensor:
        self.largest = max(self.largest, len(images))
        return self.scale * images.mean(dim=(2, 3))


class AsTheyAre(ContrastiveMethod):
    """A method that shows what it gets."""

    def contrast(
        self, vectors: Tensor, images: Images, generator: torch.Generator
    ) -> ContrastiveLoss:
        self.got, self.images, self.draw = vectors, images, torch.rand((), generator=generator)
        return ContrastiveLoss(nt_xent_loss(vectors, temperature=1.0, normalize=True), vectors, 1.0)


def method(encoder: nn.Module, **embedding: Any) -> AsTheyAre:
    watch = CollapseWatch(uniform=UniformLoss(), steps_per_epoch=3, warmup_epochs=0, hint="")
    how = Embedding(**{"views": ViewPipeline(ViewConfig(size_px=8)), **embedding})
    return AsTheyAre(encoder, how, watch=watch)


def batch(count: int = 6, side_px: int = 8, shard: Shard | None = None) -> Batch:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, side_px, side_px), generator=generator)
    return Batch(
        inputs=pixels.to(torch.uint8),
        labels=torch.arange(count) % 3,
        positions=np.arange(count),
        sizes_px=torch.full((count, 2), side_px),
        shard=shard,
    )


@pytest.mark.parametrize("micro_batch_size", [None, 2, 4])
def test_views_of_one_image_stay_together(micro_batch_size: int | None) -> None:
    """Colours survive crop and flip of images of one colour, so vectors must be the colours."""
    colours = torch.randint(0, 255, (6, 3), generator=torch.Generator().manual_seed(0))
    given = batch()
    given.inputs[:] = colours.to(torch.uint8)[:, :, None, None]
    stage = method(MeanColour(), num_views=3, micro_batch_size=micro_batch_size)
    stage.step(given, torch.Generator().manual_seed(1))
    expected = (colours / 255)[:, None, :].expand(6, 3, 3)
    torch.testing.assert_close(stage.got, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(stage.images.labels, given.labels)
    assert stage.images.ids.tolist() == given.positions.tolist()


def test_micro_batches_get_the_views_of_the_whole_batch_and_no_more_at_once() -> None:
    jitter = ViewConfig(size_px=8, jitter=(0.4, 0.4, 0.4, 0.1), jitter_prob=0.8, grayscale_prob=0.5)
    results = []
    for micro_batch_size in (None, 4):
        encoder = MeanColour()
        stage = method(encoder, views=ViewPipeline(jitter), micro_batch_size=micro_batch_size)
        output = stage.step(batch(), torch.Generator().manual_seed(1))
        torch.autograd.backward(output.loss)
        results.append((output.loss, stage.got, stage.draw, encoder.scale.grad, encoder.largest))
    whole, cached = results
    for expected, found in zip(whole[:4], cached[:4], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert (whole[4], cached[4]) == (12, 8), "views of 6 images at once, of 4"


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_shards_embed_what_one_process_would(micro_batch_size: int | None) -> None:
    whole = batch()
    everything = method(MeanColour()).embed(whole, torch.Generator().manual_seed(1))
    stage = method(MeanColour(), micro_batch_size=micro_batch_size)
    parts = []
    for start in (0, 3):
        rows = slice(start, start + 3)
        part = Batch(
            inputs=whole.inputs[rows],
            labels=whole.labels[rows],
            positions=whole.positions[rows],
            sizes_px=whole.sizes_px[rows],
            shard=Shard(start, 6),
        )
        parts.append(stage.embed(part, torch.Generator().manual_seed(1)))
    torch.testing.assert_close(torch.cat(parts), everything)


def test_batch_norm_is_told_of() -> None:
    (warning,) = grad_cache_warnings(timm.create_model("resnet18"), micro_batch_size=16)
    assert warning.code == "batch_norm_per_micro_batch"
    assert "micro-batch of 16" in warning.message
    vit = timm.create_model("vit_tiny_patch16_224", depth=1)
    assert grad_cache_warnings(vit, micro_batch_size=16) == []
