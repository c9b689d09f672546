"""An estimate as tables for people."""

from typing import Any

from cli.output import console, print_table
from ctune.schema import JsonObject
from service.jobs.numerals import duration, size

KINDS = {"decoded_images": "decoded images", "checkpoints": "checkpoints", "model": "model"}
PARTS = {"start_s": "start", "decoding_s": "decoding", "evaluation_s": "evaluation"}


def show_estimate(estimate: JsonObject) -> None:
    """Print what a job would take, or why that is not known."""
    rows: list[tuple[Any, ...]] = [
        (s["name"], s["total_steps"], s["image_passes"], _pace(s["images_per_s"]),
         duration(s["duration_s"]))
        for s in estimate["stages"]
    ]  # fmt: skip
    parts = estimate["duration"] or {}
    rows += [(name, None, None, None, duration(parts.get(key))) for key, name in PARTS.items()]
    rows.append(("all", None, estimate["image_passes"], None, duration(estimate["duration_s"])))
    print_table(("part", "steps", "image passes", "images/s", "time"), rows)
    disk = estimate["disk_bytes"]
    kinds = [f"{name} {size(disk[key])}" for key, name in KINDS.items()]
    console.print(f"memory: {size(estimate['memory_bytes'])}")
    console.print(f"disk: {size(disk['total'])} ({', '.join(kinds)})")
    measured = estimate["measured"]
    if measured is not None:
        console.print(f"measured on {measured['worker_kind']}", markup=False)
        console.print(f"without: {parts['does_not_include']}", markup=False)
        for remark in measured["remarks"]:
            console.print(remark, markup=False)
    if estimate["reason"]:
        console.print(estimate["reason"], markup=False)
    if estimate["error"] and estimate["error"].get("hint"):
        console.print(estimate["error"]["hint"], markup=False)


def _pace(images_per_s: float | None) -> str:
    return "-" if images_per_s is None else f"{images_per_s:.0f}"
