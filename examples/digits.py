"""Tune a small vision transformer on handwritten digits through a running ctune.

Run `ctune up` first, or all of it with `make demo`.
The images are scikit-learn's copy of the UCI digits: 1,797 pictures of 8 x 8 pixels, written here
as 32 x 32 PNG files (bilinear). Three of them are kept back; the service never sees them until the
tuned encoder is asked which uploaded images look like them.
"""

import argparse
import io
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.datasets import load_digits

from ctune.client import DEFAULT_URL, Client
from ctune.schema import JsonObject

SIDE_PX = 32
KEPT_BACK = ("3", "5", "8")
NEIGHBOURS = 5
SHOWN = ("top1", "gap", "mean_cosine_similarity")
console = Console()

Digit = tuple[str, bytes]  # label and PNG file


def read_digits() -> list[Digit]:
    """Return all digits in an order drawn once and for all."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    return [(str(digits.target[n]), as_png(digits.images[n])) for n in order]


def as_png(pixels: np.ndarray) -> bytes:
    """Return an 8 x 8 image with values 0 to 16 as a PNG of 32 x 32 pixels."""
    image = Image.fromarray((pixels * (255 / 16)).round().astype(np.uint8))
    buffer = io.BytesIO()
    image.resize((SIDE_PX, SIDE_PX), Image.Resampling.BILINEAR).save(buffer, "PNG")
    return buffer.getvalue()


def write_archive(path: Path, digits: list[Digit]) -> Path:
    """Write one folder per class; the service makes the train/test split."""
    with zipfile.ZipFile(path, "w") as archive:
        for number, (label, png) in enumerate(digits):
            archive.writestr(f"{label}/{number:04}.png", png)
    return path


def upload(client: Client, digits: list[Digit]) -> str:
    """Upload the digits, wait until they are ready, show what was understood, return the id."""
    with tempfile.TemporaryDirectory() as folder:
        archive = write_archive(Path(folder) / "digits.zip", digits)
        made = client.datasets.push(archive, name="handwritten digits")
    with console.status(f"{made['id']}: the service decodes every image"):
        dataset = client.datasets.wait(made["id"])
    summary, report = dataset["summary"], dataset["report"]
    splits = ", ".join(f"{count} {split}" for split, count in summary["splits"].items())
    console.print(
        f"[bold]data set[/bold] {dataset['id']}: {summary['num_images']} images,"
        f" {len(summary['classes'])} classes; split {summary['split_origin']}: {splits};"
        f" {report['num_unreadable']} unreadable, {report['num_duplicates']} duplicates"
    )
    return str(dataset["id"])


def job_on(dataset: str, epochs: int) -> JsonObject:
    """Return the body of POST /jobs: LaCViT on a small ViT that starts from random weights."""
    plain = {"color_jitter_prob": 0.0, "grayscale_prob": 0.0}  # the digits have no colour
    stage = {"epochs": epochs, "lr": 1e-3, "crop_scale_min": 0.6, **plain}
    return {
        "dataset": dataset,
        "name": "digits",
        "encoder": {
            "source": "timm",
            "name": "vit_tiny_patch16_224",
            "pretrained": False,
            "image_size_px": SIDE_PX,
            "options": {"patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4},
        },
        "method": {"name": "lacvit", "preset": "small", "contrastive": stage},
        "resources": {"gpus": 0},
    }


def follow(client: Client, job: str) -> JsonObject:
    """Show the job's progress until it has succeeded, and return it."""
    told_as = TextColumn("{task.description:<12} {task.fields[told]}")
    console.print(f"[bold]job[/bold] {job}")
    with Progress(BarColumn(), TimeElapsedColumn(), told_as, console=console) as bar:
        task = bar.add_task("queued", total=1.0, told="")
        for event in client.jobs.watch(job):
            told = event.data.get("data") or {}
            if event.kind == "progress":
                text = f"step {told['step']}/{told['total_steps']}, about "
                text += f"{told['seconds_remaining'] or 0:.0f} s left"
                bar.update(task, description=told["stage"], completed=told["fraction"], told=text)
            elif event.kind == "warning":
                bar.console.print(f"warning: {event.data['message']}", markup=False)
        bar.update(task, completed=1.0, told="done")
    return client.jobs.wait(job)


def show_gain(comparison: list[JsonObject]) -> None:
    """Print the main scores before and after tuning; the report holds all of them."""
    table = Table("score on held-out images", "before", "after")
    for row in comparison:
        if row["metric"] in SHOWN:
            before = "-" if row["before"] is None else f"{row['before']:.3f}"
            table.add_row(f"{row['protocol']} {row['metric']}", before, f"{row['after']:.3f}")
    console.print(table)


def show_neighbours(client: Client, model: str, known: list[Digit], new: list[Digit]) -> None:
    """Embed all images and print the nearest uploaded ones of each new one."""
    vectors = client.embed(model, [png for _, png in [*new, *known]], normalize=True)
    cosines = vectors[: len(new)] @ vectors[len(new) :].T  # of unit length each
    for (label, _), row in zip(new, cosines, strict=True):
        nearest = np.argsort(-row)[:NEIGHBOURS]
        found = ", ".join(f"{known[n][0]} ({row[n]:.3f})" for n in nearest)
        console.print(f"a new {label}; nearest uploaded: {found}", highlight=False)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description="Handwritten digits through ctune.")
    parser.add_argument("--url", default=DEFAULT_URL, help="address of the service")
    parser.add_argument("--epochs", type=int, default=30, help="of the contrastive stage")
    given, digits = parser.parse_args(), read_digits()
    new = [next(digit for digit in digits if digit[0] == label) for label in KEPT_BACK]
    known = [digit for digit in digits if digit not in new]
    with Client(given.url) as client:
        dataset = upload(client, known)
        created = client.jobs.create(job_on(dataset, given.epochs))
        job = follow(client, created["id"])
        show_gain(client.jobs.report(job["id"])["comparison"])
        model = job["result"]["model"]
        console.print(f"model {model}, report {given.url}/jobs/{job['id']}/report", soft_wrap=True)
        show_neighbours(client, model, known, new)


if __name__ == "__main__":
    main()
