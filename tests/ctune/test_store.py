"""What is written is read; nothing half written can be opened; reading stays small."""

import hashlib
import io
import json
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ctune.manifest import SPLITS, DatasetSummary, Manifest, Split, ValidationReport
from ctune.store import INDEX_DTYPE, PackedStore, StoreError, StoreWriter


def make_manifest(num_images: int) -> Manifest:
    return Manifest(
        archive_sha256="0" * 64,
        summary=DatasetSummary(
            num_images=num_images,
            splits={"train": num_images, "val": 0, "test": 0},
            classes=[],
            class_counts={split: {} for split in SPLITS},
            width_px=(1, 1),
            height_px=(1, 1),
            split_origin="made",
        ),
        report=ValidationReport(
            layout="flat",
            num_unreadable=0,
            unreadable=[],
            num_junk=0,
            num_duplicates=0,
            num_split_leaks=0,
            warnings=[],
        ),
        options={},
    )


def png(value: int, width: int = 5, height: int = 3) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (value, value, value)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path) -> list[bytes]:
    """Write five images, the last sharing the first one's bytes; return the bytes per image."""
    contents = [png(value) for value in (10, 20, 30, 40)]
    splits: list[Split] = ["train", "test", "train", "val", "test"]
    with StoreWriter(path) as writer:
        offsets = [writer.put(data) for data in contents]
        for n, split in enumerate(splits):
            data = contents[n % 4]
            row = {"path": f"é/{n}.png", "sha256": hashlib.sha256(data).hexdigest(), "text": "x\ny"}
            writer.add(
                row, offset=offsets[n % 4], length=len(data), size_px=(5, 3), label=n - 1,
                split=split,
            )  # fmt: skip
        writer.finish(make_manifest(5))
    return [*contents, contents[0]]


def test_round_trip(tmp_path: Path) -> None:
    contents = write(tmp_path / "store")
    store = PackedStore(tmp_path / "store")
    assert len(store) == 5
    assert [store.read(n) for n in range(5)] == contents
    assert store.indices("train").tolist() == [0, 2]
    assert store.labels("train").tolist() == [-1, 1]
    assert store.indices("test").tolist() == [1, 4]
    assert store.labels("test").dtype == store.indices("test").dtype == np.int64
    assert [store.split(n) for n in range(5)] == ["train", "test", "train", "val", "test"]
    assert store.label(4) == 3
    assert store.size_px(2) == (5, 3)
    image = store.image(3)
    assert (image.mode, image.size, image.getpixel((0, 0))) == ("RGB", (5, 3), (40, 40, 40))
    assert store.row(4) == {
        "path": "é/4.png",
        "sha256": hashlib.sha256(contents[0]).hexdigest(),
        "text": "x\ny",
    }
    assert store.manifest == make_manifest(5)
    with pytest.raises(IndexError):
        store.read(5)


def test_files_are_as_documented(tmp_path: Path) -> None:
    contents = write(tmp_path / "store")
    assert sorted(file.name for file in (tmp_path / "store").iterdir()) == [
        "images.bin", "index.npy", "manifest.json", "rows.jsonl",
    ]  # fmt: skip
    assert (tmp_path / "store" / "images.bin").read_bytes() == b"".join(contents[:4])
    index = np.load(tmp_path / "store" / "index.npy")
    assert index.dtype == INDEX_DTYPE
    assert index["split"].tolist() == [0, 2, 0, 1, 2]
    lines = (tmp_path / "store" / "rows.jsonl").read_bytes().splitlines(keepends=True)
    starts = np.cumsum([0, *(len(line) for line in lines)])[:-1]
    assert index["row"].tolist() == starts.tolist()
    assert json.loads(lines[2])["path"] == "é/2.png"


def test_an_unfinished_store_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with pytest.raises(RuntimeError), StoreWriter(path) as writer:
        writer.put(b"abc")
        with pytest.raises(StoreError, match="missing"):
            PackedStore(path)
        raise RuntimeError
    assert not path.exists()


def test_writing_again_takes_the_old_manifest_away_first(tmp_path: Path) -> None:
    write(tmp_path / "store")
    writer = StoreWriter(tmp_path / "store")
    with pytest.raises(StoreError):
        PackedStore(tmp_path / "store")
    writer.abandon()


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("manifest.json", b"{}"),
        ("manifest.json", None),
        ("images.bin", b"short"),
        ("images.bin", b""),
        ("rows.jsonl", b"{}\n"),
        ("index.npy", b"not numpy"),
        ("index.npy", None),
    ],
)
def test_damage_is_noticed(tmp_path: Path, name: str, damage: bytes | None) -> None:
    write(tmp_path / "store")
    file = tmp_path / "store" / name
    file.unlink() if damage is None else file.write_bytes(damage)
    with pytest.raises(StoreError) as caught:
        PackedStore(tmp_path / "store")
    assert (caught.value.error_code, caught.value.fault) == ("store_damaged", "system")


def test_a_wrong_count_is_noticed(tmp_path: Path) -> None:
    write(tmp_path / "store")
    manifest = make_manifest(6).model_dump_json()
    (tmp_path / "store" / "manifest.json").write_text(manifest)
    with pytest.raises(StoreError, match="5 records, the manifest says 6"):
        PackedStore(tmp_path / "store")


PROBE = """
import resource, sys
from pathlib import Path
from ctune.store import PackedStore
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
store = PackedStore(Path(sys.argv[1]))
for n in range(0, len(store), len(store) // 50):
    assert store.row(n)["path"] == f"{n}.png"
    store.image(n)
assert int(store.labels("train").sum()) == sum(n % 7 for n in range(len(store)))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_half_a_million_images_are_read_in_little_memory(tmp_path: Path) -> None:
    count = 500_000
    data = png(1)
    with StoreWriter(tmp_path / "store") as writer:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        offset = writer.put(data)
        for n in range(count):
            writer.add(
                {"path": f"{n}.png", "sha256": "0" * 64}, offset=offset, length=len(data),
                size_px=(5, 3), label=n % 7, split="train",
            )  # fmt: skip
        writer.finish(make_manifest(count))
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
    assert grown < 64
    out = subprocess.run(
        [sys.executable, "-c", PROBE, str(tmp_path / "store")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(out.stdout) < 64  # MiB, the mapped index of 14 MiB included
