"""Real child processes: last words, parent death, the lease fence, SIGTERM, hung children."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ctune.child import StopRequest, StopRequested, run_child
from ctune.events import Event, EventWriter, Failed, Finished, Progress, Stopped, read_events
from ctune.rundir import RunDir

CHILD = """
import ctypes, errno, os, signal, sys, threading, time
from concurrent.futures import ProcessPoolExecutor
from ctune.child import run_child
from ctune.errors import ConfigError, CheckpointError
from ctune.events import Progress

def wait(run_dir, events, stop):
    events.write(Progress(stage="s", step=0, total_steps=0, fraction=0.0))
    while True:
        stop.check()
        time.sleep(0.01)

def wait_to_finish(run_dir, events, stop):
    events.write(Progress(stage="s", step=0, total_steps=0, fraction=0.0))
    while not stop.finish_requested:
        stop.check()
        time.sleep(0.01)
    return {"stopping": stop.requested}

def hang(run_dir, events, stop):
    events.write(Progress(stage="s", step=0, total_steps=0, fraction=0.0))
    while True:
        time.sleep(60)

def hang_in_c(run_dir, events, stop):
    events.write(Progress(stage="s", step=0, total_steps=0, fraction=0.0))
    signal.siginterrupt(signal.SIGTERM, False)
    ctypes.CDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1)

def hang_with_gil(run_dir, events, stop):
    events.write(Progress(stage="s", step=0, total_steps=0, fraction=0.0))
    ctypes.PyDLL(None).pause()
    while True:
        ctypes.PyDLL(None).pause()

def hang_at_exit(run_dir, events, stop):
    threading.Thread(target=time.sleep, args=(600,)).start()
    wait(run_dir, events, stop)

def with_helper(run_dir, events, stop):
    pid = os.fork()
    if pid == 0:
        time.sleep(600)
    events.write(Progress(stage=str(pid), step=0, total_steps=0, fraction=0.0))
    hang(run_dir, events, stop)

def pool(run_dir, events, stop):
    pid = os.fork()
    if pid == 0:
        time.sleep(600)
    os.kill(pid, signal.SIGTERM)
    _, status = os.waitpid(pid, 0)
    time.sleep(0.3)
    stop.check()
    return {"signal": os.WTERMSIG(status)}

def done(run_dir, events, stop):
    return {"answer": 42}

def user_error(run_dir, events, stop):
    raise ConfigError("k is 9", hint="lower it", code="too_many")

def system_error(run_dir, events, stop):
    raise CheckpointError("bad")

def crash(run_dir, events, stop):
    raise ZeroDivisionError("oops")

def leave(run_dir, events, stop):
    sys.exit(3)

def memory(run_dir, events, stop):
    raise MemoryError

def disk(run_dir, events, stop):
    raise OSError(errno.ENOSPC, "No space left on device", "x.bin")

def unwritable(run_dir, events, stop):
    return {"bad": object()}

sys.exit(run_child(globals()[os.environ["BODY"]]))
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run").create()


Starter = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start(run_dir: RunDir, tmp_path: Path) -> Iterator[Starter]:
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    children: list[subprocess.Popen[bytes]] = []

    def _start(body: str, **environment: object) -> "subprocess.Popen[bytes]":
        with (tmp_path / "stderr").open("wb") as stderr:
            child = subprocess.Popen(
                [sys.executable, str(script), str(run_dir.root)],
                env={**os.environ, "BODY": body, **{k: str(v) for k, v in environment.items()}},
                stderr=stderr,
                start_new_session=True,
            )
        children.append(child)
        return child

    yield _start
    for child in children:
        if child.poll() is None:
            child.kill()
        child.wait()


def events_of(run_dir: RunDir) -> list[Event]:
    return [event for event, _ in read_events(run_dir.events)]


def last_word(run_dir: RunDir) -> Event:
    return events_of(run_dir)[-1]


def until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.02)


def until_running(run_dir: RunDir) -> None:
    until(lambda: bool(events_of(run_dir)))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"


def test_finished(run_dir: RunDir, start: Starter) -> None:
    assert start("done").wait() == 0
    assert [event.event for event in events_of(run_dir)] == ["finished"]
    word = last_word(run_dir)
    assert isinstance(word, Finished)
    assert word.result == {"answer": 42}


