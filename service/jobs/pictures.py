"""The pictures of a report: charts with what they show in words, from `figures.json`."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from ctune.figures_file import (
    MAP_SIDE,
    ClassFigures,
    CosineHistograms,
    Diagnostic,
    Figures,
    FiguresFile,
    PlaneMap,
    Query,
)
from service.jobs import charts
from service.jobs.numerals import MINUS, number, percent, words

COMPARED = ("linear_probe", "knn")
"""Predictions that exist before and after, the first of them is shown."""
WHEN = {"before": "Before", "after": "After"}
NO_LABEL = "without a class"
OWN_HEAD = "classifier"
MAP_KINDS = {"pca": "PCA", "umap": "UMAP"}


class Picture(NamedTuple):
    """A chart with its title and a note."""

    title: str
    chart: Markup
    note: str = ""


class Pictures:
    """Everything that a report draws of one `figures.json`; empty without one."""

    def __init__(self, file: FiguresFile | None) -> None:
        self._file = file or FiguresFile()
        both = {"before": self._file.before, "after": self._file.after}
        self._known: dict[str, Figures] = {w: f for w, f in both.items() if f is not None}
        self._styles = self._map_styles()

    def name(self, label: int) -> str:
        """Return the name of a class."""
        return self._file.classes.get(label, NO_LABEL if label < 0 else f"class {label}")

    @property
    def labelled(self) -> bool:
        """Whether any image of the pictures has a class."""
        return bool(self._file.classes)

    # --- cosines ---

    def cosines(self) -> list[Picture]:
        """Return the histograms of both evaluations, on one scale."""
        found = {w: f.cosines for w, f in self._known.items() if f.cosines is not None}
        parts = [counts for one in found.values() for counts in (one.intra, one.inter)]
        if not parts:
            return []
        scale = (_lowest(parts), max(max(counts) / (sum(counts) or 1) for counts in parts))
        return [_cosines(WHEN[when], one, scale) for when, one in found.items()]

    # --- classes ---

    def confusions(self) -> list[Picture]:
        """Return the matrices: of the compared predictions, and of the model's own classifier."""
        found = []
        for when, kind, classes in self._class_figures():
            if classes.matrix is not None:
                title = f"{WHEN[when]}: {words(kind)}"
                found.append(self._confusion(title, classes))
        return found

    def _confusion(self, title: str, classes: ClassFigures) -> Picture:
        assert classes.matrix is not None
        right = sum(classes.matrix[c][c] for c in range(len(classes.matrix)))
        said = (
            f"{right} of {classes.num_images} images right ({percent(right / classes.num_images)})"
        )
        worst = [
            f"{self.name(pair.label)} taken for {self.name(pair.predicted)} {pair.count} times"
            for pair in classes.pairs[:5]
        ]
        names = [self.name(label) for label in range(len(classes.matrix))]
        told = "; ".join([f"confusion matrix, {title}: {said}", *worst])
        return Picture(title, charts.heat_map(classes.matrix, names, words=told), said)

    def pairs(self) -> tuple[str, list[dict[str, Any]]]:
        """Return the most frequent confusions of the newest predictions, and which those are."""
        found = self._class_figures()
        if not found:
            return "", []
        when, kind, classes = found[-1]
        rows = [
            {
                "label": self.name(pair.label),
                "predicted": self.name(pair.predicted),
                "count": pair.count,
                "share": pair.share,
            }
            for pair in classes.pairs[:10]
        ]
        return f"{when} tuning, {words(kind)}", rows

    def class_bars(self) -> dict[str, Any] | None:
        """Return the accuracy of every class, lowest first, with that before."""
        compared = [one for one in self._class_figures() if one[1] != OWN_HEAD]
        if not compared:
            return None
        when, kind, classes = compared[-1]
        earlier = {a.label: a.accuracy for a in compared[0][2].accuracies}
        has_before = len(compared) > 1
        rows = []
        for one in classes.accuracies:
            before = earlier.get(one.label) if has_before else None
            rows.append(
                {
                    "name": self.name(one.label),
                    "num_images": one.num_images,
                    "before": before,
                    "accuracy": one.accuracy,
                    "bar": charts.bar(one.accuracy, before),
                }
            )
        title = f"Accuracy of the {words(kind)} on held-out images, lowest first"
        return {"title": title, "rows": rows, "has_before": has_before, "when": WHEN[when]}

    def _class_figures(self) -> list[tuple[str, str, ClassFigures]]:
        """Return (when, kind, figures), before first, the model's own classifier last."""
        kinds = {kind for figures in self._known.values() for kind in figures.predictions}
        shown = [*[kind for kind in COMPARED if kind in kinds][:1], OWN_HEAD]
        return [
            (when, kind, figures.predictions[kind])
            for kind in shown
            for when, figures in self._known.items()
            if kind in figures.predictions
        ]

    # --- maps ---

    def maps(self) -> list[Picture]:
        """Return the maps, those of one kind beside each other."""
        found = [(plane, when) for when, f in self._known.items() for plane in f.maps]
        return [self._map(plane, when) for plane, when in sorted(found, key=_map_order)]

    def legend(self) -> list[dict[str, Any]]:
        """Return the classes of the maps with their markers; none where no image has a class."""
        if not self._styles:
            return []
        shown = [
            {"swatch": charts.swatch(style), "name": self.name(label)}
            for label, style in self._styles.items()
        ]
        labels = {n for f in self._known.values() for plane in f.maps for n in plane.labels}
        others = len(labels - self._styles.keys() - {-1})
        if others:
            shown.append({"swatch": charts.swatch(charts.NEUTRAL), "name": f"{others} more"})
        if -1 in labels:
            shown.append({"swatch": charts.swatch(charts.NEUTRAL), "name": NO_LABEL})
        return shown

    def _map_styles(self) -> dict[int, int]:
        """Return label to style: the most frequent classes get one of their own."""
        counts = Counter(
            label
            for figures in self._known.values()
            for plane in figures.maps
            for label in plane.labels
            if label >= 0
        )
        chosen = sorted(label for label, _ in counts.most_common(charts.STYLES))
        return {label: style for style, label in enumerate(chosen)}

    def _map(self, plane: PlaneMap, when: str) -> Picture:
        other = charts.NEUTRAL if self._styles else 0
        styles = [self._styles.get(label, other) for label in plane.labels]
        title = f"{WHEN[when]}: {MAP_KINDS[plane.kind]}"
        note = f"{len(plane.points)} images"
        if plane.explained is not None:
            note += f"; the plane holds {percent(plane.explained)} of the variance"
        chart = charts.scatter(plane.points, styles, side=MAP_SIDE, words=f"{title} map of {note}")
        return Picture(title, chart, note)

    # --- neighbours ---

    def gallery(self) -> list[dict[str, Any]]:
        """Return the queries, each with a row of neighbours per evaluation."""
        rows: dict[int, list[dict[str, Any]]] = {}
        queries: dict[int, Query] = {}
        for when, figures in self._known.items():
            for query in figures.gallery:
                queries[query.image] = query
                near = [
                    self._neighbour(one.image, one.label, one.cosine, query)
                    for one in query.neighbours
                ]
                rows.setdefault(query.image, []).append({"title": WHEN[when], "neighbours": near})
        return [
            {
                "name": self.name(query.label),
                "number": image,
                "image": self._thumbnail(image),
                "rows": rows[image],
            }
            for image, query in queries.items()
        ]

    def _neighbour(self, image: int, label: int, cosine: float, query: Query) -> dict[str, Any]:
        return {
            "number": image,
            "image": self._thumbnail(image),
            "name": self.name(label),
            "cosine": f"{cosine:.3f}".replace("-", MINUS),
            "other": query.label >= 0 and label != query.label,
        }

    def _thumbnail(self, image: int) -> str | None:
        data = self._file.thumbnails.get(image)
        return None if data is None else _webp(data)

    # --- diagnostics ---

    def tables(self) -> list[dict[str, Any]]:
        """Return the tables of images that the method has to show."""
        return [
            {
                "title": table.title,
                "text": table.text,
                "columns": table.columns,
                "rows": [[_webp(data) for data in row] for row in table.rows],
            }
            for table in self._file.tables
        ]

    def diagnostics(self) -> list[Picture]:
        """Return the further pictures of the method."""
        return [
            _diagnostic(f"{WHEN[when]}: {one.title}", one)
            for when, figures in self._known.items()
            for one in figures.diagnostics.values()
        ]


