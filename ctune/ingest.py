"""Archive to packed store; `python -m ctune.ingest RUN_DIR` is a supervised child.

One pass over the archive decodes every image once and appends its bytes to the store
(`ctune.ingest_reading`); what is known of it waits in a `Spool`. When the archive is through,
labels and splits are decided there and the index is written. Memory is bounded by the bytes in
flight, the pixels in flight and the spool's cache, whatever the archive.

A damaged file is left out and listed. More than max(1 %, 10 files) of them, a class without a
readable image, or no image at all refuse the data set. Never imports torch.
"""

import hashlib
import os
import resource
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

from pydantic import Field

from ctune.child import StopRequest, run_child
from ctune.events import EventWriter, Progress, Started
from ctune.ingest_reading import IngestLimits, Pulse, Reading, num_threads
from ctune.ingest_report import check_classes, check_readable, make_report, make_summary
from ctune.layouts import Layout, detect_layout
from ctune.manifest import DatasetSummary, Manifest
from ctune.metadata import Values, invalid_metadata, sidecar_values
from ctune.rundir import RunDir
from ctune.schema import JsonObject, Schema
from ctune.spool import Spool, Spooled, open_spool
from ctune.store import NO_LABEL, StoreWriter

__all__ = ["IngestFile", "IngestLimits", "IngestOptions", "ingest", "run"]

SPARE_ADDRESS_BYTES = 2 * 2**30
ADDRESS_BYTES_PER_THREAD = 128 * 2**20
"""A stack and the allocator's reserve."""
ADDRESS_BYTES_PER_PIXEL = 40
"""Most that decoding and converting takes: frames, RGBA, white, the composite, RGB, 16-bit sums."""


class IngestOptions(Schema):
    """What a user may choose; part of the store's key."""

    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Part of each class that is held out when the archive gives no split; 0 for none."""


class IngestFile(Schema):
    """`config.json` of an ingestion's run directory."""

    archive: Path
    archive_sha256: str
    options: IngestOptions = IngestOptions()
    limits: IngestLimits = IngestLimits()

    @property
    def store_key(self) -> str:
        """Name of the store: what decides its content, hashed."""
        text = f"1 {self.archive_sha256} {self.options.model_dump_json()}"
        return hashlib.sha256(text.encode()).hexdigest()


def ingest(
    archive: Path,
    store_dir: Path,
    *,
    options: IngestOptions | None = None,
    limits: IngestLimits | None = None,
    archive_sha256: str | None = None,
    progress: Callable[[Progress], None] | None = None,
    stop: StopRequest | None = None,
) -> Manifest:
    """Make a packed store of an archive and return its manifest; on failure nothing is left.

    `archive_sha256` saves hashing the archive where it is known.

    Raises:
        ArchiveError: the archive is refused as a whole; see `ctune.archive`, or `name_collision`.
        DataError: `no_images`, `too_many_unreadable`, `class_left_empty`, `invalid_metadata`,
            `ambiguous_layout`, `too_many_folders`.
        StopRequested: `stop` was asked for.
    """
    limits = limits or IngestLimits()
    options = options or IngestOptions()
    stop = stop or StopRequest()
    sha256 = archive_sha256 or _hash_file(archive, stop)
    spool_path = store_dir.absolute().with_name(f".{store_dir.name}.spool")
    with StoreWriter(store_dir) as writer, open_spool(spool_path) as spool:
        pulse = Pulse(archive.stat().st_size, stop, say=progress)
        reading = Reading(writer, spool, limits=limits, pulse=pulse)
        with ThreadPoolExecutor(num_threads(), "decode") as pool:
            reading.read(archive, pool)
        check_readable(spool)
        layout, split_made, num_unsplit = _decide(spool, reading.metadata_paths, options=options)
        summary = make_summary(spool, split_made)
        report = make_report(
            spool, reading.seen, layout=layout, summary=summary, num_unsplit=num_unsplit
        )
        _write_rows(writer, spool, summary=summary, pulse=pulse)
        manifest = Manifest(
            archive_sha256=sha256,
            summary=summary,
            report=report,
            options=options.model_dump(mode="json"),
        )
        writer.finish(manifest)
    return manifest


