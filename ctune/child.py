"""What every supervised child process does: arm, lock, watch, run a body, say one last word.

A child must end when nobody needs it any more, whatever its own code is doing:

- its parent dies: the kernel sends SIGTERM (``PR_SET_PDEATHSIG``), and the watch thread looks too;
- the lease is not renewed for ``CTUNE_FENCE_S``: somebody else may own the job by now;
- SIGTERM or Ctrl-C.

Each of these asks the body to stop (`StopRequest`). ``CTUNE_GRACE_S`` later, and in any case before
the lease of ``CTUNE_LEASE_S`` is over, the process group is killed, body or not. The watch is a
thread woken through the signal pipe, so that a main thread stuck in C code cannot delay it, and it
keeps a kernel timer wound, so that even a process whose Python is stuck as a whole ends. Never
imports torch.
"""

import ctypes
import errno
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from types import FrameType

from ctune.errors import CtuneError, DiskFullError, RunInUseError
from ctune.events import EventBase, EventWriter, Failed, Finished, Stopped
from ctune.rundir import RunDir
from ctune.schema import JsonObject

BEGUN = time.monotonic()
"""When this process began, nearly: children import this module before anything large."""
PARENT_PID = os.getppid()
PR_SET_PDEATHSIG = 1
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
ASK_SIGNALS = (signal.SIGTERM, signal.SIGINT)
LEASE_SHARE = 0.95
"""Part of the lease after which a child that was asked to stop is killed: its job may start again
elsewhere when the lease is over, and we saw its renewal a little late."""
BACKSTOP_S = 2.0
"""Seconds by which the kernel timer trails the watch thread's own kill."""


class StopRequested(Exception):  # noqa: N818 (not an error: the body was asked)
    """Raised by `StopRequest.check`; the body lets it through once its state is safe."""


class StopRequest:
    """Whether, when and why this process was asked to stop; the first reason stays."""

    def __init__(self) -> None:
        self.requested = False
        self.reason = ""
        self.since: float | None = None
        self.finish_requested = False
        """Another wish: end the training early, evaluate, and keep the model."""

    def request(self, reason: str) -> None:
        """Ask the body to stop; later requests change nothing."""
        if not self.requested:
            self.reason = reason
            self.since = time.monotonic()
            self.requested = True

    def check(self) -> None:
        """Do nothing unless a stop was requested.

        Raises:
            StopRequested: a stop was requested.
        """
        if self.requested:
            raise StopRequested(self.reason)


Body = Callable[[RunDir, EventWriter, StopRequest], JsonObject]


def run_child(body: Body, argv: Sequence[str] | None = None) -> int:
    """Run `body` on the run directory named by the one argument and return the exit code.

    Exit codes: 0 finished or stopped, 1 failed, 2 wrong usage. Exactly one last word goes into
    `events.jsonl`, except when another process holds the directory: that file is then not ours.
    Works in the main thread only.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        print(f"expected one run directory, got {arguments}", file=sys.stderr)
        return 2
    run_dir = RunDir(Path(arguments[0]))
    stop = StopRequest()
    parent_pid = int(os.environ.get("CTUNE_PARENT_PID") or 0)
    with _watch(run_dir, stop, parent_pid=parent_pid):
        try:
            with run_dir.lock():
                events = EventWriter(run_dir.events)
                try:
                    return _say(events, _last_word(body, run_dir, events=events, stop=stop))
                finally:
                    events.close()
        except RunInUseError as error:
            print(f"{error.message}: {error.hint}", file=sys.stderr)
            return 1


def run_rank(body: Body, rank: int) -> int:
    """Run `body` as one of several processes of a run and return the exit code.

    Like `run_child`, but the launcher holds the run directory and makes the run's last word of the
    ranks' words (`ctune.ranks`). Other events come from rank 0 alone. A rank dies with its parent
    at once: nobody would wait for what it saved.
    """
    run_dir = RunDir(Path(sys.argv[1]))
    stop = StopRequest()
    with (
        _watch(run_dir, stop, parent_pid=PARENT_PID, death_signal=signal.SIGKILL),
        closing(EventWriter(run_dir.rank_events(rank))) as words,
        closing(EventWriter(run_dir.events)) if rank == 0 else nullcontext(words) as events,
    ):
        return _say(words, _last_word(body, run_dir, events=events, stop=stop))


def arm_parent_death(parent_pid: int, death_signal: signal.Signals = signal.SIGKILL) -> bool:
    """Have the kernel send `death_signal` when the parent dies; False: it is dead already.

    Linux counts the parent's *thread* that started this process: it must live as long as we do.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    return os.getppid() == parent_pid


