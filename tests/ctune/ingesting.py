"""Small archives, ingested."""

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ctune.errors import CtuneError
from ctune.ingest import IngestLimits, IngestOptions, ingest
from ctune.manifest import Manifest
from ctune.store import PackedStore

Files = dict[str, bytes]


def png(seed: int, width: int = 8, height: int = 6) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels))


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def pngs(folder: str, count: int, first_seed: int = 0) -> Files:
    return {f"{folder}/{n}.png": png(first_seed + n) for n in range(count)}


class Bench:
    """Packs files, ingests them and opens the store."""

    def __init__(self, root: Path) -> None:
        self.archive = root / "archive"
        self.store_dir = root / "store"

    def pack(self, files: Files, kind: str = "zip") -> None:
        if kind == "zip":
            with zipfile.ZipFile(self.archive, "w") as archive:
                for name, data in files.items():
                    archive.writestr(name, data)
            return
        with tarfile.open(self.archive, "w:gz" if kind == "tar.gz" else "w") as tar:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))

    def run(
        self,
        files: Files,
        kind: str = "zip",
        *,
        limits: IngestLimits | None = None,
        test_fraction: float = 0.2,
    ) -> tuple[Manifest, PackedStore]:
        self.pack(files, kind)
        options = IngestOptions(test_fraction=test_fraction)
        manifest = ingest(self.archive, self.store_dir, options=options, limits=limits)
        store = PackedStore(self.store_dir)
        assert store.manifest == manifest
        assert sorted(file.name for file in self.store_dir.parent.iterdir()) == ["archive", "store"]
        return manifest, store

    def refused(self, files: Files, *, limits: IngestLimits | None = None) -> CtuneError:
        self.pack(files)
        with pytest.raises(CtuneError) as caught:
            ingest(self.archive, self.store_dir, limits=limits)
        assert [file.name for file in self.store_dir.parent.iterdir()] == ["archive"]
        assert caught.value.fault == "user"
        assert caught.value.hint
        return caught.value


def paths_in(store: PackedStore, split: str) -> set[str]:
    return {store.row(int(n))["path"] for n in store.indices(split)}  # type: ignore[arg-type]


def remarks(manifest: Manifest) -> dict[str, str]:
    return {issue.code: issue.detail for issue in manifest.report.warnings}


def labels_by_path(store: PackedStore) -> dict[str, str | None]:
    classes = [*store.manifest.summary.classes, None]
    return {store.row(n)["path"]: classes[store.label(n)] for n in range(len(store))}
