"""Run one claimed row in a child: start, report, stop when asked, and write down its end."""

import logging
import os
import threading
import time

from pydantic import ValidationError
from sqlalchemy import select

from ctune.events import LAST_WORDS, Event, Failed, Progress, StageStarted, read_events
from ctune.rundir import RunDir
from service.db import DatabaseUnavailableError
from service.jobs import lifecycle
from service.jobs.lifecycle import Beat, Ending
from service.jobs.recorder import store_events
from service.jobs.states import TERMINAL
from workers.child_process import ChildProcess, child_environment
from workers.kinds import CannotRunError, Work
from workers.outcome import Action, Outcome, StopReason, decide, make_error, tail

log = logging.getLogger(__name__)

MAX_EVENTS = 2000
"""Events stored in one transaction."""
RETRY_S = 1.0
"""Seconds between tries to write the end of an attempt."""


class Attempt:
    """One attempt, from its run directory to its end. `run` belongs into a thread of its own."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.wish = Beat.GO_ON
        """Set by the supervisor: what it read last of what clients want of this job."""
        self.stopping = threading.Event()
        """Set by the supervisor: this worker stops."""
        self.ended = False
        self._context = work.context
        self._settings = work.context.settings
        self._child: ChildProcess | None = None
        self._offset = 0
        self._last: Event | None = None
        self._phase: str | None = None
        self._reason: StopReason | None = None
        self._kill_at: float | None = None
        self._started = self._beaten = time.monotonic()
        self._answer = Beat.GO_ON
        self._lost = False

    def run(self) -> None:
        """Do everything; whatever goes wrong ends up in the row or, the lease lost, in the log."""
        lease = self.work.lease
        log.info("%s: attempt %d starts", lease.id, lease.attempt)
        try:
            outcome = self._run_child()
        except CannotRunError as error:
            outcome = Outcome(Action.FAIL, str(error), error.error)
        except DatabaseUnavailableError as error:
            outcome = Outcome(Action.RELEASE, f"not started: {error}")
        except Exception as error:
            log.exception("%s: attempt %d broke", lease.id, lease.attempt)
            outcome = _broken(error)
        finally:
            self._reap()
            self._context.storage.remove(self.work.run_dir.cache)
        if self._lost:
            log.warning("%s: attempt %d lost its lease", lease.id, lease.attempt)
        else:
            self._end(outcome)

    def _run_child(self) -> Outcome:
        self.work.prepare()
        for attempt, run_dir in self.work.earlier():
            self._catch_up(attempt, run_dir)
        if self._lost:
            return Outcome(Action.RELEASE, "lease lost")
        self._write_lease()
        self._child = ChildProcess(self.work.command, self.work.run_dir, self._environment())
        while not self._child.wait(self._settings.poll_s) and not self._lost:
            self._report()
            self._stop_if_asked()
        exit_code = self._reap()
        if self._lost:
            return Outcome(Action.RELEASE, "lease lost")
        while self._report(final=True):
            pass
        log_tail = tail(self.work.run_dir.log.read_bytes())
        return decide(self._last, exit_code, self._reason, phase=self._phase, log_tail=log_tail)

    def _catch_up(self, attempt: int, run_dir: RunDir) -> None:
        """Store what an earlier child said after its worker had last listened.

        The child that follows resumes behind it and does not say it again.
        """
        offset = 0
        while not self._lost:
            events, offset, _ = read_batch(run_dir, offset)
            if not events:
                return
            self._lost = self._store(events, run_dir, attempt) is Beat.LOST

    def _environment(self) -> dict[str, str]:
        told = {
            "CTUNE_PARENT_PID": str(os.getpid()),
            "CTUNE_FENCE_S": str(self._settings.fence_s),
            "CTUNE_LEASE_S": str(self._settings.lease_s),
            "CTUNE_GRACE_S": str(self._settings.grace_s),
            "CTUNE_ATTEMPT": str(self.work.lease.attempt),
        }
        return child_environment(os.environ, told, self.work.gpus)

    def _report(self, *, final: bool = False) -> bool:
        """Store new events and renew the lease; True when there may be more to store."""
        events, offset, broken = read_batch(self.work.run_dir, self._offset)
        self._listen(events, broken)
        now = time.monotonic()
        due = now - self._beaten >= self._settings.beat_s or self.wish is not self._answer
        if not events and not due:
            return False
        try:
            beat = self._store(events, self.work.run_dir, self.work.lease.attempt)
        except DatabaseUnavailableError as error:
            log.warning("%s: cannot report: %s", self.work.lease.id, error)
            self._lost = now - self._beaten >= self._settings.lease_s
            if final and not self._lost:
                time.sleep(RETRY_S)
            return not self._lost
        self._offset = offset
        self._lost = beat is Beat.LOST
        if not self._lost:
            self._write_lease()
        self._obey(beat)
        return bool(events) and not self._lost

    def _obey(self, beat: Beat) -> None:
        """Note what clients want; a pause that is called off after the child was told ends it."""
        self._answer = beat
        if beat is Beat.CANCEL:
            self._reason = StopReason.CANCEL
        elif beat is Beat.PAUSE and self._reason is None:
            self._reason = StopReason.PAUSE
        elif beat is Beat.FINISH:
            self.work.run_dir.finish.touch()

    def _store(self, events: list[Event], run_dir: RunDir, attempt: int) -> Beat:
        """Renew the lease and store events, in one transaction."""
        now = time.monotonic()  # before the statement: the lease ends no earlier than we think
        folder = self._context.storage.relative(run_dir.checkpoints)
        with self._context.database.writing() as session:
            beat = lifecycle.beat(session, self.work.lease, self._settings.lease_s)
            if beat is not Beat.LOST:
                store_events(session, self.work.lease, events, checkpoints=folder, attempt=attempt)
        if beat is not Beat.LOST:
            self._beaten = now
        return beat

    def _listen(self, events: list[Event], broken: str) -> None:
        """Note the phase and the last word of the child."""
        for event in events:
            if isinstance(event, LAST_WORDS):
                self._last = event
            elif isinstance(event, StageStarted | Progress):
                self._phase = event.stage
        if broken:
            message = f"the process wrote an event that nobody understands: {broken}"
            self._last = Failed(code="bad_event", message=message)

    def _write_lease(self) -> None:
        """Tell the child that its lease was renewed: it looks for new content."""
        self.work.run_dir.lease.write_text(f"{time.time()}\n", encoding="utf-8")

    def _stop_if_asked(self) -> None:
        """Ask the child to stop, once, and kill it when its time is over.

        One that has said its last word is not asked, but gets no more time either.
        """
        assert self._child is not None
        if self._reason is None:
            self._reason = self._why_stop()
        if self._reason is None and self._last is None:
            return
        if self._kill_at is None:
            self._kill_at = time.monotonic() + self._settings.grace_s
            if self._last is None:
                self._child.ask_to_stop()
        elif time.monotonic() >= self._kill_at:
            self._child.kill()

    def _why_stop(self) -> StopReason | None:
        if self.stopping.is_set():
            return StopReason.WORKER
        limit_s = self.work.max_duration_s
        if limit_s is not None and time.monotonic() - self._started > limit_s:
            return StopReason.MAX_DURATION
        return None

    def _reap(self) -> int:
        """End the child with its whole group; harmless when there is none (any more)."""
        child, self._child = self._child, None
        return 0 if child is None else child.reap()

    def _end(self, outcome: Outcome) -> None:
        """Write the end of the attempt; a database that is down gets until the lease ends."""
        ending = None
        if outcome.action is Action.SUCCEED:
            outcome, ending = self._adopt(outcome)
        until = self._beaten + self._settings.lease_s
        while True:
            try:
                status = self._write(outcome, ending)
                break
            except DatabaseUnavailableError as error:
                if time.monotonic() >= until:
                    log.error("%s: its end could not be written: %s", self.work.lease.id, error)
                    return
                time.sleep(RETRY_S)
        log.info("%s: attempt %d: %s", self.work.lease.id, self.work.lease.attempt, status)
        if status in TERMINAL:
            self.work.clean()

    def _adopt(self, outcome: Outcome) -> tuple[Outcome, Ending | None]:
        try:
            return outcome, self.work.adopt(outcome.result or {})
        except CannotRunError as error:
            return Outcome(Action.FAIL, str(error), error.error), None
        except Exception as error:
            log.exception("%s: its result could not be stored", self.work.lease.id)
            return _broken(error), None

    def _write(self, outcome: Outcome, ending: Ending | None) -> str:
        """Write the end in one transaction and return the row's new status."""
        lease = self.work.lease
        error = outcome.error or {}
        with self._context.database.writing() as session:
            match outcome.action:
                case Action.REPEAT:
                    status = lifecycle.requeue_lost(session, lease, error, self.work.retry)
                    return status or "lease lost"
                case Action.RELEASE:
                    if not lifecycle.release(session, lease, outcome.message):
                        return "lease lost"
                    # Queued, or what somebody wanted meanwhile: paused, cancelled.
                    found = select(lease.table.status).where(lease.table.id == lease.id)
                    return session.scalars(found).one()
                case Action.CANCEL:
                    ending = Ending("cancelled", outcome.message)
                case Action.FAIL:
                    ending = Ending("failed", outcome.message, error=error)
            assert ending is not None
            done = lifecycle.finish(session, lease, ending)
            return ending.status if done else "lease lost"


def read_batch(run_dir: RunDir, offset: int) -> tuple[list[Event], int, str]:
    """Return the next events, the offset behind them, and what is wrong with the line after."""
    events: list[Event] = []
    try:
        for event, behind in read_events(run_dir.events, offset):
            events.append(event)
            offset = behind
            if len(events) >= MAX_EVENTS:
                break
    except ValidationError as error:
        return events, offset, str(error)
    return events, offset, ""


def _broken(error: Exception) -> Outcome:
    """Return the outcome of an attempt that this worker itself could not carry on."""
    message = f"the worker could not run this: {type(error).__name__}: {error}"
    hint = "look at the worker's log, its disk and its settings"
    return Outcome(
        Action.REPEAT, message, make_error("worker_error", message, hint=hint, retryable=True)
    )
