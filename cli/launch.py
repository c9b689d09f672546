"""`python -m cli.launch PARENT_PID MODULE [ARGUMENT …]`: run a module that dies with its parent.

A program between fork and exec, because code run there in a process with threads can hang.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def command(module: str, arguments: list[str]) -> list[str]:
    """Return the command that runs `module` such that it dies with this process's main thread."""
    python = [sys.executable, "-P", "-m"]  # -P: modules never come from the current directory
    return [*python, "cli.launch", str(os.getpid()), module, *arguments]


def main(arguments: list[str]) -> None:
    """Become the module named in `arguments`."""
    parent_pid, module, *rest = arguments
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent_pid):
        sys.exit(f"{module}: the parent died during the start")
    os.execv(sys.executable, [sys.executable, "-P", "-m", module, *rest])


if __name__ == "__main__":
    main(sys.argv[1:])
