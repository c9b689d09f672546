"""Invariants of mae.md 7 that need no model."""

import pytest
import torch
from torch import Tensor

from ctune.patches import (
    mae_reconstruction_loss,
    num_visible,
    patchify,
    random_masking,
    reconstruction_target,
    restore_masked_tokens,
    unpatchify,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_patches_give_back_the_images_bit_for_bit() -> None:
    imgs = normal(2, 3, 12, 8)
    patches = patchify(imgs, 4)
    assert patches.shape == (2, 6, 48)
    assert torch.equal(unpatchify(patches, 4, grid_size=(3, 2)), imgs)
    row, column, channel = 1, 2, 0  # in the patch at the right of the second row
    value = patches[0, 3, (row * 4 + column) * 3 + channel]
    assert value == imgs[0, channel, 4 + row, 4 + column]


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="10 x 8 px cannot be cut into patches of 4"):
        patchify(normal(1, 3, 10, 8), 4)
    with pytest.raises(ValueError, match="5 patches of 12 values do not make 2 x 2"):
        unpatchify(normal(1, 5, 12), 2)
    with pytest.raises(ValueError, match="16 values"):
        unpatchify(normal(1, 4, 16), 2)
    with pytest.raises(ValueError, match=r"noise has shape \(2, 8\)"):
        random_masking(normal(2, 9, 3), 0.5, noise=normal(2, 8))
    with pytest.raises(ValueError, match="pred has shape"):
        mae_reconstruction_loss(normal(1, 3, 4, 4), normal(1, 4, 3), torch.ones(1, 4), 2)


@pytest.mark.parametrize(
    ("patches", "ratio", "kept"), [(10, 0.9, 1), (16, 0.75, 4), (9, 0.6, 3), (196, 0.75, 49)]
)
def test_as_many_patches_are_kept_as_the_exact_product_says(
    patches: int, ratio: float, kept: int
) -> None:
    assert num_visible(patches, ratio) == kept


def test_a_ratio_must_keep_a_patch() -> None:
    with pytest.raises(ValueError, match="leaves none of 4 patches"):
        num_visible(4, 0.8)
    with pytest.raises(ValueError, match="must be in"):
        num_visible(4, 1.0)


@pytest.mark.parametrize(("length", "ratio"), [(16, 0.75), (9, 0.6), (7, 0.2), (5, 0.0)])
def test_kept_tokens_stand_where_the_mask_is_0(length: int, ratio: float) -> None:
    x = normal(3, length, 2)
    masked = random_masking(x, ratio, generator=torch.Generator().manual_seed(1))
    kept = num_visible(length, ratio)
    assert masked.visible.shape == (3, kept, 2)
    assert masked.mask.sum(dim=1).tolist() == [length - kept] * 3
    assert torch.equal(masked.ids_restore.sort(dim=1).values, torch.arange(length).expand(3, -1))
    class_tokens, mask_token = normal(3, 1, 2, seed=2), normal(1, 1, 2, seed=3)
    tokens = torch.cat((class_tokens, masked.visible), dim=1)
    restored = restore_masked_tokens(tokens, mask_token, masked.ids_restore)
    assert torch.equal(restored[:, :1], class_tokens)
    expected = torch.where(masked.mask[..., None] == 0, x, mask_token)
    assert torch.equal(restored[:, 1:], expected)


def test_samples_are_masked_differently_and_noise_decides() -> None:
    x, noise = normal(4, 16, 2), torch.rand(4, 16)
    masked = random_masking(x, 0.75, noise=noise)
    assert len({tuple(row) for row in masked.mask.tolist()}) > 1
    smallest = noise.topk(4, dim=1, largest=False).indices
    assert masked.mask.gather(1, smallest).sum() == 0


def test_a_perfect_prediction_has_no_loss_and_visible_patches_do_not_count() -> None:
    imgs, mask = normal(2, 3, 8, 8), torch.tensor([[1.0, 0, 1, 0], [0, 1, 1, 1]])
    for norm in (True, False):
        target = reconstruction_target(imgs, 4, norm_pix_loss=norm)
        assert mae_reconstruction_loss(imgs, target, mask, 4, norm_pix_loss=norm) == 0
        pred = target + normal(*target.shape, seed=1)
        pred.requires_grad_()
        loss = mae_reconstruction_loss(imgs, pred, mask, 4, norm_pix_loss=norm)
        (gradient,) = torch.autograd.grad(loss, pred)
        assert torch.equal(gradient.abs().sum(dim=2) > 0, mask == 1)
        alone = mae_reconstruction_loss(
            imgs.clone().requires_grad_(), pred.detach(), mask, 4, norm_pix_loss=norm
        )
        assert not alone.requires_grad, "nothing flows into the images"


@pytest.mark.parametrize("patch_size", [4, 16])
def test_predicting_nothing_costs_nearly_1(patch_size: int) -> None:
    imgs = normal(2, 3, 2 * patch_size, 2 * patch_size)
    values = 3 * patch_size**2
    pred, mask = torch.zeros(2, 4, values), torch.ones(2, 4)
    loss = mae_reconstruction_loss(imgs, pred, mask, patch_size)
    assert float(loss) == pytest.approx((values - 1) / values, abs=1e-5)


def test_a_constant_patch_is_to_be_predicted_as_0() -> None:
    target = reconstruction_target(torch.full((1, 3, 4, 4), 0.3), 4, norm_pix_loss=True)
    torch.testing.assert_close(target, torch.zeros(1, 1, 48), rtol=0, atol=1e-3)


def test_nothing_removed_is_nothing_to_learn() -> None:
    with pytest.raises(ValueError, match="no patch was removed"):
        mae_reconstruction_loss(normal(1, 3, 4, 4), normal(1, 4, 12), torch.zeros(1, 4), 2)


def test_half_predictions_are_compared_in_float32() -> None:
    imgs, pred = normal(1, 3, 4, 4).float(), normal(1, 4, 12).bfloat16()
    loss = mae_reconstruction_loss(imgs, pred, torch.ones(1, 4), 2)
    assert loss.dtype == torch.float32
    assert loss == mae_reconstruction_loss(imgs, pred.float(), torch.ones(1, 4), 2)
