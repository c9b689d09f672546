"""The Celery producer: tells the workers that a row waits. The row is the job, this only a hint.

Publishing never happens inside a request: a broker that hangs would hang the client. A hint that
is lost costs at most `resend_s`, since the sweeper sends it again.
"""

import logging
import queue
import threading
from typing import Literal

from celery import Celery

from service.settings import Settings

log = logging.getLogger(__name__)

DISPATCH = "ctune.dispatch"
QUEUE = "ctune"
Kind = Literal["job", "dataset", "calibration"]
MAX_WAITING = 1000
SOCKET_TIMEOUT_S = 5
CONNECT_TIMEOUT_S = 3


def make_celery(settings: Settings) -> Celery:
    """Return the Celery application of both sides; nothing is connected yet."""
    app = Celery("ctune", broker=settings.broker, set_as_current=False)
    app.conf.update(
        result_backend=None,
        task_ignore_result=True,
        task_acks_late=False,
        task_reject_on_worker_lost=False,
        task_serializer="json",
        accept_content=["json"],
        task_default_queue=QUEUE,
        worker_prefetch_multiplier=1,
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_hijack_root_logger=False,
        worker_enable_remote_control=False,
        broker_connection_timeout=CONNECT_TIMEOUT_S,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options=_transport_options(settings),
    )
    return app


def _transport_options(settings: Settings) -> dict[str, object]:
    if (settings.broker or "").startswith(("redis", "sentinel")):
        return {
            "socket_timeout": SOCKET_TIMEOUT_S,
            "socket_connect_timeout": CONNECT_TIMEOUT_S,
            "socket_keepalive": True,
            "health_check_interval": 15,
            "visibility_timeout": 3600,
        }
    return {}


class Announcer:
    """Publishes hints from a background thread; without a broker it does nothing."""

    def __init__(self, settings: Settings) -> None:
        self._app = make_celery(settings) if settings.broker else None
        self._waiting: queue.Queue[tuple[Kind, str] | None] = queue.Queue(MAX_WAITING)
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def announce(self, kind: Kind, row_id: str) -> None:
        """Tell the workers, soon and without waiting, that a row is queued."""
        if self._app is None:
            return
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="announcer", daemon=True)
                self._thread.start()
        try:
            self._waiting.put_nowait((kind, row_id))
        except queue.Full:
            log.warning("the broker is slow: %s %s waits for the sweeper", kind, row_id)

    def close(self, timeout_s: float = 2.0) -> None:
        """Send what waits, for at most `timeout_s`, and disconnect."""
        if self._thread is not None:
            try:
                self._waiting.put(None, timeout=timeout_s)
            except queue.Full:
                log.warning("closing with hints unsent; the sweeper sends them again")
                return
            self._thread.join(timeout_s)

    def _run(self) -> None:
        assert self._app is not None
        while (hint := self._waiting.get()) is not None:
            try:
                self._app.send_task(DISPATCH, args=hint, queue=QUEUE, retry=False)
            except Exception as error:  # of whatever transport; the thread must live on
                log.warning("the broker does not answer: hints wait", exc_info=error)
                self._drop()
        self._app.close()

    def _drop(self) -> None:
        """Forget the hints that wait: each would run into the same timeout."""
        try:
            while self._waiting.get_nowait() is not None:
                pass
            self._waiting.put_nowait(None)
        except queue.Empty:
            return
