"""What ingestion says of a data set: its summary, its report, and whether it is good enough.

Never imports torch.
"""

from collections import Counter
from dataclasses import dataclass, field

from ctune.errors import DataError
from ctune.images import Conversion
from ctune.manifest import SPLITS, DatasetSummary, FileIssue, Split, ValidationReport
from ctune.spool import Spool

MAX_LISTED = 1_000
MAX_EXAMPLES = 5
FREE_UNREADABLE = 10
CONVERSIONS: dict[Conversion, str] = {
    "alpha": "images had transparent parts, which are now white",
    "cmyk": "images were CMYK and are converted without a colour profile",
    "depth_16": "images had 16 bits per pixel and are reduced to 8",
    "first_frame": "images had several frames; the first one is used",
    "orientation": "images were turned as their EXIF orientation says",
    "palette": "images had a palette",
}
DUPLICATED = "SELECT content FROM placed GROUP BY content HAVING COUNT(*) > 1"
LEAKED = """SELECT {what} FROM placed p JOIN image i ON i.n = p.n WHERE p.split != 0
AND p.content IN (SELECT content FROM placed WHERE split = 0)"""
CONFLICTS = """SELECT MIN(i.path), GROUP_CONCAT(DISTINCT p.label)
FROM placed p JOIN image i ON i.n = p.n GROUP BY p.content HAVING COUNT(DISTINCT p.label) > 1"""


@dataclass
class Seen:
    """What was noticed while the archive streamed by."""

    num_junk: int = 0
    conversions: Counter[Conversion] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    """The first path of each kind of remark."""
    others: Counter[str] = field(default_factory=Counter)
    """Files that are no images, by suffix."""
    same_names: int = 0

    def note_other(self, path: str) -> None:
        """Count a file that is neither image nor metadata."""
        name = path.rpartition("/")[2]
        suffix = name.rpartition(".")[2].lower()[:12] if "." in name else "no suffix"
        if len(self.others) < MAX_LISTED or suffix in self.others:
            self.others[suffix] += 1
        self.examples.setdefault("ignored_files", path)


