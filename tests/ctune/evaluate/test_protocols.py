"""The protocols of a run: what is asked for, what the labels allow, scores and settings apart."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from ctune.config import EvaluationConfig
from ctune.evaluate.protocols import SCORERS, evaluate
from ctune.evaluate.subject import Histograms, LabelledFeatures, Subject
from ctune.events import Warned
from ctune.schema import JsonObject
from ctune.scores import score_rows

EVERY = list(SCORERS)


def blobs(per_class: int, classes: int, seed: int) -> LabelledFeatures:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(per_class)
    centres = 4 * torch.eye(classes, 8)
    noise = torch.randn(len(labels), 8, generator=generator)
    return LabelledFeatures(centres[labels] + 0.5 * noise, labels)


def subject(train: LabelledFeatures, heldout: LabelledFeatures, **config: object) -> Subject:
    asked = EvaluationConfig.model_validate(config)

    def views(rows: Tensor, step: int) -> Tensor:
        return heldout.features[rows] + 0.1 * step

    return Subject(
        train=train,
        heldout=heldout,
        config=asked,
        num_classes=4,
        seed=0,
        views=views,
        histograms=(histograms_of(train), histograms_of(heldout)),
    )


def histograms_of(data: LabelledFeatures) -> Histograms:
    """Histograms of two bins, whose shares the features decide."""
    return lambda rows: torch.stack([data.features[rows, :3], -data.features[rows, :3]], 2).softmax(
        2
    )


def run(
    train: LabelledFeatures,
    heldout: LabelledFeatures,
    *,
    warned: Sequence[str] = (),
    **config: object,
) -> dict[str, JsonObject]:
    told: list[Warned] = []
    results = evaluate(subject(train, heldout, **config), warn=told.append)
    assert [warning.code for warning in told] == list(warned)
    return results


def test_separable_classes_score_high_everywhere() -> None:
    results = run(blobs(20, 4, 0), blobs(10, 4, 1))
    rows = dict(score_rows(results))
    assert rows["knn", "top1"] == 1.0
    assert rows["linear_probe", "top1"] == rows["linear_probe", "top5"] == 1.0
    gap, train_gap = rows["isotropy", "gap"], rows["isotropy", "train_gap"]
    assert gap is not None and gap > 0.5
    assert train_gap is not None and abs(gap - train_gap) < 0.2


def test_settings_and_histograms_are_no_scores() -> None:
    protocols = ["knn", "isotropy"]
    results = run(
        blobs(3, 4, 0),
        blobs(10, 4, 1),
        warned=["few_neighbors"],
        protocols=protocols,
        knn_further_k=[2],
    )
    assert results["knn"]["settings"] == {"k": 12, "temperature": 0.07}
    assert {path for path, _ in score_rows(results) if path[0] == "knn"} == {
        ("knn", "top1"),
        ("knn", "purity"),
        ("knn", "k2", "top1"),
        ("knn", "standardized", "top1"),
        ("knn", "standardized", "purity"),
        ("knn", "standardized", "k2", "top1"),
    }
    names = {path[-1] for path, _ in score_rows(results)}
    assert names.isdisjoint({"k", "temperature", "num_images", "intra_count", "intra_histogram"})


def test_without_labels_only_the_unsupervised_scores_are_left() -> None:
    train, heldout = blobs(20, 4, 0), blobs(10, 4, 1)
    bare = LabelledFeatures(train.features, torch.full_like(train.labels, -1))
    asked = LabelledFeatures(heldout.features, torch.full_like(heldout.labels, -1))
    told: list[Warned] = []
    results = evaluate(subject(bare, asked, protocols=EVERY), warn=told.append)
    assert set(results) == {
        "isotropy", "rankme", "alignment_uniformity", "augmentation_invariance", "color_histogram",
    }  # fmt: skip
    assert {"gap", "train_gap"}.isdisjoint(results["isotropy"])
    assert "class_alignment" not in results["alignment_uniformity"]
    assert {warning.code for warning in told} == {"not_scored"}
    assert [warning.message.split(" could")[0] for warning in told] == [
        "knn, linear_probe, low_shot",
        "classification, clustering, nearest_neighbor",
    ]
    assert "fewer than two classes" in told[0].message


def test_unlabelled_images_are_left_out_of_supervised_scores() -> None:
    train, heldout = blobs(20, 4, 0), blobs(10, 4, 1)
    labels = train.labels.clone()
    labels[::2] = -1
    partly = LabelledFeatures(train.features, labels)
    results = run(partly, heldout, protocols=EVERY)
    assert set(results) == set(EVERY)
    assert results["knn"]["settings"]["k"] == 20
    assert results["knn"]["purity"] < 1, "twenty neighbours of ten in each class"


def test_the_isotropy_sample_is_seeded_and_capped() -> None:
    data = blobs(50, 4, 0)
    assert len(data.sample(30, seed=0).labels) == 30
    assert torch.equal(data.sample(30, seed=0).features, data.sample(30, seed=0).features)
    assert not torch.equal(data.sample(30, seed=0).features, data.sample(30, seed=1).features)
    assert data.sample(1000, seed=0) is data


@pytest.mark.parametrize("recipe", ["lacvit", "mae_ct", "mae"])
@pytest.mark.parametrize("per_class", [1, 2, 5])
def test_few_images_per_class_are_probed(per_class: int, recipe: str) -> None:
    results = run(
        blobs(per_class, 4, 0),
        blobs(10, 4, 1),
        warned=["few_neighbors"] if per_class < 5 else [],
        linear_probe={"recipe": recipe},
    )
    assert results["linear_probe"]["top1"] >= (0.75 if recipe == "lacvit" else 0.5)
    assert results["knn"]["settings"]["k"] == min(20, 4 * per_class)


def test_a_score_that_one_image_cannot_have_is_left_out_with_a_warning() -> None:
    told: list[Warned] = []
    asked = subject(blobs(5, 4, 0), blobs(1, 1, 1), protocols=EVERY)
    results = evaluate(asked, warn=told.append)
    assert set(results) == {
        "knn", "linear_probe", "classification", "low_shot", "rankme", "color_histogram",
    }  # fmt: skip
    left_out = {name for w in told for name in w.message.split(" could")[0].split(", ")}
    assert left_out == set(EVERY) - set(results)


def test_every_protocol_scores_separable_classes() -> None:
    results = run(blobs(20, 4, 0), blobs(10, 4, 1), protocols=EVERY)
    rows = {".".join(path): value for path, value in score_rows(results)}
    perfect = [
        "knn.top1", "knn.standardized.k1.top1", "linear_probe.top1", "nearest_neighbor.top1",
        "classification.linear_probe.balanced_accuracy", "clustering.accuracy",
        "clustering.ari", "low_shot.5_shot.top1", "low_shot.10_percent.top1",
    ]  # fmt: skip
    assert {name: rows[name] for name in perfect} == dict.fromkeys(perfect, pytest.approx(1))
    assert results["low_shot"]["settings"]["num_images"] == {
        "1_shot": 4, "2_shot": 8, "5_shot": 20, "1_percent": 4, "10_percent": 8,
    }  # fmt: skip
    assert rows["low_shot.5_shot.top1_std"] == 0
    assert 3 < rows["rankme.rankme"] < 8  # type: ignore[operator]
    assert rows["alignment_uniformity.class_alignment"] < 1  # type: ignore[operator]
    assert results["clustering"]["settings"]["num_clusters"] == 4
    assert all(isinstance(value, float) for value in rows.values())


def test_the_trained_classifier_is_judged_beside_the_probe() -> None:
    train, heldout = blobs(20, 4, 0), blobs(10, 4, 1)
    logits = torch.zeros(40, 4)
    asked = replace(subject(train, heldout, protocols=["classification"]), classifier_logits=logits)
    told: list[Warned] = []
    scores = evaluate(asked, warn=told.append)["classification"]
    assert told == []
    assert scores["classifier"]["top1"] == scores["classifier"]["balanced_accuracy"] == 0.25
    assert scores["classifier"]["worst_class_accuracy"] == 0
    assert scores["classifier"]["calibration_error"] == pytest.approx(0)
    assert scores["linear_probe"]["top1"] == 1
    assert asked.predictions()["linear_probe"].accuracy == 1


def test_the_probe_is_trained_once() -> None:
    asked = subject(blobs(20, 4, 0), blobs(10, 4, 1))
    assert asked.probe is asked.probe


@pytest.mark.parametrize("recipe", ["lacvit", "mae_ct", "mae"])
def test_recipes_and_the_full_protocol(recipe: str) -> None:
    train, heldout = blobs(20, 4, 0), blobs(10, 4, 1)
    labels = torch.where(torch.arange(80) % 5 == 0, -1, train.labels)
    partly = LabelledFeatures(train.features, labels)
    wanted = {"protocol": "full", "recipe": recipe}
    asked = subject(partly, heldout, protocols=["linear_probe"], linear_probe=wanted)
    seen: set[int] = set()

    def augmented(rows: torch.Tensor, step: int) -> torch.Tensor:
        seen.update(rows.tolist())
        return train.features[rows]

    told: list[Warned] = []
    scores = evaluate(replace(asked, augmented=augmented), warn=told.append)["linear_probe"]
    assert told == []
    assert seen == set((labels >= 0).nonzero()[:, 0].tolist()), "rows of the whole train set"
    assert scores["top1"] == scores["top1_max_on_test"] == 1
    assert scores["settings"]["protocol"] == "full"
    rates = {"lacvit": 10, "mae_ct": 13, "mae": 1}
    assert scores["settings"]["num_rates"] == rates[recipe]
    assert evaluate(asked, warn=told.append) == {}
    assert "needs the training images" in told[0].message


@pytest.mark.parametrize(("recipe", "epochs"), [("lacvit", 100), ("mae_ct", 100), ("mae", 90)])
def test_the_cached_probe_tells_the_best_on_the_test_images_where_its_authors_do(
    recipe: str, epochs: int
) -> None:
    results = run(
        blobs(10, 4, 0),
        blobs(10, 4, 1),
        protocols=["linear_probe"],
        linear_probe={"recipe": recipe},
    )["linear_probe"]
    assert results["settings"]["protocol"] == "cached"
    assert results["settings"]["epochs"] == epochs
    assert ("top1_max_on_test" in results) == (recipe != "lacvit")
    assert results.get("top1_max_on_test", 1) >= results["top1"]


def test_the_probe_s_epochs_may_be_chosen() -> None:
    asked = {"recipe": "mae", "epochs": 7}
    results = run(blobs(10, 4, 0), blobs(10, 4, 1), linear_probe=asked)
    assert results["linear_probe"]["settings"]["epochs"] == 7


def test_uniform_votes_may_differ_from_weighted_ones() -> None:
    """Of three neighbours the nearest is of class 0, the others of class 1."""
    train = LabelledFeatures(
        torch.tensor([[1.0, 0.01], [1.0, 1.0], [1.0, 1.1]]), torch.tensor([0, 1, 1])
    )
    asked = LabelledFeatures(torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
    wanted: dict[str, Any] = {"protocols": ["knn"], "knn_k": 3, "knn_further_k": [1]}
    weighted = run(train, asked, **wanted)["knn"]
    uniform = run(train, asked, **wanted, knn_weighting="uniform")["knn"]
    assert (weighted["top1"], uniform["top1"], uniform["k1"]["top1"]) == (1, 0, 1)
    assert uniform["settings"] == {"k": 3, "weighting": "uniform"}


def test_views_of_every_image_are_averaged() -> None:
    """Views along the axes 0 and 1 of unit vectors along them: cosine 1/√2 with their mean."""
    axes = torch.eye(8)
    heldout = LabelledFeatures(axes[[0, 1]] + 0.1, torch.tensor([0, 1]))
    asked = subject(blobs(5, 4, 0), heldout, protocols=["augmentation_invariance"])
    seen: list[tuple[int, int]] = []

    def views(rows: Tensor, step: int) -> Tensor:
        seen.append((len(rows), step))
        return axes[[step % 2] * len(rows)]

    told: list[Warned] = []
    found = evaluate(replace(asked, views=views), warn=told.append)["augmentation_invariance"]
    assert told == []
    assert seen == [(2, step) for step in range(8)]
    assert found["unnormalized"] == pytest.approx(0.5**0.5)
    assert found["norm"] == pytest.approx(0.28 / 1.28)
    assert found["normalized"] == pytest.approx(found["unnormalized"] / found["norm"])
    assert found["settings"] == {"views": "minimal", "num_views": 8, "num_images": 2}


def test_protocols_of_images_say_that_they_need_them() -> None:
    protocols = ["augmentation_invariance", "color_histogram"]
    asked = subject(blobs(5, 4, 0), blobs(5, 4, 1), protocols=protocols)
    told: list[Warned] = []
    assert evaluate(replace(asked, views=None, histograms=None), warn=told.append) == {}
    assert [warning.message.split(" could")[0] for warning in told] == protocols


def test_low_shot_splits_by_file_name() -> None:
    """The images of the second split bear the labels of other classes: all it learns is wrong."""
    train, heldout = blobs(20, 4, 0), blobs(10, 4, 1)
    rows = {f"{n}.png": n for n in range(80)}
    right, wrong = [0, 20, 40, 60], [1, 21, 41, 61]
    train.labels[wrong] = (train.labels[wrong] + 1) % 4
    lists = [[f"{n}.png" for n in split] for split in (right, wrong)]
    given = {"shots": [], "shares": [], "splits": {"msn": lists}}
    asked = subject(train, heldout, protocols=["low_shot"], low_shot=given)
    told: list[Warned] = []
    found = evaluate(replace(asked, find_train=lambda names: rows), warn=told.append)["low_shot"]
    assert told == []
    assert found["settings"]["num_images"] == {"msn": 4}
    assert found["msn"] == {"top1": pytest.approx(0.5), "top1_std": pytest.approx(0.5)}
    train.labels[20] = -1
    assert evaluate(replace(asked, find_train=lambda names: rows), warn=told.append) == {}
    assert "has images without a label" in told[0].message


def test_vectors_of_zeros_are_told_and_do_not_stop_the_neighbours() -> None:
    train, heldout = blobs(20, 4, 0), blobs(10, 4, 1)
    heldout.features[3] = 0
    told: list[Warned] = []
    results = evaluate(subject(train, heldout, protocols=["knn", "isotropy"]), warn=told.append)
    assert [warning.code for warning in told] == ["zero_vectors", "not_scored"]
    assert results["knn"]["top1"] >= 0.9
    assert "isotropy" not in results


def test_features_that_are_all_alike() -> None:
    same = LabelledFeatures(torch.ones(24, 3), torch.arange(24) % 4)
    told: list[Warned] = []
    results = evaluate(subject(same, same, protocols=EVERY), warn=told.append)
    assert results["knn"]["top1"] == 0.25
    assert results["nearest_neighbor"]["top1"] == pytest.approx(5 / 24), "row 0, of label 0"
    assert results["rankme"]["rankme"] == pytest.approx(1, abs=1e-4)
    assert results["rankme"]["feature_std"] == pytest.approx(0, abs=1e-9)
    assert results["alignment_uniformity"]["uniformity"] == pytest.approx(0, abs=1e-9)
    assert results["low_shot"]["5_shot"]["top1"] == 0.25
    assert [warning.message.split(" could")[0] for warning in told] == ["isotropy"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"protocols": ["knn", "knn"]}, "'knn' stands twice"),
        ({"protocols": ["k-nn"]}, "Input should be 'knn'"),
        ({"knn_further_k": [1, 1]}, "1 stands twice"),
        ({"knn_further_k": [0]}, "greater than or equal to 1"),
        ({"low_shot": {"shots": [0]}}, "greater than or equal to 1"),
        ({"low_shot": {"shares": [1.5]}}, "less than or equal to 1"),
        ({"clustering": {"num_runs": 0}}, "greater than or equal to 1"),
        ({"classification": {"num_bins": 0}}, "greater than or equal to 1"),
        ({"linear_probe": {"protocol": "quick"}}, "'cached' or 'full'"),
        ({"linear_probe": {"epochs": 0}}, "greater than or equal to 1"),
        ({"low_shot": {"splits": {"2_shot": [["a"]]}}}, "'2_shot' is drawn and in splits"),
        ({"low_shot": {"splits": {"msn": []}}}, "at least 1 item"),
        ({"augmentation_invariance": {"num_images": 1}}, "greater than or equal to 2"),
    ],
)
def test_config_refuses(config: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(message)):
        EvaluationConfig.model_validate(config)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_same_scores() -> None:
    splits = blobs(20, 4, 0), blobs(10, 4, 1)
    on_gpu = (LabelledFeatures(s.features.cuda(), s.labels.cuda()) for s in splits)
    here, there = (
        dict(score_rows(run(*both, protocols=EVERY))) for both in (splits, tuple(on_gpu))
    )
    assert there == pytest.approx(here, abs=1e-3)
