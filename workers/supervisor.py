"""The part of a worker that takes work: claims rows, runs each in a thread, sweeps."""

import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from sqlalchemy.orm import Session

from ctune import __version__
from service.db import Database, DatabaseUnavailableError, now_s
from service.jobs import lifecycle
from service.jobs.lifecycle import Beat
from service.queue import Announcer
from service.settings import Settings
from service.storage import Storage
from service.tables import Calibration, Dataset, Job, WorkerSeen
from workers.gpus import GpuPool, find_gpus
from workers.kinds import Context, Ingestion, Measuring, Training, Work
from workers.machine import describe_machine
from workers.supervise import Attempt
from workers.sweep import Sweeper

log = logging.getLogger(__name__)

Run = TypeVar("Run", Job, Calibration)

SEEN_S = 5.0
"""Seconds between signs of life in the table of workers."""
STOP_MARGIN_S = 5.0
"""What stopping may take beyond the children's grace."""


class Supervisor:
    """Runs up to `slots` jobs and calibrations at a time, and one ingestion beside them.

    Each attempt has its own thread, which starts the child and lives as long as it: the kernel
    ends a child with the thread that started it.
    """

    def __init__(self, settings: Settings, database: Database) -> None:
        self.name = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"[-128:]
        self._settings = settings
        self._database = database
        self._context = Context(settings, database, Storage(settings.data_dir).create(), self.name)
        gpus = find_gpus(settings)
        self._gpus = GpuPool(gpus)
        self._kind = describe_machine(gpus)
        self._attempts: dict[Attempt, threading.Thread] = {}
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._seen = -SEEN_S
        self._sweeper = Sweeper(self._context, Announcer(settings), wake=self.wake)
        self.broken = False
        """It ended by an error of its own; the process should end as well."""
        self.on_broken: Callable[[], None] = lambda: None
        """Called in that case."""

    def start(self) -> None:
        """Begin in a thread of its own."""
        self._thread = threading.Thread(target=self._run, name="supervisor", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Look for work now instead of at the next poll."""
        self._wake.set()

    def stop(self) -> None:
        """Take no more work, ask the children to stop and give their rows back; wait for that."""
        self._stopping.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(self._settings.grace_s + STOP_MARGIN_S)

    @property
    def alive(self) -> bool:
        """Whether it works."""
        return self._thread is not None and self._thread.is_alive()

    def _run(self) -> None:
        log.info("worker %s: %d slots, %d GPUs", self.name, self._settings.slots, self._gpus.total)
        self._sweeper.start()
        try:
            while not self._stopping.is_set():
                self._wake.clear()
                self._round()
                self._wake.wait(self._settings.poll_s)
        except Exception:
            self.broken = True
            log.exception("worker %s broke", self.name)
        finally:
            self._stop_attempts()
            self._sweeper.stop(STOP_MARGIN_S)
            self._say_goodbye()
            if self.broken:
                self.on_broken()

    def _round(self) -> None:
        """Do what is due: forget what has ended, say that we live, pass on wishes, take work."""
        for attempt in [attempt for attempt in self._attempts if attempt.ended]:
            del self._attempts[attempt]
            self._gpus.give_back(attempt.work.gpus)
        try:
            self._say_alive()
            self._pass_on_wishes()
            while not self._stopping.is_set() and self._take():
                pass
        except DatabaseUnavailableError as error:
            log.warning("cannot look for work: %s", error)

    def _say_alive(self) -> None:
        now = time.monotonic()
        if now - self._seen < min(SEEN_S, self._settings.beat_s):
            return
        info = {
            "slots": self._settings.slots,
            "gpus": self._gpus.total,
            "version": __version__,
            "kind": self._kind,
        }
        with self._database.writing() as session:
            session.merge(WorkerSeen(id=self.name, seen_at=now_s(), info=info))
        self._seen = now

    def _pass_on_wishes(self) -> None:
        if not self._attempts:
            return
        with self._database.reading() as session:
            wishes = lifecycle.wishes_of_clients(session, self.name)
        for attempt in self._attempts:
            attempt.wish = wishes.get(attempt.work.lease.id, Beat.GO_ON)

    def _take(self) -> bool:
        """Claim and start one row; False when there is no work or no room."""
        works = [attempt.work for attempt in self._attempts]
        in_slots = sum(not isinstance(work, Ingestion) for work in works)
        work: Work | None = None
        if in_slots == len(works):
            work = self._claim_ingestion()
        if work is None and in_slots < self._settings.slots:
            work = self._claim_calibration() or self._claim_training()
        if work is None:
            return False
        attempt = Attempt(work)
        thread = threading.Thread(
            target=self._run_attempt, args=(attempt,), name=work.lease.id, daemon=True
        )
        self._attempts[attempt] = thread
        thread.start()
        return True

    def _run_attempt(self, attempt: Attempt) -> None:
        try:
            attempt.run()
        except Exception:
            log.exception("%s: attempt broke", attempt.work.lease.id)
        finally:
            attempt.ended = True
            self.wake()

    def _claim_ingestion(self) -> Work | None:
        with self._database.writing() as session:
            row = lifecycle.claim(
                session, Dataset, owner=self.name, lease_s=self._settings.lease_s, gpus=(0, 0)
            )
        return Ingestion(self._context, row) if row is not None else None

    def _claim_training(self) -> Work | None:
        with self._database.writing() as session:
            row = self._claim_on_device(session, Job)
            if row is None:
                return None
            work = Training(self._context, row)
            work.limit(session)
        work.gpus = self._gpus.take(self._gpus.needed(row.gpus))
        return work

    def _claim_calibration(self) -> Work | None:
        with self._database.writing() as session:
            row = self._claim_on_device(session, Calibration)
            if row is None:
                return None
            row.worker_kind = self._kind
            work = Measuring(self._context, row)
        work.gpus = self._gpus.take(self._gpus.needed(row.gpus))
        return work

    def _claim_on_device(self, session: Session, table: type[Run]) -> Run | None:
        return lifecycle.claim(
            session,
            table,
            owner=self.name,
            lease_s=self._settings.lease_s,
            gpus=(self._gpus.free, self._gpus.total),
        )

    def _stop_attempts(self) -> None:
        for attempt in self._attempts:
            attempt.stopping.set()
        until = time.monotonic() + self._settings.grace_s + STOP_MARGIN_S
        for thread in self._attempts.values():
            thread.join(max(0.0, until - time.monotonic()))

    def _say_goodbye(self) -> None:
        try:
            with self._database.writing() as session:
                seen = session.get(WorkerSeen, self.name)
                if seen is not None:
                    session.delete(seen)
        except DatabaseUnavailableError as error:
            log.warning("cannot say goodbye: %s", error)
