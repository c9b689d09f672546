"""LaCViT on a CIFAR-10 subset: wall time, accuracies before and after, share of waiting for data.

`python -m bench.lacvit_cifar --cifar cifar10.tar.xz` where the archive holds
`train/<class>/*.jpg` and `test/<class>/*.jpg`.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import ctune
from bench.cifar import write_subset
from ctune.events import Metrics, read_events
from ctune.rundir import RunDir


def config(seed: int, epochs: int) -> dict[str, Any]:
    """Return the run: small preset, a 4-block ViT (0.8 M parameters, 65 tokens) from scratch."""
    return {
        "encoder": {
            "source": "timm",
            "name": "vit_tiny_patch16_224",
            "pretrained": False,
            "image_size_px": 32,
            "options": {"patch_size": 4, "depth": 4, "embed_dim": 128, "num_heads": 4},
        },
        "method": {"name": "lacvit", "preset": "small", "contrastive": {"epochs": epochs}},
        "seed": seed,
        "resources": {"gpus": 0},
    }


def measure(archive: Path, out_dir: Path, *, seed: int, epochs: int) -> dict[str, Any]:
    """Run once and return the row of the table."""
    start = time.monotonic()
    result = ctune.run(config(seed, epochs), archive, out_dir)
    wall_s = time.monotonic() - start
    waits = [
        event.values["data_wait"]
        for event, _ in read_events(RunDir(out_dir).events)
        if isinstance(event, Metrics) and event.stage == "contrastive"
    ]
    rates = [
        event.values["images_per_s"]
        for event, _ in read_events(RunDir(out_dir).events)
        if isinstance(event, Metrics) and event.stage == "contrastive"
    ]
    scores = result["evaluation"]
    return {
        "seed": seed,
        "epochs": epochs,
        "wall_s": round(wall_s, 1),
        "images_per_s": round(statistics.median(r for r in rates if r is not None), 1),
        "data_wait": round(statistics.mean(w for w in waits if w is not None), 4),
        **{
            f"{protocol}_{when}": round(scores[when][protocol]["top1"], 4)
            for protocol in ("knn", "linear_probe")
            for when in ("before", "after")
        },
        "classifier": round(scores["after"]["classifier"]["top1"], 4),
        **{
            f"isotropy_{when}": round(scores[when]["isotropy"]["isotropy_score"], 4)
            for when in ("before", "after")
        },
        **{
            f"gap_{when}": round(scores[when]["isotropy"]["gap"], 4) for when in ("before", "after")
        },
    }


def main() -> None:
    """Print hardware, versions and one row per seed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cifar", type=Path, required=True)
    parser.add_argument("--train-per-class", type=int, default=500)
    parser.add_argument("--test-per-class", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    print(
        f"{datetime.now(UTC):%Y-%m-%d} {platform.machine()}, {os.cpu_count()} cores,"
        f" torch {torch.__version__} with {torch.get_num_threads()} threads"
    )
    with tempfile.TemporaryDirectory() as folder:
        archive = Path(folder) / "cifar.zip"
        write_subset(
            options.cifar,
            archive,
            train_per_class=options.train_per_class,
            test_per_class=options.test_per_class,
        )
        for seed in options.seeds:
            row = measure(archive, Path(folder) / f"run-{seed}", seed=seed, epochs=options.epochs)
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
