"""`figures.json`: completed before and after, carried over by a resume, thumbnails inside."""

import base64
import io
from pathlib import Path

import numpy as np
from PIL import Image

from ctune.figures_file import (
    TABLE_PX,
    THUMBNAIL_PX,
    ClassAccuracy,
    ClassFigures,
    Figures,
    FiguresWriter,
    Neighbour,
    PlaneMap,
    Query,
    When,
    read_figures,
)
from ctune.image_table import ImageTable
from ctune.manifest import DatasetSummary, Manifest, ValidationReport
from ctune.rundir import RunDir
from ctune.store import PackedStore, StoreWriter

NAMES = ["<b>oak</b>", "pine", "yew"]


def store_of(folder: Path) -> PackedStore:
    """Return a store of two images, one of them large."""
    summary = DatasetSummary(
        num_images=2, splits={"train": 2}, classes=NAMES, class_counts={}, width_px=(8, 200),
        height_px=(4, 100), split_origin="made",
    )  # fmt: skip
    report = ValidationReport(
        layout="class_folders", num_unreadable=0, unreadable=[], num_junk=0, num_duplicates=0,
        num_split_leaks=0, warnings=[],
    )  # fmt: skip
    with StoreWriter(folder) as writer:
        for size_px in ((200, 100), (8, 4)):
            target = io.BytesIO()
            Image.new("RGB", size_px, (200, 10, 10)).save(target, "PNG")
            offset = writer.put(target.getvalue())
            length = len(target.getvalue())
            writer.add({}, offset=offset, length=length, size_px=size_px, label=0, split="train")
        writer.finish(Manifest(archive_sha256="0", summary=summary, report=report, options={}))
    return PackedStore(folder)


def neighbours_of(image: int) -> Figures:
    neighbour = Neighbour(image=1 - image, label=1, cosine=0.5)
    return Figures(gallery=[Query(image=image, label=-1, neighbours=[neighbour])])


def test_both_evaluations_names_and_thumbnails_are_in_the_file(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "a1").create()
    writer = FiguresWriter(run, [], store_of(tmp_path / "store"))
    assert read_figures(run.figures) is None
    writer.add("before", neighbours_of(0))
    plane = PlaneMap(kind="pca", points=[(0, 1)], labels=[2], explained=0.5)
    accuracy = ClassAccuracy(label=0, accuracy=1.0, num_images=1)
    classes = ClassFigures(num_images=1, matrix=None, pairs=[], accuracies=[accuracy])
    after = Figures(maps=[plane], predictions={"knn": classes})
    writer.add("after", after)
    found = read_figures(run.figures)
    assert found is not None and found.before == neighbours_of(0) and found.after == after
    assert found.classes == dict(enumerate(NAMES))
    sizes = {}
    for number, data in found.thumbnails.items():
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            sizes[number] = (image.format, image.size)
    assert sizes == {0: ("WEBP", (THUMBNAIL_PX, THUMBNAIL_PX // 2)), 1: ("WEBP", (8, 4))}


def test_a_resumed_run_begins_with_what_the_newest_attempt_had(tmp_path: Path) -> None:
    store = store_of(tmp_path / "store")
    attempts = [RunDir(tmp_path / f"a{n}").create() for n in (1, 2, 3, 4)]
    FiguresWriter(attempts[0], [], store).add("before", neighbours_of(0))
    FiguresWriter(attempts[1], [], store).add("before", neighbours_of(1))
    earlier = [run.root for run in reversed(attempts[:3])]  # the newest one left no figures
    FiguresWriter(attempts[3], earlier, store).add("after", neighbours_of(0))
    found = read_figures(attempts[3].figures)
    assert found is not None
    assert (found.before, found.after) == (neighbours_of(1), neighbours_of(0))


def test_tables_of_a_method_are_kept_beside_the_evaluations(tmp_path: Path) -> None:
    first, second = (RunDir(tmp_path / f"a{n}").create() for n in (1, 2))
    store = store_of(tmp_path / "store")
    images = np.zeros((2, 3, 200, 100, 3), dtype=np.uint8)
    images[1, 2] = (10, 200, 10)
    writer = FiguresWriter(first, [], store)
    writer.add_tables([])
    assert read_figures(first.figures) is None
    writer.add_tables([ImageTable("t", "said", ("a", "b", "c"), images)])
    resumed = FiguresWriter(second, [first.root], store)
    resumed.add_tables([])
    resumed.add("after", Figures())
    found = read_figures(second.figures)
    assert found is not None and found.after == Figures()
    (table,) = found.tables
    assert (table.title, table.text, table.columns) == ("t", "said", ["a", "b", "c"])
    assert np.shape(table.rows) == (2, 3)
    with Image.open(io.BytesIO(base64.b64decode(table.rows[1][2]))) as image:
        assert image.size == (TABLE_PX // 2, TABLE_PX)
        red, green, blue = image.convert("RGB").getpixel((5, 5))  # type: ignore[misc]
        assert green > 150 > 60 > max(red, blue)


def test_a_file_of_another_version_is_left_aside(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    path.write_text('{"format_version": 2}')
    assert read_figures(path) is None
    path.write_text("{")
    assert read_figures(path) is None


def test_the_file_stays_small(tmp_path: Path) -> None:
    """2,000 points on two maps, before and after."""
    run = RunDir(tmp_path / "a1").create()
    labels = [n % len(NAMES) for n in range(2000)]
    points = [(n % 1000, 999 - n % 1000) for n in range(2000)]
    plane = PlaneMap(kind="pca", points=points, labels=labels, explained=0.5)
    writer = FiguresWriter(run, [], store_of(tmp_path / "store"))
    whens: tuple[When, ...] = ("before", "after")
    for when in whens:
        writer.add(when, Figures(maps=[plane, plane]))
    assert run.figures.stat().st_size < 150_000