@pytest.mark.parametrize(
    ("body", "code", "fault", "retryable", "trace"),
    [
        ("user_error", "too_many", "user", False, False),
        ("system_error", "checkpoint_error", "system", False, True),
        ("crash", "internal", "system", False, True),
        ("leave", "internal", "system", False, True),
        ("memory", "out_of_memory", "user", False, True),
        ("disk", "disk_full", "system", True, True),
    ],
)
def test_failed(
    run_dir: RunDir, start: Starter, tmp_path: Path, *, body: str, code: str, fault: str,
    retryable: bool, trace: bool,
) -> None:  # fmt: skip
    assert start(body).wait() == 1
    assert len(events_of(run_dir)) == 1
    word = last_word(run_dir)
    assert isinstance(word, Failed)
    assert (word.code, word.fault, word.retryable) == (code, fault, retryable)
    assert ("Traceback" in (tmp_path / "stderr").read_text()) == trace
    if body == "user_error":
        assert (word.message, word.hint) == ("k is 9", "lower it")


def test_a_word_that_cannot_be_written_is_a_failure(run_dir: RunDir, start: Starter) -> None:
    assert start("unwritable").wait() == 1
    assert events_of(run_dir) == []


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGINT])
def test_signals_ask_for_a_stop(run_dir: RunDir, start: Starter, name: signal.Signals) -> None:
    child = start("wait")  # no CTUNE_* at all: a person at a terminal
    until_running(run_dir)
    child.send_signal(name)
    assert child.wait(timeout=10) == 0
    word = last_word(run_dir)
    assert isinstance(word, Stopped)
    assert word.reason == ("asked to stop" if name == signal.SIGTERM else "interrupted")


def test_a_file_asks_to_finish_early(run_dir: RunDir, start: Starter) -> None:
    child = start("wait_to_finish")
    until_running(run_dir)
    run_dir.finish.touch()
    assert child.wait(timeout=10) == 0
    word = last_word(run_dir)
    assert isinstance(word, Finished)
    assert word.result == {"stopping": False}


def test_a_second_ctrl_c_ends_a_deaf_child(run_dir: RunDir, start: Starter) -> None:
    child = start("hang")
    until_running(run_dir)
    child.send_signal(signal.SIGINT)
    time.sleep(0.3)
    assert child.poll() is None
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=10) == -signal.SIGINT


@pytest.mark.parametrize("body", ["hang", "hang_in_c"])
def test_a_hung_child_is_killed_after_the_grace(run_dir: RunDir, start: Starter, body: str) -> None:
    child = start(body, CTUNE_GRACE_S=0.5)
    until_running(run_dir)
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=10) == -signal.SIGKILL
    assert not isinstance(last_word(run_dir), Stopped)


def test_a_child_stuck_in_python_as_a_whole_is_killed_by_the_kernel_timer(
    run_dir: RunDir, start: Starter
) -> None:
    child = start("hang_with_gil", CTUNE_FENCE_S=0.5, CTUNE_GRACE_S=0.5)
    assert child.wait(timeout=20) == -signal.SIGALRM


def test_a_child_that_hangs_while_it_exits_is_killed(run_dir: RunDir, start: Starter) -> None:
    child = start("hang_at_exit", CTUNE_GRACE_S=0.5)
    until_running(run_dir)
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=20) == -signal.SIGALRM
    assert isinstance(last_word(run_dir), Stopped)


def test_the_kill_takes_the_group(run_dir: RunDir, start: Starter) -> None:
    child = start("with_helper", CTUNE_GRACE_S=0.5)
    until_running(run_dir)
    word = events_of(run_dir)[0]
    assert isinstance(word, Progress)
    helper = int(word.stage)
    assert alive(helper)
    child.send_signal(signal.SIGTERM)
    child.wait(timeout=10)
    until(lambda: not alive(helper))


def test_a_signal_to_a_forked_helper_is_not_ours(run_dir: RunDir, start: Starter) -> None:
    assert start("pool").wait(timeout=20) == 0
    word = last_word(run_dir)
    assert isinstance(word, Finished)
    assert word.result == {"signal": signal.SIGTERM}


