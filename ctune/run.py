"""`python -m ctune.run RUN_DIR`: do the run that `RUN_DIR/config.json` describes.

Importing this module puts it in the place of the function `ctune.run`; it can be called like it.
"""

import sys
from pathlib import Path
from types import ModuleType

from ctune.child import run_child
from ctune.config import RunConfig
from ctune.local import run_locally
from ctune.ranks import run_with_its_gpus
from ctune.schema import JsonObject


class _Run(ModuleType):
    def __call__(
        self,
        config: RunConfig | JsonObject,
        data: str | Path,
        out_dir: str | Path,
        *,
        allow_noncommercial_weights: bool = False,
    ) -> JsonObject:
        return run_locally(
            config,
            Path(data),
            Path(out_dir),
            allow_noncommercial_weights=allow_noncommercial_weights,
        )


sys.modules[__name__].__class__ = _Run

if __name__ == "__main__":
    sys.exit(run_child(run_with_its_gpus))
