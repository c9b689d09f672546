"""Layer-wise decay (against timm), optimizers, clipping, the linear head's reference update."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim._param_groups import param_groups_layer_decay
from timm.optim.lars import Lars
from torch import Tensor, nn

from ctune.optim import (
    LARS,
    clip_gradients_per_tensor,
    layer_decay_param_groups,
    layer_decay_scales,
    layer_lr_scale,
    make_optimizer,
    trainable_parameter_mask,
    weight_decay_names,
)


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


def test_rules_for_names_agree_with_the_groups() -> None:
    model = vit()
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    names = weight_decay_names(shapes, no_weight_decay=model.no_weight_decay())
    scales = layer_decay_scales(
        shapes,
        dict.fromkeys(shapes, True),
        num_blocks=3,
        layer_decay=0.5,
        weight_decay=0.1,
        no_weight_decay=model.no_weight_decay(),
    )
    assert names.decayed == sorted(n for n in shapes if scales[n]["weight_decay"])
    assert names.undecayed == sorted(n for n in shapes if not scales[n]["weight_decay"])
    for name, scale in scales.items():
        assert scale["lr_scale"] == layer_lr_scale(name, num_blocks=3, layer_decay=0.5)


def test_tokens_are_decayed_unless_listed_and_biases_never() -> None:
    shapes = {"cls_token": (1, 1, 4), "scores.bias": (3, 3), "norm.weight": (4,), "gain": ()}
    assert weight_decay_names(shapes) == (["cls_token"], ["gain", "norm.weight", "scores.bias"])
    assert weight_decay_names(shapes, no_weight_decay=["cls_token"]).decayed == []


def test_frozen_blocks_and_what_stays_trainable() -> None:
    names = [
        "pos_embed",
        "cls_token",
        "patch_embed.proj.weight",
        "blocks.0.x",
        "blocks.1.x",
        "norm.x",
    ]

    def trained(frozen: int) -> list[bool]:
        return trainable_parameter_mask(names, num_blocks=2, num_frozen_blocks=frozen)

    assert trained(0) == [False, True, True, True, True, True]
    assert trained(1) == [False, False, False, False, True, True]
    assert trained(2) == [False, False, False, False, False, True]
    with pytest.raises(ValueError, match=re.escape("num_frozen_blocks is 3; it must be in [0, 2]")):
        trained(3)


def steps(
    build: Callable[[list[nn.Parameter]], torch.optim.Optimizer], count: int = 3
) -> list[Tensor]:
    """Return a matrix and a vector after some steps of one optimizer on fixed gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 4), (4,))
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    optimizer = build(parameters)
    for _ in range(count):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def test_lars_is_that_of_timm_where_nothing_is_decayed() -> None:
    """Without decay the two differ only in timm's scaling of vectors, which groups switch off."""
    ours = steps(lambda p: LARS(p, 2.0, momentum=0.9))

    def timm(p: list[nn.Parameter]) -> torch.optim.Optimizer:
        groups = [{"params": [p[0]], "always_adapt": True}, {"params": [p[1]]}]
        return Lars(groups, lr=2.0, momentum=0.9)

    for mine, theirs in zip(ours, steps(timm), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_lars_decays_before_it_measures_the_gradient() -> None:
    weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    weight.grad = torch.tensor([[0.0, 1.0]])
    group = {"params": [weight], "weight_decay": 1.0}
    LARS([group], lr=1.0, trust_coefficient=0.1).step()
    decayed = torch.tensor([[3.0, 5.0]])
    step = decayed * 0.1 * 5 / decayed.norm()
    assert torch.allclose(weight.detach(), torch.tensor([[3.0, 4.0]]) - step)


def test_lars_takes_a_zero_weight_or_gradient_as_it_is() -> None:
    zero, unmoved = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.ones(2, 2))
    zero.grad, unmoved.grad = torch.ones(2, 2), torch.zeros(2, 2)
    without = nn.Parameter(torch.ones(2, 2))
    LARS([zero, unmoved, without], lr=0.5).step()
    assert zero.tolist() == [[-0.5, -0.5], [-0.5, -0.5]]
    assert unmoved.tolist() == without.tolist() == [[1, 1], [1, 1]]


def test_lars_refuses() -> None:
    with pytest.raises(ValueError, match=re.escape("momentum 1.0")):
        LARS([nn.Parameter(torch.ones(1))], 0.1, momentum=1.0)


@pytest.mark.parametrize(
    ("name", "options", "theirs"),
    [
        ("sgd", {}, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
        (
            "sgd",
            {"nesterov": True, "momentum": 0.5},
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.5, nesterov=True),
        ),
        ("adam", {}, lambda p: torch.optim.Adam(p, lr=0.1)),
        (
            "adamw",
            {"betas": (0.9, 0.95), "eps": 1e-6},
            lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.9, 0.95), eps=1e-6, weight_decay=0.0),
        ),
        ("lars", {}, lambda p: LARS(p, 0.1)),
    ],
)
def test_make_optimizer(name: Any, options: dict[str, Any], theirs: Any) -> None:
    ours = steps(lambda p: make_optimizer(name, p, lr=0.1, **options))
    for mine, wanted in zip(ours, steps(theirs), strict=True):
        torch.testing.assert_close(mine, wanted)


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lars"])
def test_weight_decay_is_that_of_the_group(name: Any) -> None:
    plain, decayed = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    groups: list[dict[str, Any]] = [
        {"params": [plain]},
        {"params": [decayed], "weight_decay": 0.1},
    ]
    optimizer = make_optimizer(name, groups, lr=0.1)
    plain.grad, decayed.grad = torch.zeros(2, 2), torch.zeros(2, 2)
    optimizer.step()
    assert (plain == 1).all() and (decayed < 1).all()


def test_make_optimizer_refuses_an_unknown_name() -> None:
    with pytest.raises(ValueError, match="the optimizer is 'lamb'"):
        make_optimizer("lamb", [nn.Parameter(torch.ones(1))], lr=0.1)  # type: ignore[arg-type]


def test_each_gradient_is_clipped_by_itself() -> None:
    small, large = torch.tensor([0.3, 0.4]), torch.tensor([3.0, 4.0])
    norms = clip_gradients_per_tensor([small, large], max_norm=1.0)
    assert [float(norm) for norm in norms] == pytest.approx([0.5, 5.0])
    assert small.tolist() == pytest.approx([0.3, 0.4])
    assert large.tolist() == pytest.approx([0.6, 0.8])
    assert clip_gradients_per_tensor([], max_norm=1.0) == []
    with pytest.raises(ValueError, match="max_norm is 0"):
        clip_gradients_per_tensor([small], max_norm=0.0)
