"""What the paths of an archive say: which files are images, their class and their split.

Accepted, all inside any number of folders that hold everything (`my_data/`):

=========================== =================================================================
`class_folders`             `cat/1.jpg`; deeper folders belong to the first one
`class_folders_with_splits` `train/cat/1.jpg`
`flat`                      `1.jpg`: no labels
`flat_with_splits`          `train/1.jpg`: no labels
`metadata`                  any of these with `metadata.csv` or `metadata.jsonl` (`file_name`, …)
`webdataset`                any of these with `1.cls`, `1.txt`, `1.json` beside `1.jpg`
=========================== =================================================================

One folder with all images directly in it is one class, not a wrapper: nothing tells the two apart.
Class names are sorted by code point and labels count in that order. Never imports torch.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from ctune.errors import DataError
from ctune.manifest import Split

Kind = Literal["junk", "image", "metadata", "sidecar", "other"]
Folder = tuple[str, ...]

SPLIT_NAMES: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
# fmt: off
IMAGE_SUFFIXES = frozenset({
    "jpg", "jpeg", "jpe", "jfif", "png", "webp", "bmp", "dib", "gif", "tif", "tiff",
    "heic", "heif", "avif", "jp2", "jxl", "psd", "ppm", "pgm", "ico",
})
# fmt: on
"""Names that promise an image; those of other formats are then reported as unsupported."""
SIDECAR_SUFFIXES = frozenset({"cls", "txt", "json"})
METADATA_NAMES = frozenset({"metadata.csv", "metadata.jsonl"})
JUNK_NAMES = frozenset({"__macosx", "thumbs.db", "desktop.ini", "$recycle.bin"})
MAX_FOLDERS = 200_000


def kind_of(path: str) -> Kind:
    """Return what a file is by its name alone; `other` may still turn out to be an image."""
    parts = path.split("/")
    if any(part.startswith(".") or part.lower() in JUNK_NAMES for part in parts):
        return "junk"
    name = parts[-1].lower()
    if name in METADATA_NAMES:
        return "metadata"
    suffix = name.rpartition(".")[2] if "." in name else ""
    if suffix in IMAGE_SUFFIXES:
        return "image"
    return "sidecar" if suffix in SIDECAR_SUFFIXES else "other"


def sample_key(path: str) -> str:
    """Return what an image shares with its sidecar files: the path up to the name's first dot."""
    folder, slash, name = path.rpartition("/")
    return folder + slash + name.partition(".")[0]


def split_named(name: str) -> Split | None:
    """Return the split that a folder or a metadata value names, if it does."""
    return SPLIT_NAMES.get(name.strip().lower())


@dataclass(frozen=True)
class Layout:
    """How the paths of one archive are read."""

    name: str
    wrapper: Folder
    """Folders around everything, which mean nothing."""
    has_splits: bool
    """Whether the first folder behind the wrapper is a split."""

    def place(self, path: str) -> tuple[str | None, Split | None]:
        """Return the class and the split that an image's path gives."""
        folders = _folder(path)[len(self.wrapper) :]
        split = None
        if self.has_splits:
            split = split_named(folders[0])
            folders = folders[1:]
        return (folders[0] if folders else None), split


def detect_layout(paths: Iterable[str], *, metadata_paths: Collection[str] = ()) -> Layout:
    """Find out how the paths of all images are to be read; the folders must fit in memory.

    Raises:
        DataError: `too_many_folders`, or `ambiguous_layout`: split folders beside others.
    """
    folders: set[Folder] = set()
    for path in paths:
        folders.add(_folder(path))
        if len(folders) > MAX_FOLDERS:
            raise DataError(
                f"the images lie in more than {MAX_FOLDERS} folders",
                hint="put labels into metadata.csv instead of folders",
                code="too_many_folders",
            )
    wrapper = _wrapper(folders, {_folder(path) for path in metadata_paths})
    inside = {folder[len(wrapper) :] for folder in folders}
    has_splits = _has_splits(inside)
    has_classes = any(len(folder) > has_splits for folder in inside)
    name = ("class_folders" if has_classes else "flat") + ("_with_splits" if has_splits else "")
    return Layout("metadata" if metadata_paths else name, wrapper, has_splits)


def _folder(path: str) -> Folder:
    return tuple(path.split("/")[:-1])


def _wrapper(folders: Collection[Folder], metadata_folders: Collection[Folder]) -> Folder:
    """Return the folders around everything: not a split, and not a class by itself."""
    wrapper: Folder = ()
    while True:
        depth = len(wrapper)
        firsts = {folder[depth : depth + 1] for folder in folders}
        if len(firsts) != 1:
            return wrapper
        (first,) = firsts
        if not first or split_named(first[0]):
            return wrapper
        described = any(folder[: depth + 1] == wrapper + first for folder in metadata_folders)
        if not described and any(len(folder) == depth + 1 for folder in folders):
            return wrapper
        wrapper += first


def _has_splits(folders: Collection[Folder]) -> bool:
    """Whether the first folders are splits.

    One split name among other folders is a class of that name; two or more are a contradiction.
    """
    firsts = {folder[0] if folder else "" for folder in folders}
    splits = sorted(first for first in firsts if split_named(first))
    others = sorted(firsts - set(splits))
    if len({split_named(first) for first in splits}) > 1 and others:
        shown = ", ".join(
            repr(other) if other else "files without a folder" for other in others[:5]
        )
        raise DataError(
            f"beside the split folders {', '.join(splits)} there are {shown}",
            hint="put every image under a split folder, or none",
            code="ambiguous_layout",
        )
    return bool(splits) and not others
