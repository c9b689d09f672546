"""From paths to classes and splits."""

import pytest

from ctune.errors import DataError
from ctune.layouts import Layout, detect_layout, kind_of, sample_key


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("a/b.jpg", "image"),
        ("a/b.JPEG", "image"),
        ("b.heic", "image"),
        ("a.tar/b", "other"),
        ("README.md", "other"),
        ("noname", "other"),
        ("train/metadata.csv", "metadata"),
        ("metadata.jsonl", "metadata"),
        ("a/001.cls", "sidecar"),
        ("a/001.txt", "sidecar"),
        ("__MACOSX/a/._b.jpg", "junk"),
        ("a/._b.jpg", "junk"),
        ("a/.DS_Store", "junk"),
        ("Thumbs.db", "junk"),
        (".ipynb_checkpoints/a.jpg", "junk"),
        (".git/objects/b.png", "junk"),
    ],
)
def test_kinds_by_name(path: str, kind: str) -> None:
    assert kind_of(path) == kind


@pytest.mark.parametrize(
    ("paths", "name", "wrapper", "places"),
    [
        (["cat/1.jpg", "dog/2.jpg"], "class_folders", "", ["cat -", "dog -"]),
        (["w/cat/1.jpg", "w/dog/2.jpg"], "class_folders", "w", ["cat -", "dog -"]),
        (["v/w/cat/1.jpg", "v/w/dog/x/2.jpg"], "class_folders", "v/w", ["cat -", "dog -"]),
        (["cat/1.jpg", "cat/2.jpg"], "class_folders", "", ["cat -", "cat -"]),
        (["w/cat/1.jpg"], "class_folders", "w", ["cat -"]),
        (["cat/1.jpg", "cat/deep/2.jpg"], "class_folders", "", ["cat -", "cat -"]),
        (["1.jpg", "2.jpg"], "flat", "", ["- -", "- -"]),
        (["1.jpg", "cat/2.jpg"], "class_folders", "", ["- -", "cat -"]),
        (
            ["train/cat/1.jpg", "test/dog/2.jpg"],
            "class_folders_with_splits",
            "",
            ["cat train", "dog test"],
        ),
        (
            ["w/Training/cat/1.jpg", "w/valid/cat/2.jpg", "w/TESTING/cat/a/3.jpg"],
            "class_folders_with_splits",
            "w",
            ["cat train", "cat val", "cat test"],
        ),
        (["train/cat/1.jpg"], "class_folders_with_splits", "", ["cat train"]),
        (["train/1.jpg", "validation/2.jpg"], "flat_with_splits", "", ["- train", "- val"]),
        (["car/1.jpg", "train/2.jpg"], "class_folders", "", ["car -", "train -"]),
        (["train/cat/1.jpg", "training/cat/2.jpg"], "class_folders_with_splits", "",
         ["cat train", "cat train"]),
    ],
)  # fmt: skip
def test_layouts(paths: list[str], name: str, wrapper: str, places: list[str]) -> None:
    layout = detect_layout(paths)
    assert layout.name == name
    assert "/".join(layout.wrapper) == wrapper
    found = [" ".join(part or "-" for part in layout.place(path)) for path in paths]
    assert found == places


def test_a_folder_with_metadata_is_a_wrapper() -> None:
    paths = ["photos/1.jpg", "photos/2.jpg"]
    assert detect_layout(paths).place("photos/1.jpg") == ("photos", None)
    layout = detect_layout(paths, metadata_paths=["photos/metadata.csv"])
    assert layout == Layout("metadata", ("photos",), has_splits=False)
    assert layout.place("photos/1.jpg") == (None, None)


@pytest.mark.parametrize(
    "paths",
    [
        ["train/a/1.jpg", "test/a/2.jpg", "extra/a/3.jpg"],
        ["train/a/1.jpg", "test/a/2.jpg", "3.jpg"],
    ],
)
def test_split_folders_beside_others_are_refused(paths: list[str]) -> None:
    with pytest.raises(DataError, match="beside the split folders test, train") as caught:
        detect_layout(paths)
    assert caught.value.error_code == "ambiguous_layout"


def test_too_many_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctune.layouts.MAX_FOLDERS", 10)
    with pytest.raises(DataError) as caught:
        detect_layout(f"{n}/1.jpg" for n in range(11))
    assert caught.value.error_code == "too_many_folders"


def test_sample_keys() -> None:
    assert sample_key("a.b/001.left.jpg") == sample_key("a.b/001.cls") == "a.b/001"
    assert sample_key("x/001.jpg") != sample_key("y/001.cls")
