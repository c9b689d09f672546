"""`ctune up`: API, worker and embedding process on one machine, as one command."""

import errno
import signal
import socket
import time
from contextlib import closing
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from types import FrameType

import httpx

from cli.processes import Process, child_environment, fail, say
from cli.uplock import DataDirInUseError, UpLock
from service.db import DatabaseSetupError, DatabaseUnavailableError, migrate
from service.settings import Settings
from service.storage import Storage

EXIT_CONFIG = 78  # EX_CONFIG of sysexits.h
TICK_S = 0.2
PROBE_S = 0.5
REMIND_S = 15.0
STOP_MARGIN_S = 10.0
CRASHES_BEFORE_READY = 3
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True)
class Address:
    """Where the API listens."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """The address as people type it."""
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach `host`."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def free_port(host: str) -> int:
    """Return a port on which nothing listens."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def is_port_taken(address: Address) -> bool:
    """Tell whether another program listens there."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    with closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as uvicorn does
        try:
            probe.bind((address.host, address.port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return True
            raise
    return False


def run_up(address: Address, settings: Settings) -> int:
    """Run all processes until a signal ends them, and return the exit code."""
    if not is_loopback(address.host):
        return fail(NOT_LOOPBACK.format(host=address.host, port=address.port), EXIT_CONFIG)
    if address.port == 0:
        address = Address(address.host, free_port(address.host))
    lock = UpLock(settings.data_dir)
    try:
        lock.take(address.url)
    except (DataDirInUseError, OSError) as error:
        return fail(str(error))
    try:
        if is_port_taken(address):
            return fail(
                f"port {address.port} of {address.host} is in use by another program."
                " Choose another with --port."
            )
        Storage(settings.data_dir).create()
        migrate(settings)
        return Up(address, settings).run()
    except (DatabaseSetupError, DatabaseUnavailableError, OSError) as error:
        return fail(str(error))
    finally:
        lock.release()


NOT_LOOPBACK = (
    "refusing to listen on {host}: there are no API keys yet, so everybody who reaches this address"
    " could read and change everything. Listen on 127.0.0.1 (the default) and reach it through"
    " `ssh -L {port}:127.0.0.1:{port} THIS_MACHINE`, or through a proxy that authenticates and"
    " sends `Host: 127.0.0.1` (the service refuses other names)."
)


class Up:
    """The running processes."""

    def __init__(self, address: Address, settings: Settings) -> None:
        self.address = address
        self.settings = settings
        self._stops = 0
        self._ready = False
        self._probe = httpx.Client(base_url=address.url, timeout=2.0, trust_env=False)
        embed = Address("127.0.0.1", free_port("127.0.0.1"))
        environment = child_environment(
            {"CTUNE_DATA_DIR": str(settings.data_dir.absolute()), "CTUNE_EMBED_URL": embed.url}
        )

        def process(name: str, module: str, at: Address | None = None) -> Process:
            arguments = ["--host", at.host, "--port", str(at.port)] if at else []
            return Process(name, module, arguments, environment)

        self.processes = [
            process("api", "service.app", address),
            process("worker", "workers.app"),
            process("embed", "service.embeddings.app", embed),
        ]

    def run(self) -> int:
        """Start everything, keep it running, stop it at a signal; return the exit code."""
        heard = [n for n in STOP_SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]  # nohup
        before = {number: signal.signal(number, self._on_signal) for number in heard}
        try:
            say("up", f"starting; data in {self.settings.data_dir.absolute()}")
            return self._keep_running()
        finally:
            self._stop()
            self._probe.close()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        self._stops += 1  # nothing else: the loops look at it every tick
        if self._stops > 1:
            for process in self.processes:
                process.kill()

    def _keep_running(self) -> int:
        remind_at, probe_at = time.monotonic() + REMIND_S, 0.0
        while not self._stops:
            for process in self.processes:
                code = process.tend()
                if code == EXIT_CONFIG or (code is not None and self._gives_up(process)):
                    say("up", f"{process.name} cannot run, see its lines above; stopping")
                    return code or 1
            if not self._ready and time.monotonic() >= probe_at:
                probe_at = time.monotonic() + PROBE_S
                missing = self._missing()
                self._ready = missing is None
                if self._ready:
                    say("up", f"ready: {self.address.url}  (reference: {self.address.url}/docs)")
                elif time.monotonic() >= remind_at:
                    say("up", f"not ready yet: {missing}")
                    remind_at = time.monotonic() + REMIND_S
            time.sleep(TICK_S)
        return 0

    def _gives_up(self, process: Process) -> bool:
        return not self._ready and process.crashes >= CRASHES_BEFORE_READY

    def _missing(self) -> str | None:
        """Return why the service is not ready, or None."""
        try:
            answer = self._probe.get("/readyz")
        except httpx.TransportError as error:
            return f"the API does not answer yet ({type(error).__name__})"
        return None if answer.is_success else answer.text

    def _stop(self) -> None:
        say("up", "stopping; jobs that run make a checkpoint and go on at the next start")
        for process in self.processes:
            process.ask_to_stop()
        deadline = time.monotonic() + self.settings.grace_s + STOP_MARGIN_S
        for process in self.processes:
            process.wait(deadline)
        say("up", "stopped")


def data_dir_of(settings: Settings, given: Path | None) -> Settings:
    """Return `settings` with the data directory of the command line, where one was given."""
    return settings.model_copy(update={"data_dir": given}) if given else settings
