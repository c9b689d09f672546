"""Mixup and CutMix: images and labels are mixed alike, whichever process holds which rows."""

from dataclasses import replace

import pytest
import torch
from timm.data.mixup import mixup_target
from torch import Tensor

from ctune.mixing import Mixing, mix
from tests.ctune.pictures import assert_near, generator

MIXUP, CUTMIX = Mixing(cutmix_alpha=0.0), Mixing(mixup_alpha=0.0)
CLASSES = 5


def batch(count: int, side: int = 12) -> tuple[Tensor, Tensor]:
    """Images of one colour each, so that a mixed pixel says what it is made of."""
    values = torch.arange(count).float()[:, None, None, None]
    return values.expand(count, 3, side, side).contiguous(), torch.arange(count) % CLASSES


def hard(labels: Tensor) -> Tensor:
    return torch.eye(CLASSES)[labels]


@pytest.mark.parametrize("config", [MIXUP, CUTMIX])
@pytest.mark.parametrize("count", [4, 7])
def test_labels_are_mixed_in_the_share_of_the_pixels(config: Mixing, count: int) -> None:
    config = replace(config, label_smoothing=0.0)
    images, labels = batch(count)
    for seed in range(20):
        mixed, soft = mix(images, labels, generator(seed), num_classes=CLASSES, config=config)
        partners = torch.tensor([n ^ 1 if n ^ 1 < count else n for n in range(count)])
        own = images[:, 0, 0, 0] - images[partners, 0, 0, 0]
        share = (mixed.mean((1, 2, 3)) - images[partners, 0, 0, 0]) / own
        share = share.where(own != 0, 1.0)
        expected = share[:, None] * hard(labels) + (1 - share)[:, None] * hard(labels[partners])
        assert_near(soft, expected)
        assert_near(share[own != 0], share[0].expand(int((own != 0).sum())))
    assert torch.equal(images, batch(count)[0])


def test_cutmix_takes_a_box_of_the_partner() -> None:
    images, labels = batch(2, side=32)
    mixed, _ = mix(images, labels, generator(3), num_classes=CLASSES, config=CUTMIX)
    cut = mixed[0, 0] != images[0, 0]
    rows, columns = cut.any(1), cut.any(0)
    assert torch.equal(cut, rows[:, None] & columns)
    assert 0 < cut.sum() < cut.numel()
    assert torch.equal(mixed[0, 0][cut], images[1, 0][cut])


def test_smoothing_is_timms() -> None:
    images, labels = batch(6)
    config = Mixing(prob=0.0)
    unmixed, soft = mix(images, labels, generator(), num_classes=CLASSES, config=config)
    assert torch.equal(unmixed, images)
    timms = mixup_target(labels, CLASSES, smoothing=0.1)  # type: ignore[no-untyped-call]
    assert_near(soft, timms)
    assert_near(soft.sum(1), torch.ones(6))


def test_shares_follow_their_beta_distribution() -> None:
    images, labels = batch(2, side=1)
    shares = torch.stack(
        [
            mix(images, labels, generator(n), num_classes=CLASSES, config=MIXUP)[0][1, 0, 0, 0]
            for n in range(2000)
        ]
    )
    expected = torch.distributions.Beta(0.8, 0.8)
    assert abs(shares.mean() - 0.5) < 0.03
    assert abs(shares.var() - expected.variance) < 0.01


def test_both_kinds_are_drawn_where_both_are_on() -> None:
    images, labels = batch(2, side=16)
    config = Mixing(switch_prob=0.3)
    whole = 0
    for n in range(300):
        mixed, _ = mix(images, labels, generator(n), num_classes=CLASSES, config=config)
        whole += int(((mixed[0] > 0) & (mixed[0] < 1)).any())  # mixup makes new values
    assert abs(whole / 300 - 0.7) < 0.08


def test_even_slices_mix_as_the_whole_batch() -> None:
    images, labels = torch.rand(8, 3, 6, 6, generator=generator()), torch.arange(8) % CLASSES
    for seed in range(6):
        whole = mix(images, labels, generator(seed), num_classes=CLASSES, config=Mixing())
        for rows in (slice(0, 2), slice(2, 8)):
            part = mix(
                images[rows], labels[rows], generator(seed), num_classes=CLASSES, config=Mixing()
            )
            assert torch.equal(part[0], whole[0][rows])
            assert torch.equal(part[1], whole[1][rows])
