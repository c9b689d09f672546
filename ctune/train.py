"""The one training loop, read top to bottom."""

import functools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ctune.child import StopRequest, StopRequested
from ctune.data import prefetch
from ctune.distributed import World
from ctune.errors import DivergedError, OutOfMemoryError
from ctune.events import EventBase, Metrics
from ctune.gradient_watch import GradientWatch
from ctune.methods.base import Batch, Stage, StepOutput, fetch_share, log_interval_steps
from ctune.optim import clip_gradients_per_tensor
from ctune.samplers import steps_per_epoch
from ctune.seeding import make_generator, seed_everything

PROGRESS_INTERVAL_S = 1.0
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
    ends_early: Callable[[int], bool] = lambda step: False
    """Whether the stage is to end with the steps made, fewer than planned."""
    look: Callable[[int], bool] = lambda step: False
    """Look at the encoder after so many steps, once; return whether to keep these weights."""
    look_interval_steps: int | None = None
    """Steps between two looks, None for no looks."""
    world: World = field(default_factory=World)
    """The processes that train together; all of them call the hooks in the same order."""
    gradients: GradientWatch = field(default_factory=GradientWatch)
    """Told every gradient norm."""


def fit(stage: Stage, *, name: str, seed: int, start_step: int, hooks: Hooks) -> int:
    """Train `stage` from `start_step` to its end; checkpoint at the end and before stopping.

    Randomness is a pure function of (seed, stage name, step, micro-batch), and the batches of an
    epoch of (seed, epoch): a resumed stage does exactly what an uninterrupted one does.

    With several processes each takes its rows of every batch, and what concerns all (when to save,
    to log, to stop) is decided alike in all of them.

    Returns:
        The optimizer steps made, those before `start_step` included.

    Raises:
        DivergedError: the loss or the gradient norm is not finite.
        OutOfMemoryError: the device does not hold a step.
        StopRequested: a stop was asked for; the checkpoint is written.
    """
    per_epoch = steps_per_epoch(stage.sampler, stage.accumulate_steps)
    total_steps = per_epoch * stage.epochs
    log_every = log_interval_steps(total_steps)
    parameters = [p for group in stage.optimizer.param_groups for p in group["params"]]
    world, step, pace = hooks.world, start_step, Pace(start_step)
    fetch = functools.partial(fetch_share, stage.source, world)
    if _look_if_due(stage, hooks, pace, step=step, total_steps=total_steps):
        hooks.save(step)
    stage.method.train()
    for epoch in range(start_step // per_epoch, stage.epochs):
        batches = stage.sampler.batches(epoch)[(step % per_epoch) * stage.accumulate_steps :]
        with prefetch(batches, fetch) as fetched:
            for group in _groups(fetched, stage.accumulate_steps):
                lr = _set_lr(stage, step)
                outputs = _accumulate(stage, group, world, seed=seed, name=name, step=step)
                world.average_gradients(parameters)
                grad_norm = _clip(stage, parameters)
                hooks.gradients.note(grad_norm)
                stage.optimizer.step()
                stage.optimizer.zero_grad(set_to_none=True)
                _emit_all(hooks, stage.method.after_step(step))
                step += 1
                if step < total_steps and hooks.ends_early(step):
                    total_steps = step  # for all that follows this was the last one
                pace.images += sum(batch.global_size for batch in group)
                due, stopping = False, False
                if step < total_steps:
                    due = pace.checkpoint_due(hooks.checkpoint_interval_s)
                    due, stopping = world.any_each(due, hooks.stop.requested)
                log = (step - 1) % log_every == 0 or step == total_steps
                if log or due or stopping:  # values come to the host only here
                    outputs = [_over_all(output, world) for output in outputs]
                    values = _values(outputs, grad_norm, group, name=name, step=step - 1)
                    if log:
                        values |= {"lr": lr, "epoch": float(epoch), **pace.lap(fetched.waited_s)}
                        hooks.emit(Metrics(stage=name, step=step - 1, values=values))
                        _emit_all(hooks, hooks.gradients.warnings(name, step - 1, float(grad_norm)))
                best = _look_if_due(stage, hooks, pace, step=step, total_steps=total_steps)
                if due or stopping or (best and step < total_steps):
                    _check_parameters(parameters, name=name, step=step - 1)
                    hooks.save(step)
                    pace.checkpoint_done()
                if stopping:
                    world.check(hooks.stop)
                if pace.progress_due():
                    hooks.report_progress(step, pace.steps_per_s(step))
                if step == total_steps:
                    break
        if step == total_steps:
            break
    _check_parameters(parameters, name=name, step=total_steps - 1)
    hooks.save(total_steps)
    return total_steps


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

    def leave_out(self, elapsed_s: float) -> None:
        """Do not count this time, which was not spent on training, to the present lap."""
        self._lap += elapsed_s

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


def _emit_all(hooks: Hooks, events: Iterable[EventBase]) -> None:
    for event in events:
        hooks.emit(event)


def _look_if_due(stage: Stage, hooks: Hooks, pace: Pace, *, step: int, total_steps: int) -> bool:
    """Look every so many steps, at the start and at the end of the stage.

    A look that a stop cuts short is taken again when the run goes on from the checkpoint made here.
    """
    every = hooks.look_interval_steps
    if every is None or (step % every and step < total_steps):
        return False
    started = time.monotonic()
    try:
        best = hooks.look(step)
    except StopRequested:
        hooks.save(step)
        raise
    stage.method.train()
    pace.leave_out(time.monotonic() - started)
    return best


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
        if stage.weight_decay_at is not None and group.get("decayed", True):
            group["weight_decay"] = stage.weight_decay_at(step)
    return lr


def _clip(stage: Stage, parameters: list[nn.Parameter]) -> Tensor:
    """Clip the gradients as the stage says; return the norm that they had together."""
    if stage.clip_tensor_norm is None:
        limit = stage.clip_grad_norm or float("inf")
        total: Tensor = torch.nn.utils.clip_grad_norm_(parameters, limit)
        return total
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = clip_gradients_per_tensor(gradients, max_norm=stage.clip_tensor_norm)
    together: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return together


def _accumulate(
    stage: Stage, group: list[Batch], world: World, *, seed: int, name: str, step: int
) -> list[StepOutput]:
    """Run forward and backward on each micro-batch; gradients are those of the mean loss.

    With several processes their mean is; a loss that is a mean over rows counts by its rows.
    """
    outputs = []
    for micro, batch in enumerate(group):
        own = (world.rank,) if world.rank else ()  # other rows, other paths to drop
        seed_everything(seed, name, step, micro, *own)
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
            output = _times(output, world.weight(len(batch.labels), batch.global_size))
            torch.autograd.backward(output.loss / len(group))
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"stage {name!r}: a micro-batch of {len(batch.labels)} images does not fit into"
                f" the memory of the device",
                hint="lower batch_size or image_size_px, set the method's grad_cache where it has"
                " one, or resources.gradient_checkpointing, or use a larger GPU",
            ) from error
        outputs.append(output)
    return outputs


def _times(output: StepOutput, weight: float) -> StepOutput:
    if weight == 1:
        return output
    metrics = {name: value * weight for name, value in output.metrics.items()}
    return StepOutput(output.loss * weight, metrics)


def _over_all(output: StepOutput, world: World) -> StepOutput:
    """Return the mean over the processes, which all have the same metrics."""
    if world.size == 1:
        return output
    values = [output.loss, *output.metrics.values()]
    loss, *metrics = world.mean(torch.stack([v.detach().float() for v in values])).unbind()
    return StepOutput(loss, dict(zip(output.metrics, metrics, strict=True)))


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
