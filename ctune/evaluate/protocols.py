"""The protocols that a run asks for, over features of an encoder that were computed once."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ctune.config import EvaluationConfig, Protocol
from ctune.evaluate.isotropy import (
    class_cosine_similarity,
    isoscore,
    mean_cosine_similarity,
    partition_isotropy,
)
from ctune.evaluate.knn import knn_accuracy
from ctune.evaluate.linear_probe import ProbeProtocol, linear_probe
from ctune.events import Warned
from ctune.schema import JsonObject
from ctune.scores import SETTINGS
from ctune.seeding import make_generator

ONE_SHOT_RATE = 0.1
"""Learning rate of the linear probe where every class has a single image (lacvit.md 2.2)."""


@dataclass(frozen=True)
class LabelledFeatures:
    """Features h [N, D] of one split and labels [N] int64, -1 where an image has none."""

    features: Tensor
    labels: Tensor

    def labelled(self) -> "LabelledFeatures":
        """Return the rows that have a label."""
        rows = self.labels >= 0
        return LabelledFeatures(self.features[rows], self.labels[rows])

    def sample(self, limit: int, seed: int) -> "LabelledFeatures":
        """Return at most `limit` rows, drawn with `seed`, in their order."""
        if len(self.labels) <= limit:
            return self
        generator = make_generator(seed, "evaluation sample")
        rows = torch.randperm(len(self.labels), generator=generator)[:limit].sort().values
        return LabelledFeatures(self.features[rows], self.labels[rows])


def evaluate(
    train: LabelledFeatures,
    heldout: LabelledFeatures,
    config: EvaluationConfig,
    *,
    num_classes: int,
    seed: int,
    warn: Callable[[Warned], None],
) -> dict[str, JsonObject]:
    """Return protocol -> metric -> value; accuracies are fractions of the held-out images.

    Protocols that need labels are left out where train or held-out images have fewer than two
    classes. Every held-out image is scored exactly once. A score that these features do not have
    (a single image, vectors that are all alike) is left out with a warning.
    """
    results: dict[str, JsonObject] = {}
    for protocol in config.protocols:
        try:
            scores = _score(
                protocol, train, heldout, config=config, num_classes=num_classes, seed=seed
            )
        except ValueError as error:
            message = f"{protocol} could not be measured: {error}"
            warn(Warned(code="not_scored", message=message, hint="look at the held-out images"))
            continue
        if scores is not None:
            results[protocol] = scores
    return results


def _score(
    protocol: Protocol,
    train: LabelledFeatures,
    heldout: LabelledFeatures,
    *,
    config: EvaluationConfig,
    num_classes: int,
    seed: int,
) -> JsonObject | None:
    """Return the scores of one protocol, None where the labels do not allow it."""
    if protocol == "isotropy":
        return _isotropy(train, heldout, config, seed=seed)
    train_labelled, heldout_labelled = train.labelled(), heldout.labelled()
    supervised = _has_two_classes(train_labelled) and len(heldout_labelled.labels) > 0
    if not supervised:
        return None
    if protocol == "knn":
        return _knn(train_labelled, heldout_labelled, config)
    return _linear_probe(train_labelled, heldout_labelled, num_classes=num_classes, seed=seed)


def _linear_probe(
    train: LabelledFeatures, heldout: LabelledFeatures, *, num_classes: int, seed: int
) -> JsonObject:
    counts = torch.unique(train.labels, return_counts=True)[1]
    protocol = ProbeProtocol(seed=seed)
    if int(counts.max()) == 1:  # nothing can be held out to choose a rate
        protocol = ProbeProtocol(seed=seed, learning_rates=(ONE_SHOT_RATE,))
    probe = linear_probe(
        train.features,
        train.labels,
        heldout.features,
        heldout.labels,
        num_classes=num_classes,
        protocol=protocol,
    )
    best = probe.best
    return {"top1": best.top1, "top5": best.top5, SETTINGS: {"lr": best.lr}}


def _knn(
    train: LabelledFeatures, heldout: LabelledFeatures, config: EvaluationConfig
) -> JsonObject:
    k = min(config.knn_k, len(train.labels))
    top1 = knn_accuracy(
        train.features,
        train.labels,
        heldout.features,
        heldout.labels,
        k=k,
        temperature=config.knn_temperature,
    )
    return {"top1": top1, SETTINGS: {"k": k, "temperature": config.knn_temperature}}


def _isotropy(
    train: LabelledFeatures, heldout: LabelledFeatures, config: EvaluationConfig, *, seed: int
) -> JsonObject:
    """Return the scores of lacvit.md 5 on held-out images; `train_gap` is the gap on train ones."""
    sample = heldout.sample(config.max_images, seed)
    partition = partition_isotropy(sample.features)
    scores: JsonObject = {
        "isotropy_score": partition["isotropy"],
        "mean_cosine_similarity": mean_cosine_similarity(sample.features),
        "isoscore": isoscore(sample.features),
        SETTINGS: {"num_images": len(sample.labels)},
    }
    labelled = sample.labelled()
    if _has_pairs(labelled):
        cosines: JsonObject = dict(class_cosine_similarity(labelled.features, labelled.labels))
        for count in ("intra_count", "inter_count"):
            scores[SETTINGS][count] = cosines.pop(count)
        scores |= cosines
    train_sample = train.labelled().sample(config.max_images, seed)
    if _has_pairs(train_sample):
        train_cosines = class_cosine_similarity(train_sample.features, train_sample.labels)
        scores["train_gap"] = train_cosines["gap"]
    return scores


def _has_two_classes(data: LabelledFeatures) -> bool:
    return len(torch.unique(data.labels)) >= 2


def _has_pairs(data: LabelledFeatures) -> bool:
    """Whether there is a pair of one class and a pair of two."""
    counts = torch.unique(data.labels, return_counts=True)[1]
    return len(counts) >= 2 and int(counts.max()) >= 2
