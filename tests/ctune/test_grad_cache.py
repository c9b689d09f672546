"""Gradient caching gives the gradients of the whole batch, in the memory of a micro-batch."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ctune.grad_cache import embed_in_micro_batches, has_batch_norm
from ctune.losses.contrastive import nt_xent_loss, supervised_contrastive_loss
from ctune.losses.n_pair import n_pair_indices, n_pair_loss

LABELS = torch.arange(6).repeat(2)


def vit(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=8,
        embed_dim=24,
        depth=2,
        num_heads=2,
        num_classes=0,
        **options,
    )
    return model


def images(count: int = 12, side_px: int = 16) -> Tensor:
    return torch.randn(count, 3, side_px, side_px, generator=torch.Generator().manual_seed(1))


def supcon(z: Tensor) -> Tensor:
    return supervised_contrastive_loss(normalize(z, dim=1)[:, None], LABELS, temperature=0.1)


def nt_xent(z: Tensor) -> Tensor:
    views = normalize(z, dim=1).view(2, -1, z.shape[1]).transpose(0, 1)
    return nt_xent_loss(views, temperature=0.1)


def n_pair(z: Tensor) -> Tensor:
    return n_pair_loss(z, n_pair_indices(LABELS, torch.Generator().manual_seed(2)))


def gradients(model: nn.Module, loss: Tensor) -> Tensor:
    """Return all gradients of a loss in one vector."""
    model.zero_grad()
    torch.autograd.backward(loss)
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def cached(model: nn.Module, inputs: Tensor, micro_batch_size: int) -> Tensor:
    return embed_in_micro_batches(
        lambda part, rows: model(part), inputs, module=model, micro_batch_size=micro_batch_size
    )


def uncached(model: nn.Module, inputs: Tensor, micro_batch_size: int) -> Tensor:
    """The same micro-batches with all activations kept: they draw the same random numbers."""
    return torch.cat([model(part) for part in torch.split(inputs, micro_batch_size)])


@pytest.mark.parametrize("loss", [supcon, nt_xent, n_pair])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("micro_batch_size", [1, 5, 12, 50])
def test_gradients_are_those_of_the_whole_batch(
    loss: Callable[[Tensor], Tensor], dtype: torch.dtype, tolerance: float, micro_batch_size: int
) -> None:
    model, inputs = vit().to(dtype), images().to(dtype)
    whole = loss(model(inputs))
    expected = gradients(model, whole)
    found_loss = loss(cached(model, inputs, micro_batch_size))
    found = gradients(model, found_loss)
    torch.testing.assert_close(found_loss, whole, rtol=tolerance, atol=tolerance)
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("autocast", [False, True])
def test_the_second_pass_draws_what_the_first_drew(autocast: bool) -> None:
    model = vit(drop_path_rate=0.5, proj_drop_rate=0.3)
    results = []
    for embed in (uncached, cached):
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=False):
            z = embed(model, images(), 5)
        drawn = torch.get_rng_state()
        results.append((z, gradients(model, nt_xent(z.float()))))
        assert torch.equal(torch.get_rng_state(), drawn), "the second pass leaves no trace"
    (kept, expected), (again, found) = results
    assert torch.equal(kept, again)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_other_draws_would_give_other_gradients() -> None:
    """What the test above rests on: with this much dropout, gradients follow the draws."""
    model = vit(drop_path_rate=0.5, proj_drop_rate=0.3)
    torch.manual_seed(3)
    first = gradients(model, nt_xent(uncached(model, images(), 5)))
    second = gradients(model, nt_xent(uncached(model, images(), 5)))
    assert (first - second).norm() > 0.1 * first.norm()


def test_bf16_gradients_are_summed_in_float32() -> None:
    """One rounding to bf16 per micro-batch, none of their sum: as near as the whole batch."""
    model, inputs = vit(), images(48)
    expected = gradients(model, nt_xent(model(inputs)))

    def error(embed: Callable[[nn.Module, Tensor, int], Tensor], micro_batch_size: int) -> float:
        with torch.autocast("cpu", torch.bfloat16):
            z = embed(model, inputs, micro_batch_size)
        found = gradients(model, nt_xent(z.float()))
        return float((found - expected).norm() / expected.norm())

    whole = error(cached, 48)
    assert 0 < whole < 0.02, "it is bf16"
    assert error(cached, 1) < 1.2 * whole
    assert error(uncached, 1) > 1.4 * whole, "what autocast's own cache would give"


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_count_each_image_once(momentum: float | None) -> None:
    def convolutions() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4, momentum=momentum),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.BatchNorm1d(4, momentum=momentum),
        )

    expected, model = convolutions(), convolutions()
    expected_gradients = gradients(expected, nt_xent(uncached(expected, images(), 4)))
    found = gradients(model, nt_xent(cached(model, images(), 4)))
    torch.testing.assert_close(found, expected_gradients)
    for (name, value), (_, wanted) in zip(
        model.named_buffers(), expected.named_buffers(), strict=True
    ):
        assert torch.equal(value, wanted), name
    assert int(model[1].num_batches_tracked) == 3  # type: ignore[index]


def test_batch_norm_is_found_in_the_forms_that_encoders_use() -> None:
    assert has_batch_norm(timm.create_model("resnet18"))
    assert has_batch_norm(timm.create_model("efficientnet_b0"))
    assert not has_batch_norm(vit())
    assert not has_batch_norm(nn.Sequential(nn.GroupNorm(1, 3), nn.InstanceNorm2d(3)))


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all storages that operations make, and the most that lived at once."""

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known = {inputs.untyped_storage()._cdata}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._known:
                    self._known.add(storage._cdata)
                    self.live += storage.nbytes()
                    self.peak = max(self.peak, self.live)
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return result

    def _gone(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.live -= nbytes


def peak_bytes(count: int, micro_batch_size: int | None) -> int:
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.GELU())]
    model = nn.Sequential(nn.Conv2d(3, 8, 1), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    inputs = images(count, side_px=16)
    with LiveBytes(inputs) as tracked:
        z = cached(model, inputs, micro_batch_size) if micro_batch_size else model(inputs)
        torch.autograd.backward(nt_xent(z))
    return int(tracked.peak)


def test_memory_is_that_of_a_micro_batch() -> None:
    small, large = peak_bytes(16, None), peak_bytes(128, None)
    assert large > 7 * small, "activations grow with the batch"
    assert peak_bytes(128, 16) < 1.1 * small


@pytest.mark.parametrize(("rows", "micro_batch_size"), [(4, 0), (0, 4)])
def test_nothing_to_embed_is_refused(rows: int, micro_batch_size: int) -> None:
    with pytest.raises(ValueError, match="both must be at least 1"):
        cached(nn.Flatten(), images(rows), micro_batch_size)
