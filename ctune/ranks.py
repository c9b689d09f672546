"""One run in several processes: torchrun starts one per GPU, and they end together.

worker -> launcher (`ctune.run`) -> torchrun -> ranks (`python -m ctune.ranks RUN_DIR`)

The launcher is the child that the worker knows: it holds the run directory, is asked to stop, and
says the run's last word, which it makes of the ranks' words. torchrun ends all ranks when one
fails. Who is killed takes everyone below along, by the parent-death signal.
"""

import functools
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping

from ctune.child import StopRequest, StopRequested, arm_parent_death, run_rank
from ctune.device import choose_device
from ctune.distributed import World
from ctune.errors import CtuneError, RankLostError
from ctune.events import LAST_WORDS, Event, EventWriter, Failed, Finished, Stopped, read_events
from ctune.pipeline import Run, RunFile
from ctune.rundir import RunDir
from ctune.schema import JsonObject

POLL_S = 0.1
SHUTDOWN_S = 30
"""Seconds that torchrun gives ranks that it asks to stop, where `CTUNE_GRACE_S` says nothing."""


class RankFailedError(CtuneError):
    """What a rank failed with, in its own words."""

    def __init__(self, word: Failed) -> None:
        super().__init__(word.message, hint=word.hint, code=word.code)
        self.fault = word.fault
        self.retryable = word.retryable


def run_with_its_gpus(run_dir: RunDir, events: EventWriter, stop: StopRequest) -> JsonObject:
    """Do the run of a run directory: in this process, or for several GPUs in one process each.

    Returns:
        `Finished.result`.

    Raises:
        CtuneError: the run cannot be done; the error says why and what to do.
        StopRequested: a stop was asked for; the last checkpoint is complete.
    """
    file = RunFile.model_validate_json(run_dir.config.read_bytes())
    gpus = file.config.resources.gpus or 0
    if gpus > 1:
        choose_device(gpus)  # refuses at once where there are not as many
        return run_ranks(run_dir, events, stop, num_ranks=gpus)
    return Run(file, run_dir.create(), events=events, stop=stop).execute()


def run_ranks(
    run_dir: RunDir, events: EventWriter, stop: StopRequest, *, num_ranks: int
) -> JsonObject:
    """Do the run of a run directory in `num_ranks` processes; see `run_with_its_gpus`.

    Raises:
        RankLostError: a rank ended without a word.
    """
    stop.check()
    shutil.rmtree(run_dir.ranks, ignore_errors=True)
    run_dir.ranks.mkdir(parents=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--local-addr", "127.0.0.1", "--nproc-per-node", str(num_ranks)]
    torchrun = subprocess.Popen(
        [*command, "-m", "ctune.ranks", str(run_dir.root)],
        env=rank_environment(os.environ, num_ranks),
        preexec_fn=functools.partial(arm_parent_death, os.getpid()),
        process_group=0,  # Ctrl-C reaches the launcher alone, which asks
    )
    asked = False
    try:
        while torchrun.poll() is None:
            if stop.requested and not asked:
                torchrun.send_signal(signal.SIGTERM)
                asked = True
            time.sleep(POLL_S)
    finally:
        torchrun.kill()
        torchrun.wait()
        events.catch_up()
    return joint_result(last_words(run_dir, num_ranks), num_ranks, stop)


def rank_environment(environment: Mapping[str, str], num_ranks: int) -> dict[str, str]:
    """Return the environment of torchrun and the ranks, all on this machine."""
    grace_s = float(environment.get("CTUNE_GRACE_S") or SHUTDOWN_S)
    defaults = {
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // num_ranks)),
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(math.ceil(grace_s)),
    }
    return defaults | dict(environment)


def last_words(run_dir: RunDir, num_ranks: int) -> dict[int, Event]:
    """Return what each rank said last; a rank that was killed is missing."""
    words: dict[int, Event] = {}
    for rank in range(num_ranks):
        for event, _ in read_events(run_dir.rank_events(rank)):
            if isinstance(event, LAST_WORDS):
                words[rank] = event
    return words


def joint_result(words: Mapping[int, Event], num_ranks: int, stop: StopRequest) -> JsonObject:
    """Return the run's result, or raise what kept it from one.

    The first failure that is not itself the loss of another rank counts before all else: the other
    ranks' words follow from it.

    Raises:
        RankFailedError: a rank failed.
        StopRequested: the ranks were asked to stop.
        RankLostError: a rank ended without a word.
    """
    failures = sorted(
        (word for word in words.values() if isinstance(word, Failed)), key=lambda word: word.time
    )
    causes = [word for word in failures if word.code != RankLostError.code]
    if causes:
        raise RankFailedError(causes[0])
    stop.check()
    silent = [str(rank) for rank in range(num_ranks) if rank not in words]
    if silent:
        raise RankLostError(
            f"process {' and '.join(silent)} of {num_ranks} ended without a word",
            hint="the log says with which signal; SIGKILL means most often that the machine ran out"
            " of memory",
        )
    for word in words.values():
        if isinstance(word, Stopped):
            raise StopRequested(word.reason)
    if failures:
        raise RankFailedError(failures[0])
    main = words[0]
    assert isinstance(main, Finished)
    return main.result


def rank_body(run_dir: RunDir, events: EventWriter, stop: StopRequest) -> JsonObject:
    """Do this rank's part of the run."""
    file = RunFile.model_validate_json(run_dir.config.read_bytes())
    device = choose_device(file.config.resources.gpus, int(os.environ["LOCAL_RANK"]))
    with World.from_environment(gpu=device.type == "cuda") as world:
        return Run(file, run_dir.create(), events=events, stop=stop, world=world).execute()


if __name__ == "__main__":
    sys.exit(run_rank(rank_body, int(os.environ["RANK"])))