def check_readable(spool: Spool) -> None:
    """Refuse a data set of which too little can be read.

    Raises:
        DataError: `no_images`, `too_many_unreadable`; the message names files and reasons.
    """
    bad = spool.count("SELECT COUNT(*) FROM unreadable")
    total = spool.num_images + bad
    limit = max(FREE_UNREADABLE, total // 100)
    if spool.num_images and bad <= limit:
        return
    examples = _unreadable_examples(spool)
    hint = "JPEG, PNG, WebP, BMP, GIF and TIFF are read; repair the files or leave them out"
    if spool.num_images == 0:
        text = f": {examples}" if bad else ""
        raise DataError(f"no image in the archive can be read{text}", hint=hint, code="no_images")
    message = f"{bad} of {total} images cannot be read, the limit is {limit}: {examples}"
    raise DataError(message, hint=hint, code="too_many_unreadable")


def check_classes(spool: Spool) -> None:
    """Refuse a data set in which a class has lost all its images.

    Raises:
        DataError: `class_left_empty`.
    """
    sql = (
        "SELECT p.label, MIN(i.path), u.code, u.detail FROM placed p JOIN image i ON i.n = p.n "
        "LEFT JOIN unreadable u ON u.path = i.path "
        "WHERE p.label IS NOT NULL GROUP BY p.label HAVING COUNT(p.content) = 0 ORDER BY p.label"
    )
    lost = list(spool.rows(sql))
    if lost:
        examples = "; ".join(
            f"{name}: {path} ({code}: {why})" for name, path, code, why in lost[:5]
        )
        raise DataError(
            f"no image can be read of {len(lost)} classes: {examples}",
            hint="repair the files, or leave the classes out",
            code="class_left_empty",
        )


def _unreadable_examples(spool: Spool) -> str:
    sql = "SELECT path, code, detail FROM unreadable LIMIT ?"
    found = spool.rows(sql, MAX_EXAMPLES)
    return "; ".join(f"{path} ({code}: {detail})" for path, code, detail in found)


def make_summary(spool: Spool, split_made: bool) -> DatasetSummary:
    """Count the placed images."""
    labels = spool.rows("SELECT DISTINCT label FROM placed WHERE label IS NOT NULL ORDER BY label")
    classes = [label for (label,) in labels]
    class_counts: dict[Split, dict[str, int]] = {
        split: dict.fromkeys(classes, 0) for split in SPLITS
    }
    splits: dict[Split, int] = dict.fromkeys(SPLITS, 0)
    counts = "SELECT split, label, COUNT(*) FROM placed GROUP BY split, label"
    for number, label, count in spool.rows(counts):
        splits[SPLITS[number]] += count
        if label is not None:
            class_counts[SPLITS[number]][label] = count
    sizes = "SELECT MIN(width), MAX(width), MIN(height), MAX(height) FROM content"
    ((min_width, max_width, min_height, max_height),) = spool.rows(sizes)
    return DatasetSummary(
        num_images=sum(splits.values()),
        splits=splits,
        classes=classes,
        class_counts=class_counts,
        width_px=(min_width, max_width),
        height_px=(min_height, max_height),
        split_origin="made" if split_made else "given",
    )


def make_report(
    spool: Spool, seen: Seen, *, layout: str, summary: DatasetSummary, num_unsplit: int
) -> ValidationReport:
    """Say what is worth knowing of the data set beside its counts."""
    unreadable = spool.rows("SELECT path, code, detail FROM unreadable LIMIT ?", MAX_LISTED)
    warnings = [
        *_label_warnings(spool, summary),
        *_split_warnings(spool, summary, num_unsplit=num_unsplit),
        *_file_warnings(spool, seen),
    ]
    return ValidationReport(
        layout=layout,
        num_unreadable=spool.count("SELECT COUNT(*) FROM unreadable"),
        unreadable=[FileIssue(path=p, code=c, detail=d) for p, c, d in unreadable],
        num_junk=seen.num_junk,
        num_duplicates=spool.count(f"SELECT COUNT(*) FROM placed WHERE content IN ({DUPLICATED})"),
        num_split_leaks=spool.count(LEAKED.format(what="COUNT(*)")),
        warnings=warnings,
    )


def _label_warnings(spool: Spool, summary: DatasetSummary) -> list[FileIssue]:
    """Conflicting labels, a single class, classes with one image, images without a label."""
    warnings = []
    conflicts = spool.count(f"SELECT COUNT(*) FROM ({CONFLICTS})")
    for path, labels in spool.rows(f"{CONFLICTS} LIMIT ?", MAX_EXAMPLES):
        detail = f"the same bytes stand under {labels[:300].replace(',', ', ')}"
        if conflicts > 1:
            detail += f" ({conflicts} such images)"
        warnings.append(FileIssue(path=path, code="conflicting_labels", detail=detail))
    if len(summary.classes) == 1:
        detail = f"all labelled images are of the one class {summary.classes[0]!r}"
        warnings.append(FileIssue(path="", code="one_class", detail=detail))
    single = (
        "SELECT label, MIN(i.path) FROM placed p JOIN image i ON i.n = p.n "
        "WHERE label IS NOT NULL GROUP BY label HAVING COUNT(DISTINCT p.content) = 1"
    )
    warnings += [
        FileIssue(path=path, code="class_with_one_image", detail=f"class {label!r} has one image")
        for label, path in spool.rows(f"{single} LIMIT ?", MAX_LISTED)
    ]
    unlabelled = spool.count("SELECT COUNT(*) FROM placed WHERE label IS NULL")
    if summary.classes and unlabelled:
        detail = f"{unlabelled} images have no label although others have one"
        warnings.append(FileIssue(path="", code="unlabelled_images", detail=detail))
    return warnings


def _split_warnings(spool: Spool, summary: DatasetSummary, *, num_unsplit: int) -> list[FileIssue]:
    warnings = []
    for (path,) in spool.rows(LEAKED.format(what="i.path") + " LIMIT ?", MAX_EXAMPLES):
        detail = "a held-out image whose bytes are also in the training split"
        warnings.append(FileIssue(path=path, code="split_leak", detail=detail))
    if summary.split_origin == "made":
        detail = f"no split was given; {summary.splits['test']} images were held out as test"
        warnings.append(FileIssue(path="", code="split_made", detail=detail))
    if not summary.splits["train"]:
        detail = "there are no training images"
        warnings.append(FileIssue(path="", code="no_training_images", detail=detail))
    if summary.heldout_split is None:
        detail = "there are no held-out images, so that nothing can be evaluated"
        warnings.append(FileIssue(path="", code="no_heldout_images", detail=detail))
    if num_unsplit:
        detail = f"{num_unsplit} images without a split were put into train"
        warnings.append(FileIssue(path="", code="no_split_given", detail=detail))
    return warnings


def _file_warnings(spool: Spool, seen: Seen) -> list[FileIssue]:
    """Converted images, equal names, files that are ignored."""
    warnings = [
        FileIssue(
            path=seen.examples[f"converted_{kind}"],
            code=f"converted_{kind}",
            detail=f"{count} {CONVERSIONS[kind]}",
        )
        for kind, count in sorted(seen.conversions.items())
    ]
    if seen.same_names:
        detail = f"{seen.same_names} files stand in the archive twice with the same bytes"
        path = seen.examples["duplicate_names"]
        warnings.append(FileIssue(path=path, code="duplicate_names", detail=detail))
    for (path,) in spool.rows(
        "SELECT path FROM sidecar WHERE sample NOT IN (SELECT sample FROM image)"
    ):
        seen.note_other(path)
    if seen.others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in seen.others.most_common(10))
        path = seen.examples["ignored_files"]
        detail = f"files that are no images were ignored: {kinds}"
        warnings.append(FileIssue(path=path, code="ignored_files", detail=detail))
    return warnings
