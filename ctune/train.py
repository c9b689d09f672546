"""The one training loop, read top to bottom."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ctune.child import StopRequest
from ctune.data import prefetch
from ctune.errors import DivergedError, OutOfMemoryError
from ctune.events import EventBase, Metrics
from ctune.methods.base import Batch, Stage, StepOutput, steps_per_epoch
from ctune.seeding import make_generator, seed_everything

PROGRESS_INTERVAL_S = 1.0
LOGS_PER_STAGE = 1000
SHOWN_IMAGES = 16


@dataclass(frozen=True)
class Hooks:
    """How the loop reaches the run it is part of."""

    emit: Callable[[EventBase], None]
    save: Callable[[int], None]
    """Write a checkpoint of this step."""
    report_progress: Callable[[int, float | None], None]
    """Tell (step, steps per second)."""
    stop: StopRequest
    checkpoint_interval_s: float


def fit(stage: Stage, *, name: str, seed: int, start_step: int, hooks: Hooks) -> None:
    """Train `stage` from `start_step` to its end; checkpoint at the end and before stopping.

    Randomness is a pure function of (seed, stage name, step, micro-batch), and the batches of an
    epoch of (seed, epoch): a resumed stage does exactly what an uninterrupted one does.

    Raises:
        DivergedError: the loss or the gradient norm is not finite.
        OutOfMemoryError: the device does not hold a step.
        StopRequested: a stop was asked for; the checkpoint is written.
    """
    per_epoch = steps_per_epoch(stage.sampler, stage.accumulate_steps)
    total_steps = per_epoch * stage.epochs
    log_every = max(1, total_steps // LOGS_PER_STAGE)
    parameters = [p for group in stage.optimizer.param_groups for p in group["params"]]
    step, pace = start_step, Pace(start_step)
    stage.method.train()
    for epoch in range(start_step // per_epoch, stage.epochs):
        batches = stage.sampler.batches(epoch)[(step % per_epoch) * stage.accumulate_steps :]
        with prefetch(batches, stage.source.fetch) as fetched:
            for group in _groups(fetched, stage.accumulate_steps):
                lr = _set_lr(stage, step)
                outputs = _accumulate(stage, group, seed=seed, name=name, step=step)
                grad_norm = torch.nn.utils.clip_grad_norm_(
                    parameters, stage.clip_grad_norm or float("inf")
                )
                stage.optimizer.step()
                stage.optimizer.zero_grad(set_to_none=True)
                for warning in stage.method.after_step(step):
                    hooks.emit(warning)
                step += 1
                pace.images += sum(len(batch.labels) for batch in group)
                due = pace.checkpoint_due(hooks.checkpoint_interval_s) and step < total_steps
                stopping = hooks.stop.requested and step < total_steps
                log = (step - 1) % log_every == 0 or step == total_steps
                if log or due or stopping:  # values come to the host only here
                    values = _values(outputs, grad_norm, group, name=name, step=step - 1)
                    if log:
                        values |= {"lr": lr, "epoch": float(epoch), **pace.lap(fetched.waited_s)}
                        hooks.emit(Metrics(stage=name, step=step - 1, values=values))
                if due or stopping:
                    _check_parameters(parameters, name=name, step=step - 1)
                    hooks.save(step)
                    pace.checkpoint_done()
                if stopping:
                    hooks.stop.check()
                if pace.progress_due():
                    hooks.report_progress(step, pace.steps_per_s(step))
    _check_parameters(parameters, name=name, step=total_steps - 1)
    hooks.save(total_steps)


@dataclass
class Pace:
    """Clocks of the loop: what is due, and how fast it goes."""

    start_step: int
    images: int = 0
    _start: float = field(default_factory=time.monotonic)
    _lap: float = field(default_factory=time.monotonic)
    _progress: float = field(default_factory=time.monotonic)
    _checkpoint: float = field(default_factory=time.monotonic)
    _waited_s: float = 0.0

    def lap(self, waited_s: float) -> dict[str, float]:
        """Return images per second and the share of time spent waiting for data since last time.

        `waited_s` counts from the start of the epoch; a smaller value means a new one began.
        """
        now = time.monotonic()
        elapsed_s = max(now - self._lap, 1e-9)
        waited = waited_s - self._waited_s if waited_s >= self._waited_s else waited_s
        values = {"images_per_s": self.images / elapsed_s, "data_wait": min(1, waited / elapsed_s)}
        self._lap, self._waited_s, self.images = now, waited_s, 0
        return values

    def steps_per_s(self, step: int) -> float | None:
        """Return the mean pace since this process began the stage."""
        elapsed_s = time.monotonic() - self._start
        return (step - self.start_step) / elapsed_s if elapsed_s > 0 else None

    def progress_due(self) -> bool:
        """Return whether to tell progress now, and start the next interval if so."""
        now = time.monotonic()
        if now - self._progress < PROGRESS_INTERVAL_S:
            return False
        self._progress = now
        return True

    def checkpoint_due(self, interval_s: float) -> bool:
        """Return whether a checkpoint is due."""
        return time.monotonic() - self._checkpoint >= interval_s

    def checkpoint_done(self) -> None:
        """Start the next checkpoint interval."""
        self._checkpoint = time.monotonic()


def _groups(batches: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    group: list[Batch] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def _set_lr(stage: Stage, step: int) -> float:
    lr = stage.lr_at(step)
    for group in stage.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr


def _accumulate(
    stage: Stage, group: list[Batch], *, seed: int, name: str, step: int
) -> list[StepOutput]:
    """Run forward and backward on each micro-batch; gradients are those of the mean loss."""
    outputs = []
    for micro, batch in enumerate(group):
        seed_everything(seed, name, step, micro)
        generator = make_generator(seed, name, step, micro, "views")
        device = batch.inputs.device.type
        autocast = (
            torch.autocast(device, dtype=stage.autocast_dtype)
            if stage.autocast_dtype is not None
            else nullcontext()
        )
        try:
            with autocast:
                output = stage.method.step(batch, generator)
            torch.autograd.backward(output.loss / len(group))
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"stage {name!r}: a micro-batch of {len(batch.labels)} images does not fit into"
                f" the memory of the device",
                hint="lower batch_size or image_size_px, or use a larger GPU",
            ) from error
        outputs.append(output)
    return outputs


def _values(
    outputs: list[StepOutput], grad_norm: Tensor, group: list[Batch], *, name: str, step: int
) -> dict[str, float | None]:
    """Return the step's values as floats after making sure that they are finite."""
    loss = torch.stack([output.loss.detach().float() for output in outputs]).mean()
    values = {key: float(value) for key, value in outputs[-1].metrics.items()}
    values |= {"loss": float(loss), "grad_norm": float(grad_norm)}
    if not bool(torch.isfinite(loss) & torch.isfinite(grad_norm)):
        images = [int(n) for batch in group for n in batch.positions]
        shown = ", ".join(map(str, images[:SHOWN_IMAGES]))
        what = f"loss {float(loss)}, gradient norm {float(grad_norm)}, training images {shown}"
        raise _diverged(what + (" …" if len(images) > SHOWN_IMAGES else ""), name, step)
    return dict(values)


def _check_parameters(parameters: list[nn.Parameter], *, name: str, step: int) -> None:
    """Refuse to save weights that are not finite."""
    if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters):
        raise _diverged("the update made weights that are not finite", name, step)


def _diverged(what: str, name: str, step: int) -> DivergedError:
    return DivergedError(
        f"stage {name!r}, step {step}: {what}",
        hint="lower the learning rate, raise the temperature, or set clip_grad_norm",
    )
