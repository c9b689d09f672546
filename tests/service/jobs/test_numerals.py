"""Numbers as people read them."""

import pytest

from service.jobs import numerals


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (0.123456, "0.1235"), (1234.56, "1,235"), (-0.5, "−0.5"), (3.2e-7, "3.2e−7"),
     (12_345_678, "1.23e7"), (45_678.9, "45,679"), (None, "–")],
)  # fmt: skip
def test_number(value: float | None, shown: str) -> None:
    assert numerals.number(value) == shown


@pytest.mark.parametrize(
    ("metric", "better", "is_fraction"),
    [
        ("top1", "higher", True),
        ("k20.top1", "higher", True),
        ("class_accuracy", "higher", True),
        ("ece", "lower", True),
        ("mean_cosine_similarity", "lower", False),
        ("overlap", "lower", False),
        ("davies_bouldin", "lower", False),
        ("ari", "higher", False),
        ("train_gap", "higher", False),
        ("isoscore", None, False),
        ("intra_std", None, False),
        ("1_shot.top1_std", None, True),
        ("worst_class_accuracy", "higher", True),
        ("class_alignment", "lower", False),
        ("normalized", "higher", False),
        ("unnormalized", None, False),
        ("top1_max_on_test", "higher", True),
        ("uniform_l1", None, False),
        ("something_new", None, False),
    ],
)
def test_meaning(metric: str, better: str | None, is_fraction: bool) -> None:
    assert numerals.meaning(metric) == (is_fraction, better)
    sign = {"higher": "better", "lower": "worse", None: None}[better]
    assert numerals.verdict(0.5, metric) == sign
    assert numerals.verdict(None, metric) is None


def test_scores_and_differences() -> None:
    assert numerals.score(0.58249, "top1") == "58.2 %"
    assert numerals.score(0.58249, "gap") == "0.5825"
    assert numerals.difference(0.2722, "top1") == "+27.2"
    assert numerals.difference(-0.00123, "gap") == "−0.00123"
    assert numerals.difference(0.0, "top1") == "0" and numerals.verdict(0.0, "top1") == "same"
    assert numerals.difference(None, "top1") == "–" == numerals.score(None, "top1")


def test_words() -> None:
    assert numerals.words("knn") == "k-NN"
    assert numerals.words("k20.top1") == "k = 20, top-1 accuracy"
    assert numerals.words("5_shot.top1_std") == "5 images per class, spread of the top-1 accuracy"
    assert numerals.words("new_metric") == "new metric"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.04, "0.0 s"), (9.5, "9.5 s"), (59.4, "59 s"), (61, "1 min 1 s"), (7384, "2 h 3 min"),
     (200_000, "2 d 7 h"), (None, "–")],
)  # fmt: skip
def test_duration(seconds: float | None, shown: str) -> None:
    assert numerals.duration(seconds) == shown


def test_moments_and_sizes() -> None:
    assert numerals.moment(1_790_000_000) == "2026-09-21 14:13 UTC"
    assert numerals.moment(None) == numerals.size(None) == "–"
    assert [numerals.size(n) for n in (999, 105_500, 3.41e6, 2.5e12)] == [
        "999 B", "106 kB", "3.41 MB", "2.5 TB",
    ]  # fmt: skip
