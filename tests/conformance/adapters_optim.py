"""Adapters of schedules, optimizers, parameter groups and moving averages."""

from typing import Any

import torch
from torch import Tensor, nn

from ctune.ema import ema_update
from ctune.optim import (
    LARS,
    clip_gradients_per_tensor,
    layer_decay_scales,
    layer_lr_scale,
    trainable_parameter_mask,
    weight_decay_names,
)
from ctune.schedules import WarmupCosine, cosine_to_cube, scale_learning_rate, warmup_steps
from tests.conformance.convert import Adapter, Case, options, tensors

ENDPOINTS: dict[str, Case] = {
    "exclusive": {"ramp": "neither"},
    "inclusive": {"ramp": "both", "reach_end": True},
}


def at_times(schedule: WarmupCosine, times: Any) -> Any:
    """The values at a list of times, or at the one time."""
    return [schedule(time) for time in times] if isinstance(times, list) else schedule(times)


def _cosine_decay_lr(inputs: Case, parameters: Case) -> Case:
    schedule = cosine_to_cube(lr=parameters["base_lr"], **options(parameters, "base_lr"))
    return {"lr": at_times(schedule, inputs["epochs_at"])}


def _half_cycle_cosine_lr(inputs: Case, parameters: Case) -> Case:
    schedule = WarmupCosine(
        total=parameters["epochs"],
        warmup=parameters["warmup_epochs"],
        peak=parameters["base_lr"],
        end=parameters["min_lr"],
    )
    return {"lr": at_times(schedule, inputs["epochs_at"])}


def _warmup_cosine_lr_by_epoch(inputs: Case, parameters: Case) -> Case:
    schedule = WarmupCosine(
        total=parameters["epochs"],
        warmup=parameters["warmup_epochs"],
        peak=parameters["lr"],
        end=parameters["min_lr"],
    )
    return {"lr": at_times(schedule, inputs["epoch"])}


def _warmup_cosine_lr_by_fraction(inputs: Case, parameters: Case) -> Case:
    total = parameters["total_steps"]
    schedule = WarmupCosine(
        total=total,
        warmup=warmup_steps(total, parameters["warmup_fraction"]),
        peak=parameters["peak_lr"],
        **ENDPOINTS[parameters.get("endpoints", "exclusive")],
    )
    return {"lr": at_times(schedule, inputs["step"])}


def _warmup_cosine_lr_by_steps(inputs: Case, parameters: Case) -> Case:
    schedule = WarmupCosine(
        total=parameters["total_steps"],
        warmup=parameters["warmup_steps"],
        peak=parameters["base_lr"],
        ramp="peak",
    )
    return {"lr": at_times(schedule, parameters["steps"])}


def _cosine_annealing_lr(inputs: Case, parameters: Case) -> Case:
    schedule = WarmupCosine(total=parameters["total_epochs"], peak=parameters["base_lr"])
    return {"lr": schedule.values()}


def _cosine_schedule(inputs: Case, parameters: Case) -> Case:
    schedule = WarmupCosine(
        total=parameters["epochs"],
        warmup=parameters.get("warmup_epochs", 0),
        peak=parameters["base_value"],
        end=parameters["final_value"],
        start=parameters.get("start_warmup_value", 0.0),
        ramp="both",
    )
    return {"schedule": schedule.in_steps(parameters["steps_per_epoch"]).values()}


def _teacher_temperature_schedule(inputs: Case, parameters: Case) -> Case:
    schedule = WarmupCosine(
        total=parameters["epochs"],
        warmup=parameters["warmup_epochs"],
        start=parameters["warmup_value"],
        peak=parameters["final_value"],
        end=parameters["final_value"],
        ramp="both",
    )
    return {"schedule": schedule.values()}


def _scale_learning_rate(inputs: Case, parameters: Case) -> Case:
    return {"lr": scale_learning_rate(**options(parameters))}


def _layer_decay_scales(inputs: Case, parameters: Case) -> Case:
    scales = layer_decay_scales(
        inputs["named_shapes"], inputs["requires_grad"], **options(parameters)
    )
    return {name: dict(scale) for name, scale in scales.items()}


