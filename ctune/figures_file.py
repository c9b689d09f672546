"""`figures.json` of a run directory: what the pictures of a report show. Never imports torch.

One file per run, written before and after the training. It holds class names and thumbnails of its
own, so that a report outlives the data set.
"""

import base64
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from PIL import Image
from pydantic import ValidationError

from ctune.config import MapKind
from ctune.image_table import ImageTable
from ctune.rundir import RunDir, write_atomically
from ctune.schema import Schema
from ctune.store import PackedStore

When = Literal["before", "after"]

MAP_SIDE = 1000
"""Coordinates of a map are whole numbers 0 ... MAP_SIDE."""
THUMBNAIL_PX = 64
TABLE_PX = 128
THUMBNAIL_QUALITY = 75


class CosineHistograms(Schema):
    """Pairs of held-out images per bin of their cosine; equal bins on [-1, 1]."""

    intra: list[int]
    """Pairs of one class."""
    inter: list[int]
    """Pairs of two classes."""
    intra_mean: float
    inter_mean: float


class ConfusedPair(Schema):
    """Images of one class that were taken for another."""

    label: int
    predicted: int
    count: int
    share: float
    """Of the images of `label`."""


class ClassAccuracy(Schema):
    """How many held-out images of one class are recognised."""

    label: int
    accuracy: float
    num_images: int


class ClassFigures(Schema):
    """Predictions of one kind (`knn`, `linear_probe`, `classifier`) on the held-out images."""

    num_images: int
    matrix: list[list[int]] | None
    """[C, C] images by (true, predicted) class; null beyond 50 classes."""
    pairs: list[ConfusedPair]
    """The most frequent confusions, most frequent first."""
    accuracies: list[ClassAccuracy]
    """By rising accuracy; beyond 50 classes the lowest and the highest."""


class PlaneMap(Schema):
    """Held-out images as points of a plane; axes have no unit, both have one scale."""

    kind: MapKind
    points: list[tuple[int, int]]
    labels: list[int]
    """-1 where an image has none."""
    explained: float | None
    """Share of the variance that the two axes hold; null where that has no meaning."""


class Neighbour(Schema):
    """A training image near a query."""

    image: int
    """Its number in the packed store."""
    label: int
    cosine: float


class Query(Schema):
    """A held-out image and the training images nearest to it, nearest first."""

    image: int
    label: int
    neighbours: list[Neighbour]


class Diagnostic(Schema):
    """A further picture of a method."""

    title: str
    text: str
    """What it says, in a sentence."""
    y: list[float | None]
    """One bar per label, or a curve over `x`."""
    labels: list[str] = []
    x: list[float] = []


class PictureTable(Schema):
    """Small images in rows and columns."""

    title: str
    text: str
    columns: list[str]
    rows: list[list[str]]
    """WebP, base64."""


class Figures(Schema):
    """The pictures of one evaluation; what could not be made is empty."""

    cosines: CosineHistograms | None = None
    predictions: dict[str, ClassFigures] = {}
    maps: list[PlaneMap] = []
    gallery: list[Query] = []
    diagnostics: dict[str, Diagnostic] = {}


class FiguresFile(Schema):
    """The whole file."""

    format_version: Literal[1] = 1
    classes: dict[int, str] = {}
    """Names of the classes that the pictures show."""
    thumbnails: dict[int, str] = {}
    """Number in the packed store to a WebP of at most 64 px a side, base64."""
    before: Figures | None = None
    after: Figures | None = None
    tables: list[PictureTable] = []
    """What the method has to show of its training."""


def read_figures(path: Path) -> FiguresFile | None:
    """Return the figures in a file; None where there is none, or one of another version."""
    try:
        return FiguresFile.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None


class FiguresWriter:
    """Completes the `figures.json` of a run.

    A run that resumes begins with what its earlier attempts had.
    """

    def __init__(self, run_dir: RunDir, earlier: Iterable[Path], store: PackedStore) -> None:
        self._path = run_dir.figures
        self._store = store
        found = (read_figures(RunDir(root).figures) for root in (run_dir.root, *earlier))
        self._file = next((file for file in found if file is not None), FiguresFile())

    def add(self, when: When, figures: Figures) -> None:
        """Set one evaluation's figures and write the file, with names and thumbnails."""
        parts = {"before": self._file.before, "after": self._file.after, when: figures}
        known = [part for part in parts.values() if part is not None]
        names = self._store.manifest.summary.classes
        self._file = FiguresFile(
            classes={label: names[label] for part in known for label in _labels(part)},
            thumbnails={n: self._thumbnail(n) for part in known for n in _images(part.gallery)},
            tables=self._file.tables,
            **parts,
        )
        self._write()

    def add_tables(self, tables: Iterable[ImageTable]) -> None:
        """Set the method's tables with small images, and write the file; without any do nothing."""
        found = [
            PictureTable(
                title=table.title,
                text=table.text,
                columns=list(table.columns),
                rows=[[_webp(Image.fromarray(i), TABLE_PX) for i in row] for row in table.images],
            )
            for table in tables
        ]
        if found:
            self._file = self._file.model_copy(update={"tables": found})
            self._write()

    def _write(self) -> None:
        write_atomically(self._path, self._file.model_dump_json().encode())

    def _thumbnail(self, number: int) -> str:
        known = self._file.thumbnails.get(number)
        return known or _webp(self._store.image(number), THUMBNAIL_PX)


def _webp(image: Image.Image, most_px: int) -> str:
    image.thumbnail((most_px, most_px), Image.Resampling.LANCZOS)
    target = io.BytesIO()
    image.save(target, "WEBP", quality=THUMBNAIL_QUALITY)
    return base64.b64encode(target.getvalue()).decode("ascii")


def _images(gallery: Sequence[Query]) -> list[int]:
    neighbours = [n.image for query in gallery for n in query.neighbours]
    return [query.image for query in gallery] + neighbours


def _labels(figures: Figures) -> set[int]:
    """Return every class that a picture names."""
    found = {label for plane in figures.maps for label in plane.labels}
    for query in figures.gallery:
        found |= {query.label, *(neighbour.label for neighbour in query.neighbours)}
    for classes in figures.predictions.values():
        found |= {one.label for one in classes.accuracies}
        found |= {label for pair in classes.pairs for label in (pair.label, pair.predicted)}
        found |= set(range(len(classes.matrix or [])))
    return {label for label in found if label >= 0}
