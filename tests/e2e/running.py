"""A real `ctune up` for tests, and a look at its processes."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import httpx

from cli.uplock import UpLock

QUICK = {
    "CTUNE_POLL_S": "0.2",
    "CTUNE_BEAT_S": "0.5",
    "CTUNE_GRACE_S": "10",
    "CTUNE_GPUS": "none",
    "OMP_NUM_THREADS": "1",
}
READY_WITHIN_S = 120.0


class Running:
    """`ctune up` on a free port and a data directory of its own; output goes to a file."""

    def __init__(self, data_dir: Path, environment: Mapping[str, str] | None = None) -> None:
        self.data_dir = data_dir
        data_dir.mkdir(parents=True, exist_ok=True)
        self._log = data_dir / "test.log"
        with self._log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cli.main", "up", "--port", "0", "--data-dir", data_dir],
                env=clean_environment() | QUICK | dict(environment or {}),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.url = ""

    def wait_ready(self) -> "Running":
        """Wait for /readyz to answer 200."""
        until(lambda: self._is_ready(), READY_WITHIN_S, self.log)
        return self

    def _is_ready(self) -> bool:
        assert self.process.poll() is None, f"ctune up ended:\n{self.log()}"
        holder = UpLock(self.data_dir).holder()
        if holder is None:
            return False
        self.url = holder.url
        try:
            return httpx.get(f"{self.url}/readyz", timeout=5).is_success
        except httpx.TransportError:
            return False

    def log(self) -> str:
        """Return everything printed so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def children(self) -> dict[str, int]:
        """Return module -> process id of the direct children."""
        found = {}
        for pid, parent in parents().items():
            if parent == self.process.pid:
                words = command_line(pid)
                if "-m" in words:
                    found[words[words.index("-m") + 1]] = pid
        return found

    def descendants(self) -> set[int]:
        """Return the process ids of everything started, children of children too."""
        parent_of, found, fresh = parents(), set[int](), {self.process.pid}
        while fresh:
            fresh = {pid for pid, parent in parent_of.items() if parent in fresh} - found
            found |= fresh
        return found

    def stop(self, number: int = signal.SIGTERM, within_s: float = 30.0) -> int:
        """Send a signal and return the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(within_s)

    def discard(self) -> None:
        """End it at the end of a test, whatever state it is in."""
        try:
            self.stop()
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def clean_environment() -> dict[str, str]:
    """Return the environment without settings of ctune."""
    return {key: value for key, value in os.environ.items() if not key.startswith("CTUNE_")}


def parents() -> dict[int, int]:
    """Return process id -> parent's, of all processes that are not zombies."""
    found = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            state, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if state != "Z":
            found[int(folder.name)] = int(parent)
    return found


def command_line(pid: int) -> list[str]:
    """Return the words of a process's command; none when it is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except (FileNotFoundError, ProcessLookupError):
        return []


def until(
    holds: Callable[[], bool], within_s: float, explain: Callable[[], str] = lambda: ""
) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {within_s} s\n{explain()}"
        time.sleep(0.1)
