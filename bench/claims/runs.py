"""What the claims share: the images, the sizes, runs that are made once, the rows they print."""

import argparse
import hashlib
import json
import math
import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import scipy.stats
import torch

import ctune
from bench.cifar import write_subset
from ctune.events import Finished, read_events
from ctune.ingest import ingest
from ctune.rundir import RunDir
from ctune.schema import JsonObject
from ctune.store import MANIFEST

EVALUATION: JsonObject = {
    "protocols": ["knn", "linear_probe", "low_shot", "clustering", "isotropy", "rankme"],
    "linear_probe": {"recipe": "mae_ct"},
    "before": False,
    "online": {"every_steps": None},
}
"""How encoders without labels are judged (mae_ct.md 5)."""
SCORES = {
    "k-NN": "knn.top1",
    "k-NN, standardised": "knn.standardized.top1",
    "linear probe": "linear_probe.top1",
    "1-shot": "low_shot.1_shot.top1",
    "5-shot": "low_shot.5_shot.top1",
    "cluster accuracy": "clustering.accuracy",
    "NMI": "clustering.nmi",
    "head's k-NN": "nnclr_head.knn_top1",
}
"""Column of a table to the path of its score in `result["evaluation"]["after"]`."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large the runs are."""

    train_per_class: int
    """Training images per class without labels."""
    labelled_per_class: int
    """Training images per class where labels are used."""
    test_per_class: int
    encoder: JsonObject
    """timm encoder that is pre-trained from random weights."""
    mae: JsonObject
    """Stage `mae` on top of the preset `small`."""
    mae_ct: JsonObject
    """Method `mae_ct`, likewise: what its stages with neighbours share."""
    head_init: JsonObject
    """Stage of that name."""
    tuning: JsonObject
    """Stage `contrastive_tuning`."""
    combined: JsonObject
    """Stage `combined`, with as many encoder passes as the three stages above."""
    supervised_epochs: int
    """Epochs of one view; even, for two views have half of them."""


def vit(**options: int) -> JsonObject:
    """Return a vision transformer on 4 px patches of 32 px images, from random weights."""
    return {
        "source": "timm",
        "name": "vit_tiny_patch16_224",
        "pretrained": False,
        "image_size_px": 32,
        "options": {"patch_size": 4, **options},
    }


SIZES = {
    "cpu": Size(
        train_per_class=1000,
        labelled_per_class=100,
        test_per_class=1000,
        encoder=vit(embed_dim=128, depth=6, num_heads=4),
        mae={"epochs": 50, "batch_size": 128, "base_lr": 2e-3},
        mae_ct={"batch_size": 256, "crop_scale_min": 0.2},
        head_init={"epochs": 5},
        tuning={"epochs": 5, "top_k": 10, "base_lr": 1e-3, "head_base_lr": 1e-3},
        combined={"epochs": 35, "batch_size": 128, "base_lr": 1e-3},
        supervised_epochs=24,
    ),
    "cuda": Size(
        train_per_class=5000,
        labelled_per_class=1000,
        test_per_class=1000,
        encoder=vit(embed_dim=384, depth=12, num_heads=6),
        mae={"epochs": 400, "batch_size": 1024, "base_lr": 3e-4, "precision": "bf16"},
        mae_ct={"batch_size": 512, "crop_scale_min": 0.2, "precision": "bf16"},
        head_init={"epochs": 20},
        tuning={"epochs": 40, "top_k": 10},
        combined={"epochs": 260, "batch_size": 512, "base_lr": 3e-4, "precision": "bf16"},
        supervised_epochs=100,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where images come from and runs go to, and how large they are."""

    cifar: Path
    work_dir: Path
    device: str
    size: Size
    seeds: Sequence[int]

    def images(self, train_per_class: int) -> Path:
        """Return the packed store of the first images of every class."""
        name = f"images-{train_per_class}-{self.size.test_per_class}"
        store, archive = self.work_dir / name, self.work_dir / f"{name}.zip"
        if not (store / MANIFEST).exists():
            write_subset(
                self.cifar,
                archive,
                train_per_class=train_per_class,
                test_per_class=self.size.test_per_class,
            )
            ingest(archive, store)
            archive.unlink()
        return store

    def run(
        self,
        name: str,
        *,
        encoder: JsonObject,
        method: JsonObject,
        data: Path,
        seed: int,
        evaluation: JsonObject = EVALUATION,
    ) -> JsonObject:
        """Return the result of a run, which is made once and goes on where it was interrupted.

        Its directory's name holds a hash of all that was asked for.
        """
        config: JsonObject = {
            "encoder": encoder,
            "method": method,
            "evaluation": evaluation,
            "seed": seed,
            "resources": {"gpus": 1 if self.device == "cuda" else 0},
        }
        asked = json.dumps([config, data.name], sort_keys=True)
        out_dir = self.work_dir / f"{name}-{hashlib.sha256(asked.encode()).hexdigest()[:8]}"
        done = _finished(out_dir)
        if done is None:
            done = ctune.run(config, data, out_dir)
        return done | {"out_dir": str(out_dir)}


def _finished(out_dir: Path) -> JsonObject | None:
    events = read_events(RunDir(out_dir).events)
    results = [event.result for event, _ in events if isinstance(event, Finished)]
    return results[-1] if results else None


def parse(about: str, *, seeds: Sequence[int] = (0, 1, 2)) -> Bench:
    """Read the command line that all claims have, print where this runs, return what to do."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--cifar", type=Path, required=True, help="train/ and test/<class>/*.jpg")
    parser.add_argument("--device", choices=sorted(SIZES), default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[*seeds])
    parser.add_argument("--work-dir", type=Path, default=Path("claims-data"))
    options = parser.parse_args()
    work_dir = options.work_dir.resolve()
    work_dir.mkdir(parents=True, exist_ok=True)
    print(about)
    print(f"{datetime.now(UTC):%Y-%m-%d} · {hardware(options.device)} · seeds {options.seeds}\n")
    return Bench(
        cifar=options.cifar,
        work_dir=work_dir,
        device=options.device,
        size=SIZES[options.device],
        seeds=options.seeds,
    )


def hardware(device: str) -> str:
    """Return machine and versions in words."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("ctune", "torch", "timm"))
    cores = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return f"{torch.cuda.get_device_name() if device == 'cuda' else cores} · {versions}"


def score(result: JsonObject, path: str) -> float | None:
    """Return one score of the encoder after a run, None where it was not measured."""
    value: Any = result["evaluation"]["after"]
    for name in path.split("."):
        value = (value or {}).get(name)
    return None if value is None else float(value)


def with_interval(values: Sequence[float]) -> str:
    """Return mean and half width of the 95 % interval of Student's t; one value stands alone."""
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.3f}"
    if len(values) == 1:
        return mean
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean} ± {scipy.stats.t.ppf(0.975, len(values) - 1) * spread:.3f}"


def scores_row(results: Sequence[JsonObject], paths: Iterable[str]) -> list[str]:
    """Return the cells of one way of training: its scores over the seeds."""
    scores = [[score(result, path) for result in results] for path in paths]
    return [with_interval([value for value in row if value is not None]) for row in scores]


def cost_row(results: Sequence[JsonObject]) -> list[str]:
    """Return image passes of the encoder in training, and minutes with evaluation, per run."""
    minutes = statistics.fmean(result["train_s"] for result in results) / 60
    return [f"{results[0]['image_passes']:,}", f"{minutes:.1f}"]


def print_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print Markdown."""
    for cells in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(cells) + " |", flush=True)
