"""The data of a report's pictures, from features that were computed once.

Letters: N images, D dimensions, C classes. What these features do not allow (a single image,
vectors that are all alike) is left out with a warning.
"""

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from torch import Tensor

from ctune.config import MapKind
from ctune.evaluate.classification import Predictions, confusion_matrix
from ctune.evaluate.knn import knn_classify, nearest_neighbors
from ctune.evaluate.subject import LabelledFeatures, Subject
from ctune.evaluation_config import PROBED
from ctune.events import Warned
from ctune.figures_file import (
    MAP_SIDE,
    ClassAccuracy,
    ClassFigures,
    ConfusedPair,
    CosineHistograms,
    Figures,
    Neighbour,
    PlaneMap,
    Query,
)
from ctune.schema import JsonObject
from ctune.seeding import derive_seed, make_generator

T = TypeVar("T")

MAP_IMAGES = 2_000
MATRIX_CLASSES = 50
"""Beyond these a confusion matrix cannot be read, and bars of all classes neither."""
MOST_CONFUSED = 20
EXTREME_CLASSES = 20
QUERIES = 8
NEIGHBOURS = 5
UMAP_NEIGHBOURS = 15
PREDICTING_NEIGHBOURS = 20
UMAP_MISSING = Warned(
    code="umap_missing",
    message="this worker has no umap-learn: the 2-D map is the PCA's",
    hint="install `ctune[umap]` where the worker runs, or leave umap out of evaluation.map",
)


class Numbers(NamedTuple):
    """Numbers in the packed store of the rows of both splits, int64."""

    train: NDArray[np.int64]
    heldout: NDArray[np.int64]


def make_figures(
    subject: Subject,
    results: Mapping[str, JsonObject],
    *,
    numbers: Numbers,
    warn: Callable[[Warned], None],
) -> Figures:
    """Return the pictures of one evaluation.

    Args:
        subject: what was evaluated; the same images are drawn before and after.
        results: what the protocols found.
        numbers: where the images are.
        warn: told what could not be made.
    """

    def attempt(what: str, make: Callable[[], T]) -> list[T]:
        try:
            return [make()]
        except ValueError as error:
            message = f"the report has no {what}: {error}"
            warn(Warned(code="no_figure", message=message, hint="look at the held-out images"))
            return []

    seed, sample = subject.seed, subject.heldout.sample(MAP_IMAGES, subject.seed)
    maps: list[PlaneMap] = []
    for kind in _possible(subject.config.map_kinds, warn):
        maps += attempt(f"{kind} map", lambda kind=kind: plane_map(sample, kind, seed=seed))  # type: ignore[misc]
    train, heldout = subject.train, subject.heldout
    found = attempt("gallery", lambda: gallery(train, heldout, numbers=numbers, seed=seed))
    predictions = shown_predictions(subject, results)
    return Figures(
        cosines=cosine_histograms(results),
        predictions={name: class_figures(one) for name, one in predictions.items()},
        maps=maps,
        gallery=found[0] if found else [],
    )


def shown_predictions(
    subject: Subject, results: Mapping[str, JsonObject]
) -> dict[str, Predictions]:
    """Return those of the trained classifier, if any, and of the linear probe.

    Where no protocol has trained a probe, its place is taken by the 20 nearest training images.
    Without labels there are none.
    """
    if PROBED & results.keys():
        return subject.predictions()
    known, asked = subject.train.labelled(), subject.heldout.labelled()
    found = {}
    if subject.classifier_logits is not None:
        found["classifier"] = Predictions(asked.labels, subject.classifier_logits)
    if len(known.labels) and len(asked.labels):
        k = min(PREDICTING_NEIGHBOURS, len(known.labels))
        C = subject.num_classes
        nearest = knn_classify(known.features, known.labels, asked.features, num_classes=C, k=k)
        found["knn"] = Predictions(asked.labels, nearest.scores)
    return found


def cosine_histograms(results: Mapping[str, JsonObject]) -> CosineHistograms | None:
    """Return the histograms that the protocol `isotropy` counted; None where it did not."""
    scores = results.get("isotropy", {})
    if "intra_histogram" not in scores:
        return None
    return CosineHistograms(
        intra=scores["intra_histogram"],
        inter=scores["inter_histogram"],
        intra_mean=scores["intra_mean"],
        inter_mean=scores["inter_mean"],
    )


def class_figures(predictions: Predictions) -> ClassFigures:
    """Return confusions and the accuracy of every class that has a held-out image."""
    true, guess = predictions.labels.cpu(), predictions.classes.cpu()
    C = predictions.logits.shape[1]
    cells, counts = torch.unique(true * C + guess, return_counts=True)  # C x C may be too large
    totals = torch.bincount(true, minlength=C).tolist()
    right = torch.bincount(true[true == guess], minlength=C).tolist()
    accuracies = [
        ClassAccuracy(label=c, accuracy=right[c] / totals[c], num_images=totals[c])
        for c in range(C)
        if totals[c]
    ]
    accuracies.sort(key=lambda one: (one.accuracy, one.label))
    if len(accuracies) > MATRIX_CLASSES:
        accuracies = accuracies[:EXTREME_CLASSES] + accuracies[-EXTREME_CLASSES:]
    return ClassFigures(
        num_images=len(true),
        matrix=confusion_matrix(predictions).tolist() if C <= MATRIX_CLASSES else None,
        pairs=_most_confused(cells.tolist(), counts.tolist(), totals),
        accuracies=accuracies,
    )


