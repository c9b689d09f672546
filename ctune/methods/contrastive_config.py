"""What the configs of contrastive methods share. Never imports torch."""

from typing import Annotated

from pydantic import Field

from ctune.schema import Fault, JsonObject

GradCache = Annotated[
    bool,
    Field(
        description="Embed the batch in micro-batches: the gradients of the whole batch in the"
        " memory of a micro-batch, for one more forward pass."
    ),
]
MicroBatchSize = Annotated[
    int,
    Field(
        ge=1,
        le=1_000_000,
        description="Images embedded at a time on each GPU; used with `grad_cache`.",
    ),
]


def grad_cache_problems(grad_cache: bool, micro_batch_size: int, batch_size: int) -> list[str]:
    """Return what does not fit together."""
    if grad_cache and micro_batch_size > batch_size:
        return [f"micro_batch_size ({micro_batch_size}) exceeds batch_size ({batch_size})"]
    return []


def refuse_accumulation(given: JsonObject, defaults: JsonObject) -> None:
    """Refuse `accumulate_steps` above 1 in a block that has no such field.

    Args:
        given: the block as it came.
        defaults: what lies below it, with a `batch_size`.

    Raises:
        ValueError: why, and what to do instead.
    """
    steps, batch_size = given.get("accumulate_steps"), (defaults | given)["batch_size"]
    if isinstance(steps, int) and isinstance(batch_size, int) and steps > 1:
        raise ValueError(no_accumulation(batch_size, steps))


def no_accumulation(batch_size: int, accumulate_steps: int) -> str:
    """Return why gradients are not accumulated, and what to do instead."""
    whole = batch_size * accumulate_steps
    return (
        f"accumulate_steps ({accumulate_steps}) does not enlarge a contrastive batch: every image"
        f" would still meet the {batch_size} of its own batch alone. Set grad_cache true,"
        f" batch_size {whole} and micro_batch_size {batch_size}: the same memory, and all {whole}"
        " images meet"
    )


def batch_fault(pointer: str, batch_size: int, images: int) -> list[Fault]:
    """Return a fault where the training split does not hold one whole batch."""
    if images >= batch_size:
        return []
    return [
        Fault(
            pointer=pointer,
            code="batch_larger_than_data",
            detail=f"batch_size {batch_size} exceeds the {images} training images that can be"
            " used: an epoch would have no batch. Lower batch_size or add images.",
        )
    ]
