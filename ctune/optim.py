"""Learning rates as pure functions of the time, and parameter groups.

Letters: E epochs, W warm-up epochs, N layer id of the head.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear


def cosine_decay_lr(epoch: float, *, base_lr: float, epochs: int, lr_decay_rate: float) -> float:
    """Cosine from base_lr at epoch 0 to base_lr * lr_decay_rate**3 at ``epochs``.

    The floor is the cube of the rate: HobbitLong/SupContrast, ``util.py: adjust_learning_rate``.
    LaCViT calls it with whole epochs 0..E-1.

    Raises:
        ValueError: epoch outside [0, epochs]; epochs < 1; base_lr <= 0; a rate outside [0, 1].
    """
    _check_schedule(epoch, base_lr=base_lr, epochs=epochs)
    if not 0 <= lr_decay_rate <= 1:
        raise ValueError(f"lr_decay_rate is {lr_decay_rate}; it must be in [0, 1]")
    floor = base_lr * lr_decay_rate**3
    return floor + (base_lr - floor) * (1 + math.cos(math.pi * epoch / epochs)) / 2


def warmup_cosine_decay_lr(
    step: int,
    *,
    steps_per_epoch: int,
    base_lr: float,
    epochs: int,
    lr_decay_rate: float,
    warmup_epochs: int = 0,
) -> float:
    """Learning rate of optimiser step ``step`` (from 0): ``cosine_decay_lr`` after a warm-up.

    After the warm-up the rate changes once per epoch. During it, it grows with every step, linearly
    from 0 at step 0 to the cosine's value at epoch W. SupContrast warms up to the same value but
    from 0.01, above LaCViT's own target of 0.001, which is not reproduced.

    Raises:
        ValueError: as ``cosine_decay_lr``; step outside [0, epochs * steps_per_epoch];
            steps_per_epoch < 1; warmup_epochs outside [0, epochs).
    """
    if steps_per_epoch < 1:
        raise ValueError(f"steps_per_epoch is {steps_per_epoch}; it must be at least 1")
    _check_warmup(warmup_epochs, epochs)
    warmup_steps = warmup_epochs * steps_per_epoch
    epoch = warmup_epochs if step < warmup_steps else step // steps_per_epoch
    reached = cosine_decay_lr(epoch, base_lr=base_lr, epochs=epochs, lr_decay_rate=lr_decay_rate)
    if step < 0:
        raise ValueError(f"step is {step}; steps count from 0")
    return reached * step / warmup_steps if step < warmup_steps else reached


def half_cycle_cosine_lr(
    epoch_float: float, *, base_lr: float, min_lr: float, epochs: int, warmup_epochs: float
) -> float:
    """Linear warm-up from 0 over W epochs, then half a cosine to min_lr at ``epochs``.

    Source: facebookresearch/mae, ``util/lr_sched.py``; ``epoch_float`` is the time before the step,
    in epochs, so that the rate changes with every step.

    Raises:
        ValueError: epoch_float outside [0, epochs]; epochs < 1; base_lr <= 0; min_lr outside
            [0, base_lr]; warmup_epochs outside [0, epochs).
    """
    _check_schedule(epoch_float, base_lr=base_lr, epochs=epochs)
    _check_warmup(warmup_epochs, epochs)
    if not 0 <= min_lr <= base_lr:
        raise ValueError(f"min_lr is {min_lr}; it must be in [0, base_lr = {base_lr}]")
    if epoch_float < warmup_epochs:
        return base_lr * epoch_float / warmup_epochs
    progress = (epoch_float - warmup_epochs) / (epochs - warmup_epochs)
    return min_lr + (base_lr - min_lr) * (1 + math.cos(math.pi * progress)) / 2


class ParameterScale(TypedDict):
    """How the optimiser treats one parameter."""

    lr_scale: float
    weight_decay: float


def layer_decay_scales(
    named_shapes: Mapping[str, Sequence[int]],
    requires_grad: Mapping[str, bool],
    *,
    num_blocks: int,
    layer_decay: float,
    weight_decay: float,
    no_weight_decay: Iterable[str],
    decay_all: bool = False,
) -> dict[str, ParameterScale]:
    """Learning-rate factor and weight decay of every trainable parameter of a ViT.

    Layer ids follow facebookresearch/mae, ``util/lr_decay.py``: 0 for cls_token, pos_embed and
    patch_embed.*; k+1 for blocks.k.*; N = num_blocks + 1 for the rest (norm, heads, shared
    relative-position bias). The factor is layer_decay**(N - id). A leading ``encoder.`` is ignored.

    Args:
        named_shapes: parameter name to shape.
        requires_grad: parameter name to whether it is trained; frozen ones are left out.
        num_blocks: transformer blocks of the encoder.
        layer_decay: in (0, 1]; 1 switches it off.
        weight_decay: for parameters of two dimensions or more that are not listed.
        no_weight_decay: names, with or without ``encoder.``, that get none.
        decay_all: give every parameter the weight decay, as plain SGD does in LaCViT.

    Raises:
        ValueError: layer_decay outside (0, 1]; weight_decay < 0; num_blocks < 0; a name without
            an entry in requires_grad; a block number that is not below num_blocks.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay is {layer_decay}; it must be in (0, 1], 1 switches it off")
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay is {weight_decay}; it must be 0 or more")
    if num_blocks < 0:
        raise ValueError(f"num_blocks is {num_blocks}; give the encoder's number of blocks")
    missing = [name for name in named_shapes if name not in requires_grad]
    if missing:
        raise ValueError(f"requires_grad lacks {missing}; give an entry for every parameter")
    excluded = {name.removeprefix("encoder.") for name in no_weight_decay}
    scales: dict[str, ParameterScale] = {}
    for name, shape in named_shapes.items():
        if requires_grad[name]:
            plain = name.removeprefix("encoder.")
            undecayed = not decay_all and (len(shape) <= 1 or plain in excluded)
            scales[name] = {
                "lr_scale": layer_decay ** (num_blocks + 1 - _layer_id(plain, num_blocks)),
                "weight_decay": 0.0 if undecayed else weight_decay,
            }
    return scales


