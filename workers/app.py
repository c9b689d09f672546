"""The worker process: `python -m workers.app`.

With a broker it is a Celery worker whose boot step hosts the supervisor: the task `ctune.dispatch`
only wakes it and returns in milliseconds, so that no setting of the broker (visibility timeout,
consumer timeout, prefetch, acknowledgement) has a say in what happens to an hour-long job. Without
one it is the supervisor alone. Either way the supervisor works while the broker is down.
"""

import logging
import os
import signal
import sys
import time
from types import FrameType
from typing import Any

from celery import Celery, bootsteps

from service.db import Database, check_migrated, make_engine
from service.queue import DISPATCH, QUEUE, Kind, make_celery
from service.settings import Settings, get_settings
from workers.supervisor import Supervisor

log = logging.getLogger(__name__)

TICK_S = 0.2


def make_worker(settings: Settings, supervisor: Supervisor) -> Celery:
    """Return the Celery application of a worker that hosts `supervisor`."""
    app = make_celery(settings)
    app.conf.update(
        worker_concurrency=1,
        worker_pool="threads",
        worker_disable_prefetch=(settings.broker or "").startswith(("redis", "sentinel")),
        worker_send_task_events=False,
    )

    def dispatch(kind: Kind, row_id: str) -> None:
        """Wake the supervisor: a row waits; which one it takes is the database's business."""
        log.debug("hint: %s %s", kind, row_id)
        supervisor.wake()

    app.task(dispatch, name=DISPATCH, ignore_result=True)

    class SupervisorStep(bootsteps.StartStopStep):  # type: ignore[misc]
        """Starts the supervisor with the worker and stops it with it."""

        requires = {"celery.worker.components:Pool"}

        def start(self, _worker: Any) -> None:
            supervisor.start()

        def stop(self, _worker: Any) -> None:
            supervisor.stop()

        def terminate(self, _worker: Any) -> None:
            supervisor.stop()

    app.steps["worker"].add(SupervisorStep)
    return app


def run_celery(settings: Settings, supervisor: Supervisor) -> None:
    """Run a Celery worker until it is told to stop, or its supervisor breaks."""
    supervisor.on_broken = lambda: os.kill(os.getpid(), signal.SIGTERM)
    arguments = ["worker", "--loglevel=INFO", f"--queues={QUEUE}"]
    quiet = ["--without-mingle", "--without-gossip", "--without-heartbeat"]
    make_worker(settings, supervisor).worker_main([*arguments, *quiet])


def run_alone(supervisor: Supervisor) -> None:
    """Run the supervisor until SIGTERM or Ctrl-C; a second one ends the process at once."""
    asked: list[int] = []

    def on_signal(number: int, _frame: FrameType | None) -> None:
        asked.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    supervisor.start()
    while not asked and supervisor.alive:
        time.sleep(TICK_S)
    supervisor.stop()


def main() -> int:
    """Run a worker with the settings of the environment and return the exit code.

    Raises:
        DatabaseSetupError: the tables are not those of this version.
        DatabaseUnavailableError: the database does not answer.
    """
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    settings = get_settings()
    database = Database(make_engine(settings))
    check_migrated(database)
    supervisor = Supervisor(settings, database)
    if settings.broker:
        run_celery(settings, supervisor)
    else:
        run_alone(supervisor)
    return 1 if supervisor.broken else 0


if __name__ == "__main__":
    sys.exit(main())
