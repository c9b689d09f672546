"""Optimizers, parameter groups and gradient clipping.

Letters: N layer id of the head.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypedDict

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

OptimizerName = Literal["sgd", "adam", "adamw", "lars"]
ParameterGroups = list[dict[str, Any]]
CLIP_EPS = 1e-6


class LARS(torch.optim.Optimizer):
    """SGD whose steps are scaled by the weights' norm (You et al., 1708.03888).

    Per tensor w of two dimensions or more with gradient g: g = g + weight_decay w, then
    g = g * trust_coefficient |w| / |g| where both norms are above 0. All tensors: m = momentum m +
    g, w = w - lr m. Tensors of one dimension are neither decayed nor scaled. Source:
    facebookresearch/mae, ``util/lars.py``; timm's Lars takes |g| before the decay.

    Raises:
        ValueError: lr, weight_decay or trust_coefficient below 0; momentum outside [0, 1).
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust_coefficient: float = 0.001,
    ) -> None:
        if not (lr >= 0 and weight_decay >= 0 and 0 <= momentum < 1 and trust_coefficient >= 0):
            raise ValueError(
                f"lr {lr}, weight_decay {weight_decay}, momentum {momentum}, trust_coefficient "
                f"{trust_coefficient}: need momentum in [0, 1) and the others 0 or more"
            )
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "trust_coefficient": trust_coefficient,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Make one step with the gradients at hand; parameters without one stay."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(weight)
                momentum = state["momentum_buffer"].mul_(group["momentum"])
                momentum.add_(_trusted_gradient(weight, group))
                weight.sub_(momentum, alpha=group["lr"])
        return loss


def _trusted_gradient(weight: Tensor, group: dict[str, Any]) -> Tensor:
    gradient: Tensor = weight.grad  # type: ignore[assignment]
    if weight.ndim <= 1:
        return gradient
    gradient = gradient.add(weight, alpha=group["weight_decay"])
    weight_norm, gradient_norm = weight.norm(), gradient.norm()
    ratio = group["trust_coefficient"] * weight_norm / gradient_norm
    return gradient * torch.where((weight_norm > 0) & (gradient_norm > 0), ratio, 1.0)


def make_optimizer(
    name: OptimizerName,
    groups: ParamsT,
    *,
    lr: float,
    momentum: float = 0.9,
    nesterov: bool = False,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.optim.Optimizer:
    """Return the optimizer of a stage: torch's, fused (on a CPU 3 times faster too), or `LARS`.

    Args:
        name: `adam` couples weight decay with the gradient, `adamw` does not.
        groups: parameters, or groups as `layer_decay_param_groups` makes them; the weight decay is
            a group's own, 0 where it names none.
        lr: peak learning rate; the loop sets it anew each step.
        momentum: of `sgd` and `lars`.
        nesterov: of `sgd`.
        betas: of `adam` and `adamw`.
        eps: of `adam` and `adamw`.

    Raises:
        ValueError: an unknown name, no parameters, a value outside its range.
    """
    if name == "lars":
        return LARS(groups, lr, momentum=momentum)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=nesterov, fused=True)
    if name == "adam":
        return torch.optim.Adam(groups, lr=lr, betas=betas, eps=eps, fused=True)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=0.0, fused=True)
    raise ValueError(f"the optimizer is {name!r}; use 'sgd', 'adam', 'adamw' or 'lars'")


@torch.no_grad()
def clip_gradients_per_tensor(gradients: Sequence[Tensor], *, max_norm: float) -> list[Tensor]:
    """Scale each gradient to at most `max_norm` by itself, in place; return the norms before.

    The factor is max_norm / (norm + 1e-6) where that is below 1 (facebookresearch/dino,
    ``utils.py: clip_gradients``).

    Raises:
        ValueError: max_norm is not positive.
    """
    if not max_norm > 0:
        raise ValueError(f"max_norm is {max_norm}; it must be positive")
    if not gradients:
        return []
    norms = list(torch._foreach_norm(list(gradients)))
    factors = [(max_norm / (norm + CLIP_EPS)).clamp(max=1.0) for norm in norms]
    torch._foreach_mul_(list(gradients), factors)
    return norms


class ParameterScale(TypedDict):
    """How the optimiser treats one parameter."""

    lr_scale: float
    weight_decay: float


def layer_id(name: str, *, num_blocks: int) -> int:
    """Return the layer of a vision transformer that a parameter belongs to.

    0 for cls_token, pos_embed and patch_embed.*; k + 1 for blocks.k.*; N = num_blocks + 1 for the
    rest (norm, heads, shared relative-position bias): facebookresearch/mae, ``util/lr_decay.py``.
    With num_blocks 0 (no transformer) everything is the top.

    Raises:
        ValueError: num_blocks < 0; a block number that is not below num_blocks.
    """
    if num_blocks < 0:
        raise ValueError(f"num_blocks is {num_blocks}; give the encoder's number of blocks")
    name = _plain(name)
    if name in ("cls_token", "pos_embed") or name.startswith("patch_embed."):
        return 0
    if name.startswith("blocks.") and num_blocks:
        block = int(name.split(".")[1])
        if block >= num_blocks:
            raise ValueError(
                f"num_blocks is {num_blocks}, but there is a parameter {name}; give the "
                "encoder's number of blocks"
            )
        return block + 1
    return num_blocks + 1


