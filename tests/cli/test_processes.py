"""Child processes of `ctune up`, with small stand-ins: crashes, backoff, logs, stubborn ones."""

import os
import signal
import time
from pathlib import Path

import pytest

from cli.processes import Process, child_environment, explain
from cli.up import free_port, is_loopback
from cli.uplock import DataDirInUseError, Holder, UpLock
from tests.e2e.running import until

STUBBORN = """
import signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("deaf", flush=True)
time.sleep(60)
"""
CRASHING = "import sys; print('cannot', file=sys.stderr); sys.exit(3)"


def make(folder: Path, source: str) -> Process:
    """Return a process that runs `source` as a module."""
    (folder / "stand_in.py").write_text(source)
    return Process("child", "stand_in", [], child_environment({"PYTHONPATH": str(folder)}))


def ends_with(process: Process, within_s: float = 20.0) -> int:
    """Tend a process until it has ended and return its exit code."""
    deadline = time.monotonic() + within_s
    while (code := process.tend()) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return code


def test_crash_is_told_and_repeated_later(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = make(tmp_path, CRASHING)
    assert ends_with(process) == 3
    assert process.crashes == 1
    started = time.monotonic()
    assert ends_with(process) == 3
    assert time.monotonic() - started >= 1.0
    assert process.crashes == 2
    said = capsys.readouterr().out
    assert "child  | cannot\n" in said
    assert "up     | child ended: exit code 3; starting it again in 1 s" in said
    assert "starting it again in 2 s" in said


def test_stubborn_child_is_killed_at_the_deadline(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    process = make(tmp_path, STUBBORN)
    process.start()
    said = ""

    def is_deaf() -> bool:
        nonlocal said
        said += capfd.readouterr().out
        return "deaf" in said

    until(is_deaf, 20)
    process.ask_to_stop()
    started = time.monotonic()
    process.wait(started + 0.5)
    assert 0.4 < time.monotonic() - started < 10
    assert "did not stop in time" in capfd.readouterr().out


def test_stopping_what_never_ran(tmp_path: Path) -> None:
    process = make(tmp_path, CRASHING)
    process.ask_to_stop()
    process.kill()
    process.wait(time.monotonic())


def test_exit_codes_in_words() -> None:
    assert explain(1) == "exit code 1"
    assert explain(-signal.SIGKILL) == "killed by SIGKILL"


def test_lock_is_held_by_one_and_told(tmp_path: Path) -> None:
    first, second = UpLock(tmp_path / "data"), UpLock(tmp_path / "data")
    assert not first.is_held()
    first.take("http://127.0.0.1:1")
    assert second.holder() == Holder(os.getpid(), "http://127.0.0.1:1")
    with pytest.raises(DataDirInUseError, match=r"http://127\.0\.0\.1:1"):
        second.take("http://127.0.0.1:2")
    first.release()
    assert second.holder() is None
    second.take("http://127.0.0.1:2")
    second.release()


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.0.2.1", False),
        ("localhost.example.org", False),
    ],
)
def test_loopback(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_free_port_is_free() -> None:
    assert 1024 <= free_port("127.0.0.1") <= 65535
