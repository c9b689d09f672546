"""Worker processes of their own, as `python -m workers.app` runs them."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from service.settings import Settings
from tests.workers.rows import SCALED


def worker_environment(settings: Settings) -> dict[str, str]:
    """Return the environment that gives a worker process these settings."""
    told = {
        f"CTUNE_{name.upper()}": json.dumps(value) if isinstance(value, list) else str(value)
        for name in [*SCALED, "data_dir", "slots", "gpus", "max_attempts"]
        for value in [getattr(settings, name)]
    }
    if settings.database_url:
        told["CTUNE_DATABASE_URL"] = settings.database
    if settings.broker:
        told["CTUNE_BROKER_URL"] = settings.broker
    return os.environ | told


class WorkerProcess:
    """One worker with its log."""

    def __init__(self, settings: Settings, log: Path) -> None:
        self.log = log
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "workers.app"],
                env=worker_environment(settings),
                stdout=file,
                stderr=file,
                start_new_session=True,
            )

    def kill(self) -> None:
        """Kill the worker; its children are in sessions of their own."""
        self.process.kill()
        self.process.wait()

    def terminate(self, timeout_s: float) -> int:
        """Ask it to stop and return its exit code.

        Raises:
            TimeoutExpired: it did not stop in time.
        """
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout_s)


def children_of(folder: Path) -> list[int]:
    """Return the ids of living processes that work below a data directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_text().split("\0")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if any(argument.startswith(f"{folder}/") for argument in arguments):
            found.append(int(process.name))
    return found