def _layer_lr_scale(inputs: Case, parameters: Case) -> Case:
    depth, decay = parameters["depth"], parameters["layer_decay"]
    names = inputs["names"]
    return {"scales": [layer_lr_scale(n, num_blocks=depth, layer_decay=decay) for n in names]}


def _trainable_parameter_mask(inputs: Case, parameters: Case) -> Case:
    mask = trainable_parameter_mask(
        inputs["names"],
        num_blocks=parameters["depth"],
        num_frozen_blocks=parameters["num_frozen_blocks"],
    )
    return {"trainable": mask}


def _weight_decay_parameter_names(inputs: Case, parameters: Case) -> Case:
    names = weight_decay_names(inputs["shapes"])
    return {"decay": names.decayed, "no_decay": names.undecayed}


def _weight_decay_groups(inputs: Case, parameters: Case) -> Case:
    trained = {p["name"]: p["shape"] for p in inputs["parameters"] if p["requires_grad"]}
    names = weight_decay_names(trained)
    return {"decayed": names.decayed, "not_decayed": names.undecayed}


def _lars(inputs: Case, parameters: Case) -> Case:
    names = list(inputs["params"])
    weights = [nn.Parameter(w) for w in tensors(inputs["params"], parameters, *names)]
    optimizer = LARS(weights, **options(parameters))
    after = []
    for gradients in inputs["grads"]:
        for weight, gradient in zip(weights, tensors(gradients, parameters, *names), strict=True):
            weight.grad = gradient
        optimizer.step()
        after.append({name: w.tolist() for name, w in zip(names, weights, strict=True)})
    return {"params_after": after}


def _clip_gradients_per_parameter(inputs: Case, parameters: Case) -> Case:
    gradients = [torch.tensor(values, dtype=torch.float64) for values in inputs["gradients"]]
    norms = clip_gradients_per_tensor(gradients, **options(parameters))
    return {"clipped": [g.tolist() for g in gradients], "norms": [float(n) for n in norms]}


def state_dict(values: Case) -> dict[str, Tensor]:
    """Tensors of a module's state: whole numbers as integers, everything else as float64."""
    return {
        name: torch.tensor(value, dtype=None if isinstance(value, int) else torch.float64)
        for name, value in values.items()
    }


def _ema_update(inputs: Case, parameters: Case) -> Case:
    target = state_dict(inputs["target"])
    ema_update(state_dict(inputs["online"]), target, **options(parameters))
    return {"target": {name: value.tolist() for name, value in target.items()}}


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("lacvit", "cosine_decay_lr"): _cosine_decay_lr,
    ("lacvit", "half_cycle_cosine_lr"): _half_cycle_cosine_lr,
    ("lacvit", "layer_decay_scales"): _layer_decay_scales,
    ("latteclip", "warmup_cosine_lr"): _warmup_cosine_lr_by_steps,
    ("mae", "LARS"): _lars,
    ("mae", "layer_lr_scale"): _layer_lr_scale,
    ("mae", "scale_learning_rate"): _scale_learning_rate,
    ("mae", "warmup_cosine_lr_by_epoch"): _warmup_cosine_lr_by_epoch,
    ("mae", "weight_decay_parameter_names"): _weight_decay_parameter_names,
    ("mae_ct", "ema_update"): _ema_update,
    ("mae_ct", "layer_lr_scale"): _layer_lr_scale,
    ("mae_ct", "trainable_parameter_mask"): _trainable_parameter_mask,
    ("mae_ct", "warmup_cosine_lr"): _warmup_cosine_lr_by_fraction,
    ("transformer_head", "cosine_annealing_lr"): _cosine_annealing_lr,
    ("udi", "clip_gradients_per_parameter"): _clip_gradients_per_parameter,
    ("udi", "cosine_schedule"): _cosine_schedule,
    ("udi", "teacher_temperature_schedule"): _teacher_temperature_schedule,
    ("udi", "weight_decay_groups"): _weight_decay_groups,
}
