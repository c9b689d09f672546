"""What an attempt comes to: a pure function of the child's last word, its exit and our reason.

| last word | otherwise | outcome |
|---|---|---|
| finished | any exit | succeeds |
| failed | retryable | repeated; fails with that code when no attempts are left |
| failed | not retryable | fails with that code |
| stopped, none | cancel was asked for | cancelled |
| stopped, none | this worker stops | released |
| stopped, none | a pause was asked for | released: it becomes paused |
| stopped, none | it took too long | fails `max_duration` |
| stopped | none of these | repeated; fails `stopped` when no attempts are left |
| none | exit 0 | fails `no_result` |
| none | any other exit | repeated; fails `crashed` when no attempts are left |
"""

import signal
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from ctune.events import Event, Failed, Finished, Stopped

LOG_TAIL_LINES = 50
LOG_TAIL_BYTES = 16 * 1024

ADVICE: dict[int, str] = {
    -signal.SIGKILL: "It was killed, most often because the machine ran out of memory"
    " (the kernel's log says so): use smaller batches or images, or a machine with more memory.",
    -signal.SIGTERM: "Something outside ctune ended it.",
    -signal.SIGINT: "Something outside ctune interrupted it.",
    -signal.SIGSEGV: "A native library crashed: check that torch fits the driver and the machine.",
    -signal.SIGBUS: "Shared memory or the disk is full: enlarge /dev/shm (`--shm-size`) or free"
    " disk space.",
    -signal.SIGABRT: "A native library gave up; the last lines of the log say why.",
    -signal.SIGFPE: "A native library divided by zero.",
    -signal.SIGILL: "torch was built for another processor.",
    1: "The last lines of the log say why.",
    2: "The worker's train, ingest or calibrate command is wrong.",
    126: "The worker's train, ingest or calibrate command cannot be executed.",
    127: "The worker's train, ingest or calibrate command was not found.",
    137: "It was killed, most often because the machine ran out of memory.",
    139: "A native library crashed: check that torch fits the driver and the machine.",
}
OTHER_ADVICE = "The last lines of the log may say why."


class StopReason(StrEnum):
    """Why this worker asked the child to stop."""

    CANCEL = "cancel"
    WORKER = "worker"
    PAUSE = "pause"
    MAX_DURATION = "max_duration"


class Action(StrEnum):
    """What becomes of the row."""

    SUCCEED = "succeed"
    FAIL = "fail"
    CANCEL = "cancel"
    RELEASE = "release"
    REPEAT = "repeat"


@dataclass(frozen=True)
class Outcome:
    """The decision on an attempt; `error` only where it fails or is repeated."""

    action: Action
    message: str
    error: dict[str, Any] | None = None
    result: dict[str, Any] | None = None


def decide(
    last: Event | None,
    exit_code: int,
    reason: StopReason | None,
    *,
    phase: str | None = None,
    log_tail: str = "",
) -> Outcome:
    """Return what becomes of an attempt whose child has ended.

    Args:
        exit_code: negative for a signal, as `subprocess` has it.
        reason: why the child was asked to stop; None when it was not.
    """
    if isinstance(last, Finished):
        return Outcome(Action.SUCCEED, "done", result=last.result)
    if isinstance(last, Failed):
        error = make_error(
            last.code, last.message, hint=last.hint, fault=last.fault, retryable=last.retryable
        )
        error |= {"phase": phase, "log_tail": log_tail}
        return Outcome(Action.REPEAT if last.retryable else Action.FAIL, last.message, error)
    if reason is StopReason.CANCEL:
        return Outcome(Action.CANCEL, "cancelled")
    if reason is StopReason.WORKER:
        return Outcome(Action.RELEASE, "the worker stops; another one goes on")
    if reason is StopReason.PAUSE:  # what is said here is read where the pause was called off
        return Outcome(Action.RELEASE, "the pause was called off; it goes on from its checkpoint")
    error = _unasked(last, exit_code, reason) | {"phase": phase, "log_tail": log_tail}
    action = Action.REPEAT if error["retryable"] else Action.FAIL
    return Outcome(action, error["message"], error)


def make_error(
    code: str, message: str, *, hint: str = "", fault: str = "system", retryable: bool = False
) -> dict[str, Any]:
    """Return the content of a row's `error` column."""
    return {
        "code": code,
        "message": message,
        "hint": hint,
        "fault": fault,
        "retryable": retryable,
        "phase": None,
        "log_tail": "",
    }


def _unasked(last: Event | None, exit_code: int, reason: StopReason | None) -> dict[str, Any]:
    if reason is StopReason.MAX_DURATION:
        return make_error(
            "max_duration",
            "it took longer than it may (`resources.max_duration_s`)",
            hint="allow more time, train fewer epochs, or use smaller images",
            fault="user",
        )
    if isinstance(last, Stopped):
        message = f"the run stopped by itself: {last.reason}"
        return make_error("stopped", message, retryable=True)
    if exit_code == 0:
        message = "the process ended without a result"
        return make_error("no_result", message, hint=OTHER_ADVICE)
    advice = ADVICE.get(exit_code, OTHER_ADVICE)
    message = f"the process ended with {describe_exit(exit_code)}"
    return make_error("crashed", message, hint=advice, retryable=True)


def describe_exit(exit_code: int) -> str:
    """Return an exit code in words: `exit code 3`, `signal SIGKILL`."""
    if exit_code >= 0:
        return f"exit code {exit_code}"
    try:
        return f"signal {signal.Signals(-exit_code).name}"
    except ValueError:
        return f"signal {-exit_code}"


def tail(log: bytes) -> str:
    """Return the last lines of a log as text that any database stores."""
    text = log[-LOG_TAIL_BYTES:].decode(errors="replace").replace("\x00", "")
    return "\n".join(text.splitlines()[-LOG_TAIL_LINES:])
