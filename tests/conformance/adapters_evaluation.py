"""Adapters of the evaluation functions."""

from torch import nn

from ctune.evaluate.alignment_uniformity import augmentation_invariance
from ctune.evaluate.clustering import (
    cluster_accuracy,
    clustering_scores,
    davies_bouldin_score,
    kmeans,
    kmeans_runs,
    silhouette_score,
)
from ctune.evaluate.fixed_probe import fit_linear_probe
from ctune.evaluate.inputs import check_features, directions
from ctune.evaluate.knn import knn_classify
from ctune.evaluate.linear_probe import LinearProbeHead
from ctune.evaluate.low_shot import fit_logistic_regression, preprocess_low_shot
from ctune.evaluate.nearest_neighbor import nearest_neighbor_accuracy
from ctune.evaluate.probe_protocol import ProbeProtocol, Schedule
from ctune.evaluate.rankme import rankme
from tests.conformance.convert import Adapter, Case, integers, options, tensors


def _knn_classify(inputs: Case, parameters: Case) -> Case:
    train, test = tensors(inputs, parameters, "train_features", "test_features")
    chosen = {"k": 10, "standardize": True, **options(parameters)}  # the specification's defaults
    result = knn_classify(train, integers(inputs["train_labels"]), test, **chosen)
    actual = {"predictions": result.predictions.tolist(), "scores": result.scores.tolist()}
    if inputs.get("test_labels") is None:
        return actual
    labels = integers(inputs["test_labels"])
    return actual | {"accuracy": result.accuracy(labels), "purity": result.purity(labels)}


def _weighted_knn_classify(inputs: Case, parameters: Case) -> Case:
    train, test = tensors(inputs, parameters, "train_features", "test_features")
    labels = integers(inputs["test_labels"])
    result = knn_classify(train, integers(inputs["train_labels"]), test, **options(parameters))
    return {
        "top1": 100 * result.accuracy(labels),  # the vectors are in percent
        "top5": 100 * result.topk_accuracy(labels),
        "predictions": result.predictions.tolist(),
    }


def _rankme(inputs: Case, parameters: Case) -> Case:
    (features,) = tensors(inputs, parameters, "features")
    return {"rankme": rankme(features, **options(parameters))}


def _linear_probe_head(inputs: Case, parameters: Case) -> Case:
    features, weight, bias = tensors(inputs, parameters, "features", "weight", "bias")
    head = LinearProbeHead(weight.shape[1], weight.shape[0], **options(parameters)).to(features)
    head.linear.weight = nn.Parameter(weight)
    head.linear.bias = nn.Parameter(bias)
    train_logits = head.train()(features).tolist()
    return {
        "train_logits": train_logits,
        "eval_logits": head.eval()(features).tolist(),
        "running_mean": head.norm.running_mean.tolist(),  # type: ignore[union-attr]
        "running_var": head.norm.running_var.tolist(),  # type: ignore[union-attr]
    }


PROBE_SCHEDULES: dict[str, Schedule] = {"none": "constant", "cosine": "cosine"}


def _fit_linear_probe(inputs: Case, parameters: Case) -> Case:
    given = {
        "epochs": 100, "batch_size": 64, "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4,
        "lr_schedule": "none", "seed": 0, **options(parameters),
    }  # fmt: skip
    prepare = directions if given.pop("normalize", False) else check_features
    (features,) = tensors(inputs, parameters, "features")
    start = None
    if "initial_weight" in inputs:
        weight, bias = tensors(inputs, parameters, "initial_weight", "initial_bias")
        start = (weight, bias)
    protocol = ProbeProtocol(
        learning_rates=(given.pop("lr"),),
        schedule=PROBE_SCHEDULES[given.pop("lr_schedule")],
        **{name: given.pop(name) for name in ("epochs", "batch_size", "momentum")},
        **{name: given.pop(name) for name in ("weight_decay", "seed")},
    )
    labels = integers(inputs["labels"])
    probe = fit_linear_probe(prepare(features), labels, protocol=protocol, start=start, **given)
    actual: Case = {
        "weight": probe.weight.tolist(),
        "bias": probe.bias.tolist(),
        "losses": probe.losses,
    }
    if "test_features" in inputs:
        (test,) = tensors(inputs, parameters, "test_features")
        actual["test_accuracy"] = probe.accuracy(prepare(test), integers(inputs["test_labels"]))
    return actual


def _cluster_accuracy(inputs: Case, parameters: Case) -> Case:
    labels, clusters = integers(inputs["labels"]), integers(inputs["clusters"])
    return {"accuracy": cluster_accuracy(labels, clusters)}


