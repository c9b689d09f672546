"""ctune: contrastive tuning of image encoders. Importing this package never imports torch."""

from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def run(
    config: Any,
    data: str | Path,
    out_dir: str | Path,
    *,
    allow_noncommercial_weights: bool = False,
) -> dict[str, Any]:
    """Tune an encoder without any service and return the result; calling it again resumes.

    Args:
        config: a `ctune.config.RunConfig`, or the same as a dictionary (the body of POST /jobs).
        data: a folder or an archive of images, or the packed store that an earlier run left in
            its `out_dir/store`.
        out_dir: run directory; events, checkpoints and the exported model are written there.
        allow_noncommercial_weights: start also from weights whose licence forbids commercial use.

    Raises:
        pydantic.ValidationError: the config is not valid.
        CtuneError: the run cannot be done; the error says why and what to do.
    """
    from ctune.local import run_locally  # torch is imported when a run starts, not before

    return run_locally(
        config,
        Path(data),
        Path(out_dir),
        allow_noncommercial_weights=allow_noncommercial_weights,
    )