def _last_word(body: Body, run_dir: RunDir, *, events: EventWriter, stop: StopRequest) -> EventBase:
    """Run the body and turn whatever comes of it into the last event."""
    try:
        stop.check()
        return Finished(result=body(run_dir, events, stop))
    except StopRequested as request:
        return Stopped(reason=str(request))
    except CtuneError as error:
        if error.fault == "system":
            traceback.print_exc()
        return Failed.of(error)
    except MemoryError:
        traceback.print_exc()
        return Failed(
            code="out_of_memory",
            message="the process ran out of host memory",
            hint="use smaller batches or images, or a machine with more memory",
            fault="user",
        )
    except (Exception, SystemExit) as error:  # noqa: BLE001 (reported as the last word)
        traceback.print_exc()
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            return _disk_full(error)
        return Failed(code="internal", message=f"{type(error).__name__}: {error}")


def _disk_full(error: OSError) -> Failed:
    where = error.filename or "the run directory"
    return Failed.of(
        DiskFullError(
            f"no space left while writing {where}",
            hint="free disk space; the run goes on from its last checkpoint",
        )
    )


def _say(events: EventWriter, word: EventBase) -> int:
    """Write the last word and return the exit code; a word that cannot be written is a failure."""
    try:
        events.write(word)
    except (OSError, TypeError, ValueError):
        traceback.print_exc()
        print(f"cannot write the last word: {word!r}", file=sys.stderr)
        return 1
    if isinstance(word, Failed):
        print(f"{word.code}: {word.message}", file=sys.stderr)
        return 1
    return 0


def _seconds(name: str) -> float | None:
    value = os.environ.get(name)
    return float(value) if value else None


class _Watch:
    """The thread that asks for a stop when the process should end, and enforces it."""

    def __init__(
        self, run_dir: RunDir, stop: StopRequest, *, parent_pid: int, wake_fd: int
    ) -> None:
        self.stop = stop
        self.wake_fd = wake_fd
        self.lease = run_dir.lease
        self.finish = run_dir.finish
        self.fence_s = _seconds("CTUNE_FENCE_S")
        self.lease_s = _seconds("CTUNE_LEASE_S")
        self.grace_s = _seconds("CTUNE_GRACE_S")
        self.parent_pid = parent_pid
        self.tick_s = min([1.0, *(s / 4 for s in (self.fence_s, self.grace_s) if s)])
        self.lease_content = self._read_lease()  # as old as this process, at least
        self.lease_seen = BEGUN
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._loop, name="ctune-watch", daemon=True)

    def asked(self, signum: int) -> None:
        """Note a signal; death of the parent arrives as SIGTERM and is told apart here."""
        if self.parent_pid and os.getppid() != self.parent_pid:
            self.stop.request("the supervisor died")
        else:
            self.stop.request("interrupted" if signum == signal.SIGINT else "asked to stop")

    def _loop(self) -> None:
        while not self.ended.is_set():
            readable, _, _ = select.select([self.wake_fd], [], [], self.tick_s)
            if self.ended.is_set():
                return
            signals = os.read(self.wake_fd, 512) if readable else b""
            for signum in signals:
                if signum in ASK_SIGNALS:
                    self.asked(signum)
            self._look()
            self.enforce()

    def _look(self) -> None:
        """Ask for a stop when the parent is gone or the lease is old; only our clock counts."""
        if self.finish.exists():
            self.stop.finish_requested = True
        if self.parent_pid and os.getppid() != self.parent_pid:
            self.stop.request("the supervisor died")
        if self.fence_s is None:
            return
        content = self._read_lease()
        if content is not None and content != self.lease_content:
            self.lease_content = content
            self.lease_seen = time.monotonic()
        elif time.monotonic() - self.lease_seen > self.fence_s:
            self.stop.request("lease lost")

    def _read_lease(self) -> bytes | None:
        try:
            return self.lease.read_bytes()
        except OSError:  # not written yet, or not readable: it counts as not renewed
            return None

    def enforce(self) -> None:
        """Kill the group once the grace is over; keep the kernel timer wound behind that."""
        if self.grace_s is None:
            return
        if self.stop.since is not None:
            end = self.stop.since + self.grace_s
        elif self.fence_s is not None:
            end = time.monotonic() + self.fence_s + self.grace_s
        else:
            return
        if self.lease_s is not None:  # whatever the grace, never beside a successor
            end = min(end, self.lease_seen + LEASE_SHARE * self.lease_s)
        left_s = end - time.monotonic()
        if left_s <= 0:
            _die()
        signal.setitimer(signal.ITIMER_REAL, left_s + BACKSTOP_S)


