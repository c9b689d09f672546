"""Warnings at the start and at the end of a SimCLR run, with hints."""

from ctune.events import Warned
from ctune.methods.base import RunContext
from ctune.methods.contrastive import grad_cache_warnings
from ctune.methods.simclr.config import SimCLRConfig
from ctune.schema import JsonObject

COLLAPSE_HINT = "lower the learning rate, raise the temperature or the batch, use stronger views"
SMALL_BATCH = 64


def start_warnings(config: SimCLRConfig, context: RunContext) -> list[Warned]:
    """Return what the config and the encoder call for before the first step."""
    found = []
    if config.batch_size < SMALL_BATCH:
        found.append(
            Warned(
                code="small_batch",
                message=f"each view is told from the {2 * config.batch_size - 2} views of other"
                " images in its batch, which is few",
                hint="raise batch_size to 128 or more; grad_cache does it without more memory",
            )
        )
    if config.grad_cache:
        found += grad_cache_warnings(context.encoder, micro_batch_size=config.micro_batch_size)
    return found


def advise(before: JsonObject | None, after: JsonObject) -> list[Warned]:
    """Return what the scores before and after training call for."""
    was = (before or {}).get("knn", {}).get("top1")
    now = after.get("knn", {}).get("top1")
    if was is None or now is None or now >= was:
        return []
    return [
        Warned(
            code="worse_than_before",
            message=f"nearest neighbours name the class less often than before: {now:.3f}, before"
            f" {was:.3f}",
            hint="keep the original encoder; else train longer or lower lr",
        )
    ]
