"""A whole run: encoder, method, evaluation, seed, resources, and what must fit together.

Never imports torch: the API validates with exactly these models.
"""

from typing import Annotated, Literal

from pydantic import Field

from ctune.encoders import EncoderConfig, TimmEncoder, check_encoder
from ctune.manifest import DatasetSummary
from ctune.methods import MethodConfig
from ctune.schema import Fault, JsonObject, Schema

Protocol = Literal["knn", "linear_probe", "isotropy"]


class EvaluationConfig(Schema):
    """Protocols that score the encoder on held-out images, before and after."""

    protocols: list[Protocol] = ["knn", "linear_probe", "isotropy"]
    """What to measure; protocols that need labels are left out where there are none."""
    before: bool = True
    """Also score the untuned encoder, so that the gain is a number."""
    knn_k: Annotated[int, Field(ge=1, le=10_000)] = 20
    """Neighbours that vote."""
    knn_temperature: Annotated[float, Field(ge=0.002, le=10)] = 0.07
    """Temperature of the votes; below 1/700 their weights would overflow."""
    max_images: Annotated[int, Field(ge=2)] = 10_000
    """Cap on the images of the isotropy scores, drawn with the run's seed."""


class ResourcesConfig(Schema):
    """What the run may use."""

    gpus: Annotated[int, Field(ge=0, le=1)] | None = None
    """GPUs, at most one; 0 for the CPU, null for a GPU where the worker has one."""
    max_duration_s: Annotated[int, Field(ge=1)] | None = None
    """Wall-clock limit of all attempts together; null for none."""
    checkpoint_interval_s: Annotated[float, Field(ge=0)] = 60.0
    """Seconds between checkpoints inside a stage; the end of a stage always makes one."""


class RunConfig(Schema):
    """Everything that decides the outcome of a run but the data set."""

    encoder: EncoderConfig
    method: MethodConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Same seed, data and machine: same weights, bit for bit on a CPU."""
    resources: ResourcesConfig = ResourcesConfig()


def resolve(config: RunConfig) -> RunConfig:
    """Return `config` with every `auto` that is decided by the config itself filled in."""
    values: JsonObject = config.model_dump()
    stage = values["method"].get("contrastive", {})
    if stage.get("layer_decay") == "auto":
        from_scratch = isinstance(config.encoder, TimmEncoder) and not config.encoder.pretrained
        stage["layer_decay"] = 1.0 if from_scratch else 0.75
    if stage.get("warmup_epochs") == "auto":
        stage["warmup_epochs"] = min(2, stage["epochs"] // 5)
    return RunConfig.model_validate(values)


def check(config: RunConfig, summary: DatasetSummary) -> list[Fault]:
    """Return every fault that shows before training: encoder, data needs, evaluation.

    Pointers are relative to the body of POST /jobs.
    """
    faults = [_below("/encoder", fault) for fault in check_encoder(config.encoder)]
    faults += [_below("/method", fault) for fault in config.method.check_data(summary)]
    if not summary.splits.get("train"):
        detail = "the data set has no training images."
        faults.append(Fault(pointer="/dataset", code="no_training_images", detail=detail))
    return faults


def _below(prefix: str, fault: Fault) -> Fault:
    return fault.model_copy(update={"pointer": prefix + fault.pointer})