def _most_confused(
    cells: Sequence[int], counts: Sequence[int], totals: Sequence[int]
) -> list[ConfusedPair]:
    C = len(totals)
    wrong = [(count, *divmod(cell, C)) for cell, count in zip(cells, counts, strict=True)]
    wrong = sorted(
        (pair for pair in wrong if pair[1] != pair[2]), key=lambda pair: (-pair[0], *pair[1:])
    )
    return [
        ConfusedPair(label=label, predicted=guess, count=count, share=count / totals[label])
        for count, label, guess in wrong[:MOST_CONFUSED]
    ]


def plane_map(data: LabelledFeatures, kind: MapKind, *, seed: int) -> PlaneMap:
    """Return a 2-D map of all rows of `data`.

    `pca`: the first two principal components, by scikit-learn. `umap`: McInnes et al. 2018, arXiv
    1802.03426, by umap-learn with cosine distances. For one seed and machine always the same.

    Raises:
        ValueError: fewer than 3 images, or features that are all the same row.
    """
    X = data.features.detach().double().cpu()
    if len(X) < 3:
        raise ValueError(f"a map needs at least 3 images, there are {len(X)}")
    X = X - X.mean(0)
    spread = float(X.square().sum())
    if spread <= len(X) * (1e-12 * float(data.features.abs().max())) ** 2:
        raise ValueError("the features of all images are the same")
    explained = None
    if kind == "pca":
        pca = PCA(n_components=min(2, X.shape[1]), random_state=seed)
        plane = pca.fit_transform(X.numpy())
        explained = float(pca.explained_variance_ratio_.sum())
    else:
        plane = _umap(data.features.float().cpu().numpy(), seed)
    return PlaneMap(
        kind=kind, points=_on_grid(plane), labels=data.labels.tolist(), explained=explained
    )


def _umap(features: NDArray[np.float32], seed: int) -> NDArray[np.float64]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ImportWarning)  # without TensorFlow it does what we need
        umap = importlib.import_module("umap")
    mapper = umap.UMAP(
        n_neighbors=min(UMAP_NEIGHBOURS, len(features) - 1),
        metric="cosine",
        init="pca",  # the spectral one warns, or fails, where the graph falls apart
        random_state=derive_seed(seed, "umap") % 2**31,
        n_jobs=1,
    )
    plane: NDArray[np.float64] = mapper.fit_transform(features).astype(np.float64)
    return plane


def _on_grid(plane: NDArray[np.float64]) -> list[tuple[int, int]]:
    """Return [N, 1 or 2] points on 0 ... MAP_SIDE, centred, with one scale for both axes."""
    whole = np.zeros((len(plane), 2))
    whole[:, : plane.shape[1]] = plane
    low, high = whole.min(0), whole.max(0)
    scaled = (whole - (low + high) / 2) / (high - low).max() + 0.5
    return [(int(x), int(y)) for x, y in np.rint(scaled * MAP_SIDE)]


def gallery(
    train: LabelledFeatures, heldout: LabelledFeatures, *, numbers: Numbers, seed: int
) -> list[Query]:
    """Return held-out images, spread over classes, with the training images of largest cosine.

    Raises:
        ValueError: there is no training image, or no held-out one.
    """
    if not len(train.labels) or not len(heldout.labels):
        raise ValueError("it needs a training image and a held-out image")
    rows = _spread_rows(heldout.labels.cpu(), seed)
    queries = heldout.features[rows.to(heldout.features.device)]
    count = min(NEIGHBOURS, len(train.labels))
    cosines, nearest = nearest_neighbors(train.features, queries, k=count)
    found = []
    for row, values, places in zip(rows.tolist(), cosines.tolist(), nearest.tolist(), strict=True):
        neighbours = [
            Neighbour(image=int(numbers.train[p]), label=int(train.labels[p]), cosine=round(v, 4))
            for v, p in zip(values, places, strict=True)
        ]
        image, label = int(numbers.heldout[row]), int(heldout.labels[row])
        found.append(Query(image=image, label=label, neighbours=neighbours))
    return found


def _spread_rows(labels: Tensor, seed: int) -> Tensor:
    """Return up to `QUERIES` rows drawn with `seed`: one of every class before a second of any."""
    order = torch.randperm(len(labels), generator=make_generator(seed, "gallery"))
    seen: dict[int, int] = {}
    turns: list[tuple[int, int, int, int]] = []
    for row, label in zip(order.tolist(), labels[order].tolist(), strict=True):
        turns.append((seen.get(label, 0), len(turns), label, row))
        seen[label] = seen.get(label, 0) + 1
    first = sorted(turns)[:QUERIES]
    return torch.tensor([row for _, _, _, row in sorted(first, key=lambda t: (t[2], t[0]))])


def _possible(kinds: Sequence[MapKind], warn: Callable[[Warned], None]) -> list[MapKind]:
    """Return the maps that this installation can make; PCA in place of a missing UMAP."""
    if "umap" not in kinds or importlib.util.find_spec("umap") is not None:
        return list(kinds)
    warn(UMAP_MISSING)
    return list(dict.fromkeys("pca" if kind == "umap" else kind for kind in kinds))
