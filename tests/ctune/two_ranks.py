"""`python -m tests.ctune.two_ranks RUN_DIR`: a run in two processes on the CPU, as `ctune.run`
does it for two GPUs."""

import functools
import sys

from ctune.child import run_child
from ctune.ranks import run_ranks

if __name__ == "__main__":
    sys.exit(run_child(functools.partial(run_ranks, num_ranks=2)))
