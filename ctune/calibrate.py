"""`python -m ctune.calibrate RUN_DIR`: measure for seconds what a run will take."""

import sys

from ctune.child import run_child
from ctune.measuring import calibrate

if __name__ == "__main__":
    sys.exit(run_child(calibrate))
