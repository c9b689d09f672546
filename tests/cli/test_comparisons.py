"""What `ctune jobs compare` prints."""

from typing import Any

import pytest

from cli.comparisons import show_comparison


def comparison() -> dict[str, Any]:
    fixed = {"method": "lacvit", "encoder": "vit", "status": "succeeded", "train_s": 75.0}
    spread = {
        "protocol": "knn", "metric": "top1", "before_mean": 0.25, "before_std": 0.0,
        "after_mean": 0.55, "after_std": None,
    }  # fmt: skip
    values = [{"before": 0.25, "after": 0.5}, {"before": None, "after": None}]
    return {
        "jobs": [
            {"id": "job_1", "name": "[bold]leaves", "seed": 0, **fixed},
            {"id": "job_2", "name": None, "seed": 1, **fixed},
        ],
        "scores": [{"protocol": "knn", "metric": "top1", "values": values}],
        "groups": [{"jobs": ["job_1", "job_2"], "seeds": [0, 1], "scores": [spread]}],
        "warnings": [{"code": "different_data", "message": "other data", "jobs": ["job_2"]}],
    }


def test_jobs_scores_seeds_and_warnings_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    show_comparison(comparison())
    said = " ".join(capsys.readouterr().out.split())
    assert "k-NN, top-1 accuracy 50.0 % (25.0 %) – (–)" in said
    assert "jobs 1, 2, mean ± std over seeds" in said and "25.0 % ± 0.0 % 55.0 %" in said
    assert "[bold]leaves" in said
    assert "warning (jobs 2): other data" in said and "1 min 15 s" in said
