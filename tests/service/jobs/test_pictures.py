"""What a report draws of `figures.json`, beyond what the page's own tests see."""

from ctune.figures_file import (
    ClassAccuracy,
    ClassFigures,
    ConfusedPair,
    CosineHistograms,
    Figures,
    FiguresFile,
    PlaneMap,
)
from service.jobs import charts
from service.jobs.pictures import NO_LABEL, Pictures, curve
from tests.service.jobs.reported import figures, figures_file


def map_of(labels: list[int]) -> Figures:
    points = [(n, n) for n in range(len(labels))]
    return Figures(maps=[PlaneMap(kind="pca", points=points, labels=labels, explained=None)])


def test_without_a_file_there_is_nothing() -> None:
    empty = Pictures(None)
    assert not empty.cosines() and not empty.confusions() and not empty.maps()
    assert not empty.gallery() and not empty.diagnostics() and not empty.legend()
    assert empty.pairs() == ("", []) and empty.class_bars() is None


def test_the_most_frequent_classes_have_a_marker_of_their_own() -> None:
    labels = [n for n in range(30) for _ in range(1 if n < 9 else 2)] + [-1]
    shown = Pictures(FiguresFile(after=map_of(labels)))
    legend = shown.legend()
    assert [entry["name"] for entry in legend[:2]] == ["class 9", "class 10"]
    assert [entry["name"] for entry in legend[charts.STYLES :]] == ["9 more", NO_LABEL]
    assert len({entry["swatch"] for entry in legend[: charts.STYLES]}) == charts.STYLES


def test_a_class_keeps_its_marker_before_and_after() -> None:
    shown = Pictures(FiguresFile(before=map_of([5, 5, 3]), after=map_of([3, 3, 5, 3])))
    before, after = (picture.chart for picture in shown.maps())
    assert before.count('class="mark round c0"') == after.count('class="mark round c0"') == 1
    assert [entry["name"] for entry in shown.legend()] == ["class 3", "class 5"]


def test_points_without_labels_are_seen_and_need_no_legend() -> None:
    shown = Pictures(FiguresFile(before=map_of([-1, -1, -1])))
    assert 'class="mark round c0"' in shown.maps()[0].chart and not shown.legend()
    assert not shown.labelled


def test_maps_of_one_kind_stand_beside_each_other() -> None:
    planes = [
        PlaneMap(kind=kind, points=[(0, 0)], labels=[0], explained=None) for kind in ("umap", "pca")
    ]
    shown = Pictures(FiguresFile(before=Figures(maps=planes), after=Figures(maps=planes)))
    assert [picture.title for picture in shown.maps()] == [
        "Before: PCA", "After: PCA", "Before: UMAP", "After: UMAP",
    ]  # fmt: skip


def test_the_classifier_is_shown_beside_what_is_compared() -> None:
    shown = Pictures(figures_file())
    titles = [picture.title for picture in shown.confusions()]
    assert titles[:2] == ["Before: k-NN", "After: k-NN"]
    assert titles[-1] == "After: the model's classifier"
    title, pairs = shown.pairs()
    assert title == "after tuning, the model's classifier" and pairs[0]["count"] == 5


def test_many_classes_have_pairs_and_bars_but_no_matrix() -> None:
    many = ClassFigures(
        num_images=400,
        matrix=None,
        pairs=[ConfusedPair(label=70, predicted=3, count=9, share=0.9)],
        accuracies=[ClassAccuracy(label=70, accuracy=0.1, num_images=10)],
    )
    shown = Pictures(FiguresFile(before=Figures(predictions={"linear_probe": many, "knn": many})))
    assert not shown.confusions() and shown.pairs()[1][0]["label"] == "class 70"
    bars = shown.class_bars()
    assert bars is not None and not bars["has_before"] and "linear probe" in bars["title"]


def test_histograms_begin_where_pairs_begin() -> None:
    """Cosines of 0.5 and more: the axis begins at the fifth below."""
    cosines = CosineHistograms(
        intra=[0] * 45 + [4] * 5, inter=[0] * 38 + [1] * 12, intra_mean=0.9, inter_mean=0.7
    )
    chart = Pictures(FiguresFile(before=Figures(cosines=cosines))).cosines()[0].chart
    ticks = [">0.4<", ">0.6<", ">0.8<", ">1.0<"]
    assert all(tick in chart for tick in ticks) and ">0.2<" not in chart


def test_a_neighbour_of_another_class_is_marked() -> None:
    row = Pictures(FiguresFile(after=figures(3))).gallery()[0]["rows"][0]
    assert [near["other"] for near in row["neighbours"]] == [True, True, False, True, True]
    assert row["neighbours"][0]["image"] is None, "a thumbnail that is not there is left out"


def test_a_curve_says_its_last_value_and_what_is_missing() -> None:
    series = {"name": "loss", "steps": [0, 1, 2], "values": [2.0, None, 1.0]}
    assert curve(series).note == "last 1; 1 not finite"
