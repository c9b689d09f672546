"""SupCon and NT-Xent: the formula written again, invariances, known values, gradients, guards."""

import math
import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from ctune.losses.contrastive import (
    nt_xent_loss,
    simplex_supcon_loss,
    supervised_contrastive_loss,
    supervised_contrastive_loss_sharded,
)


def unit_features(B: int = 6, V: int = 2, d: int = 5, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(B, V, d, generator=generator, dtype=torch.float64), dim=-1)


LABELS = torch.tensor([0, 1, 0, 2, 1, 0])


def reference(
    z: Tensor, weights: Tensor, tau: float, base: float, *, only_first_view: bool = False
) -> float:
    """The equation, one anchor and one candidate at a time; weights [B, B] between images."""
    views = [(i, v) for i in range(z.shape[0]) for v in range(z.shape[1])]
    anchors = [view for view in views if view[1] == 0 or not only_first_view]
    losses = []
    for i, v in anchors:
        others = [view for view in views if view != (i, v)]
        similarity = {o: float(z[i, v] @ z[o]) / tau for o in others}
        log_sum = math.log(sum(math.exp(s) for s in similarity.values()))
        w = {o: float(weights[i, o[0]]) for o in others}
        total = sum(w.values())
        value = sum(w[o] * (similarity[o] - log_sum) for o in others) / total if total else 0.0
        losses.append(-tau / base * value)
    return sum(losses) / len(losses)


def same_label(labels: Tensor) -> Tensor:
    return (labels[:, None] == labels[None, :]).double()


@pytest.mark.parametrize("V", [1, 2, 3])
@pytest.mark.parametrize("mode", ["all", "one"])
def test_equals_the_written_out_formula(V: int, mode: Any) -> None:
    z = unit_features(V=V)
    loss = supervised_contrastive_loss(
        z, LABELS, temperature=0.2, base_temperature=0.07, contrast_mode=mode
    )
    expected = reference(z, same_label(LABELS), 0.2, 0.07, only_first_view=mode == "one")
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_fractional_asymmetric_mask_equals_the_written_out_formula() -> None:
    z, mask = unit_features(B=4, V=2), torch.rand(4, 4, dtype=torch.float64)
    mask[1] = torch.tensor([0.0, 0.5, 0.0, 0.25])
    loss = supervised_contrastive_loss(z, mask=mask, temperature=0.3, base_temperature=0.3)
    assert loss.item() == pytest.approx(reference(z, mask, 0.3, 0.3), rel=1e-12)


def test_mask_keeps_the_other_view_of_the_same_image_unless_its_weight_is_zero() -> None:
    z = unit_features(B=3)
    off_diagonal = 1 - torch.eye(3, dtype=torch.float64)
    loss = supervised_contrastive_loss(z, mask=off_diagonal, temperature=0.1)
    assert loss.item() == pytest.approx(reference(z, off_diagonal, 0.1, 0.07), rel=1e-12)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), B=st.integers(2, 7), V=st.integers(2, 3))
def test_invariances(seed: int, B: int, V: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = unit_features(B, V, 4, seed)
    labels = torch.randint(0, 3, (B,), generator=generator)
    loss = supervised_contrastive_loss(z, labels).item()
    images, views = torch.randperm(B, generator=generator), torch.randperm(V, generator=generator)
    assert supervised_contrastive_loss(z[images], labels[images]).item() == pytest.approx(loss)
    assert supervised_contrastive_loss(z[:, views], labels).item() == pytest.approx(loss)
    assert supervised_contrastive_loss(z, 17 - 5 * labels).item() == pytest.approx(loss)
    rotation = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64))[0]
    assert supervised_contrastive_loss(z @ rotation, labels).item() == pytest.approx(loss)


