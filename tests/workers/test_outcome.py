"""The table of outcomes, row by row."""

import signal

import pytest

from ctune.events import Event, Failed, Finished, Metrics, Stopped
from workers.outcome import ADVICE, Action, StopReason, decide, describe_exit, tail

FINISHED = Finished(result={"model": {}})
RETRYABLE = Failed(code="disk_full", message="no space", hint="free some", retryable=True)
FINAL = Failed(code="diverged", message="loss is NaN", fault="user")
STOPPED = Stopped(reason="lease lost")
METRICS = Metrics(stage="s", step=1, values={})
CANCEL, WORKER, LONG = StopReason.CANCEL, StopReason.WORKER, StopReason.MAX_DURATION
PAUSE = StopReason.PAUSE
KILLED = -signal.SIGKILL


@pytest.mark.parametrize(
    ("last", "exit_code", "reason", "action", "code"),
    [
        (FINISHED, 0, None, Action.SUCCEED, None),
        (FINISHED, KILLED, None, Action.SUCCEED, None),
        (FINISHED, 0, CANCEL, Action.SUCCEED, None),
        (FINISHED, KILLED, WORKER, Action.SUCCEED, None),
        (FINISHED, 0, PAUSE, Action.SUCCEED, None),
        (RETRYABLE, 1, None, Action.REPEAT, "disk_full"),
        (RETRYABLE, 1, CANCEL, Action.REPEAT, "disk_full"),
        (FINAL, 1, None, Action.FAIL, "diverged"),
        (FINAL, 0, WORKER, Action.FAIL, "diverged"),
        (STOPPED, 0, CANCEL, Action.CANCEL, None),
        (STOPPED, 0, WORKER, Action.RELEASE, None),
        (STOPPED, 0, PAUSE, Action.RELEASE, None),
        (STOPPED, 0, LONG, Action.FAIL, "max_duration"),
        (STOPPED, 0, None, Action.REPEAT, "stopped"),
        (None, KILLED, CANCEL, Action.CANCEL, None),
        (None, KILLED, WORKER, Action.RELEASE, None),
        (None, KILLED, PAUSE, Action.RELEASE, None),
        (None, KILLED, LONG, Action.FAIL, "max_duration"),
        (None, 0, None, Action.FAIL, "no_result"),
        (METRICS, 0, None, Action.FAIL, "no_result"),
        (None, 3, None, Action.REPEAT, "crashed"),
        (METRICS, KILLED, None, Action.REPEAT, "crashed"),
        (None, -signal.SIGSEGV, None, Action.REPEAT, "crashed"),
    ],
)
def test_outcome(
    last: Event | None, exit_code: int, reason: StopReason | None, action: Action, code: str | None
) -> None:
    outcome = decide(last, exit_code, reason, phase="contrastive", log_tail="the end")
    assert outcome.action is action
    assert (outcome.error or {}).get("code") == code
    if outcome.error:
        assert outcome.error.keys() == {
            "code", "message", "hint", "fault", "retryable", "phase", "log_tail",
        }  # fmt: skip
        assert outcome.error["phase"] == "contrastive"
        assert outcome.error["log_tail"] == "the end"
        assert outcome.error["retryable"] == (action is Action.REPEAT)


def test_the_result_is_passed_on() -> None:
    assert decide(FINISHED, 0, None).result == {"model": {}}


@pytest.mark.parametrize("exit_code", ADVICE)
def test_every_known_exit_has_its_advice(exit_code: int) -> None:
    error = decide(None, exit_code, None).error
    assert error is not None
    assert error["hint"] == ADVICE[exit_code]


def test_exits_in_words() -> None:
    assert describe_exit(3) == "exit code 3"
    assert describe_exit(-9) == "signal SIGKILL"
    assert describe_exit(-99) == "signal 99"


def test_the_tail_of_a_log() -> None:
    log = b"\n".join(b"line %d" % number for number in range(200)) + b"\xff\x00"
    assert tail(log).splitlines()[0] == "line 150"
    assert tail(log).endswith("line 199�")
    assert len(tail(b"x" * 10**6)) == 16 * 1024
    assert tail(b"") == ""