def _clustering_scores(inputs: Case, parameters: Case) -> Case:
    return dict(clustering_scores(integers(inputs["labels"]), integers(inputs["clusters"])))


def _silhouette_score(inputs: Case, parameters: Case) -> Case:
    (features,) = tensors(inputs, parameters, "features")
    score = silhouette_score(features, integers(inputs["labels"]), **options(parameters))
    return {"score": score}


def _davies_bouldin_score(inputs: Case, parameters: Case) -> Case:
    (features,) = tensors(inputs, parameters, "features")
    score = davies_bouldin_score(features, integers(inputs["labels"]), **options(parameters))
    return {"score": score}


def _kmeans(inputs: Case, parameters: Case) -> Case:
    (features,) = tensors(inputs, parameters, "features")
    count, normalize = parameters["n_clusters"], parameters.get("l2_normalize", True)
    if "init" in inputs:
        (init,) = tensors(inputs, parameters, "init")
        found = kmeans(
            features,
            count,
            init=init,
            max_iterations=parameters.get("max_iter", 300),
            tolerance=parameters.get("tol", 1e-4),
            l2_normalize=normalize,
        )
    else:
        num_runs = parameters.get("n_init", 20)
        found = kmeans_runs(features, count, num_runs=num_runs, l2_normalize=normalize)[0]
    return {
        "clusters": found.clusters.tolist(),
        "centers": found.centers.tolist(),
        "inertia": found.inertia,
    }


def _preprocess_low_shot(inputs: Case, parameters: Case) -> Case:
    (features,) = tensors(inputs, parameters, "features")
    return {"features": preprocess_low_shot(features).tolist()}


def _fit_logistic_regression(inputs: Case, parameters: Case) -> Case:
    prepare = preprocess_low_shot if parameters.get("preprocess", True) else check_features
    (features,) = tensors(inputs, parameters, "features")
    model = fit_logistic_regression(
        prepare(features), integers(inputs["labels"]), **options(parameters, "preprocess")
    )
    actual: Case = {"weight": model.weight.tolist(), "objective": model.objective}
    if "test_features" in inputs:
        logits = model.logits(prepare(*tensors(inputs, parameters, "test_features")))
        actual |= {"test_logits": logits.tolist(), "test_predictions": logits.argmax(1).tolist()}
    return actual


def _augmentation_invariance(inputs: Case, parameters: Case) -> Case:
    features, augmented = tensors(inputs, parameters, "features", "augmented")
    return dict(augmentation_invariance(features, augmented))


def _nearest_neighbour_accuracy(inputs: Case, parameters: Case) -> Case:
    (features,) = tensors(inputs, parameters, "features")
    labels = integers(inputs["labels"])
    return {"accuracy": nearest_neighbor_accuracy(features, labels, **options(parameters))}


def _linear_head_sgd(inputs: Case, parameters: Case) -> Case:
    features, weight, bias = tensors(inputs, parameters, "features", "weight", "bias")
    protocol = ProbeProtocol(
        learning_rates=(parameters["lr"],),
        epochs=parameters["num_steps"],
        batch_size=len(features),
        schedule="constant",
        **options(parameters, "lr", "num_steps"),
    )
    labels, start = integers(inputs["labels"]), (weight, bias)
    probe = fit_linear_probe(
        features, labels, len(bias), protocol=protocol, shuffle=False, start=start
    )
    return {
        "weight": probe.weight.tolist(),
        "bias": probe.bias.tolist(),
        "losses": probe.losses,
    }


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("lacvit", "linear_head_sgd"): _linear_head_sgd,
    ("mae_ct", "knn_classify"): _knn_classify,
    ("mae_ct", "cluster_accuracy"): _cluster_accuracy,
    ("mae_ct", "clustering_scores"): _clustering_scores,
    ("mae_ct", "silhouette_score"): _silhouette_score,
    ("mae_ct", "davies_bouldin_score"): _davies_bouldin_score,
    ("mae_ct", "kmeans"): _kmeans,
    ("mae_ct", "preprocess_low_shot"): _preprocess_low_shot,
    ("mae_ct", "fit_logistic_regression"): _fit_logistic_regression,
    ("mae_ct", "augmentation_invariance"): _augmentation_invariance,
    ("transformer_head", "nearest_neighbour_accuracy"): _nearest_neighbour_accuracy,
    ("mae_ct", "LinearProbeHead.forward"): _linear_probe_head,
    ("transformer_head", "fit_linear_probe"): _fit_linear_probe,
    ("udi", "weighted_knn_classify"): _weighted_knn_classify,
    ("udi", "rankme"): _rankme,
}
