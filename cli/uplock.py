"""`DATA_DIR/up.lock`: who runs `ctune up` on a data directory, and where it listens."""

import fcntl
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

TRIES = 5  # somebody who only asks `is_held` has the lock for a moment
PAUSE_S = 0.1


@dataclass(frozen=True)
class Holder:
    """The `ctune up` that holds a data directory."""

    pid: int
    url: str


class DataDirInUseError(Exception):
    """Another `ctune up` holds the data directory; `holder` is None while it is just starting."""

    def __init__(self, data_dir: Path, holder: Holder | None) -> None:
        self.holder = holder
        who = f"process {holder.pid}, {holder.url}" if holder else "it is just starting"
        super().__init__(
            f"{data_dir} is in use by another `ctune up` ({who})."
            " Stop it with `ctune down`, or choose another --data-dir."
        )


class UpLock:
    """Exclusive hold on a data directory; the kernel ends it with the process."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir.absolute()
        self._path = self.data_dir / "up.lock"
        self._descriptor: int | None = None

    def take(self, url: str) -> None:
        """Hold the directory and say so in the file.

        Raises:
            DataDirInUseError: another process holds it.
        """
        self.data_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        if not _lock(descriptor, TRIES):
            os.close(descriptor)
            raise DataDirInUseError(self.data_dir, self._read())
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(asdict(Holder(os.getpid(), url))).encode(), 0)
        self._descriptor = descriptor

    def release(self) -> None:
        """Let go; the file stays."""
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)
            self._descriptor = None

    def is_held(self) -> bool:
        """Tell whether a process holds the directory."""
        if not self._path.exists():
            return False
        descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        try:
            return not _lock(descriptor, tries=1)
        finally:
            os.close(descriptor)

    def holder(self) -> Holder | None:
        """Return who holds the directory; None when nobody does, or it has not said yet."""
        return self._read() if self.is_held() else None

    def _read(self) -> Holder | None:
        text = self._path.read_text(encoding="utf-8")
        return Holder(**json.loads(text)) if text else None


def _lock(descriptor: int, tries: int) -> bool:
    for tried in range(tries):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if tried + 1 < tries:
                time.sleep(PAUSE_S)
        else:
            return True
    return False
