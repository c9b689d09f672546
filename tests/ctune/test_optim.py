"""Learning-rate schedules, layer-wise decay (against timm), the linear head's reference update."""

import math
import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim._param_groups import param_groups_layer_decay
from torch import nn

from ctune.optim import (
    cosine_decay_lr,
    half_cycle_cosine_lr,
    layer_decay_param_groups,
    layer_decay_scales,
    linear_head_sgd,
    warmup_cosine_decay_lr,
)


def test_cosine_decay_runs_from_base_to_the_cube_of_the_rate() -> None:
    lrs = [cosine_decay_lr(e, base_lr=0.5, epochs=10, lr_decay_rate=0.2) for e in range(11)]
    assert lrs[0] == 0.5
    assert lrs[10] == pytest.approx(0.5 * 0.2**3)
    assert lrs[5] == pytest.approx((lrs[0] + lrs[10]) / 2)
    assert all(later < earlier for earlier, later in pairwise(lrs))


def test_half_cycle_is_linear_then_half_a_cosine() -> None:
    def lr(t: float) -> float:
        return half_cycle_cosine_lr(t, base_lr=2e-3, min_lr=1e-6, epochs=100, warmup_epochs=5)

    assert [lr(0), lr(2.5), lr(5)] == pytest.approx([0, 1e-3, 2e-3])
    assert lr(100) == pytest.approx(1e-6)
    assert lr(52.5) == pytest.approx((2e-3 + 1e-6) / 2)


def test_half_cycle_without_warm_up_starts_at_the_base() -> None:
    assert half_cycle_cosine_lr(0, base_lr=1.0, min_lr=0, epochs=3, warmup_epochs=0) == 1.0


def test_warm_up_by_step_reaches_the_cosine_and_then_changes_once_per_epoch() -> None:
    lrs = [
        warmup_cosine_decay_lr(
            step, steps_per_epoch=4, base_lr=0.1, epochs=5, lr_decay_rate=0.1, warmup_epochs=2
        )
        for step in range(20)
    ]
    at_two = cosine_decay_lr(2, base_lr=0.1, epochs=5, lr_decay_rate=0.1)
    assert lrs[:9] == pytest.approx([at_two * step / 8 for step in range(9)])
    assert lrs[8:12] == [at_two] * 4
    assert lrs[16] == lrs[19] == cosine_decay_lr(4, base_lr=0.1, epochs=5, lr_decay_rate=0.1)


def test_no_warm_up_is_the_plain_cosine() -> None:
    for step in range(12):
        lr = warmup_cosine_decay_lr(
            step, steps_per_epoch=3, base_lr=0.1, epochs=4, lr_decay_rate=0.1
        )
        assert lr == cosine_decay_lr(step // 3, base_lr=0.1, epochs=4, lr_decay_rate=0.1)


@pytest.mark.parametrize(
    ("epoch", "changes", "message"),
    [
        (-1, {}, "the epoch is -1"),
        (11, {}, "the epoch is 11; it must be in [0, 10]"),
        (math.nan, {}, "the epoch is nan"),
        (0, {"epochs": 0}, "epochs is 0"),
        (0, {"base_lr": 0.0}, "base_lr is 0.0"),
        (0, {"lr_decay_rate": 1.5}, "lr_decay_rate is 1.5"),
    ],
)
def test_cosine_decay_refuses(epoch: float, changes: dict[str, Any], message: str) -> None:
    options = {"base_lr": 0.1, "epochs": 10, "lr_decay_rate": 0.1, **changes}
    with pytest.raises(ValueError, match=re.escape(message)):
        cosine_decay_lr(epoch, **options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup_epochs": 10}, "warmup_epochs is 10; it must be in [0, 10)"),
        ({"warmup_epochs": -1}, "warmup_epochs is -1"),
        ({"min_lr": 0.2}, "min_lr is 0.2"),
        ({"epoch_float": 10.5}, "the epoch is 10.5"),
    ],
)
def test_half_cycle_refuses(changes: dict[str, Any], message: str) -> None:
    options = {
        "epoch_float": 1.0, "base_lr": 0.1, "min_lr": 0.0, "epochs": 10, "warmup_epochs": 2,
        **changes,
    }  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(message)):
        half_cycle_cosine_lr(**options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": -1}, "step is -1"),
        ({"step": 21}, "the epoch is 7"),
        ({"steps_per_epoch": 0}, "steps_per_epoch is 0"),
        ({"warmup_epochs": 6}, "warmup_epochs is 6"),
    ],
)
def test_warm_up_by_step_refuses(changes: dict[str, Any], message: str) -> None:
    options = {
        "step": 0, "steps_per_epoch": 3, "base_lr": 0.1, "epochs": 6, "lr_decay_rate": 0.1,
        "warmup_epochs": 2, **changes,
    }  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(message)):
        warmup_cosine_decay_lr(**options)


def vit(**options: Any) -> VisionTransformer:
    return VisionTransformer(
        img_size=8, patch_size=4, embed_dim=12, depth=3, num_heads=2, num_classes=5, **options
    )


