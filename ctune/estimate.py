"""What a run will take: steps from its config, time and memory from a measurement.

The measurement is `ctune.calibrate`'s, on a machine of the kind that will do the run.
Never imports torch.
"""

import hashlib
import json
from typing import Any

from ctune import __version__
from ctune.config import KEPT_CHECKPOINTS, RunConfig
from ctune.manifest import DatasetSummary, working_size_px
from ctune.schema import JsonObject, Schema

WITHOUT_INFLUENCE = frozenset(
    {"epochs", "warmup_epochs", "preset", "max_duration_s", "checkpoint_interval_s"}
)
"""Fields of method and resources that do not change how long a step takes."""
STEP_COST = 3
"""Of an image in a fine-tuning, in encodings: one pass forward and two backward."""
INCLUDED = "start, decoding, training, encoding for the evaluations before, during and after"
NOT_INCLUDED = "download of weights, what the protocols compute, figures, writing of checkpoints"


class MeasuredStage(Schema):
    """What was measured of one stage."""

    name: str
    step_s: float
    """Seconds per optimizer step at the run's batch size."""
    encodes_train: bool
    """It begins by encoding every training image once."""
    trains_encoder: bool
    """The run looks at the encoder during this stage."""
    checkpoint_bytes: int


class Measurement(Schema):
    """Result of a calibration."""

    device: str
    at: float
    """Seconds since the epoch."""
    image_size_px: int
    """Side of the encoder's input."""
    start_s: float
    """From the start of the process until the encoder is ready."""
    decode_images_per_s: float
    encode_images_per_s: float
    """Images through the encoder without gradient."""
    stages: list[MeasuredStage]
    model_bytes: int
    memory_bytes: int | None
    """Peak on the device: allocated on the GPU, resident set of the process on the CPU."""
    remarks: list[str] = []
    """What differs between the measurement and the run."""


