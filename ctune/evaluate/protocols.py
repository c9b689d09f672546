"""The protocols that a run asks for, over features of an encoder that were computed once."""

from collections.abc import Callable, Mapping
from statistics import mean, pstdev

import torch

from ctune.errors import DivergedError
from ctune.evaluate.alignment_uniformity import (
    augmentation_invariance,
    class_alignment,
    uniformity,
)
from ctune.evaluate.classification import Predictions, classification_scores
from ctune.evaluate.clustering import (
    clustering_scores,
    davies_bouldin_score,
    kmeans_runs,
    silhouette_score,
)
from ctune.evaluate.color_histogram import color_histogram_probe
from ctune.evaluate.isotropy import (
    class_cosine_similarity,
    isoscore,
    mean_cosine_similarity,
    partition_isotropy,
)
from ctune.evaluate.knn import knn_scores
from ctune.evaluate.low_shot import (
    fit_logistic_regression,
    preprocess_low_shot,
    sample_low_shot,
)
from ctune.evaluate.nearest_neighbor import nearest_neighbor_accuracy
from ctune.evaluate.rankme import feature_spread, rankme
from ctune.evaluate.subject import (
    LabelledFeatures,
    Subject,
    count_classes,
    has_pairs,
    sample_rows,
)
from ctune.evaluation_config import Protocol, share_name, shots_name
from ctune.events import Warned
from ctune.schema import JsonObject
from ctune.scores import SETTINGS


def evaluate(subject: Subject, *, warn: Callable[[Warned], None]) -> dict[str, JsonObject]:
    """Return protocol -> metric -> value; accuracies are fractions of the held-out images.

    Every held-out image is scored exactly once. A protocol that these images do not allow (no
    labels, a single image, vectors that are all alike) is left out with a warning that says why.
    """
    results: dict[str, JsonObject] = {}
    left_out: dict[str, list[str]] = {}
    _warn_of_zeros(subject, warn)
    _warn_of_few(subject, warn)
    for protocol in subject.config.protocols:
        try:
            results[protocol] = SCORERS[protocol](subject)
        except (ValueError, DivergedError) as error:
            left_out.setdefault(str(error), []).append(protocol)
    for reason, names in left_out.items():
        message = f"{', '.join(names)} could not be measured: {reason}"
        warn(Warned(code="not_scored", message=message, hint="look at the held-out images"))
    return results


def _warn_of_zeros(subject: Subject, warn: Callable[[Warned], None]) -> None:
    every = torch.cat([subject.train.features, subject.heldout.features])
    zeros = int((every == 0).all(1).sum())
    if zeros:
        message = f"{zeros} of {len(every)} images have vectors that are all zero"
        hint = "they are similar to nothing; look at the images and the encoder"
        warn(Warned(code="zero_vectors", message=message, hint=hint))


def _warn_of_few(subject: Subject, warn: Callable[[Warned], None]) -> None:
    config, count = subject.config, len(subject.train.labelled().labels)
    most = max(config.knn_k, *config.knn_further_k)
    if "knn" in config.protocols and 0 < count < most:
        message = f"k-NN asks for {most} neighbours, but there are {count} labelled training images"
        hint = f"all {count} vote; lower evaluation.knn_k and knn_further_k"
        warn(Warned(code="few_neighbors", message=message, hint=hint))


def _knn(subject: Subject) -> JsonObject:
    config, known, asked = subject.config, subject.known, subject.asked
    wanted = [config.knn_k, *config.knn_further_k]
    ks = sorted({min(k, len(known.labels)) for k in wanted})
    main = min(config.knn_k, len(known.labels))
    uniform = config.knn_weighting == "uniform"
    temperature = None if uniform else config.knn_temperature

    def score(standardize: bool) -> JsonObject:
        found = knn_scores(
            known.features,
            known.labels,
            asked.features,
            asked.labels,
            ks=ks,
            temperature=temperature,
            standardize=standardize,
        )
        further = {f"k{k}": {"top1": one.top1} for k, one in found.items() if k != main}
        return {"top1": found[main].top1, "purity": found[main].purity, **further}

    scores = score(False)
    if config.knn_standardized:
        scores["standardized"] = score(True)
    how = {"weighting": "uniform"} if uniform else {"temperature": temperature}
    return scores | {SETTINGS: {"k": main, **how}}


def _linear_probe(subject: Subject) -> JsonObject:
    probe, settings = subject.probe, subject.config.linear_probe
    scores = {"top1": probe.top1, "top5": probe.top5}
    if probe.top1_max_on_test is not None:
        scores["top1_max_on_test"] = probe.top1_max_on_test
    grid = {"epochs": settings.num_epochs, "lr": probe.lr, "num_rates": len(probe.rates)}
    return scores | {SETTINGS: {"protocol": probe.protocol, "recipe": settings.recipe, **grid}}


def _isotropy(subject: Subject) -> JsonObject:
    """Return the scores of lacvit.md 5 on held-out images; `train_gap` is the gap on train ones."""
    sample = subject.sample
    scores: JsonObject = {
        "isotropy_score": partition_isotropy(sample.features)["isotropy"],
        "mean_cosine_similarity": mean_cosine_similarity(sample.features),
        "isoscore": isoscore(sample.features),
        SETTINGS: {"num_images": len(sample.labels)},
    }
    labelled = sample.labelled()
    if has_pairs(labelled):
        cosines: JsonObject = dict(class_cosine_similarity(labelled.features, labelled.labels))
        for count in ("intra_count", "inter_count"):
            scores[SETTINGS][count] = cosines.pop(count)
        scores |= cosines
    train_sample = subject.train.labelled().sample(subject.config.max_images, subject.seed)
    if has_pairs(train_sample):
        train_cosines = class_cosine_similarity(train_sample.features, train_sample.labels)
        scores["train_gap"] = train_cosines["gap"]
    return scores


