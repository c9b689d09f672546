"""`ctune up` for real: ready, restarts, refusals, and nothing left behind."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.running import Running, clean_environment, parents, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

MODULES = {"api": "service.app", "worker": "workers.app", "embed": "service.embeddings.app"}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    made = Running(tmp_path_factory.mktemp("up") / "data")
    try:
        yield made.wait_ready()
        assert made.stop(signal.SIGINT) == 0
    finally:
        made.discard()


def ctune(*arguments: str, within_s: float = 60.0) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        [sys.executable, "-m", "cli.main", *arguments],
        env=clean_environment(),
        capture_output=True,
        text=True,
        timeout=within_s,
        check=False,
    )


def test_ready_with_three_children(running: Running) -> None:
    assert httpx.get(f"{running.url}/healthz").status_code == 200
    assert set(running.children()) == set(MODULES.values())
    until(lambda: "ready: http://127.0.0.1:" in running.log(), 10, running.log)


@pytest.mark.parametrize("name", MODULES)
def test_killed_child_is_started_again(running: Running, name: str) -> None:
    module = MODULES[name]
    before = running.children()[module]
    os.kill(before, signal.SIGKILL)
    until(lambda: running.children().get(module) not in (None, before), 20, running.log)
    assert f"{name} ended: killed by SIGKILL; starting it again in" in running.log()
    running.wait_ready()


def test_second_up_on_the_same_data_is_refused(running: Running) -> None:
    second = ctune("up", "--port", "0", "--data-dir", str(running.data_dir))
    assert second.returncode == 1
    assert "is in use by another `ctune up`" in second.stderr
    assert running.url in second.stderr
    assert running.process.poll() is None


def test_detach_finds_the_one_that_runs(running: Running) -> None:
    found = ctune("up", "--detach", "--data-dir", str(running.data_dir))
    assert (found.returncode, found.stdout.strip()) == (0, running.url)


def test_taken_port_is_said(running: Running, tmp_path: Path) -> None:
    port = running.url.rpartition(":")[2]
    second = ctune("up", "--port", port, "--data-dir", str(tmp_path))
    assert second.returncode == 1
    assert f"port {port} of 127.0.0.1 is in use" in second.stderr


def test_other_addresses_are_refused(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "192.0.2.1", "::", "example.org"):
        refused = ctune("up", "--host", host, "--data-dir", str(tmp_path / "data"))
        assert refused.returncode == 78
        assert "no API keys" in refused.stderr
        assert "ssh -L" in refused.stderr
    assert not (tmp_path / "data").exists()


def test_children_die_with_a_killed_parent(tmp_path: Path) -> None:
    made = Running(tmp_path / "data").wait_ready()
    everything = made.descendants()
    assert len(everything) >= len(MODULES)
    assert made.stop(signal.SIGKILL) == -signal.SIGKILL
    until(lambda: not everything & set(parents()), 10)


def test_sigterm_stops_everything(tmp_path: Path) -> None:
    made = Running(tmp_path / "data").wait_ready()
    everything = made.descendants()
    try:
        assert made.stop(signal.SIGTERM) == 0
    finally:
        made.discard()
    assert not everything & set(parents())
    assert "stopped" in made.log()
    assert "killed" not in made.log()
    with socket.socket() as probe, pytest.raises(ConnectionRefusedError):
        probe.connect(("127.0.0.1", int(made.url.rpartition(":")[2])))


@pytest.mark.slow
def test_detached_one_is_stopped_by_down(tmp_path: Path) -> None:
    place = str(tmp_path / "data")
    started = ctune("up", "--detach", "--port", "0", "--data-dir", place, within_s=180)
    try:
        assert started.returncode == 0, started.stderr
        url = started.stdout.strip()
        assert httpx.get(f"{url}/readyz").status_code == 200
    finally:
        stopped = ctune("down", "--data-dir", place)
    assert (stopped.returncode, stopped.stdout.strip()) == (0, f"stopped {url}")
    assert "nothing runs" in ctune("down", "--data-dir", place).stdout
