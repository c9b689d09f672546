"""Charts as SVG: what is drawn, escaped, and said in words."""

import re
import xml.etree.ElementTree as ET

import pytest
from markupsafe import Markup

from service.jobs import charts

HOSTILE = '<script>alert("x")</script>'


def words_of(chart: Markup) -> str:
    """Return the label of a chart; it is well-formed."""
    return ET.fromstring(chart).attrib["aria-label"]


def path_of(chart: Markup, name: str) -> str:
    found = [p.attrib["d"] for p in ET.fromstring(chart) if p.attrib.get("class") == name]
    return found[0]


def texts_of(chart: Markup, name: str = "tick middle") -> list[str]:
    return [t.text or "" for t in ET.fromstring(chart) if t.attrib.get("class") == name]


def test_a_curve_goes_from_corner_to_corner() -> None:
    chart = charts.line_chart([0, 50, 100], [2.0, 1.0, 0.0], name="loss")
    assert path_of(chart, "curve") == "M52.0 10.0L180.0 83.0L308.0 156.0"
    assert words_of(chart) == "loss: 2 at step 0, 0 at step 100; lowest 0, highest 2"


def test_missing_values_are_gaps_and_single_ones_dots() -> None:
    chart = charts.line_chart([0, 1, 2, 3, 4], [1.0, None, 2.0, 2.0, None], name="loss")
    assert path_of(chart, "curve dots").count("M") == 1
    assert path_of(chart, "curve").count("M") == 1
    assert words_of(charts.line_chart([7], [0.5], name="a")) == "a: 0.5 at step 7"
    with pytest.raises(ValueError, match="no value"):
        charts.line_chart([1], [None], name="loss")


def test_steps_are_whole_numbers() -> None:
    assert texts_of(charts.line_chart([0, 1], [1.0, 2.0], name="loss")) == ["0", "1"]
    assert texts_of(charts.line_chart([0, 40_000], [1.0, 2.0], name="loss"))[1] == "10k"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 100, [0, 50, 100]),
        (0.13, 0.47, [0.2, 0.3, 0.4]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
        (1e-9, 4e-9, [1e-9, 2e-9, 3e-9, 4e-9]),
    ],
)
def test_round_values(low: float, high: float, expected: list[float]) -> None:
    assert charts.round_values(low, high) == pytest.approx(expected)


@pytest.mark.parametrize("value", [0.0, 5.0, -3e-9, 1e30])
def test_a_constant_series_has_a_chart(value: float) -> None:
    numbers = re.findall(
        r"-?\d+\.\d", path_of(charts.line_chart([0, 9], [value] * 2, name=""), "curve")
    )
    assert numbers == ["52.0", "83.0", "308.0", "83.0"]


def test_histograms_are_shares_on_one_scale() -> None:
    chart = charts.histograms([[0, 4], [3, 1]], lowest=-1.0, highest_share=1.0, words="w")
    assert path_of(chart, "area c0") == "M52 156.0V156.0H180.0V10.0H308.0V156.0Z"
    assert path_of(chart, "area c1") == "M52 156.0V46.5H180.0V119.5H308.0V156.0Z"
    cut = charts.histograms([[0, 4]], lowest=0.0, highest_share=1.0, words="w")
    assert path_of(cut, "area c0") == "M52 156.0V10.0H308.0V156.0Z"


def test_a_small_matrix_has_numbers_and_names() -> None:
    chart = charts.heat_map([[3, 1], [0, 4]], ["oak", HOSTILE], words=HOSTILE)
    assert HOSTILE not in chart and words_of(chart) == HOSTILE
    assert texts_of(chart, "tick end")[0] == "oak 1"
    assert texts_of(chart, "cell dark") == ["3", "4"] and texts_of(chart, "cell") == ["1"]
    assert path_of(chart, "s8").count("M") == 1 and path_of(chart, "s2").count("M") == 1
    short = charts.heat_map([[1, 0], [0, 1]], ["0", "1"], words="")
    assert texts_of(short, "tick end") == texts_of(short) == ["0", "1"]


def test_the_largest_charts_stay_small() -> None:
    matrix = [[(row * column) % 7 for column in range(50)] for row in range(50)]
    assert len(charts.heat_map(matrix, ["x"] * 50, words="")) < 80_000
    points = [((n * 7) % 1000, (n * 13) % 1000) for n in range(2000)]
    styles = [n % (charts.NEUTRAL + 1) for n in range(2000)]
    assert len(charts.scatter(points, styles, side=1000, words="")) < 80_000


def test_points_have_a_colour_and_a_marker_per_class() -> None:
    chart = charts.scatter([(0, 0), (1000, 1000)], [0, charts.NEUTRAL], side=1000, words="two")
    assert path_of(chart, "mark round c0") == "M8.0 312.0h0"
    assert path_of(chart, "mark round neutral") == "M312.0 8.0h0"
    kinds = {charts.style_class(style) for style in range(charts.STYLES)}
    assert len(kinds) == charts.STYLES and charts.style_class(charts.NEUTRAL) not in kinds
    assert ET.fromstring(charts.swatch(charts.COLOURS)).attrib["class"] == "swatch"


def test_bars() -> None:
    chart = charts.bar_chart(["a", HOSTILE], [1.0, None], name="norms")
    assert words_of(chart) == f"norms: a 1, {HOSTILE} –" and HOSTILE not in chart
    assert charts.bar(0.25).count("25.0") == 2 and "was" not in charts.bar(0.25)
    assert "M50.0 0v12" in charts.bar(0.25, 0.5)
