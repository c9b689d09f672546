"""Look after what others left behind: lost rows, old hints, files that nothing refers to.

Any number of workers may sweep at once: rows are changed by guarded statements, and a file is
renamed away before it is removed, which only one of them can do.
"""

import logging
import secrets
import threading
import time
from collections.abc import Callable, Container, Iterable, Iterator
from itertools import islice
from pathlib import Path

from sqlalchemy import ColumnElement, delete, select
from sqlalchemy.orm import InstrumentedAttribute

from service.db import DatabaseUnavailableError, now_s
from service.jobs import lifecycle
from service.jobs.lifecycle import Row
from service.jobs.states import TERMINAL
from service.queue import Announcer, Kind
from service.tables import Calibration, Checkpoint, Dataset, Job, Model, WorkerSeen
from workers.kinds import Context, clean_ended

log = logging.getLogger(__name__)

PURGE_S = 3600.0
YOUNG_S = 24 * 3600.0
"""Files younger than this may belong to something that is about to get its row."""
CALIBRATIONS_KEPT_S = 30 * 24 * 3600.0
"""After this time a measurement is made anew: drivers and libraries change."""
TRASH = ".trash-"


class Sweeper:
    """A thread that sweeps every `reap_s`, and purges files every hour."""

    def __init__(self, context: Context, announcer: Announcer, *, wake: Callable[[], None]) -> None:
        self._context = context
        self._announcer = announcer
        self._wake = wake
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="sweeper", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """End after the present round, which gets `timeout_s`."""
        self._stopping.set()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        purged: float | None = None
        while not self._stopping.is_set():
            try:
                self.sweep()
                if purged is None or time.monotonic() - purged >= PURGE_S:
                    purge(self._context)
                    purged = time.monotonic()
            except DatabaseUnavailableError as error:
                log.warning("cannot sweep: %s", error)
            except Exception:
                log.exception("the sweep broke; the next one tries again")
            self._stopping.wait(self._context.settings.reap_s)
        self._announcer.close()

    def sweep(self) -> None:
        """Take back lost rows and send old hints again."""
        self._sweep("job", Job)
        self._sweep("dataset", Dataset)
        self._sweep("calibration", Calibration)
        self._wake()

    def _sweep(self, kind: Kind, table: type[Row]) -> None:
        database, settings = self._context.database, self._context.settings
        with database.writing() as session:
            reaped = lifecycle.reap(session, table, self._context.retry)
        for row_id, status in reaped:
            log.warning("%s was lost and is now %s", row_id, status)
            if status in TERMINAL:  # its worker is gone and cleans no more
                clean_ended(self._context.storage, table, row_id)
        if not settings.broker:
            return
        with database.writing() as session:
            ids = lifecycle.resend(session, table, settings.resend_s)
        for row_id in ids:
            self._announcer.announce(kind, row_id)


def purge(context: Context, young_s: float = YOUNG_S) -> None:
    """Remove files that nothing refers to, workers not seen for a day, and old calibrations."""
    purge_uploads(context, young_s)
    purge_passing_runs(context, young_s, folder="runs", table=Dataset)
    purge_passing_runs(context, young_s, folder="calibrations", table=Calibration)
    purge_stores(context, young_s)
    purge_models(context, young_s)
    purge_job_runs(context, young_s)
    with context.database.writing() as session:
        session.execute(delete(WorkerSeen).where(WorkerSeen.seen_at < now_s() - YOUNG_S))
        old = Calibration.created_at < now_s() - CALIBRATIONS_KEPT_S
        session.execute(delete(Calibration).where(old, Calibration.status != "running"))


def purge_uploads(context: Context, young_s: float) -> None:
    """Remove half-written archives, and those whose data set is gone or needs them no more."""
    old = {context.storage.relative(path): path for path in _old(context, "uploads", young_s)}
    needed = _rows(context, Dataset.upload, old, Dataset.status.not_in(TERMINAL))
    for name in old.keys() - needed.keys():
        _discard(context, old[name])


