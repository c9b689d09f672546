"""Private Postgres and Redis servers of the tests, on free ports, gone with the test session."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

START_S = 30.0
INITDB_OPTIONS = ["-U", "ctune", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
UNPRIVILEGED = ("postgres", "nobody")


class ServerMissingError(Exception):
    """The machine has no such program, or it does not start."""


class Server:
    """A running program that can be killed and started again on the same port and data."""

    def __init__(
        self,
        command: list[str],
        *,
        folder: Path,
        url: str,
        answers: Callable[[], bool],
        user: str | None = None,
    ) -> None:
        self.url = url
        self._command = command
        self._folder = folder
        self._answers = answers
        self._user = user
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it and wait until it answers."""
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command, stdout=log, stderr=log, start_new_session=True, **as_user(self._user)
            )
        until = time.monotonic() + START_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > until:
                log_text = (self._folder / "server.log").read_text(errors="replace")
                self.kill()
                raise ServerMissingError(f"{self._command[0]} does not start: {log_text[-2000:]}")
            time.sleep(0.05)

    def kill(self) -> None:
        """Kill it with everything it has started, as a power cut would."""
        self._signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait()

    def freeze(self) -> None:
        """Stop it without ending it: connections stay open, nothing answers."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen one go on."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        if self._process is None:
            return
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return


def as_user(user: str | None) -> dict[str, Any]:
    """Return the arguments of `subprocess` that run a program as another user."""
    if user is None:
        return {}
    return {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}


def free_port() -> int:
    """Return a port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@contextmanager
def postgres() -> Iterator[Server]:
    """Run a private Postgres; `url` names its superuser's database.

    Raises:
        ServerMissingError: it cannot be run here.
    """
    user = _postgres_user()
    with _folder(user) as folder:
        data, port = folder / "data", free_port()
        made = subprocess.run(
            [_program("initdb"), "-D", data, *INITDB_OPTIONS],
            capture_output=True,
            text=True,
            **as_user(user),
        )
        if made.returncode != 0:
            raise ServerMissingError(f"initdb failed: {made.stderr}")
        settings = {
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": "",
            "max_connections": "200",
            "fsync": "off",
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        command = [_program("postgres"), "-D", str(data), "-p", str(port), *options]
        dsn = f"postgresql://ctune@127.0.0.1:{port}/postgres"
        server = Server(
            command, folder=folder, url=dsn, answers=lambda: _postgres_answers(dsn), user=user
        )
        yield from _running(server)


@contextmanager
def redis() -> Iterator[Server]:
    """Run a private Redis that keeps an append-only file.

    Raises:
        ServerMissingError: it cannot be run here.
    """
    with _folder(None) as folder:
        port = free_port()
        command = [_program("redis-server"), "--port", str(port), "--bind", "127.0.0.1"]
        command += ["--dir", str(folder), "--save", "", "--appendonly", "yes"]
        server = Server(
            command,
            folder=folder,
            url=f"redis://127.0.0.1:{port}/0",
            answers=lambda: _redis_answers(port),
        )
        yield from _running(server)


@contextmanager
def needed() -> Iterator[None]:
    """Skip the test where a server cannot be run; with CI set, fail instead."""
    try:
        yield
    except ServerMissingError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


def _running(server: Server) -> Iterator[Server]:
    server.start()
    try:
        yield server
    finally:
        server.thaw()
        server.kill()


def _postgres_user() -> str | None:
    """Return the user that may run Postgres: it refuses root."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return next(name for name in UNPRIVILEGED if name in known)


@contextmanager
def _folder(user: str | None) -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(prefix="ctune-tests-"))
    try:
        if user is not None:
            shutil.chown(path, user)
        yield path
    finally:
        shutil.rmtree(path)


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        newest = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
        if not newest:
            raise ServerMissingError(f"this machine has no {name}")
        found = str(newest[-1])
    return found


def _postgres_answers(dsn: str) -> bool:
    try:
        psycopg.connect(dsn, connect_timeout=2).close()
    except psycopg.OperationalError:
        return False
    return True


def _redis_answers(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(16).startswith(b"+PONG")
    except OSError:
        return False
