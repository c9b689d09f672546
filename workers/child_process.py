"""Start, wait for and end one child process with everything it has started. Linux only."""

import os
import select
import signal
import subprocess
from collections.abc import Mapping, Sequence

from ctune.rundir import RunDir

# What a child may see of the worker's environment: no CTUNE_* (database, broker), no tokens.
PASSED = frozenset(
    {
        "PATH", "HOME", "USER", "LOGNAME", "SHELL", "LANG", "LANGUAGE", "TZ", "TMPDIR",
        "LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONPATH", "PYTHONHASHSEED", "VIRTUAL_ENV",
        "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "TORCH_HOME",
        "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE",
        "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "no_proxy",
        "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "CUBLAS_WORKSPACE_CONFIG",
        "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF", "TORCHINDUCTOR_CACHE_DIR",
        "TRITON_CACHE_DIR",
    }
)  # fmt: skip
PASSED_PREFIXES = ("LC_", "CUDA_", "NVIDIA_", "NCCL_")


def child_environment(
    environment: Mapping[str, str], added: Mapping[str, str], gpus: Sequence[str]
) -> dict[str, str]:
    """Return the environment of a child: what is passed on, what it is told, its GPUs."""
    passed = {
        name: value
        for name, value in environment.items()
        if name in PASSED or name.startswith(PASSED_PREFIXES)
    }
    told = {"PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ",".join(gpus)}
    return passed | told | dict(added)


class ChildProcess:
    """A program in its own session, its output in the run directory's log.

    The kernel ends the child when the *thread* that made this object ends: keep it alive.
    """

    def __init__(
        self, command: Sequence[str], run_dir: RunDir, environment: Mapping[str, str]
    ) -> None:
        """Start the program.

        Raises:
            OSError: the program cannot be started.
        """
        with run_dir.log.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, str(run_dir.root)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,
            )
        self._pidfd = os.pidfd_open(self._process.pid)
        self._ended = select.poll()
        self._ended.register(self._pidfd, select.POLLIN)

    @property
    def pid(self) -> int:
        """Process id, also the id of its group and session."""
        return self._process.pid

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end of the child; True when it has ended. It stays a zombie until `reap`."""
        return bool(self._ended.poll(max(0, round(timeout_s * 1000))))

    def ask_to_stop(self) -> None:
        """Send SIGTERM to the child alone: its helpers are its own business."""
        signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)

    def kill(self) -> None:
        """Kill the child's whole group; its id cannot be another's before `reap`."""
        os.killpg(self.pid, signal.SIGKILL)

    def reap(self) -> int:
        """Kill what is left of the group and return the exit code, negative for a signal."""
        self.kill()
        exit_code = self._process.wait()
        os.close(self._pidfd)
        return exit_code