def layer_lr_scale(name: str, *, num_blocks: int, layer_decay: float) -> float:
    """Return layer_decay**(N - layer id), the learning-rate factor of a parameter.

    Raises:
        ValueError: layer_decay outside (0, 1]; as `layer_id`.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay is {layer_decay}; it must be in (0, 1], 1 switches it off")
    return float(layer_decay ** (num_blocks + 1 - layer_id(name, num_blocks=num_blocks)))


def trainable_parameter_mask(
    names: Iterable[str], *, num_blocks: int, num_frozen_blocks: int
) -> list[bool]:
    """Return per name whether it is trained when the lower blocks are frozen (mae_ct.md 10).

    The position embedding never is; class token and patch embedding are when no block is frozen;
    what is above the blocks always is.

    Raises:
        ValueError: num_frozen_blocks outside [0, num_blocks]; as `layer_id`.
    """
    if not 0 <= num_frozen_blocks <= num_blocks:
        raise ValueError(
            f"num_frozen_blocks is {num_frozen_blocks}; it must be in [0, {num_blocks}]"
        )
    frozen_up_to = num_frozen_blocks if num_frozen_blocks else -1
    return [
        _plain(name) != "pos_embed" and layer_id(name, num_blocks=num_blocks) > frozen_up_to
        for name in names
    ]


class DecayNames(NamedTuple):
    """Result of `weight_decay_names`, each sorted."""

    decayed: list[str]
    undecayed: list[str]


def weight_decay_names(
    named_shapes: Mapping[str, Sequence[int]], *, no_weight_decay: Iterable[str] = ()
) -> DecayNames:
    """Split parameters by whether they get weight decay.

    None for parameters of one dimension or none, for names that end in ``.bias`` and for those in
    `no_weight_decay`. Class token, mask token and position embedding are decayed unless listed.
    """
    excluded = {_plain(name) for name in no_weight_decay}
    found = DecayNames([], [])
    for name, shape in sorted(named_shapes.items()):
        (found.decayed if _is_decayed(name, shape, excluded) else found.undecayed).append(name)
    return found


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

    The factor is that of `layer_lr_scale`. Parameters of one dimension or none, those named
    ``*.bias`` and the listed ones get no weight decay. A leading ``encoder.`` is ignored.

    Args:
        named_shapes: parameter name to shape.
        requires_grad: parameter name to whether it is trained; frozen ones are left out.
        num_blocks: transformer blocks of the encoder.
        layer_decay: in (0, 1]; 1 switches it off.
        weight_decay: of the parameters that are decayed.
        no_weight_decay: names, with or without ``encoder.``, that get none.
        decay_all: give every parameter the weight decay, as plain SGD does in LaCViT.

    Raises:
        ValueError: layer_decay outside (0, 1]; weight_decay < 0; num_blocks < 0; a name without
            an entry in requires_grad; a block number that is not below num_blocks.
    """
    if not weight_decay >= 0:
        raise ValueError(f"weight_decay is {weight_decay}; it must be 0 or more")
    missing = [name for name in named_shapes if name not in requires_grad]
    if missing:
        raise ValueError(f"requires_grad lacks {missing}; give an entry for every parameter")
    excluded = {_plain(name) for name in no_weight_decay}
    scales: dict[str, ParameterScale] = {}
    for name, shape in named_shapes.items():
        if requires_grad[name]:
            decayed = decay_all or _is_decayed(name, shape, excluded)
            scales[name] = {
                "lr_scale": layer_lr_scale(name, num_blocks=num_blocks, layer_decay=layer_decay),
                "weight_decay": weight_decay if decayed else 0.0,
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
) -> ParameterGroups:
    """Optimiser groups of a module's trainable parameters: params, lr_scale, weight_decay, decayed.

    One group per distinct (lr_scale, weight_decay), in the order of first appearance; the loop
    sets each group's ``lr`` to the schedule's value times its ``lr_scale``, and the weight decay of
    those that are ``decayed`` where that has a schedule. Arguments and errors as
    `layer_decay_scales`; a model with nothing to train is a ValueError too.
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
        group = groups.setdefault(
            key, {"params": [], **scale, "decayed": scale["weight_decay"] > 0}
        )
        group["params"].append(parameters[name])
    return list(groups.values())


def _plain(name: str) -> str:
    return name.removeprefix("encoder.")


def _is_decayed(name: str, shape: Sequence[int], excluded: Collection[str]) -> bool:
    return len(shape) > 1 and not name.endswith(".bias") and _plain(name) not in excluded
