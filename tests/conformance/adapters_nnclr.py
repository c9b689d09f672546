"""Adapters of the nearest-neighbour contrastive parts and of the poolings beside them."""

from typing import Any

import torch

from ctune.losses.nnclr import nnclr_loss
from ctune.nearest_neighbor_queue import (
    NearestNeighborQueue,
    draw_neighbors,
    find_nearest_neighbors,
    oracle_part,
)
from ctune.nnclr_head import NNCLRHead, NNCLRSettings
from ctune.pooling import pool_tokens
from tests.conformance.convert import (
    Adapter,
    Case,
    integers,
    loss_and_gradient,
    options,
    tensors,
)

POOLS: dict[str, str] = {"mean_patch": "mean"}
TRAINING = ("temperature", "top_k", "variant")


def _pool_tokens(inputs: Case, parameters: Case) -> Case:
    pooling = parameters["pooling"]
    pool: Any = POOLS.get(pooling, pooling)
    tokens = tensors(inputs, parameters, "tokens")
    pooled = pool_tokens(*tokens, pool=pool, **options(parameters, "pooling"))
    return {"pooled": pooled.tolist()}


def _nnclr_loss(inputs: Case, parameters: Case) -> Case:
    predicted, neighbors = tensors(inputs, parameters, "predicted", "neighbors")
    loss = nnclr_loss(predicted.requires_grad_(), neighbors, **options(parameters))
    return loss_and_gradient(loss, predicted, "grad_predicted")


def _queue(state: Case, parameters: Case, name: str = "queue") -> NearestNeighborQueue:
    (features,) = tensors(state, parameters, name)
    queue = NearestNeighborQueue(*features.shape).to(features)
    queue.features.copy_(features)
    return queue


def _find_nearest_neighbors(inputs: Case, parameters: Case) -> Case:
    (z,) = tensors(inputs, parameters, "z")
    queue = _queue(inputs, parameters)
    queue.ids.copy_(integers(inputs["queue_ids"]))
    oracle_labels = None
    if "labels" in inputs:
        queue.labels.copy_(integers(inputs["queue_labels"]))
        oracle_labels = oracle_part(integers(inputs["labels"]), parameters["oracle_fraction"])
    ranked = find_nearest_neighbors(
        z,
        integers(inputs["ids"]) if parameters["exclude_self"] else None,
        queue=queue,
        top_k=parameters["top_k"],
        oracle_labels=oracle_labels,
    )
    index = draw_neighbors(ranked, choice=integers(inputs["choice"]))
    return {"index": index.tolist(), "neighbors": queue.features[index].tolist()}


def _state(queue: NearestNeighborQueue) -> Case:
    return {
        "queue": queue.features.tolist(),
        "queue_labels": queue.labels.tolist(),
        "queue_ids": queue.ids.tolist(),
    }


def _enqueue(inputs: Case, parameters: Case) -> Case:
    queue, pointers = _queue(inputs, parameters), []
    (batches,) = tensors(inputs, parameters, "features")
    labels, ids = integers(inputs["labels"]), integers(inputs["ids"])
    for batch in zip(batches, labels, ids, strict=True):
        queue.enqueue(*batch)
        pointers.append(int(queue.pointer))
    return _state(queue) | {"pointer": pointers}


def _training_loss(inputs: Case, parameters: Case) -> Case:
    settings = NNCLRSettings(**{name: parameters[name] for name in TRAINING})
    head = NNCLRHead(**options(parameters, *TRAINING)).double()
    state = {name: torch.tensor(value).to(head.state_dict()[name]) for name, value in
             inputs["state_dict"].items()}  # fmt: skip
    missing, unexpected = head.load_state_dict(state, strict=False)
    allowed = ("queue.",) if settings.variant == "nnclr_ema" else ("queue.", "target_projector.")
    assert not unexpected
    assert all(name.startswith(allowed) for name in missing), missing
    head.queue = _queue(inputs, parameters)
    steps = [_step(head, settings, step) for step in inputs["steps"]]
    norm = head.projector[1]
    assert isinstance(norm, torch.nn.BatchNorm1d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    final = _state(head.queue) | {
        "pointer": int(head.queue.pointer),
        "projector_1_running_mean": norm.running_mean.tolist(),
        "projector_1_running_var": norm.running_var.tolist(),
    }
    return {"steps": steps, "final": final}


def _step(head: NNCLRHead, settings: NNCLRSettings, step: Case) -> Case:
    (pooled,) = tensors(step, {}, "pooled")
    found = head.train().training_loss(
        list(pooled.requires_grad_()),
        integers(step["ids"]),
        integers(step["labels"]),
        settings=settings,
        choice=list(integers(step["choice"])),
    )
    weight = head.get_parameter("projector.0.weight")
    gradients = torch.autograd.grad(found.loss, [pooled, weight])
    return {
        "loss": found.loss.item(),
        "nn_accuracy": float(found.metrics["nn_accuracy"]),
        "grad_pooled": gradients[0].tolist(),
        "grad_projector_0_weight": gradients[1].tolist(),
    }


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("mae_ct", "pool_tokens"): _pool_tokens,
    ("mae_ct", "nnclr_loss"): _nnclr_loss,
    ("mae_ct", "find_nearest_neighbors"): _find_nearest_neighbors,
    ("mae_ct", "NearestNeighborQueue.enqueue"): _enqueue,
    ("mae_ct", "NNCLRHead.training_loss"): _training_loss,
}
