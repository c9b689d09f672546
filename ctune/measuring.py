"""The calibration: what a run will take, measured for seconds.

Encoder, method and the one loop are those of the run, on its packed store. Only a sample of the
images is decoded and encoded; it stands for all of them, so that every number that a stage derives
from the data set is the run's own.
"""

import resource
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ctune.child import BEGUN, StopRequest
from ctune.device import synchronize
from ctune.estimate import MeasuredStage, Measurement
from ctune.events import EventWriter, StageStarted
from ctune.methods.base import Program, Stage, StagePlan
from ctune.model_dir import HEADS
from ctune.pipeline import Run, RunFile
from ctune.rundir import RunDir
from ctune.sampled_images import SampledImages
from ctune.samplers import ClassBalancedBatchSampler, EpochBatches, Indices
from ctune.schema import JsonObject
from ctune.seeding import seed_everything
from ctune.train import Hooks, fit

TRAINING_S = 12.0
"""Time for the steps of all stages together."""
MAX_STEPS = 20
TRIAL_IMAGES = 4
"""On a CPU, images of the steps that show whether there is time for whole ones."""
TRIAL_S = 1.0
PATIENT_STEPS = 3
"""At least so many where the first one loads kernels or compiles: its time says nothing."""
STEPS_IN_TIME = 3
"""Whole steps that there must be time for: one to warm up, two to measure."""


class FewerImages(EpochBatches):
    """The first rows of each batch of another sampler."""

    def __init__(self, whole: EpochBatches, batch_size: int) -> None:
        super().__init__(batch_size, seed=whole.seed)
        self._whole = whole

    def __len__(self) -> int:
        return len(self._whole)

    def batches(self, epoch: int) -> list[Indices]:
        """See the base class."""
        return [batch[: self.batch_size] for batch in self._whole.batches(epoch)]


class EnoughError(Exception):
    """Enough steps were measured."""


class Clock:
    """Ends a stage when its time is over, and says how long its steps took.

    It stands in the place of the learning rate, which the loop asks for once per step. A GPU works
    behind the program, so it is waited for where the measured steps begin and end.
    """

    def __init__(
        self, lr_at: Callable[[int], float], device: torch.device, limit_s: float, *, least: int
    ) -> None:
        self._lr_at = lr_at
        self._least = least
        self._device = device
        self._ends = time.perf_counter() + limit_s
        self._begun: list[float] = []
        self._ended: float | None = None

    def __call__(self, step: int) -> float:
        """Note that a step begins.

        Raises:
            EnoughError: no further step is needed.
        """
        steps = len(self._begun)
        over = time.perf_counter() > self._ends
        if steps > MAX_STEPS or (over and steps >= self._least):
            self.end()
            raise EnoughError
        if steps == 1:
            synchronize(self._device)
        self._begun.append(time.perf_counter())
        return self._lr_at(step)

    def end(self) -> None:
        """Note that the last step is over; a second call changes nothing."""
        if self._ended is None:
            synchronize(self._device)
            self._ended = time.perf_counter()

    def step_s(self) -> float:
        """Return the seconds per step after the end; the first, if others follow, warms up."""
        assert self._ended is not None
        measured = self._begun[1:] or self._begun
        return (self._ended - measured[0]) / len(measured)


