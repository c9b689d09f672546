"""Hints to the broker: never in the caller's way, and harmless to lose."""

import json
import logging

import pytest
import redis
from pydantic import SecretStr

from service.queue import DISPATCH, MAX_WAITING, QUEUE, Announcer
from service.settings import Settings
from tests.servers import Server, free_port
from tests.workers.rows import wait_until


def _settings(url: str) -> Settings:
    return Settings(broker_url=SecretStr(url))


def _waiting(url: str) -> int:
    with redis.Redis.from_url(url) as client:
        count: int = client.llen(QUEUE)
    return count


def test_a_hint_names_the_row(killable_redis: Server) -> None:
    announcer = Announcer(_settings(killable_redis.url))
    announcer.announce("job", "job_1")
    wait_until(lambda: _waiting(killable_redis.url) == 1)
    with redis.Redis.from_url(killable_redis.url) as client:
        message = json.loads(client.lindex(QUEUE, 0))
    assert message["headers"]["task"] == DISPATCH
    assert message["headers"]["argsrepr"] == "('job', 'job_1')"
    announcer.close()


def test_without_a_broker_nothing_happens() -> None:
    announcer = Announcer(Settings())
    announcer.announce("job", "job_1")
    announcer.close()


@pytest.mark.slow
@pytest.mark.parametrize("state", ["frozen", "down"])
def test_a_broker_that_does_not_answer_costs_the_caller_nothing(
    killable_redis: Server, state: str, caplog: pytest.LogCaptureFixture
) -> None:
    announcer = Announcer(_settings(killable_redis.url))
    if state == "frozen":
        killable_redis.freeze()
    else:
        killable_redis.kill()
    with caplog.at_level(logging.WARNING, logger="service.queue"):
        for number in range(MAX_WAITING + 10):
            announcer.announce("job", f"job_{number}")
        wait_until(lambda: "the broker does not answer" in caplog.text, timeout_s=30)
    if state == "frozen":
        killable_redis.thaw()
    else:
        killable_redis.start()
    announcer.announce("job", "job_later")
    wait_until(lambda: _waiting(killable_redis.url) >= 1, timeout_s=30)
    announcer.close()


def test_closing_does_not_hang() -> None:
    announcer = Announcer(_settings(f"redis://127.0.0.1:{free_port()}/0"))
    announcer.announce("job", "job_1")
    announcer.close(timeout_s=0.5)