def purge_passing_runs(
    context: Context, young_s: float, *, folder: str, table: type[Dataset] | type[Calibration]
) -> None:
    """Remove run directories of ended ingestions or calibrations, and of attempts before others."""
    paths = {path.name: path for path in _old(context, folder, 0.0)}
    running = _rows(context, table.id, paths, table.status.not_in(TERMINAL))
    for name, path in paths.items():
        if name in running:
            _discard_earlier(context, path, running[name])
        elif _age_s(path) >= young_s:
            _discard(context, path)


def purge_stores(context: Context, young_s: float) -> None:
    """Remove packed stores that no data set refers to."""
    old = {context.storage.relative(path): path for path in _old(context, "stores", young_s)}
    used = _rows(context, Dataset.store, old)
    for name in old.keys() - used.keys():
        _discard(context, old[name], young_s)


def purge_models(context: Context, young_s: float) -> None:
    """Remove model directories without a row: their attempt had lost its lease."""
    old = {path.name: path for path in _old(context, "models", young_s)}
    with context.database.reading() as session:
        known = {
            model_id
            for names in _chunks(old)
            for model_id in session.scalars(select(Model.id).where(Model.id.in_(names)))
        }
    for name in old.keys() - known:
        _discard(context, old[name], young_s)


def purge_job_runs(context: Context, young_s: float) -> None:
    """Remove run directories of deleted jobs; of ended ones caches and earlier attempts.

    Those with the best checkpoint of a stage stay. Caches are left when a job was cancelled as it
    waited for another attempt.
    """
    paths = {path.name: path for path in _old(context, "jobs", 0.0)}
    known = _rows(context, Job.id, paths)
    ended = _rows(context, Job.id, paths, Job.status.in_(TERMINAL), Job.attempt > 0)
    for name, path in paths.items():
        if name in ended:
            if ended[name] > 1:
                best = _forget_checkpoints(context, name, ended[name])
                _discard_earlier(context, path, ended[name], keep=best)
            clean_ended(context.storage, Job, name)
        elif name not in known and _age_s(path) >= young_s:
            _discard(context, path)


def _forget_checkpoints(context: Context, job_id: str, attempt: int) -> set[int]:
    """Remove the rows of checkpoints whose files are about to go; return the attempts that stay."""
    earlier = (Checkpoint.job_id == job_id, Checkpoint.attempt < attempt)
    with context.database.writing() as session:
        best = set(session.scalars(select(Checkpoint.attempt).where(*earlier, Checkpoint.best)))
        session.execute(delete(Checkpoint).where(*earlier, Checkpoint.attempt.not_in(best)))
    return best


def _rows(
    context: Context,
    column: InstrumentedAttribute[str] | InstrumentedAttribute[str | None],
    values: Iterable[str],
    *where: ColumnElement[bool],
) -> dict[str, int]:
    """Return, of the rows whose `column` is among `values`, that value and the attempt."""
    table = column.class_
    with context.database.reading() as session:
        found: dict[str, int] = {}
        for names in _chunks(values):
            wanted = select(column, table.attempt).where(column.in_(names), *where)
            found |= dict(session.execute(wanted).all())
    return found


def _chunks(values: Iterable[str]) -> Iterator[list[str]]:
    remaining = iter(sorted(values))
    while names := list(islice(remaining, 500)):
        yield names


def _old(context: Context, folder: str, young_s: float) -> list[Path]:
    """Return what lies in a folder and has not changed for `young_s`."""
    paths = (context.storage.root / folder).iterdir()
    return [path for path in paths if _age_s(path) >= young_s]


def _age_s(path: Path) -> float:
    """Return the age of a path; a negative one when it is gone."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return -1.0


def _discard_earlier(
    context: Context, folder: Path, attempt: int, *, keep: Container[int] = ()
) -> None:
    for path in folder.glob("a*"):
        number = path.name[1:]
        if number.isdigit() and int(number) < attempt and int(number) not in keep:
            _discard(context, path)


def _discard(context: Context, path: Path, young_s: float = 0.0) -> None:
    """Rename a path away, look once more whether it is still old, and remove it."""
    trash = path.with_name(f"{TRASH}{secrets.token_hex(8)}")
    try:
        path.rename(trash)
    except FileNotFoundError:
        return  # another worker was faster
    if _age_s(trash) < young_s and not path.exists():
        trash.rename(path)  # adopted in the meantime
        return
    context.storage.remove(trash)
    log.info("removed %s", path)