def _webp(data: str) -> str:
    return f"data:image/webp;base64,{data}"


def _lowest(parts: Sequence[Sequence[int]]) -> float:
    """Return a round cosine below which no part holds more than a thousandth of its pairs."""
    bins = len(parts[0])
    for n in range(bins):
        if any(sum(counts[: n + 1]) > sum(counts) / 1000 for counts in parts):
            return max(-1.0, math.floor((-1 + 2 * n / bins) * 5 + 1e-9) / 5)
    return -1.0


def _cosines(title: str, one: CosineHistograms, scale: tuple[float, float]) -> Picture:
    note = (
        f"mean {number(round(one.intra_mean, 3))} within classes,"
        f" {number(round(one.inter_mean, 3))} across"
    )
    told = f"cosines of pairs of held-out images, {title}: {note}"
    lowest, share = scale
    parts = [one.intra, one.inter]
    chart = charts.histograms(parts, lowest=lowest, highest_share=share, words=told)
    return Picture(title, chart, note)


def _diagnostic(title: str, one: Diagnostic) -> Picture:
    if one.labels:
        return Picture(title, charts.bar_chart(one.labels, one.y, name=one.title), one.text)
    return Picture(title, charts.line_chart(one.x, one.y, name=one.title, along="x"), one.text)


def _map_order(found: tuple[PlaneMap, str]) -> tuple[bool, bool]:
    plane, when = found
    return plane.kind != "pca", when != "before"


def curve(series: dict[str, Any]) -> Picture:
    """Return the chart of one series of metrics (`service.jobs.metrics.columns`).

    Raises:
        ValueError: it has no value.
    """
    values: Sequence[float | None] = series["values"]
    known = [value for value in values if value is not None]
    title = words(series["name"])
    chart = charts.line_chart(series["steps"], values, name=title)
    missing = len(values) - len(known)
    note = f"last {number(known[-1])}" + (f"; {missing} not finite" if missing else "")
    return Picture(title, chart, note)
