"""Which checkpoint a run goes on from, and how it knows that the checkpoint is its own."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

from ctune.checkpoint import CheckpointManifest, find_checkpoints, load_checkpoint
from ctune.config import RunConfig
from ctune.errors import CheckpointError, ConfigError
from ctune.events import Warned
from ctune.schema import JsonObject


def run_fingerprint(config: RunConfig, archive_sha256: str) -> str:
    """Return what a checkpoint must share with a run: a hash of all that decides the outcome."""
    text = f"{config.model_dump_json(exclude={'resources'})} {archive_sha256}"
    return hashlib.sha256(text.encode()).hexdigest()


def newest_checkpoint(
    own: Path, earlier: Iterable[Path], *, fingerprint: str, warn: Callable[[Warned], None]
) -> tuple[CheckpointManifest, JsonObject] | None:
    """Return the newest checkpoint that verifies, with its state; others give a warning.

    Args:
        own: directory of this run's checkpoints.
        earlier: those of its earlier attempts, the newest first. They have this run's
            configuration and data set; where they do not fit, another version made them.
        fingerprint: of this run.
        warn: told of every checkpoint that is left out.

    Raises:
        ConfigError: one of `own` was made with another configuration or data set.
    """
    for path in find_checkpoints([own, *earlier]):
        try:
            manifest, state = load_checkpoint(path)
        except CheckpointError as error:
            warn(
                Warned(
                    code="checkpoint_damaged",
                    message=f"{path.name} is left out: {error.message}",
                    hint="an earlier checkpoint is used, or the run starts again",
                )
            )
            continue
        if state["fingerprint"] == fingerprint:
            return manifest, state
        if path.parent == own:
            raise ConfigError(
                f"{path} was made with another configuration or data set",
                hint="use a new run directory",
            )
        warn(
            Warned(
                code="checkpoint_unfit",
                message=f"{path.name} is left out: another version of ctune has made it",
                hint="the run starts again",
            )
        )
    return None
