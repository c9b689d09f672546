"""The protocols of a run: what is asked for, what the labels allow, scores and settings apart."""

import pytest
import torch

from ctune.config import EvaluationConfig
from ctune.evaluate.protocols import LabelledFeatures, evaluate
from ctune.events import Warned
from ctune.schema import JsonObject
from ctune.scores import score_rows


def blobs(per_class: int, classes: int, seed: int) -> LabelledFeatures:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(per_class)
    centres = 4 * torch.eye(classes, 8)
    noise = torch.randn(len(labels), 8, generator=generator)
    return LabelledFeatures(centres[labels] + 0.5 * noise, labels)


def run(
    train: LabelledFeatures, heldout: LabelledFeatures, **config: object
) -> dict[str, JsonObject]:
    asked = EvaluationConfig.model_validate(config)
    told: list[Warned] = []
    results = evaluate(train, heldout, asked, num_classes=4, seed=0, warn=told.append)
    assert told == []
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
    results = run(blobs(3, 4, 0), blobs(10, 4, 1), protocols=["knn", "isotropy"])
    assert results["knn"] == {"top1": 1.0, "settings": {"k": 12, "temperature": 0.07}}
    names = {path[-1] for path, _ in score_rows(results)}
    assert names.isdisjoint({"k", "temperature", "num_images", "intra_count", "intra_histogram"})


def test_without_labels_only_the_unsupervised_scores_are_left() -> None:
    train, heldout = blobs(20, 4, 0), blobs(10, 4, 1)
    bare = LabelledFeatures(train.features, torch.full_like(train.labels, -1))
    results = run(bare, LabelledFeatures(heldout.features, torch.full_like(heldout.labels, -1)))
    assert set(results) == {"isotropy"}
    assert {"gap", "train_gap"}.isdisjoint(results["isotropy"])


def test_unlabelled_images_are_left_out_of_supervised_scores() -> None:
    train, heldout = blobs(20, 4, 0), blobs(10, 4, 1)
    labels = train.labels.clone()
    labels[::2] = -1
    assert run(LabelledFeatures(train.features, labels), heldout)["knn"] == {
        "top1": 1.0,
        "settings": {"k": 20, "temperature": 0.07},
    }


def test_the_isotropy_sample_is_seeded_and_capped() -> None:
    data = blobs(50, 4, 0)
    assert len(data.sample(30, seed=0).labels) == 30
    assert torch.equal(data.sample(30, seed=0).features, data.sample(30, seed=0).features)
    assert not torch.equal(data.sample(30, seed=0).features, data.sample(30, seed=1).features)
    assert data.sample(1000, seed=0) is data


@pytest.mark.parametrize("per_class", [1, 2, 5])
def test_few_images_per_class_are_probed(per_class: int) -> None:
    results = run(blobs(per_class, 4, 0), blobs(10, 4, 1))
    assert results["linear_probe"]["top1"] >= 0.75
    assert results["knn"]["settings"]["k"] == min(20, 4 * per_class)


def test_a_score_that_one_image_cannot_have_is_left_out_with_a_warning() -> None:
    heldout = blobs(1, 1, 1)
    told: list[Warned] = []
    asked = EvaluationConfig()
    results = evaluate(blobs(5, 4, 0), heldout, asked, num_classes=4, seed=0, warn=told.append)
    assert set(results) == {"knn", "linear_probe"}
    assert [(w.code, "isotropy" in w.message) for w in told] == [("not_scored", True)]
