"""`python -m ctune.run RUN_DIR`: do the run that `RUN_DIR/config.json` describes."""

import sys

from ctune.child import run_child
from ctune.pipeline import run_directory

if __name__ == "__main__":
    sys.exit(run_child(run_directory))
