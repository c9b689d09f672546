"""Whole runs in two processes: results, ends of every kind, and that nobody is left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ctune.checkpoint import checkpoint_name
from ctune.child import StopRequest, StopRequested
from ctune.errors import CtuneError, RankLostError
from ctune.events import CheckpointSaved, Event, EventBase, Failed, Finished, Metrics, Stopped
from ctune.ranks import joint_result, rank_environment
from ctune.rundir import RunDir
from tests.ctune.test_pipeline import events, finish, prepare, saved, start
from tests.squares import tiny_config
from tests.workers.processes import children_of

TWO = "tests.ctune.two_ranks"
TIMEOUT_S = 120


def start_two(run_dir: RunDir) -> subprocess.Popen[bytes]:
    return start(run_dir, TWO)


def finish_two(run_dir: RunDir) -> Finished:
    return finish(run_dir, TWO)


def wait_until(condition: Callable[[], bool], launcher: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        assert launcher.poll() is None or condition()
        time.sleep(0.01)


def wait_for(run_dir: RunDir, launcher: subprocess.Popen[bytes], stage: str, step: int) -> None:
    told = saved(stage, step)
    wait_until(lambda: any(told(event) for event in events(run_dir)), launcher)


def rank_pid(run_dir: RunDir, rank: int) -> int:
    """Return the process id of a rank, which torchrun tells it its number in the environment."""
    for pid in children_of(run_dir.root.parent):
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in environment:
            return pid
    raise AssertionError(f"no rank {rank}")


def nobody_left(run_dir: RunDir) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while children_of(run_dir.root.parent):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def metrics(*run_dirs: RunDir) -> dict[tuple[str, int, str], float | None]:
    """Return (stage, step, name) -> value, of a later attempt where there are several."""
    return {
        (event.stage, event.step, name): value
        for run_dir in run_dirs
        for event in events(run_dir)
        if isinstance(event, Metrics)
        for name, value in event.values.items()
        if name not in ("images_per_s", "data_wait")
    }


def assert_close(reference: RunDir, *attempts: RunDir) -> None:
    """The last attempt ended like the reference, to rounding."""
    expected = load_file(reference.model / "model.safetensors")
    tensors = load_file(attempts[-1].model / "model.safetensors")
    for name, tensor in expected.items():
        torch.testing.assert_close(tensors[name], tensor, rtol=1e-3, atol=1e-4)
    values, found = metrics(reference), metrics(*attempts)
    assert found.keys() == values.keys()
    for key, value in values.items():
        assert found[key] == pytest.approx(value, rel=1e-2, abs=1e-3), key


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, store: Path) -> RunDir:
    run_dir = prepare(tmp_path_factory.mktemp("alone") / "run", store, tiny_config())
    finish(run_dir)
    return run_dir


def test_a_killed_rank_ends_the_run_and_the_next_attempt_ends_like_one_process(
    tmp_path: Path, store: Path, alone: RunDir
) -> None:
    run_dir = prepare(tmp_path / "run", store, tiny_config())
    launcher = start_two(run_dir)
    wait_for(run_dir, launcher, "contrastive", 3)
    os.kill(rank_pid(run_dir, 1), signal.SIGKILL)
    assert launcher.wait(TIMEOUT_S) == 1
    nobody_left(run_dir)
    last = events(run_dir)[-1]
    assert isinstance(last, Failed)
    assert (last.code, last.fault, last.retryable) == ("rank_lost", "system", True)
    assert "process 1 of 2" in last.message
    result = finish_two(run_dir).result
    assert [event.seq for event in events(run_dir)] == list(range(len(events(run_dir))))
    assert result["evaluation"]["after"]["classifier"]["top1"] >= 0.9
    assert_close(alone, run_dir)


@pytest.mark.slow
def test_asked_to_stop_it_goes_on_with_two_bit_for_bit_and_with_one_to_rounding(
    tmp_path: Path, store: Path, alone: RunDir
) -> None:
    whole = prepare(tmp_path / "whole" / "run", store, tiny_config())
    finish_two(whole)
    first = prepare(tmp_path / "stopped" / "a1", store, tiny_config())
    launcher = start_two(first)
    wait_for(first, launcher, "contrastive", 3)
    launcher.send_signal(signal.SIGTERM)
    assert launcher.wait(TIMEOUT_S) == 0
    nobody_left(first)
    assert isinstance(events(first)[-1], Stopped)
    two = prepare(tmp_path / "stopped" / "a2", store, tiny_config(), (first.root,))
    finish_two(two)
    expected = load_file(whole.model / "model.safetensors")
    tensors = load_file(two.model / "model.safetensors")
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert metrics(first, two) == metrics(whole)
    one = prepare(tmp_path / "stopped" / "a3", store, tiny_config(), (first.root,))
    finish(one)
    assert_close(alone, first, one)


@pytest.mark.slow
def test_who_is_killed_takes_everyone_below_along(tmp_path: Path, store: Path) -> None:
    config = tiny_config()
    config["method"]["contrastive"]["epochs"] = 10_000
    for number, depth in enumerate(("launcher", "torchrun")):
        run_dir = prepare(tmp_path / depth / "run", store, config)
        launcher = start_two(run_dir)
        wait_for(run_dir, launcher, "contrastive", 1)
        (torchrun,) = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        os.kill([launcher.pid, int(torchrun)][number], signal.SIGKILL)
        launcher.wait(TIMEOUT_S)
        nobody_left(run_dir)


@pytest.mark.slow
def test_both_ranks_finish_early_at_the_same_step(tmp_path: Path, store: Path) -> None:
    config = tiny_config()
    config["method"]["contrastive"]["epochs"] = 10_000
    run_dir = prepare(tmp_path / "run", store, config)
    launcher = start_two(run_dir)
    wait_for(run_dir, launcher, "contrastive", 1)
    run_dir.finish.touch()
    assert launcher.wait(TIMEOUT_S) == 0
    last = events(run_dir)[-1]
    assert isinstance(last, Finished)
    assert last.result["stopped_early"]["stage"] == "contrastive"
    assert "classifier" in last.result["evaluation"]["after"]


@pytest.mark.slow
def test_a_rank_that_hangs_costs_no_more_than_the_grace(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config()
    config["method"]["contrastive"]["epochs"] = 10_000
    run_dir = prepare(tmp_path / "run", store, config)
    monkeypatch.setenv("CTUNE_GRACE_S", "2")
    launcher = start_two(run_dir)
    wait_for(run_dir, launcher, "contrastive", 1)
    os.kill(rank_pid(run_dir, 1), signal.SIGSTOP)
    launcher.send_signal(signal.SIGTERM)
    launcher.wait(TIMEOUT_S)
    nobody_left(run_dir)
    assert not isinstance(events(run_dir)[-1], Finished)


@pytest.mark.slow
def test_when_the_supervisor_is_killed_the_ranks_save_and_end(tmp_path: Path, store: Path) -> None:
    config = tiny_config()
    config["method"]["contrastive"]["epochs"] = 10_000
    run_dir = prepare(tmp_path / "run", store, config)
    code = (
        "import os, subprocess, sys\n"
        "told = {'CTUNE_PARENT_PID': str(os.getpid()), 'CTUNE_GRACE_S': '60'}\n"
        f"command = [sys.executable, '-m', '{TWO}', sys.argv[1]]\n"
        "subprocess.run(command, env=os.environ | told)\n"
    )
    with run_dir.log.open("ab") as log:
        supervisor = subprocess.Popen(
            [sys.executable, "-c", code, str(run_dir.root)],
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    wait_for(run_dir, supervisor, "contrastive", 1)
    supervisor.kill()
    supervisor.wait(TIMEOUT_S)
    nobody_left(run_dir)
    last = events(run_dir)[-1]
    assert isinstance(last, Stopped)
    assert last.reason == "the supervisor died"
    at = max(event.step for event in events(run_dir) if isinstance(event, CheckpointSaved))
    assert (run_dir.checkpoints / checkpoint_name("contrastive", at)).is_dir()


def test_more_gpus_than_there_are(tmp_path: Path, store: Path) -> None:
    if torch.cuda.device_count() > 1:
        pytest.skip("there are")
    config = tiny_config(resources={"gpus": 2})
    run_dir = prepare(tmp_path / "run", store, config)
    assert start(run_dir).wait(TIMEOUT_S) == 1
    (last,) = events(run_dir)
    assert isinstance(last, Failed)
    assert (last.code, last.fault) == ("invalid_config", "user")
    assert "resources.gpus is 2" in last.message


@pytest.mark.slow
def test_what_a_rank_says_last_is_the_last_word(tmp_path: Path, store: Path) -> None:
    config = tiny_config()
    config["method"]["contrastive"] |= {"lr": 1e30, "clip_grad_norm": None, "optimizer": "sgd"}
    run_dir = prepare(tmp_path / "run", store, config)
    assert start_two(run_dir).wait(TIMEOUT_S) == 1
    last = events(run_dir)[-1]
    assert isinstance(last, Failed)
    assert (last.code, last.fault, last.retryable) == ("diverged", "user", False)
    assert "learning rate" in last.hint
    nobody_left(run_dir)


def lost(time_s: float) -> EventBase:
    return Failed.of(RankLostError("gone")).model_copy(update={"time": time_s})


def failed(code: str, time_s: float) -> Failed:
    return Failed(code=code, message=code, fault="user", time=time_s)


def joint(*words: EventBase | None, stop: StopRequest | None = None) -> dict[str, object]:
    said: dict[int, Event] = {n: word for n, word in enumerate(words) if word is not None}  # type: ignore[misc]
    return joint_result(said, len(words), stop or StopRequest())


def test_the_main_rank_has_the_result() -> None:
    assert joint(Finished(result={"a": 1}), Finished(result={})) == {"a": 1}


@pytest.mark.parametrize(
    "words",
    [
        (lost(3.0), failed("diverged", 2.0)),
        (failed("diverged", 2.0), failed("internal", 2.5)),
        (Stopped(reason="asked to stop"), failed("diverged", 2.0)),
        (None, failed("diverged", 2.0)),
    ],
)
def test_the_first_cause_is_the_last_word(words: tuple[EventBase | None, ...]) -> None:
    with pytest.raises(CtuneError) as caught:
        joint(*words)
    assert (caught.value.error_code, caught.value.fault) == ("diverged", "user")
    with pytest.raises(CtuneError, match="diverged"):
        joint(*words[::-1])


def test_a_rank_without_a_word_is_lost_unless_the_run_was_asked_to_stop() -> None:
    for words in ((None, lost(1.0)), (None, Stopped(reason="asked")), (None, Finished(result={}))):
        with pytest.raises(RankLostError, match="process 0 of 2"):
            joint(*words)
    with pytest.raises(RankLostError, match="process 0 and 1 of 2"):
        joint(None, None)
    with pytest.raises(CtuneError, match="gone"):
        joint(lost(1.0), Finished(result={}))
    stop = StopRequest()
    stop.request("asked to stop")
    with pytest.raises(StopRequested, match="asked to stop"):
        joint(None, lost(1.0), stop=stop)


def test_ranks_that_stop_by_themselves() -> None:
    with pytest.raises(StopRequested, match="lease lost"):
        joint(Stopped(reason="lease lost"), Stopped(reason="lease lost"))


def test_ranks_share_the_cores_and_the_grace() -> None:
    told = rank_environment({"CTUNE_GRACE_S": "7.5", "HOME": "/x"}, 2)
    assert (told["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"], told["HOME"]) == ("8", "/x")
    assert int(told["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2)
    assert rank_environment({"OMP_NUM_THREADS": "3"}, 2)["OMP_NUM_THREADS"] == "3"
