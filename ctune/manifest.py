"""What a packed data set says of itself: `manifest.json` beside the images. Never imports torch."""

from typing import Literal

from ctune.schema import JsonObject, Schema

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


class DatasetSummary(Schema):
    """Counts that job validation and people need."""

    num_images: int
    """Readable images in the data set."""
    splits: dict[Split, int]
    """Images per split."""
    classes: list[str]
    """Class names in label order; empty for an unlabelled data set."""
    class_counts: dict[Split, dict[str, int]]
    """Labelled images per split and class; every class appears in every split, also with 0."""
    width_px: tuple[int, int]
    """Smallest and largest width."""
    height_px: tuple[int, int]
    """Smallest and largest height."""
    split_origin: Literal["given", "made"]
    """`made`: the archive gave no split, a deterministic stratified one was drawn."""

    @property
    def train_classes(self) -> dict[str, int]:
        """Labelled training images per class."""
        return self.class_counts.get("train", {})

    @property
    def heldout_split(self) -> Split | None:
        """The split that evaluation scores: test, else val, else none."""
        for split in ("test", "val"):
            if self.splits.get(split, 0):
                return split
        return None


def working_size_px(summary: DatasetSummary, image_size_px: int) -> int:
    """Return the cache side for training: 8/7 of the view (256 for 224), at most the native side.

    The native side is the longest side of any image: a cache beyond it would hold no more detail,
    only more bytes. So 32 px images are kept at 32 px for an encoder of 32 px as for one of 224 px,
    and the random crop enlarges them in one step.
    """
    native_px = max(summary.width_px[1], summary.height_px[1])
    return max(1, min(-(-image_size_px * 8 // 7), native_px))


class FileIssue(Schema):
    """One member of the archive that is not in the data set, or one that deserves a look."""

    path: str
    """Name inside the archive."""
    code: str
    """Why, for example `corrupt`, `empty_file`, `image_too_large`."""
    detail: str
    """What was found."""


class ValidationReport(Schema):
    """What ingestion understood, beside the counts."""

    layout: str
    """Layout that was recognised, for example `class_folders_with_splits`."""
    num_unreadable: int
    """Members left out because they cannot be decoded or break a limit."""
    unreadable: list[FileIssue]
    """The first 1,000 of them."""
    num_junk: int
    """System files (`__MACOSX`, `.DS_Store`, `Thumbs.db`, …) that were ignored."""
    num_duplicates: int
    """Images whose bytes occur more than once."""
    num_split_leaks: int
    """Images of a held-out split whose bytes also occur in the training split."""
    warnings: list[FileIssue]
    """Data-set level remarks: classes with one image, converted images, conflicting labels."""


class Manifest(Schema):
    """`manifest.json` of a packed store."""

    format_version: Literal[1] = 1
    archive_sha256: str
    summary: DatasetSummary
    report: ValidationReport
    options: JsonObject
    """Ingestion options that shaped this store."""
