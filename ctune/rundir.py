"""The only file that knows the names inside a run directory. Never imports torch.

RUN_DIR/
    config.json     what to run (`ctune.pipeline.RunFile`, or `ctune.ingest.IngestFile`)
    events.jsonl    what happened, appended by the child
    train.log       the child's stdout and stderr
    lock            held by the one process that may write here
    lease           rewritten by the supervisor at every heartbeat; see `ctune.child`
    finish          made by the supervisor: end the training early, evaluate, keep the model
    figures.json    what the pictures of the report show (`ctune.figures_file`)
    checkpoints/    one directory per checkpoint
    store/          the packed store that an ingestion makes
    cache/          decoded images; removed at the end
    model/          the exported encoder
    ranks/          the last words of the processes of one run, where there are several
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ctune.errors import RunInUseError


class RunDir:
    """Paths of one run directory."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()
        self.config = self.root / "config.json"
        self.events = self.root / "events.jsonl"
        self.log = self.root / "train.log"
        self.lock_file = self.root / "lock"
        self.lease = self.root / "lease"
        self.finish = self.root / "finish"
        self.figures = self.root / "figures.json"
        self.checkpoints = self.root / "checkpoints"
        self.cache = self.root / "cache"
        self.model = self.root / "model"
        self.ranks = self.root / "ranks"

    def create(self) -> "RunDir":
        """Make the directory and those inside it; existing ones stay as they are."""
        for path in (self.root, self.checkpoints):
            path.mkdir(parents=True, exist_ok=True)
        return self

    def rank_events(self, rank: int) -> Path:
        """Return where one of several processes of the run says its last word."""
        return self.ranks / f"{rank}.jsonl"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the directory for this process.

        Raises:
            RunInUseError: another live process holds it.
        """
        descriptor = os.open(self.lock_file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunInUseError(
                    f"{self.root} is in use by another process",
                    hint="wait for it to end, or choose another run directory",
                ) from error
            yield
        finally:
            os.close(descriptor)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: temporary name, fsync, rename, fsync of the directory."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync_directory(path.parent)


def fsync_directory(path: Path) -> None:
    """Make a rename inside `path` survive a power loss."""
    _fsync(path)


def fsync_file(path: Path) -> None:
    """Make the content of a written file survive a power loss."""
    _fsync(path)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
