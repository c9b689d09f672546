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


def test_what_has_no_scores_has_no_groups() -> None:
    assert score_groups({"evaluation": None, "comparison": []}) == []