def test_a_lease_that_is_not_renewed_stops_the_child(run_dir: RunDir, start: Starter) -> None:
    run_dir.lease.write_text("0")
    child = start("wait", CTUNE_FENCE_S=2.0, CTUNE_GRACE_S=5)
    until_running(run_dir)
    for beat in range(12):  # renewed for longer than the fence: the child stays
        time.sleep(0.25)
        run_dir.lease.write_text(str(beat))
        assert child.poll() is None
    assert child.wait(timeout=20) == 0
    word = last_word(run_dir)
    assert isinstance(word, Stopped)
    assert word.reason == "lease lost"


def test_touching_the_lease_without_changing_it_renews_nothing(
    run_dir: RunDir, start: Starter
) -> None:
    run_dir.lease.write_text("same")
    child = start("wait", CTUNE_FENCE_S=0.8, CTUNE_GRACE_S=5)
    until_running(run_dir)
    deadline = time.monotonic() + 10
    while child.poll() is None and time.monotonic() < deadline:
        run_dir.lease.write_text("same")
        time.sleep(0.05)
    assert child.poll() == 0


def test_a_lost_lease_kills_a_hung_child(run_dir: RunDir, start: Starter) -> None:
    child = start("hang_in_c", CTUNE_FENCE_S=0.5, CTUNE_GRACE_S=0.5)
    assert child.wait(timeout=15) == -signal.SIGKILL


def test_no_grace_outlasts_the_lease(run_dir: RunDir, start: Starter) -> None:
    child = start("hang_in_c", CTUNE_FENCE_S=0.5, CTUNE_LEASE_S=1.5, CTUNE_GRACE_S=600)
    assert child.wait(timeout=30) == -signal.SIGKILL


PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen(
    sys.argv[1:], start_new_session=True,
    env={**os.environ, "CTUNE_PARENT_PID": str(os.getpid())},
)
print(child.pid, flush=True)
time.sleep(600)
"""


def start_under_parent(
    run_dir: RunDir, tmp_path: Path, body: str
) -> tuple["subprocess.Popen[bytes]", int]:
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, sys.executable, str(script), str(run_dir.root)],
        env={**os.environ, "BODY": body, "CTUNE_GRACE_S": "0.5"},
        stdout=subprocess.PIPE,
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.stdout.close()
    until_running(run_dir)
    return parent, pid


@pytest.mark.parametrize("body", ["wait", "hang_in_c"])
def test_a_child_does_not_outlive_its_parent(run_dir: RunDir, tmp_path: Path, body: str) -> None:
    parent, pid = start_under_parent(run_dir, tmp_path, body)
    parent.kill()
    parent.wait()
    until(lambda: not alive(pid), timeout_s=5)
    if body == "wait":
        word = last_word(run_dir)
        assert isinstance(word, Stopped)
        assert word.reason == "the supervisor died"


def test_a_child_whose_parent_died_before_it_armed_stops_at_once(
    run_dir: RunDir, start: Starter
) -> None:
    assert start("wait", CTUNE_PARENT_PID=1).wait(timeout=20) == 0
    assert [event.event for event in events_of(run_dir)] == ["stopped"]


def test_a_directory_in_use_is_left_alone(run_dir: RunDir, start: Starter, tmp_path: Path) -> None:
    first = start("wait")
    until_running(run_dir)
    before = run_dir.events.read_bytes()
    assert start("done").wait() == 1
    assert run_dir.events.read_bytes() == before
    assert "in use" in (tmp_path / "stderr").read_text()
    first.terminate()
    assert first.wait(timeout=10) == 0


def test_wrong_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def body(run_dir: RunDir, events: EventWriter, stop: StopRequest) -> dict[str, object]:
        raise AssertionError

    assert run_child(body, []) == 2
    assert run_child(body, [str(tmp_path / "missing")]) == 2
    assert "one run directory" in capsys.readouterr().err


def test_in_process_run_restores_the_signals(run_dir: RunDir) -> None:
    before = [signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)]

    def body(run_dir: RunDir, events: EventWriter, stop: StopRequest) -> dict[str, object]:
        os.kill(os.getpid(), signal.SIGTERM)
        stop.check()
        raise AssertionError

    assert run_child(body, [str(run_dir.root)]) == 0
    assert json.loads(run_dir.events.read_text())["event"] == "stopped"
    after = [signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)]
    assert after == before


def test_the_first_reason_stays() -> None:
    stop = StopRequest()
    stop.check()
    stop.request("first")
    stop.request("second")
    with pytest.raises(StopRequested, match="first"):
        stop.check()