@pytest.mark.parametrize("base", [0.07, None])
def test_nt_xent_is_supcon_with_all_labels_different(base: float | None) -> None:
    z = unit_features()
    expected = supervised_contrastive_loss(
        z, torch.tensor([9, 3, 5, 1, 0, 2]), temperature=0.5, base_temperature=base
    )
    loss = nt_xent_loss(z, temperature=0.5, base_temperature=base)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_nt_xent_is_the_cross_entropy_of_simclr() -> None:
    z = unit_features()
    flat = z.transpose(0, 1).reshape(12, -1)
    logits = (flat @ flat.T / 0.5).masked_fill(torch.eye(12, dtype=torch.bool), -torch.inf)
    expected = cross_entropy(logits, (torch.arange(12) + 6) % 12)
    assert nt_xent_loss(z, temperature=0.5).item() == pytest.approx(expected.item(), rel=1e-12)


def test_nt_xent_of_aligned_views_and_orthogonal_images() -> None:
    z = torch.eye(5, dtype=torch.float64)[:, None].repeat(1, 2, 1)
    expected = math.log(1 + (2 * 5 - 2) * math.exp(-1 / 0.2))
    assert nt_xent_loss(z, temperature=0.2).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("base", [0.07, None])
def test_collapsed_features_give_the_logarithm_of_the_candidates(base: float | None) -> None:
    z = unit_features(1, 1).expand(6, 3, 5)
    loss = supervised_contrastive_loss(z, LABELS, temperature=0.1, base_temperature=base)
    factor = 0.1 / base if base else 1.0
    assert loss.item() == pytest.approx(factor * math.log(6 * 3 - 1), rel=1e-12)


def simplex(P: int) -> Tensor:
    return normalize(torch.eye(P, dtype=torch.float64) - 1 / P, dim=-1)


@pytest.mark.parametrize(("P", "K", "V"), [(2, 1, 2), (4, 2, 2), (5, 3, 1), (1, 2, 2)])
def test_simplex_reaches_the_floor(P: int, K: int, V: int) -> None:
    corners = simplex(P) if P > 1 else torch.ones(1, 1, dtype=torch.float64)
    labels = torch.arange(P).repeat_interleave(K)
    loss = supervised_contrastive_loss(corners[labels][:, None].repeat(1, V, 1), labels)
    floor = simplex_supcon_loss(P, K, num_views=V, temperature=0.1, base_temperature=0.07)
    assert loss.item() == pytest.approx(floor, rel=1e-10)


def test_nothing_balanced_is_below_the_floor() -> None:
    labels = torch.arange(4).repeat_interleave(2)
    floor = simplex_supcon_loss(4, 2, num_views=2, temperature=0.5, base_temperature=None)
    for seed in range(20):
        nudge = 10.0 ** -(seed % 5)
        corner = torch.nn.functional.pad(simplex(4), (0, 1))[labels][:, None].repeat(1, 2, 1)
        z = normalize(corner + nudge * unit_features(8, 2, 5, seed), dim=-1)
        loss = supervised_contrastive_loss(z, labels, temperature=0.5, base_temperature=None)
        assert loss.item() >= floor - 1e-12


def test_small_temperature_stays_finite_in_float32() -> None:
    z = normalize(torch.randn(8, 2, 16, generator=torch.Generator().manual_seed(1)), dim=-1)
    z.requires_grad_()
    loss = supervised_contrastive_loss(z, torch.arange(8), temperature=0.004)
    (gradient,) = torch.autograd.grad(loss, z)
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert gradient.isfinite().all()
    exact = supervised_contrastive_loss(z.detach().double(), torch.arange(8), temperature=0.004)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