class Calibration(Run):
    """Builds what a run builds and measures it.

    Args:
        share: processes that share every batch of the run; one of them is measured.
    """

    def __init__(
        self,
        file: RunFile,
        run_dir: RunDir,
        *,
        events: EventWriter,
        stop: StopRequest,
        share: int = 1,
    ) -> None:
        super().__init__(file, run_dir, events=events, stop=stop)
        self._share = share
        self._images: SampledImages = SampledImages(
            self._store,
            run_dir,
            labelled_only="labels" in self._config.method.NEEDS,
            emit=self._emit,
            stop=stop,
        )
        self._remarks: list[str] = []
        self._whole_batches = True
        if share > 1:
            self._remarks.append(
                f"measured on one GPU with 1/{share} of each batch; what {share} GPUs say to each"
                " other is not included"
            )

    def _execute(self) -> JsonObject:
        seed_everything(self._config.seed, "encoder")
        self._encoder = self._build_encoder()
        start_s = time.monotonic() - BEGUN
        self._emit(StageStarted(stage="encoding"))
        self._images.encode(self._encoder, "train", self._device)
        program = self._build_program()
        stages = [self._measure(program, plan) for plan in program.plans]
        heads = [program.modules[name] for name in HEADS if name in program.modules]
        exported = [self._encoder, *heads]
        found = Measurement(
            device=self._versions()["device"],
            at=time.time(),
            image_size_px=self._encoder.image_size_px,
            start_s=start_s,
            decode_images_per_s=self._images.decode_images_per_s,
            encode_images_per_s=self._images.encode_images_per_s,
            stages=stages,
            model_bytes=sum(tensor_bytes(module.state_dict()) for module in exported),
            memory_bytes=peak_memory_bytes(self._device) if self._whole_batches else None,
            remarks=self._remarks,
        )
        return found.model_dump(mode="json")

    def _measure(self, program: Program, plan: StagePlan) -> MeasuredStage:
        self._emit(StageStarted(stage=plan.name, total_steps=plan.total_steps))
        limit_s = TRAINING_S / len(program.plans)
        encoded = self._images.encoded
        stage = plan.start()
        encodes_train = self._images.encoded > encoded
        share = -(-stage.sampler.batch_size // self._share)
        whole = max(share, fewest_images(stage.sampler))
        images, accumulate, step_s = self._timed(plan, stage, whole, limit_s)
        times = whole * stage.accumulate_steps / (images * accumulate)
        if times > 1:
            self._whole_batches = self._whole_batches and images == whole
            self._remarks.append(
                f"{plan.name}: measured with {images * accumulate} images per step instead of"
                f" {whole * stage.accumulate_steps}, which take long on this processor"
            )
        return MeasuredStage(
            name=plan.name,
            step_s=step_s * times,
            encodes_train=encodes_train,
            trains_encoder=plan.trains_encoder,
            checkpoint_bytes=tensor_bytes(program.modules.state_dict())
            + tensor_bytes(stage.optimizer.state_dict()),
        )

    def _timed(
        self, plan: StagePlan, stage: Stage, whole: int, limit_s: float
    ) -> tuple[int, int, float]:
        """Return images per micro-batch, micro-batches per step and seconds per such step.

        Only a CPU gets fewer than a whole step: there a small one, tried first, shows the pace.
        """
        images, accumulate = whole, stage.accumulate_steps
        least = fewest_images(stage.sampler)
        few = max(TRIAL_IMAGES, least)
        if self._device.type == "cpu" and whole * accumulate > few:
            images = equal_part(whole, few, least=least)
            trial_s = self._steps_s(plan, stage, images=images, limit_s=TRIAL_S)
            room = int(limit_s / STEPS_IN_TIME / (trial_s / images))
            if room <= images:
                return images, 1, trial_s
            images = equal_part(whole, room, least=least)
            accumulate = max(1, min(accumulate, room // images))
        step_s = self._steps_s(plan, stage, images=images, accumulate=accumulate, limit_s=limit_s)
        return images, accumulate, step_s

    def _steps_s(
        self, plan: StagePlan, stage: Stage, *, images: int, limit_s: float, accumulate: int = 1
    ) -> float:
        """Train a few steps of `stage` in the loop of a run and return the seconds per step."""
        compiles = self._device.type != "cpu" or self._config.resources.compile
        least = PATIENT_STEPS if compiles else 1
        clock = Clock(stage.lr_at, self._device, limit_s, least=least)
        short = replace(
            stage,
            sampler=FewerImages(stage.sampler, images),
            accumulate_steps=accumulate,
            lr_at=clock,
        )
        hooks = Hooks(
            emit=lambda event: None,
            save=lambda step: None,
            report_progress=lambda step, rate: None,
            stop=self._stop,
            checkpoint_interval_s=float("inf"),
        )
        with suppress(EnoughError):
            fit(short, name=plan.name, seed=self._config.seed, start_step=0, hooks=hooks)
        clock.end()
        return clock.step_s()


def fewest_images(sampler: EpochBatches) -> int:
    """Return how many first rows of a batch any loss can do with: two, of balanced classes too.

    Fewer say nothing to a loss that compares images or classes, nor to batch norm.
    """
    per_class = sampler.samples_per_class if isinstance(sampler, ClassBalancedBatchSampler) else 1
    return min(2 * per_class, sampler.batch_size)


def equal_part(whole: int, limit: int, *, least: int) -> int:
    """Return the largest divisor of `whole` from `least` to `limit`, or `whole` where none is.

    A queue takes whole batches alone, and so equal parts of them.
    """
    return next((n for n in range(min(limit, whole), least - 1, -1) if whole % n == 0), whole)


def tensor_bytes(state: Any) -> int:
    """Return the size of all tensors in a nested state."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if isinstance(state, dict):
        return sum(map(tensor_bytes, state.values()))
    if isinstance(state, list | tuple):
        return sum(map(tensor_bytes, state))
    return 0


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory this process had: allocated on a GPU, else its resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def calibrate(run_dir: RunDir, events: EventWriter, stop: StopRequest) -> JsonObject:
    """Measure what the `config.json` of a run directory describes; return a `Measurement`."""
    file = RunFile.model_validate_json(run_dir.config.read_bytes())
    share = max(1, file.config.resources.gpus or 0)
    if share > 1:
        one = file.config.resources.model_copy(update={"gpus": 1})
        config = file.config.model_copy(update={"resources": one})
        file = file.model_copy(update={"config": config})
    run = Calibration(file, run_dir.create(), events=events, stop=stop, share=share)
    return run.execute()