def layer_decay_param_groups(
    model: nn.Module,
    *,
    num_blocks: int,
    layer_decay: float,
    weight_decay: float,
    no_weight_decay: Iterable[str] = (),
    decay_all: bool = False,
) -> list[dict[str, Any]]:
    """Optimiser groups of a module's trainable parameters: params, lr_scale, weight_decay.

    One group per distinct (lr_scale, weight_decay), in the order of first appearance; the caller
    sets each group's ``lr`` to the schedule's value times its ``lr_scale``. Arguments and errors as
    ``layer_decay_scales``; a model with nothing to train is a ValueError too.
    """
    parameters = dict(model.named_parameters())
    scales = layer_decay_scales(
        {name: tuple(parameter.shape) for name, parameter in parameters.items()},
        {name: parameter.requires_grad for name, parameter in parameters.items()},
        num_blocks=num_blocks,
        layer_decay=layer_decay,
        weight_decay=weight_decay,
        no_weight_decay=no_weight_decay,
        decay_all=decay_all,
    )
    if not scales:
        raise ValueError("the model has no trainable parameter; unfreeze some of it")
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, scale in scales.items():
        key = (scale["lr_scale"], scale["weight_decay"])
        group = groups.setdefault(key, {"params": [], **scale})
        group["params"].append(parameters[name])
    return list(groups.values())


class LinearHeadState(NamedTuple):
    """Result of ``linear_head_sgd``."""

    weight: Tensor
    """[C, D] after the last step."""
    bias: Tensor
    """[C] after the last step."""
    losses: list[float]
    """Mean cross-entropy before each step."""


def linear_head_sgd(
    features: Tensor,
    labels: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    num_steps: int,
) -> LinearHeadState:
    """Full-batch reference of the linear head's update (LaCViT, stage 2).

    g is the gradient of the mean cross-entropy plus weight_decay * p, for weight and bias alike;
    v = momentum * v + g with v = g at first; p = p - lr * v: torch.optim.SGD without dampening.

    Args:
        features: [N, D], constant.
        labels: [N] int64.
        weight: [C, D] start; not changed.
        bias: [C] start; not changed.
        lr: learning rate.
        momentum: in [0, 1).
        weight_decay: 0 or more.
        num_steps: 0 or more.

    Raises:
        ValueError: an argument outside its range.
    """
    if not (lr > 0 and 0 <= momentum < 1 and weight_decay >= 0 and num_steps >= 0):
        raise ValueError(
            f"lr {lr}, momentum {momentum}, weight_decay {weight_decay}, num_steps {num_steps}: "
            "need lr > 0, momentum in [0, 1), weight_decay >= 0, num_steps >= 0"
        )
    parameters = [weight.detach().clone(), bias.detach().clone()]
    velocities: list[Tensor | None] = [None, None]
    losses = []
    for _ in range(num_steps):
        with torch.enable_grad():
            leaves = [parameter.detach().requires_grad_() for parameter in parameters]
            loss = cross_entropy(linear(features, leaves[0], leaves[1]), labels)
            gradients = torch.autograd.grad(loss, leaves)
        losses.append(float(loss.detach()))
        for i, gradient in enumerate(gradients):
            g = gradient + weight_decay * parameters[i]
            old = velocities[i]
            v = g if old is None else momentum * old + g
            velocities[i] = v
            parameters[i] = parameters[i] - lr * v
    return LinearHeadState(parameters[0], parameters[1], losses)


def _layer_id(name: str, num_blocks: int) -> int:
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed."):
        return 0
    if name.startswith("blocks.") and num_blocks:  # 0: no transformer, everything is the top
        block = int(name.split(".")[1])
        if block >= num_blocks:
            raise ValueError(
                f"num_blocks is {num_blocks}, but there is a parameter {name}; give the "
                "encoder's number of blocks"
            )
        return block + 1
    return num_blocks + 1


def _check_schedule(epoch: float, *, base_lr: float, epochs: int) -> None:
    if epochs < 1:
        raise ValueError(f"epochs is {epochs}; it must be at least 1")
    if not 0 <= epoch <= epochs:
        raise ValueError(f"the epoch is {epoch}; it must be in [0, {epochs}]")
    if not 0 < base_lr < math.inf:
        raise ValueError(f"base_lr is {base_lr}; it must be a positive number")


def _check_warmup(warmup_epochs: float, epochs: int) -> None:
    if not 0 <= warmup_epochs < epochs:
        raise ValueError(f"warmup_epochs is {warmup_epochs}; it must be in [0, {epochs})")
