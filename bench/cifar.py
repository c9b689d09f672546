"""CIFAR-10 subsets for benchmarks, from an archive of `train/<class>/*` and `test/<class>/*`."""

import collections
import tarfile
import zipfile
from pathlib import Path


def write_subset(cifar: Path, archive: Path, *, train_per_class: int, test_per_class: int) -> None:
    """Write the first images of every class as a zip of class folders."""
    limits = {"train": train_per_class, "test": test_per_class}
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    with tarfile.open(cifar) as source, zipfile.ZipFile(archive, "w") as target:
        for member in source:
            if not member.isfile():
                continue
            split, label, name = member.name.split("/")[-3:]
            if counts[split, label] >= limits[split]:
                continue
            counts[split, label] += 1
            file = source.extractfile(member)
            assert file is not None
            target.writestr(f"{split}/{label}/{name}", file.read())