def calibration_key(config: RunConfig, summary: DatasetSummary) -> str:
    """Return a hash of what decides how long a step takes and how much memory it needs.

    Args:
        config: resolved.
    """
    values = config.model_dump(mode="json")
    told = {
        "version": __version__,
        "encoder": values["encoder"],
        "method": _with_influence(values["method"]),
        "resources": _with_influence(values["resources"]),
        "width_px": summary.width_px,
        "height_px": summary.height_px,
        "classes": len(summary.classes),
        "train_images": len(config.method.train_labels(summary)),
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _with_influence(block: JsonObject) -> JsonObject:
    return {
        key: _with_influence(value) if isinstance(value, dict) else value
        for key, value in block.items()
        if key not in WITHOUT_INFLUENCE
    }


def estimate(
    config: RunConfig,
    summary: DatasetSummary,
    *,
    image_size_px: int | None,
    measurement: Measurement | None,
) -> JsonObject:
    """Return stages, image passes, disk, memory and time of a run.

    Args:
        config: resolved and without faults.
        image_size_px: side of the encoder's input, None where it is not known yet.
        measurement: without one, time and memory are null.
    """
    planned = config.method.plan(summary)
    if measurement is not None:  # one GPU was measured; all of them encode their share
        paces = {"encode_images_per_s": measurement.encode_images_per_s * _processes(config)}
        measurement = measurement.model_copy(update=paces)
    costs: list[MeasuredStage | None] = list(measurement.stages) if measurement else []
    num_train = len(config.method.train_labels(summary))
    stages = []
    for plan, cost in zip(planned, costs or [None] * len(planned), strict=True):
        shown: JsonObject = {
            "name": plan.name,
            "total_steps": plan.total_steps,
            "image_passes": plan.image_passes,
            "images_per_s": None,
            "duration_s": None,
        }
        if cost is not None and measurement is not None:
            encoding_s = num_train / measurement.encode_images_per_s if cost.encodes_train else 0.0
            duration_s = encoding_s + plan.total_steps * cost.step_s
            shown |= {
                "images_per_s": plan.image_passes / duration_s,
                "duration_s": duration_s,
            }
        stages.append(shown)
    size_px = measurement.image_size_px if measurement else image_size_px
    caches = _caches(config, summary, size_px) if size_px else {}
    return {
        "stages": stages,
        "image_passes": sum(plan.image_passes for plan in planned),
        "disk_bytes": _disk(config, caches, measurement),
        "memory_bytes": measurement.memory_bytes if measurement else None,
        **_duration(config, summary, stages, caches=caches, measurement=measurement),
    }


def _processes(config: RunConfig) -> int:
    return max(1, config.resources.gpus or 0)


def _caches(config: RunConfig, summary: DatasetSummary, size_px: int) -> dict[tuple[str, int], int]:
    """Return how many images are decoded per split and side; see `ctune.features.RunImages`."""
    train = len(config.method.train_labels(summary))
    working_px = working_size_px(summary, size_px)
    caches = {("train", working_px): train, ("train", size_px): train}
    heldout = summary.heldout_split
    if heldout is not None:
        count = summary.splits[heldout]
        caches[heldout, size_px] = count
        if config.evaluation.viewed_images(count):
            caches[heldout, working_px] = count
    return caches


def _disk(
    config: RunConfig, caches: dict[tuple[str, int], int], measurement: Measurement | None
) -> JsonObject:
    """Return the most bytes that lie on the disk at a time, by kind."""
    found: JsonObject = {"decoded_images": None, "checkpoints": None, "model": None}
    if caches:
        found["decoded_images"] = sum(n * 3 * side_px**2 for (_, side_px), n in caches.items())
    if measurement is not None:
        sizes = [stage.checkpoint_bytes for stage in measurement.stages]
        best = [s.checkpoint_bytes for s in measurement.stages if s.trains_encoder]
        looks = config.evaluation.online.every_steps is not None
        kept = sum(sizes) + (sum(best) if looks else 0) + KEPT_CHECKPOINTS * max(sizes)
        found |= {"checkpoints": kept, "model": measurement.model_bytes}
    known = [size for size in found.values() if size is not None]
    return found | {"total": sum(known) if len(known) == len(found) else None}


def _duration(
    config: RunConfig,
    summary: DatasetSummary,
    stages: list[JsonObject],
    *,
    caches: dict[tuple[str, int], int],
    measurement: Measurement | None,
) -> JsonObject:
    """Return the time of the whole run and its parts, in seconds; null without a measurement."""
    if measurement is None:
        return {"duration_s": None, "duration": None}
    parts = {
        "start_s": measurement.start_s,
        "decoding_s": sum(caches.values()) / measurement.decode_images_per_s,
        "training_s": sum(stage["duration_s"] for stage in stages),
        "evaluation_s": _evaluated_images(config, summary, stages, measurement)
        / measurement.encode_images_per_s,
    }
    about: dict[str, Any] = {"includes": INCLUDED, "does_not_include": NOT_INCLUDED}
    return {"duration_s": sum(parts.values()), "duration": parts | about}


def _evaluated_images(
    config: RunConfig, summary: DatasetSummary, stages: list[JsonObject], measurement: Measurement
) -> int:
    """Return how many images are encoded to score the encoder: before, after, at every look."""
    train, heldout = len(config.method.train_labels(summary)), summary.heldout_split
    rounds = 2 if config.evaluation.before else 1
    images = 0
    if heldout is not None:
        labelled = sum(summary.train_classes.values())
        crops = config.evaluation.crop_epochs * labelled
        crops += STEP_COST * config.evaluation.tuned_images(labelled)
        count = summary.splits[heldout]
        images = rounds * (train + count + crops + config.evaluation.viewed_images(count))
    online = config.evaluation.online
    val = summary.splits.get("val", 0) if heldout == "test" else 0
    limit = online.max_images
    per_look = min(limit, train) + min(limit, val) if val else min(2 * limit, train)
    for stage, cost in zip(stages, measurement.stages, strict=True):
        every = online.interval_steps(stage["total_steps"]) if cost.trains_encoder else None
        if every is not None:
            looks = 1 + -(-stage["total_steps"] // every)
            images += looks * per_look
    return images
