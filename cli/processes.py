"""Child processes of `ctune up`: started, logged with a prefix, restarted, stopped."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from typing import IO

from cli.launch import command

FIRST_BACKOFF_S = 1.0
LONGEST_BACKOFF_S = 30.0
STEADY_S = 60.0
PREFIX_WIDTH = 7

_print_lock = threading.Lock()


def say(name: str, line: str) -> None:
    """Print one line with its origin; a reader that has gone away is no reason to stop."""
    with _print_lock:
        try:
            print(f"{name:<{PREFIX_WIDTH}}| {line}", flush=True)
        except OSError:
            return


class Process:
    """One child; call `tend` often from the main thread, whose death is also the child's."""

    def __init__(
        self, name: str, module: str, arguments: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        self.name = name
        self.crashes = 0
        """Crashes in a row; running for a minute ends the row."""
        self._module = module
        self._arguments = list(arguments)
        self._environment = dict(environment)
        self._running: subprocess.Popen[bytes] | None = None
        self._log: threading.Thread | None = None
        self._started_at = 0.0
        self._start_at = 0.0

    def start(self) -> None:
        """Start the child in a session of its own, so that Ctrl-C reaches only its parent."""
        self._running = subprocess.Popen(
            command(self._module, self._arguments),
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._started_at = time.monotonic()
        self._log = threading.Thread(target=self._copy_log, args=(self._running.stdout,))
        self._log.daemon = True
        self._log.start()

    def tend(self) -> int | None:
        """Restart the child when it is due; return the exit code of one that has just ended."""
        if self._running is None:
            if time.monotonic() >= self._start_at:
                self.start()
            return None
        code = self._running.poll()
        if code is None:
            return None
        ran_s = time.monotonic() - self._started_at
        self._forget()
        self.crashes = 1 if ran_s >= STEADY_S else self.crashes + 1
        backoff_s = min(FIRST_BACKOFF_S * 2 ** (self.crashes - 1), LONGEST_BACKOFF_S)
        self._start_at = time.monotonic() + backoff_s
        say("up", f"{self.name} ended: {explain(code)}; starting it again in {backoff_s:.0f} s")
        return code

    def ask_to_stop(self) -> None:
        """Send SIGTERM."""
        if self._running is not None:
            self._running.terminate()

    def wait(self, deadline: float) -> None:
        """Wait until the child has ended; kill it and its process group at `deadline`."""
        if self._running is None:
            return
        try:
            self._running.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            say("up", f"{self.name} did not stop in time and is killed")
            self.kill()
            self._running.wait()
        self._forget()

    def kill(self) -> None:
        """Send SIGKILL to the child's process group."""
        if self._running is not None and self._running.poll() is None:
            os.killpg(self._running.pid, signal.SIGKILL)

    def _forget(self) -> None:
        if self._log is not None:
            self._log.join(timeout=1.0)
        self._running = None

    def _copy_log(self, pipe: IO[bytes]) -> None:
        with pipe:
            for line in pipe:
                say(self.name, line.decode("utf-8", errors="replace").rstrip())


def explain(code: int) -> str:
    """Return an exit code in words."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def child_environment(changes: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a child: this one's, unbuffered logs, no modules from the cwd."""
    fixed = {"PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}
    return dict(os.environ) | fixed | dict(changes)


def fail(message: str, code: int = 1) -> int:
    """Print an error and return `code` for the exit."""
    print(f"ctune: {message}", file=sys.stderr, flush=True)
    return code
