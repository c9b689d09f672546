"""SIGKILL in the middle of stage 1, of the child, of the worker, of both: the job still ends well.

The service restarts what died and the job goes on by itself from its last checkpoint. The final
metrics and weights are those of a run that nobody disturbed, bit for bit. So are those of a job
that was paused and resumed; one that was stopped ends early, with a model.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ctune.client import Client
from ctune.client_http import ConflictError, ServerEvent
from ctune.events import CheckpointSaved, read_events
from ctune.rundir import RunDir
from ctune.schema import JsonObject
from tests.e2e.running import Running, command_line, until
from tests.squares import tiny_config, write_archive

pytestmark = pytest.mark.timeout(600)

SCALED = {
    "CTUNE_BEAT_S": "0.5",
    "CTUNE_LEASE_S": "10",
    "CTUNE_FENCE_S": "6",
    "CTUNE_REAP_S": "0.5",
    "CTUNE_RETRY_BACKOFF_S": "0.1",
}
KILL_AT_STEP = 6


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    made = Running(tmp_path_factory.mktemp("killed") / "data", SCALED)
    try:
        yield made.wait_ready()
    finally:
        made.discard()


@pytest.fixture(scope="module")
def client(service: Running) -> Iterator[Client]:
    with Client(service.url) as made:
        yield made


@pytest.fixture(scope="module")
def dataset(client: Client, tmp_path_factory: pytest.TempPathFactory) -> str:
    archive = write_archive(tmp_path_factory.mktemp("archive") / "squares.zip")
    return str(client.datasets.wait(client.datasets.push(archive)["id"])["id"])


@pytest.fixture(scope="module")
def undisturbed(client: Client, dataset: str) -> JsonObject:
    job = client.jobs.wait(client.jobs.create(body(dataset))["id"])
    assert (job["status"], job["attempt"]) == ("succeeded", 1)
    return outcome(client, job)


def body(dataset: str) -> dict[str, Any]:
    """Return a job whose stage 1 has 16 steps with a checkpoint after each."""
    made = tiny_config(dataset=dataset)
    made["method"]["contrastive"] |= {"epochs": 4}
    return made


def outcome(client: Client, job: JsonObject) -> JsonObject:
    """Return everything that must not depend on what happened on the way."""
    losses = client.jobs.metrics(job["id"], name="loss")["series"]
    files = client.models.get(job["result"]["model"])["info"]["files"]
    weights = {name: sha for name, sha in files.items() if name.endswith(".safetensors")}
    return {"evaluation": job["result"]["evaluation"], "losses": losses, "weights": weights}


def find_child(service: Running, job: str) -> int:
    """Return the process id of a job's training."""
    pids = [
        pid
        for pid in service.descendants()
        if "ctune.run" in (words := command_line(pid)) and any(job in word for word in words)
    ]
    assert len(pids) == 1, service.log()
    return pids[0]


def reached(run_dir: RunDir, step: int) -> bool:
    return any(
        isinstance(event, CheckpointSaved) and event.stage == "contrastive" and event.step >= step
        for event, _ in read_events(run_dir.events)
    )


@pytest.mark.parametrize("victims", [("child",), ("worker",), ("child", "worker")], ids="+".join)
def test_a_job_survives_a_kill_in_stage_1(
    service: Running,
    client: Client,
    dataset: str,
    undisturbed: JsonObject,
    victims: tuple[str, ...],
) -> None:
    job = client.jobs.create(body(dataset))["id"]
    first = RunDir(service.data_dir / "jobs" / job / "a1")
    until(lambda: reached(first, KILL_AT_STEP), 120, service.log)
    pids = {"worker": service.children()["workers.app"], "child": find_child(service, job)}
    # Stopped first, so that neither of the two sees the other die.
    for victim in victims:
        os.kill(pids[victim], signal.SIGSTOP)
    for victim in victims:
        os.kill(pids[victim], signal.SIGKILL)
    ended = client.jobs.wait(job)
    assert ended["status"] == "succeeded", ended["error"]
    assert ended["attempt"] == 2
    assert not reached(first, 16), "killed before the end of the stage"
    assert outcome(client, ended) == undisturbed
    events = client.http.data_of(f"/jobs/{job}/events", {"limit": 200})
    resumed = [e for e in reversed(events) if e["type"] == "started"]
    assert ["goes on from contrastive" in e["message"] for e in resumed] == [False, True]


def freeze(service: Running, job: str) -> int:
    """Stop a job's training in the middle of stage 1 and return its process id."""
    run_dir = RunDir(service.data_dir / "jobs" / job / "a1")
    until(lambda: reached(run_dir, KILL_AT_STEP), 120, service.log)
    pid = find_child(service, job)
    os.kill(pid, signal.SIGSTOP)
    return pid


def has_pending(pid: int, number: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    masks = [
        int(line.split()[1], 16)
        for line in status.splitlines()
        if line.startswith("S") and line.split(":")[0] in ("SigPnd", "ShdPnd")
    ]
    return any(mask >> (number - 1) & 1 for mask in masks)


def test_a_paused_and_resumed_job_ends_like_one_that_nobody_disturbed(
    service: Running, client: Client, dataset: str, undisturbed: JsonObject
) -> None:
    job = client.jobs.create(body(dataset))["id"]
    told: list[ServerEvent] = []
    watcher = threading.Thread(target=lambda: told.extend(client.jobs.watch(job)))
    watcher.start()
    pid = freeze(service, job)
    assert client.jobs.pause(job)["pause_requested_at"] is not None
    until(lambda: has_pending(pid, signal.SIGTERM), 30, service.log)
    os.kill(pid, signal.SIGCONT)
    until(lambda: client.jobs.get(job)["status"] == "paused", 60, service.log)
    with pytest.raises(ConflictError, match="resume"):
        client.jobs.stop(job)
    assert watcher.is_alive(), "a pause is not the end"
    assert client.jobs.resume(job)["status"] == "queued"
    ended = client.jobs.wait(job)
    assert (ended["status"], ended["attempt"]) == ("succeeded", 2)
    assert outcome(client, ended) == undisturbed
    watcher.join(30)
    statuses = [event.data["data"]["status"] for event in told if event.kind == "status"]
    asked = ["running", "running"]  # the attempt starts; pausing was asked for
    assert statuses == ["queued", *asked, "paused", "queued", "running", "succeeded"]
    assert [event.kind for event in told].count("done") == 1


def test_a_stopped_job_leaves_a_model(service: Running, client: Client, dataset: str) -> None:
    long = body(dataset)
    long["method"]["contrastive"]["epochs"] = 2000
    job = client.jobs.create(long)["id"]
    pid = freeze(service, job)
    command = [sys.executable, "-m", "cli.main", "jobs", "stop", job, "--url", service.url]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    until((service.data_dir / "jobs" / job / "a1" / "finish").exists, 30, service.log)
    os.kill(pid, signal.SIGCONT)
    ended = client.jobs.wait(job)
    stopped = ended["result"]["stopped_early"]
    assert stopped["stage"] == "contrastive"
    assert KILL_AT_STEP <= stopped["step"] < stopped["total_steps"] == 8000
    assert "classifier" in ended["result"]["evaluation"]["after"]
    assert client.models.get(ended["result"]["model"])["info"]["classes"]
    codes = [warning["data"]["code"] for warning in client.jobs.report(job)["warnings"]]
    assert codes.count("stopped_early") == 1