@pytest.mark.parametrize("mode", ["all", "one"])
def test_gradcheck_and_every_view_gets_a_gradient(mode: Any) -> None:
    z = unit_features(4, 2, 3).requires_grad_()
    labels = torch.tensor([0, 1, 0, 2])

    def loss(x: Tensor) -> Tensor:
        return supervised_contrastive_loss(x, labels, temperature=0.3, contrast_mode=mode)

    assert torch.autograd.gradcheck(loss, (z,))
    (gradient,) = torch.autograd.grad(loss(z), z)
    assert (gradient.norm(dim=-1) > 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_computes_in_float32_whatever_autocast_says(dtype: torch.dtype) -> None:
    z = unit_features().to(dtype)
    expected = supervised_contrastive_loss(z.float(), LABELS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = supervised_contrastive_loss(z, LABELS)
        sharded = supervised_contrastive_loss_sharded(z, LABELS, z, LABELS, 0)
    assert loss.dtype == torch.float32
    assert loss.item() == expected.item() == sharded.item()


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("mode", ["all", "one"])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_mean_over_shards_is_the_whole_batch(labelled: bool, mode: Any, world: int) -> None:
    z = unit_features().requires_grad_()
    labels = LABELS if labelled else None
    whole = supervised_contrastive_loss(z, labels, contrast_mode=mode)
    (expected,) = torch.autograd.grad(whole, z)
    share = 6 // world
    losses, gradient = [], torch.zeros_like(z)
    for rank in range(world):
        # Every rank has its own leaves; a gather with gradient sums what they receive.
        leaves = [part.detach().requires_grad_() for part in z.split(share)]  # type: ignore[no-untyped-call]
        here = slice(rank * share, (rank + 1) * share)
        loss = supervised_contrastive_loss_sharded(
            leaves[rank],
            None if labels is None else labels[here],
            torch.cat(leaves),
            labels,
            rank * share,
            contrast_mode=mode,
        )
        losses.append(loss)
        gradient += torch.cat(torch.autograd.grad(loss, leaves)) / world
    assert torch.stack(losses).mean().item() == pytest.approx(whole.item(), rel=1e-12)
    torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-12)


def test_shard_without_own_positives_is_zero_when_another_rank_has_some() -> None:
    z, labels = unit_features(4, 1), torch.tensor([0, 1, 2, 2])
    alone = supervised_contrastive_loss_sharded(z[:2], labels[:2], z, labels, 0)
    rest = supervised_contrastive_loss_sharded(z[2:], labels[2:], z, labels, 2)
    assert alone.item() == 0
    whole = supervised_contrastive_loss(z, labels)
    assert (rest / 2).item() == pytest.approx(whole.item(), rel=1e-12)


def test_anchors_without_positive() -> None:
    z, labels = unit_features(5, 1), torch.tensor([0, 1, 1, 2, 1])
    zero = supervised_contrastive_loss(z, labels)
    skip = supervised_contrastive_loss(z, labels, no_positive="skip")
    assert zero.item() == pytest.approx(reference(z, same_label(labels), 0.1, 0.07), rel=1e-12)
    assert skip.item() == pytest.approx(zero.item() * 5 / 3, rel=1e-12)
    with pytest.raises(ValueError, match="2 of 5 anchors have no positive"):
        supervised_contrastive_loss(z, labels, no_positive="raise")


def test_tiny_mask_weights_count_as_no_positive() -> None:
    mask = torch.eye(3, dtype=torch.float64)
    mask[0, 0] = 1e-8
    z = unit_features(3)
    skip = supervised_contrastive_loss(z, mask=mask, no_positive="skip")
    zero = supervised_contrastive_loss(z, mask=mask)
    assert skip.item() == pytest.approx(zero.item() * 6 / 4, rel=1e-12)


def test_single_class_is_legal() -> None:
    loss = supervised_contrastive_loss(unit_features(), torch.full((6,), 3))
    assert loss.isfinite()


Z = unit_features(4)
Y = torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        (Z[:1], {"labels": Y[:1]}, "features holds 1 images"),
        (Z[:, 0], {"labels": Y}, "must be floating point [B, V, d]"),
        (Z.long(), {"labels": Y}, "dtype torch.int64"),
        (Z[..., :0], {"labels": Y}, "[4, 2, 0]"),
        (Z, {"labels": Y.double()}, "labels has shape [4] and dtype torch.float64"),
        (Z, {"labels": Y.bool()}, "dtype torch.bool"),
        (Z, {"labels": Y[:3]}, "must hold 4 integers"),
        (Z, {"labels": Y[:, None]}, "labels has shape [4, 1]"),
        (Z, {"labels": Y, "mask": torch.eye(4)}, "both given"),
        (Z, {"mask": torch.eye(3)}, "mask has shape [3, 3]"),
        (Z, {"mask": -torch.eye(4)}, "negative or non-finite"),
        (Z, {"mask": torch.full((4, 4), torch.nan)}, "negative or non-finite"),
        (Z, {"mask": torch.zeros(4, 4)}, "none of the 8 anchors"),
        (Z, {"labels": Y, "temperature": 0.0}, "temperature is 0.0"),
        (Z, {"labels": Y, "temperature": math.nan}, "temperature is nan"),
        (Z, {"labels": Y, "base_temperature": -1.0}, "base_temperature is -1.0"),
        (Z, {"labels": Y, "contrast_mode": "two"}, "contrast_mode is 'two'"),
        (Z, {"labels": Y, "no_positive": "ignore"}, "no_positive is 'ignore'"),
        (Z[:, :1], {"labels": torch.arange(4)}, "none of the 4 anchors"),
        (Z[:, :1], {}, "none of the 4 anchors"),
    ],
)
def test_refuses(features: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        supervised_contrastive_loss(features, **options)


@pytest.mark.parametrize(
    ("local", "labels", "contrast", "contrast_labels", "offset", "message"),
    [
        (Z[:2], Y[:2], Z, Y, 3, "image_offset is 3"),
        (Z[:2], Y[:2], Z, Y, -1, "image_offset is -1"),
        (Z[:2], Y[:2], Z, Y, 2, "labels_local differs"),
        (Z[:2], None, Z, Y, 0, "both be given or both be None"),
        (Z[:2, :1], Y[:2], Z, Y, 0, "[V, d]"),
        (Z[:2], Y[:1], Z, Y, 0, "labels_local has shape [1]"),
        (Z[:2], Y[:2], Z, Y[:3], 0, "contrast_labels has shape [3]"),
        (Z[:1], Y[:1], Z[:1], Y[:1], 0, "contrast_features holds 1 images"),
        (Z[:0], Y[:0], Z, Y, 0, "features_local holds 0 images"),
        (Z[:2, :1], torch.arange(2), Z[:, :1], torch.arange(4), 0, "none of the 4 anchors"),
        (Z[:2, :1], None, Z[:, :1], None, 0, "none of the 4 anchors"),
    ],
)
def test_sharded_refuses(
    local: Tensor,
    labels: Tensor | None,
    contrast: Tensor,
    contrast_labels: Tensor | None,
    offset: int,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        supervised_contrastive_loss_sharded(local, labels, contrast, contrast_labels, offset)


@pytest.mark.parametrize(
    ("counts", "temperature", "message"),
    [
        ((0, 2, 2), 0.1, "num_classes is 0"),
        ((3, 0, 2), 0.1, "samples_per_class is 0"),
        ((3, 2, 0), 0.1, "num_views is 0"),
        ((3, 1, 1), 0.1, "use 2 views"),
        ((3, 2, 2), -0.1, "temperature is -0.1"),
    ],
)
def test_simplex_refuses(counts: tuple[int, int, int], temperature: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simplex_supcon_loss(
            counts[0],
            counts[1],
            num_views=counts[2],
            temperature=temperature,
            base_temperature=None,
        )


def test_simplex_floor_grows_with_the_classes() -> None:
    floors = [
        simplex_supcon_loss(P, 2, num_views=2, temperature=0.1, base_temperature=None)
        for P in (1, 2, 8, 64)
    ]
    assert all(low < high for low, high in pairwise(floors))
    assert floors[0] == math.log(3)
