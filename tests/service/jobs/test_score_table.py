"""Groups of the table of scores."""

from service.jobs.report import comparison
from service.jobs.score_table import score_groups


def test_families_of_finer_scores_have_a_heading_of_their_own() -> None:
    detail = {"top1": 0.5, "ece": 0.1, "balanced_accuracy": 0.4}
    after = {
        "isotropy": {"gap": 0.5},
        "knn": {"k10": {"top1": 0.3}, "k2": {"top1": 0.2}, "top1": 0.4, "settings": {"k": 20}},
        "classification": {"linear_probe": detail, "settings": {"classifier": "x", "many": [1]}},
    }
    evaluation = {"before": None, "after": after}
    found = score_groups({"evaluation": evaluation, "comparison": comparison(evaluation)})
    assert [(group["name"], group["settings"]) for group in found] == [
        ("k-NN", "k 20"),
        ("predictions in detail: linear probe", ""),
        ("isotropy", ""),
    ]
    said = [row["said"] for row in found[0]["rows"]]
    assert said == ["top-1 accuracy", "k = 2, top-1 accuracy", "k = 10, top-1 accuracy"]
    assert [row["said"] for row in found[1]["rows"]] == [
        "balanced accuracy",
        "calibration error (ECE)",
        "top-1 accuracy",
    ]


def test_what_mae_ct_is_scored_by_is_said_in_words() -> None:
    after = {
        "linear_probe": {
            "top1": 0.5, "top1_max_on_test": 0.6, "settings": {"protocol": "cached", "epochs": 90},
        },
        "nnclr_head": {"knn_top1": 0.4, "settings": {"k": 1, "queue_size": 256}},
        "low_shot": {
            "1_percent": {"top1": 0.1}, "10_percent": {"top1": 0.2},
            "10_percent_finetuned": {"top1": 0.3},
        },
        "augmentation_invariance": {"normalized": 2.0, "unnormalized": 0.9, "norm": 0.45},
        "color_histogram": {"l1": 0.01, "uniform_l1": 0.012, "mean_l1": 0.011},
    }  # fmt: skip
    evaluation = {"before": None, "after": after}
    found = score_groups({"evaluation": evaluation, "comparison": comparison(evaluation)})
    assert [(group["name"], group["settings"]) for group in found] == [
        ("linear probe", "protocol cached, epochs 90"),
        ("the head's queue of neighbours", "k 1, rows of the queue 256"),
        ("few labelled images", ""),
        ("invariance to random views", ""),
        ("colours read from the features", ""),
    ]
    assert [row["said"] for row in found[2]["rows"]] == [
        "1 % of the images, top-1 accuracy",
        "10 % of the images, top-1 accuracy",
        "10 % of the images, encoder fine-tuned, top-1 accuracy",
    ]
    assert "(too high)" in found[0]["rows"][1]["said"]
    assert all("_" not in row["said"] for group in found for row in group["rows"])


def test_what_has_no_scores_has_no_groups() -> None:
    assert score_groups({"evaluation": None, "comparison": []}) == []