def _rankme(subject: Subject) -> JsonObject:
    features = subject.sample.features
    return {
        "rankme": rankme(features),
        "feature_std": feature_spread(features),
        SETTINGS: {"num_images": len(features)},
    }


def _classification(subject: Subject) -> JsonObject:
    num_bins = subject.config.classification.num_bins
    return {
        name: classification_scores(predictions, num_bins=num_bins)
        for name, predictions in subject.predictions().items()
    } | {SETTINGS: {"num_bins": num_bins}}


def _low_shot(subject: Subject) -> JsonObject:
    settings, known, asked = subject.config.low_shot, subject.known, subject.asked
    test = preprocess_low_shot(asked.features)

    def draw(shots: int | float, seed: int) -> LabelledFeatures:
        C = subject.num_classes
        return known.rows(sample_low_shot(known.labels, num_classes=C, shots=shots, seed=seed))

    drawn: dict[str, list[LabelledFeatures]] = {
        shots_name(shots): [draw(shots, seed) for seed in range(settings.num_splits)]
        for shots in settings.shots
    }
    drawn |= {share_name(share): [draw(float(share), 0)] for share in settings.shares}
    drawn |= subject.named_splits

    def top1(split: LabelledFeatures) -> float:
        model = fit_logistic_regression(
            preprocess_low_shot(split.features), split.labels, num_classes=subject.num_classes
        )
        return Predictions(asked.labels, model.logits(test)).accuracy

    scores: JsonObject = {}
    for name, splits in drawn.items():
        tops = [top1(split) for split in splits]
        scores[name] = {"top1": mean(tops)} | ({"top1_std": pstdev(tops)} if tops[1:] else {})
    how: JsonObject = {"classifier": "logistic regression, frozen encoder"}
    how["num_splits"] = settings.num_splits
    if subject.finetuned:
        how["finetune_epochs"] = settings.finetune_epochs
    num_images = {name: len(splits[0].labels) for name, splits in drawn.items()}
    return scores | {**subject.finetuned, SETTINGS: {**how, "num_images": num_images}}


def _clustering(subject: Subject) -> JsonObject:
    data = subject.labelled_sample
    runs = kmeans_runs(
        data.features, count_classes(data), num_runs=subject.config.clustering.num_runs
    )
    every: list[JsonObject] = [
        dict(clustering_scores(data.labels, run.clusters.to(data.labels))) for run in runs
    ]
    means = {name: mean(scores[name] for scores in every) for name in every[0]}
    return {
        **every[0],
        "mean": means,
        "silhouette": silhouette_score(data.features, data.labels),
        "davies_bouldin": davies_bouldin_score(data.features, data.labels),
        SETTINGS: {
            "num_clusters": count_classes(data),
            "num_runs": len(runs),
            "num_images": len(data.labels),
        },
    }


def _alignment_uniformity(subject: Subject) -> JsonObject:
    sample = subject.sample
    scores: JsonObject = {"uniformity": uniformity(sample.features)}
    labelled = sample.labelled()
    if has_pairs(labelled):
        scores["class_alignment"] = class_alignment(labelled.features, labelled.labels)
    return scores | {SETTINGS: {"num_images": len(sample.labels)}}


def _nearest_neighbor(subject: Subject) -> JsonObject:
    data = subject.labelled_sample
    top1 = nearest_neighbor_accuracy(data.features, data.labels)
    return {"top1": top1, SETTINGS: {"num_images": len(data.labels)}}


def _augmentation_invariance(subject: Subject) -> JsonObject:
    settings, heldout = subject.config.augmentation_invariance, subject.heldout
    if subject.views is None:
        raise ValueError("random views need the held-out images, not only features")
    rows = sample_rows(len(heldout.labels), settings.num_images, subject.seed)
    seen = torch.stack([subject.views(rows, view) for view in range(settings.num_views)], dim=1)
    found = augmentation_invariance(heldout.features[rows], seen)
    how = {"views": settings.views, "num_views": settings.num_views, "num_images": len(rows)}
    return {**found, SETTINGS: how}


def _color_histogram(subject: Subject) -> JsonObject:
    if subject.histograms is None:
        raise ValueError("colour histograms need the images, not only features")
    limit, given = subject.config.max_images, []
    for data, histograms in zip((subject.train, subject.heldout), subject.histograms, strict=True):
        rows = sample_rows(len(data.labels), limit, subject.seed)
        given += [data.features[rows], histograms(rows)]
    return {
        **color_histogram_probe(*given, seed=subject.seed),
        SETTINGS: {"num_bins": given[1].shape[2], "num_images": len(given[2])},
    }


SCORERS: Mapping[Protocol, Callable[[Subject], JsonObject]] = {
    "knn": _knn,
    "linear_probe": _linear_probe,
    "isotropy": _isotropy,
    "rankme": _rankme,
    "classification": _classification,
    "low_shot": _low_shot,
    "clustering": _clustering,
    "alignment_uniformity": _alignment_uniformity,
    "nearest_neighbor": _nearest_neighbor,
    "augmentation_invariance": _augmentation_invariance,
    "color_histogram": _color_histogram,
}
