"""From a conformance case to a call and back. An adapter renames, reshapes and picks; no maths."""

import torch

from ctune.evaluate.accuracy import topk_accuracy
from ctune.evaluate.isotropy import (
    class_cosine_similarity,
    isoscore,
    mean_cosine_similarity,
    partition_isotropy,
)
from ctune.heads import ProjectionHead
from ctune.losses.contrastive import (
    nt_xent_loss,
    simplex_supcon_loss,
    supervised_contrastive_loss,
    supervised_contrastive_loss_sharded,
)
from ctune.losses.n_pair import n_pair_loss
from ctune.pooling import pool_tokens
from ctune.samplers import ClassBalancedBatchSampler, expected_cross_image_positive_fraction
from tests.conformance import (
    adapters_attention,
    adapters_evaluation,
    adapters_mae,
    adapters_nnclr,
    adapters_optim,
    adapters_transformer_head,
    adapters_views,
)
from tests.conformance.convert import Adapter, Case, integers, loss_and_gradient, options, tensors


def _supervised_contrastive_loss(inputs: Case, parameters: Case) -> Case:
    (features,) = tensors(inputs, parameters, "features")
    labels, mask = inputs.get("labels"), inputs.get("mask")
    loss = supervised_contrastive_loss(
        features.requires_grad_(),
        None if labels is None else integers(labels),
        None if mask is None else tensors(inputs, parameters, "mask")[0],
        **options(parameters),
    )
    return loss_and_gradient(loss, features, "grad_features")


def _nt_xent_loss(inputs: Case, parameters: Case) -> Case:
    (features,) = tensors(inputs, parameters, "features")
    loss = nt_xent_loss(features.requires_grad_(), **options(parameters))
    return loss_and_gradient(loss, features, "grad_features")


def _nt_xent_loss_of_pairs(inputs: Case, parameters: Case) -> Case:
    views = [z.requires_grad_() for z in tensors(inputs, parameters, "z0", "z1")]
    loss = nt_xent_loss(torch.stack(views, dim=1), normalize=True, **options(parameters))
    gradients = torch.autograd.grad(loss, views)
    return {
        "loss": loss.item(),
        "grad_z0": gradients[0].tolist(),
        "grad_z1": gradients[1].tolist(),
    }


def _supervised_contrastive_loss_sharded(inputs: Case, parameters: Case) -> Case:
    (features,) = tensors(inputs, parameters, "features")
    features.requires_grad_()
    labels = integers(inputs["labels"])
    world_size = parameters["world_size"]
    share = len(labels) // world_size
    losses = [
        supervised_contrastive_loss_sharded(
            features[offset : offset + share],
            labels[offset : offset + share],
            features,
            labels,
            offset,
            **options(parameters, "world_size"),
        )
        for offset in range(0, world_size * share, share)
    ]
    mean = torch.stack(losses).mean()
    (gradient,) = torch.autograd.grad(mean, features)
    return {
        "loss_per_rank": [loss.item() for loss in losses],
        "loss_global": mean.item(),
        "grad_features_global": gradient.tolist(),
    }


def _n_pair_loss(inputs: Case, parameters: Case) -> Case:
    (embeddings,) = tensors(inputs, parameters, "embeddings")
    embeddings.requires_grad_()
    loss = n_pair_loss(embeddings, integers(inputs["pairs"]), **options(parameters))
    return loss_and_gradient(loss, embeddings, "grad_embeddings")


def _simplex_supcon_loss(inputs: Case, parameters: Case) -> Case:
    return {"loss": simplex_supcon_loss(**inputs, **options(parameters))}


def _projection_head(inputs: Case, parameters: Case) -> Case:
    (x,) = tensors(inputs, parameters, "x")
    head = ProjectionHead(**options(parameters)).to(x.dtype)
    state = inputs.get("state_dict", {})
    head.mlp.load_state_dict(
        {name: torch.tensor(value, dtype=x.dtype) for name, value in state.items()}
    )
    return {"z": head(x).tolist()}


def _pool_tokens(inputs: Case, parameters: Case) -> Case:
    given = tensors(inputs, parameters, "tokens", "norm_weight", "norm_bias")
    return {"features": pool_tokens(*given, **options(parameters)).tolist()}


