"""The protocols that a run asks for, over features of an encoder that were computed once."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ctune.config import EvaluationConfig
from ctune.evaluate.isotropy import (
    class_cosine_similarity,
    isoscore,
    mean_cosine_similarity,
    partition_isotropy,
)
from ctune.evaluate.knn import knn_accuracy
from ctune.evaluate.linear_probe import ProbeProtocol, linear_probe
from ctune.schema import JsonObject
from ctune.scores import SETTINGS
from ctune.seeding import make_generator


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
) -> dict[str, JsonObject]:
    """Return protocol -> metric -> value; accuracies are fractions of the held-out images.

    Protocols that need labels are left out where train or held-out images have fewer than two
    classes. Every held-out image is scored exactly once.
    """
    train_labelled, heldout_labelled = train.labelled(), heldout.labelled()
    supervised = _has_two_classes(train_labelled) and len(heldout_labelled.labels) > 0
    results: dict[str, JsonObject] = {}
    for protocol in config.protocols:
        if protocol == "isotropy":
            results[protocol] = _isotropy(train, heldout, config, seed=seed)
        elif protocol == "knn" and supervised:
            results[protocol] = _knn(train_labelled, heldout_labelled, config)
        elif protocol == "linear_probe" and supervised:
            probe = linear_probe(
                train_labelled.features,
                train_labelled.labels,
                heldout_labelled.features,
                heldout_labelled.labels,
                num_classes=num_classes,
                protocol=ProbeProtocol(seed=seed),
            )
            best = probe.best
            results[protocol] = {"top1": best.top1, "top5": best.top5, SETTINGS: {"lr": best.lr}}
    return results


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
