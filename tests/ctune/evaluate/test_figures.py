"""Data of the report's pictures."""

import importlib.util
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from ctune.config import EvaluationConfig
from ctune.evaluate import figures
from ctune.evaluate.classification import Predictions
from ctune.evaluate.figures import (
    Numbers,
    class_figures,
    cosine_histograms,
    gallery,
    make_figures,
    plane_map,
    shown_predictions,
)
from ctune.evaluate.subject import LabelledFeatures, Subject
from ctune.events import Warned
from ctune.figures_file import MAP_SIDE

CLASSES = 3
NUMBERS = Numbers(np.arange(40) + 1000, np.arange(20) + 2000)


def clusters(spread: float = 0.1) -> tuple[LabelledFeatures, LabelledFeatures]:
    """Return 40 training and 20 held-out rows, a class around each of the first axes."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % CLASSES
    noise = spread * torch.randn(60, 8, generator=generator)
    features = torch.eye(8)[labels] + noise
    return (
        LabelledFeatures(features[:40], labels[:40]),
        LabelledFeatures(features[40:], labels[40:]),
    )


def subject_of(train: LabelledFeatures, heldout: LabelledFeatures, **config: Any) -> Subject:
    return Subject(
        train=train,
        heldout=heldout,
        config=EvaluationConfig.model_validate(config),
        num_classes=CLASSES,
        seed=0,
    )


def predicted(labels: torch.Tensor, guesses: torch.Tensor, num_classes: int) -> Predictions:
    return Predictions(labels, torch.nn.functional.one_hot(guesses, num_classes).double())


def test_confusions_are_counted_by_true_and_predicted_class() -> None:
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    guesses = torch.tensor([0, 1, 1, 1, 0, 2])
    found = class_figures(predicted(labels, guesses, 3))
    assert found.matrix == [[1, 2, 0], [1, 1, 0], [0, 0, 1]]
    assert [(p.label, p.predicted, p.count, p.share) for p in found.pairs] == [
        (0, 1, 2, 2 / 3),
        (1, 0, 1, 1 / 2),
    ]
    assert [(a.label, a.accuracy, a.num_images) for a in found.accuracies] == [
        (0, 1 / 3, 3),
        (1, 1 / 2, 2),
        (2, 1.0, 1),
    ]


def test_a_class_without_held_out_images_has_no_accuracy() -> None:
    found = class_figures(predicted(torch.tensor([0, 3]), torch.tensor([5, 3]), 6))
    assert [one.label for one in found.accuracies] == [0, 3]
    assert found.matrix is not None and np.shape(found.matrix) == (6, 6)


def test_many_classes_are_shown_by_their_extremes() -> None:
    labels = torch.arange(400) % 200
    guesses = torch.where(labels < 30, labels + 1, labels)
    found = class_figures(predicted(labels, guesses, 200))
    assert found.matrix is None and len(found.pairs) == figures.MOST_CONFUSED
    accuracies = [one.accuracy for one in found.accuracies]
    assert accuracies == [0.0] * figures.EXTREME_CLASSES + [1.0] * figures.EXTREME_CLASSES


def test_pca_gives_the_plane_of_largest_variance() -> None:
    generator = torch.Generator().manual_seed(1)
    plane = torch.randn(50, 2, generator=generator).double() * torch.tensor([4.0, 1.0])
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator).double()).Q
    data = LabelledFeatures(plane @ rotation[:2] + 7.0, torch.arange(50) % 4)
    found = plane_map(data, "pca", seed=0)
    assert found.explained == pytest.approx(1.0)
    points = torch.tensor(found.points).double()
    distances, scale = torch.cdist(points, points), torch.cdist(plane, plane)
    ratio = float(distances.max() / scale.max())
    assert torch.allclose(distances, ratio * scale, atol=2.0)  # points are whole numbers
    assert points.min() >= 0 and points.max() <= MAP_SIDE and found.labels == data.labels.tolist()
    assert plane_map(data, "pca", seed=9) == found


@pytest.mark.parametrize(
    ("features", "said"),
    [(torch.eye(2), "at least 3"), (torch.ones(5, 4), "the same"), (torch.zeros(3, 4), "the same")],
)
def test_features_without_a_map(features: torch.Tensor, said: str) -> None:
    data = LabelledFeatures(features, torch.zeros(len(features), dtype=torch.int64))
    with pytest.raises(ValueError, match=said):
        plane_map(data, "pca", seed=0)


def test_features_of_one_dimension_lie_on_a_line() -> None:
    data = LabelledFeatures(torch.arange(5.0)[:, None], torch.full((5,), -1))
    found = plane_map(data, "pca", seed=0)
    assert [x for x, _ in found.points] == [0, 250, 500, 750, 1000]
    assert {y for _, y in found.points} == {MAP_SIDE // 2}


@pytest.mark.slow
def test_umap_keeps_classes_together_and_repeats_itself() -> None:
    _, heldout = clusters()
    found = plane_map(heldout, "umap", seed=3)
    assert found.explained is None and found == plane_map(heldout, "umap", seed=3)
    points = torch.tensor(found.points).double()
    same = heldout.labels[:, None] == heldout.labels[None]
    distances = torch.cdist(points, points).fill_diagonal_(float("inf"))
    assert bool(same[range(20), distances.argmin(1)].all())


def test_neighbours_are_training_images_of_the_largest_cosine() -> None:
    train, heldout = clusters()
    found = gallery(train, heldout, numbers=NUMBERS, seed=0)
    assert len(found) == figures.QUERIES and {query.label for query in found} == {0, 1, 2}
    unit = torch.nn.functional.normalize(train.features)
    for query in found:
        row = query.image - 2000
        cosines = unit @ torch.nn.functional.normalize(heldout.features[row], dim=0)
        wanted = (cosines.topk(figures.NEIGHBOURS).indices + 1000).tolist()
        assert [neighbour.image for neighbour in query.neighbours] == wanted
        assert query.neighbours[0].cosine == pytest.approx(float(cosines.max()), abs=1e-4)
        assert {neighbour.label for neighbour in query.neighbours} == {query.label}


def test_the_gallery_asks_about_the_same_images_before_and_after() -> None:
    train, heldout = clusters()
    other = clusters(spread=2.0)[1]
    images = [
        [query.image for query in gallery(train, features, numbers=NUMBERS, seed=4)]
        for features in (heldout, other)
    ]
    assert images[0] == images[1]


def test_few_images_give_a_small_gallery() -> None:
    train, heldout = clusters()
    train = LabelledFeatures(train.features[:2], torch.full((2,), -1))
    found = gallery(train, heldout.sample(1, 0), numbers=NUMBERS, seed=0)
    assert len(found) == 1 and [n.label for n in found[0].neighbours] == [-1, -1]
    empty = LabelledFeatures(train.features[:0], train.labels[:0])
    with pytest.raises(ValueError, match="training image"):
        gallery(empty, heldout, numbers=NUMBERS, seed=0)


def test_predictions_are_those_of_the_probe_or_else_of_the_neighbours() -> None:
    train, heldout = clusters()
    probed = shown_predictions(subject_of(train, heldout), {"linear_probe": {}})
    assert set(probed) == {"linear_probe"} and probed["linear_probe"].accuracy > 0.7
    voted = shown_predictions(subject_of(train, heldout), {"knn": {}})
    assert set(voted) == {"knn"} and voted["knn"].accuracy == 1.0
    logits = voted["knn"].logits
    headed = replace(subject_of(train, heldout), classifier_logits=logits)
    assert set(shown_predictions(headed, {})) == {"classifier", "knn"}
    unlabelled = LabelledFeatures(train.features, torch.full((40,), -1))
    assert shown_predictions(subject_of(unlabelled, heldout), {}) == {}


def test_all_pictures_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(figures, "MAP_IMAGES", 12)
    said: list[Warned] = []
    scores = {"intra_histogram": [1], "inter_histogram": [1], "intra_mean": 1.0, "inter_mean": 0.0}
    subject = subject_of(*clusters())
    found = make_figures(subject, {"isotropy": scores}, numbers=NUMBERS, warn=said.append)
    assert not said and set(found.predictions) == {"knn"} and len(found.gallery) == 8
    assert [(plane.kind, len(plane.points)) for plane in found.maps] == [("pca", 12)]
    assert found.cosines is not None and found.cosines.intra_mean == 1.0


def test_what_cannot_be_drawn_is_said() -> None:
    train, heldout = clusters()
    alike = LabelledFeatures(torch.ones(20, 8), heldout.labels)
    said: list[Warned] = []
    found = make_figures(subject_of(train, alike), {}, numbers=NUMBERS, warn=said.append)
    assert found.maps == [] and len(found.gallery) == 8
    assert [warning.code for warning in said] == ["no_figure"] and "pca map" in said[0].message


def test_a_missing_umap_is_said_and_the_pca_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said: list[Warned] = []
    subject = subject_of(*clusters(), map=["umap", "pca"])
    found = make_figures(subject, {}, numbers=NUMBERS, warn=said.append)
    assert [plane.kind for plane in found.maps] == ["pca"]
    assert said == [figures.UMAP_MISSING] and "ctune[umap]" in said[0].hint


def test_histograms_of_cosines_are_those_of_the_isotropy_protocol() -> None:
    scores = {"intra_histogram": [1, 2], "inter_histogram": [3, 0], "gap": 0.5}
    found = cosine_histograms({"isotropy": {**scores, "intra_mean": 0.5, "inter_mean": 0.0}})
    assert found is not None and (found.intra, found.inter) == ([1, 2], [3, 0])
    assert cosine_histograms({"isotropy": {"isoscore": 0.1}}) is None
    assert cosine_histograms({}) is None


def test_maps_are_named_once() -> None:
    assert EvaluationConfig().map_kinds == ["pca"]
    assert EvaluationConfig(map=["umap", "umap"]).map_kinds == ["umap"]