def _topk_accuracy(inputs: Case, parameters: Case) -> Case:
    (logits,) = tensors(inputs, parameters, "logits")
    fractions = topk_accuracy(logits, integers(inputs["targets"]), parameters["topk"])
    return {"accuracy": [100 * fraction for fraction in fractions]}  # the vectors are in percent


def _partition_isotropy(inputs: Case, parameters: Case) -> Case:
    (features,) = tensors(inputs, parameters, "features")
    return dict(partition_isotropy(features, **options(parameters)))


def _mean_cosine_similarity(inputs: Case, parameters: Case) -> Case:
    features = tensors(inputs, parameters, "features")
    return {"mean_cosine_similarity": mean_cosine_similarity(*features)}


def _isoscore(inputs: Case, parameters: Case) -> Case:
    return {"isoscore": isoscore(*tensors(inputs, parameters, "features"))}


def _class_cosine_similarity(inputs: Case, parameters: Case) -> Case:
    (features,) = tensors(inputs, parameters, "features")
    result = class_cosine_similarity(features, integers(inputs["labels"]), **options(parameters))
    return dict(result)


def _expected_cross_image_positive_fraction(inputs: Case, parameters: Case) -> Case:
    fraction = expected_cross_image_positive_fraction(inputs["labels"], **options(parameters))
    return {"fraction": fraction}


def single_or_all(values: set[int]) -> int | list[int]:
    """The one value, or all of them, which then differ from an expected number."""
    return next(iter(values)) if len(values) == 1 else sorted(values)


def _class_balanced_batch_sampler(inputs: Case, parameters: Case) -> Case:
    labels = inputs["labels"]
    sampler = ClassBalancedBatchSampler(labels, **options(parameters))
    lengths, batch_sizes, classes_drawn, samples_drawn = {len(sampler)}, set(), set(), set()
    distinct: dict[str, set[int]] = {}
    for epoch in range(5000):
        batches = sampler.batches(epoch)
        lengths.add(len(batches))
        for batch in batches:
            by_class: dict[int, list[int]] = {}
            for index in batch.tolist():
                by_class.setdefault(labels[index], []).append(index)
            batch_sizes.add(len(batch))
            classes_drawn.add(len(by_class))
            for label, members in by_class.items():
                samples_drawn.add(len(members))
                distinct.setdefault(str(label), set()).add(len(set(members)))
        if epoch >= 20 and len(distinct) == len(sampler.eligible_classes):
            break
    return {
        "num_batches": single_or_all(lengths),
        "batch_size": single_or_all(batch_sizes),
        "classes_in_each_batch": single_or_all(classes_drawn),
        "samples_of_each_class": single_or_all(samples_drawn),
        "eligible_classes": sampler.eligible_classes,
        "distinct_indices_per_class_in_batch": {
            label: single_or_all(counts) for label, counts in sorted(distinct.items())
        },
    }


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("lacvit", "supervised_contrastive_loss"): _supervised_contrastive_loss,
    ("lacvit", "nt_xent_loss"): _nt_xent_loss,
    ("transformer_head", "nt_xent_loss"): _nt_xent_loss_of_pairs,
    ("lacvit", "supervised_contrastive_loss_sharded"): _supervised_contrastive_loss_sharded,
    ("lacvit", "n_pair_loss"): _n_pair_loss,
    ("lacvit", "simplex_supcon_loss"): _simplex_supcon_loss,
    ("lacvit", "ProjectionHead"): _projection_head,
    ("lacvit", "pool_tokens"): _pool_tokens,
    ("lacvit", "topk_accuracy"): _topk_accuracy,
    ("lacvit", "partition_isotropy"): _partition_isotropy,
    ("lacvit", "mean_cosine_similarity"): _mean_cosine_similarity,
    ("lacvit", "isoscore"): _isoscore,
    ("lacvit", "class_cosine_similarity"): _class_cosine_similarity,
    ("lacvit", "expected_cross_image_positive_fraction"): _expected_cross_image_positive_fraction,
    ("lacvit", "ClassBalancedBatchSampler"): _class_balanced_batch_sampler,
    **adapters_attention.ADAPTERS,
    **adapters_evaluation.ADAPTERS,
    **adapters_mae.ADAPTERS,
    **adapters_nnclr.ADAPTERS,
    **adapters_optim.ADAPTERS,
    **adapters_transformer_head.ADAPTERS,
    **adapters_views.ADAPTERS,
}