def _die() -> None:
    """Kill this process, with its group where it leads one."""
    sys.stderr.write("the grace period is over: killing this process\n")
    sys.stderr.flush()
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


@contextmanager
def _watch(
    run_dir: RunDir,
    stop: StopRequest,
    *,
    parent_pid: int,
    death_signal: signal.Signals = signal.SIGTERM,
) -> Iterator[None]:
    """Install the signal handlers and the watch thread, and take them away again at the end.

    Once a stop was requested the kernel timer stays wound: a process that then hangs while it
    exits is killed all the same.
    """
    wake_fd, signal_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    watch = _Watch(run_dir, stop, parent_pid=parent_pid, wake_fd=wake_fd)

    def on_signal(signum: int, frame: FrameType | None) -> None:
        del frame
        watch.asked(signum)
        if signum == signal.SIGINT:  # a second Ctrl-C ends the process at once
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    before = {name: signal.signal(name, on_signal) for name in ASK_SIGNALS}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, signal.SIG_DFL)
    wakeup_before = signal.set_wakeup_fd(signal_fd, warn_on_full_buffer=False)
    owner_pid = os.getpid()

    def restore() -> None:
        signal.set_wakeup_fd(wakeup_before)
        for name, handler in before.items():
            signal.signal(name, handler)

    def hold() -> None:  # a signal must not meet our handlers in a helper that was just forked
        if not watch.ended.is_set():
            signal.pthread_sigmask(signal.SIG_BLOCK, ASK_SIGNALS)

    def release() -> None:
        if not watch.ended.is_set():
            signal.pthread_sigmask(signal.SIG_UNBLOCK, ASK_SIGNALS)

    def restore_in_fork() -> None:  # a helper's signals are its own, not its parent's
        if os.getppid() == owner_pid and not watch.ended.is_set():
            restore()
        release()

    os.register_at_fork(before=hold, after_in_parent=release, after_in_child=restore_in_fork)
    if watch.parent_pid and not arm_parent_death(watch.parent_pid, death_signal):
        stop.request("the supervisor died")
    watch.enforce()
    watch.thread.start()
    try:
        yield
    finally:
        watch.ended.set()
        os.write(signal_fd, b"\0")
        watch.thread.join()
        if stop.requested and watch.grace_s is not None:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            before.pop(signal.SIGALRM)
        else:
            signal.setitimer(signal.ITIMER_REAL, 0)
        restore()
        os.close(wake_fd)
        os.close(signal_fd)