def test_groups_equal_those_of_timm() -> None:
    """Only with mean pooling: timm counts a final ``norm`` to the last block, MAE to the head."""
    model = vit(global_pool="avg")
    ours = layer_decay_param_groups(
        model,
        num_blocks=3,
        layer_decay=0.65,
        weight_decay=0.05,
        no_weight_decay=model.no_weight_decay(),
    )
    theirs = param_groups_layer_decay(
        model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.65
    )

    def flat(groups: list[dict[str, Any]]) -> dict[int, tuple[Any, float]]:
        return {
            id(parameter): (pytest.approx(group["lr_scale"]), group["weight_decay"])
            for group in groups
            for parameter in group["params"]
        }

    assert flat(ours) == flat(theirs)
    assert len(ours) == len({(g["lr_scale"], g["weight_decay"]) for g in ours})


class Wrapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = vit()
        self.head = nn.Linear(12, 4)


def test_encoder_prefix_frozen_parameters_and_other_heads() -> None:
    model = Wrapped()
    model.encoder.patch_embed.requires_grad_(False)
    options: dict[str, Any] = {"num_blocks": 3, "layer_decay": 0.5, "weight_decay": 0.1}
    parameters = dict(model.named_parameters())
    scales = layer_decay_scales(
        {name: p.shape for name, p in parameters.items()},
        {name: p.requires_grad for name, p in parameters.items()},
        no_weight_decay=["pos_embed", "encoder.cls_token"],
        **options,
    )
    assert not [name for name in scales if "patch_embed" in name]
    assert scales["encoder.cls_token"] == {"lr_scale": 0.5**4, "weight_decay": 0}
    assert scales["encoder.pos_embed"] == {"lr_scale": 0.5**4, "weight_decay": 0}
    assert scales["encoder.blocks.2.mlp.fc1.weight"] == {"lr_scale": 0.5, "weight_decay": 0.1}
    assert scales["encoder.norm.weight"] == {"lr_scale": 1, "weight_decay": 0}
    assert scales["head.weight"] == {"lr_scale": 1, "weight_decay": 0.1}
    assert scales["head.bias"] == {"lr_scale": 1, "weight_decay": 0}
    everything = layer_decay_param_groups(model, decay_all=True, **options)
    assert {group["weight_decay"] for group in everything} == {0.1}
    optimizer = torch.optim.SGD(everything, lr=1.0)
    assert all("lr_scale" in group for group in optimizer.param_groups)


def test_no_decay_is_two_groups_that_hold_every_parameter_once() -> None:
    model = Wrapped()
    groups = layer_decay_param_groups(model, num_blocks=3, layer_decay=1.0, weight_decay=0.1)
    ids = [id(parameter) for group in groups for parameter in group["params"]]
    assert len(groups) == 2
    assert sorted(ids) == sorted(id(parameter) for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_decay": 0.0}, "layer_decay is 0.0"),
        ({"layer_decay": 1.1}, "layer_decay is 1.1"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"num_blocks": -1}, "num_blocks is -1"),
        ({"num_blocks": 2}, "num_blocks is 2, but there is a parameter blocks.2.x"),
        ({"requires_grad": {}}, "requires_grad lacks ['blocks.2.x']"),
    ],
)
def test_layer_decay_refuses(changes: dict[str, Any], message: str) -> None:
    options = {
        "named_shapes": {"blocks.2.x": [2, 2]}, "requires_grad": {"blocks.2.x": True},
        "num_blocks": 3, "layer_decay": 0.5, "weight_decay": 0.1, "no_weight_decay": [], **changes,
    }  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(message)):
        layer_decay_scales(**options)


def test_groups_refuse_a_frozen_model() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        layer_decay_param_groups(
            vit().requires_grad_(False), num_blocks=3, layer_decay=1.0, weight_decay=0.0
        )


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_linear_head_reference_is_torch_sgd(weight_decay: float) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(7, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1, 2, 2])
    head = nn.Linear(4, 3, dtype=torch.float64)
    state = linear_head_sgd(
        x, y, head.weight, head.bias,
        lr=0.3, momentum=0.9, weight_decay=weight_decay, num_steps=5,
    )  # fmt: skip
    optimizer = torch.optim.SGD(head.parameters(), lr=0.3, momentum=0.9, weight_decay=weight_decay)
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(head(x), y)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    torch.testing.assert_close(state.weight, head.weight.detach())
    torch.testing.assert_close(state.bias, head.bias.detach())
    assert state.losses == pytest.approx(losses)
    assert not state.weight.requires_grad


def test_linear_head_reference_refuses() -> None:
    with pytest.raises(ValueError, match="momentum 1"):
        linear_head_sgd(
            torch.ones(2, 2), torch.tensor([0, 1]), torch.ones(2, 2), torch.ones(2),
            lr=0.1, momentum=1.0, weight_decay=0.0, num_steps=1,
        )  # fmt: skip