def _write_rows(
    writer: StoreWriter, spool: Spool, *, summary: DatasetSummary, pulse: Pulse
) -> None:
    """Write the index and the rows, in the archive's order."""
    numbers = {name: number for number, name in enumerate(summary.classes)}
    for n, row in enumerate(spool.placed()):
        pulse.wrote(n, summary.num_images)
        writer.add(
            {"path": row.path, "sha256": row.sha256, **row.columns},
            offset=row.offset,
            length=row.length,
            size_px=row.size_px,
            label=NO_LABEL if row.label is None else numbers[row.label],
            split=row.split,
        )


def _hash_file(path: Path, stop: StopRequest) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**20):
            stop.check()
            digest.update(chunk)
    return digest.hexdigest()


def _decide(
    spool: Spool, metadata_paths: list[str], *, options: IngestOptions
) -> tuple[str, bool, int]:
    """Give every image label and split; return the layout, whether the split is made, and how
    many images had none although others did."""
    _check_metadata_targets(spool)
    layout = detect_layout(spool.paths(), metadata_paths=metadata_paths)
    placing = _Placing(spool, layout)
    spool.place(placing.place)
    check_classes(spool)
    spool.drop_unreadable()
    given = spool.count("SELECT COUNT(*) FROM placed WHERE split IS NOT NULL")
    if given:
        return placing.layout_name, False, spool.fill_split("train")
    if options.test_fraction:
        spool.draw_split(options.test_fraction)
    else:
        spool.fill_split("train")
    return placing.layout_name, True, 0


def _check_metadata_targets(spool: Spool) -> None:
    """Refuse metadata rows about files that are not there."""
    sql = (
        "SELECT source, line, path FROM metadata WHERE key NOT IN (SELECT key FROM image) "
        "ORDER BY source, line LIMIT 20"
    )
    missing = list(spool.rows(sql))
    if missing:
        rows = "; ".join(f"row {line}: no image {path}" for _, line, path in missing)
        raise invalid_metadata(missing[0][0], rows)


class _Placing:
    """Decides label, split and columns of one image after the other.

    A metadata file that has labels is the only source of them; likewise `.cls` files; else the
    folders say.
    """

    def __init__(self, spool: Spool, layout: Layout) -> None:
        has_labels = "SELECT COUNT(*) FROM metadata WHERE label IS NOT NULL"
        has_classes = (
            "SELECT COUNT(*) FROM sidecar WHERE suffix = 'cls' "
            "AND sample IN (SELECT sample FROM image)"
        )
        self._layout = layout
        self._from_metadata = spool.count(has_labels) > 0
        self._from_sidecars = spool.count(has_classes) > 0
        self.layout_name = "webdataset" if self._from_sidecars else layout.name

    def place(self, image: Spooled) -> Values:
        """Return what is said of one image, by whichever source comes first."""
        label, split = self._layout.place(image.path)
        if self._from_metadata or self._from_sidecars:
            label = None
        columns: JsonObject = {}
        for path, content in reversed(image.sidecars):
            beside = sidecar_values(path, content)
            columns |= beside.columns
            label, split = beside.label or label, beside.split or split
        if image.metadata is not None:
            columns |= image.metadata.columns
            label = image.metadata.label or label
            split = image.metadata.split or split
        return Values(label, split, columns)


def run(run_dir: RunDir, events: EventWriter, stop: StopRequest) -> JsonObject:
    """Ingest what `config.json` says into `RUN_DIR/store`; the body of the child process."""
    file = IngestFile.model_validate_json(run_dir.config.read_bytes())
    events.write(Started(message=f"reading {file.archive.name}"))
    os.environ["SQLITE_TMPDIR"] = str(run_dir.root)
    _limit_memory(file.limits)
    manifest = ingest(
        file.archive,
        run_dir.root / "store",
        options=file.options,
        limits=file.limits,
        archive_sha256=file.archive_sha256,
        progress=events.write,
        stop=stop,
    )
    return {"store_key": file.store_key, "manifest": manifest.model_dump(mode="json")}


def _limit_memory(limits: IngestLimits) -> None:
    """Keep a decompression surprise from taking the machine: it fails as a `MemoryError` here."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    wanted = used + SPARE_ADDRESS_BYTES + ADDRESS_BYTES_PER_THREAD * num_threads()
    wanted += ADDRESS_BYTES_PER_PIXEL * limits.max_image_pixels
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


if __name__ == "__main__":
    sys.exit(run_child(run))
