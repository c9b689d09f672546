"""`ctune up --detach` and `ctune down`."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx

from cli.processes import fail
from cli.uplock import UpLock

READY_WITHIN_S = 180.0
STOP_WITHIN_S = 90.0
TICK_S = 0.2
TAIL_BYTES = 4000


def detach(data_dir: Path, arguments: list[str]) -> int:
    """Start `ctune up` in the background unless it runs; print its address once it is ready."""
    lock = UpLock(data_dir)
    log = data_dir.absolute() / "up.log"
    started = None
    if not lock.is_held():
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as file:
            started = subprocess.Popen(
                [sys.executable, "-P", "-m", "cli.main", "up", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        print(f"starting ctune in the background; its log: {log}", file=sys.stderr)
    deadline = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < deadline:
        if started is not None and started.poll() is not None:
            return fail(f"`ctune up` ended:\n{_tail(log)}", started.returncode or 1)
        holder = lock.holder()
        if holder is not None and _is_ready(holder.url):
            print(holder.url, flush=True)
            return 0
        time.sleep(TICK_S)
    return fail(f"not ready after {READY_WITHIN_S:.0f} s:\n{_tail(log)}\nStop it: ctune down")


def stop(data_dir: Path) -> int:
    """Stop the `ctune up` of a data directory and wait until it is gone."""
    lock = UpLock(data_dir)
    holder = lock.holder()
    if holder is None:
        print(f"nothing runs on {lock.data_dir}")
        return 0
    os.kill(holder.pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_WITHIN_S
    while lock.is_held():
        if time.monotonic() > deadline:
            return fail(f"process {holder.pid} still runs after {STOP_WITHIN_S:.0f} s")
        time.sleep(TICK_S)
    print(f"stopped {holder.url}")
    return 0


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=2.0, trust_env=False).is_success
    except httpx.TransportError:
        return False


def _tail(log: Path) -> str:
    if not log.exists():
        return "(no log)"
    return log.read_bytes()[-TAIL_BYTES:].decode("utf-8", errors="replace")
