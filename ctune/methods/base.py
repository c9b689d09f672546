"""The seam between the one training loop and the methods.

A method's `method.py` offers ``build(config, context) -> Program``: the modules of the run and a
plan per stage. The loop (`ctune.train.fit`) sees of a stage only what stands in `Stage`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ctune.augment import Shard
from ctune.backbones import Encoder
from ctune.data import ImageCache
from ctune.distributed import World
from ctune.events import EventBase, Warned
from ctune.image_table import ImageTable
from ctune.methods.base_config import PlannedStage
from ctune.samplers import EpochBatches, Indices
from ctune.schema import JsonObject

LOGS_PER_STAGE = 1000
"""Or up to twice as many."""


def log_interval_steps(total_steps: int) -> int:
    """Return the optimizer steps between two events with metrics, the first after step 0."""
    return max(1, total_steps // LOGS_PER_STAGE)


@dataclass(frozen=True)
class Batch:
    """What one micro-batch brings to the device.

    Shapes: B images, D feature dimensions, S cache side in pixels.
    """

    inputs: Tensor
    """uint8 images [B, 3, S, S], or cached features float [B, D]."""
    labels: Tensor
    """int64 [B]; -1 where an image has no label."""
    positions: Indices
    """Which images of the training split these are, [B]."""
    sizes_px: Tensor
    """Original (height, width) of each image [B, 2]; empty [0, 2] with cached features."""
    shard: Shard | None = None
    """Which rows of the global batch these are; None: they are all of it."""

    @property
    def global_size(self) -> int:
        """Images of the global batch."""
        return len(self.labels) if self.shard is None else self.shard.total


@dataclass(frozen=True)
class StepOutput:
    """Loss to differentiate and what to log beside it, all scalars."""

    loss: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Method(nn.Module):
    """The trainable part of one stage."""

    def step(self, batch: Batch, generator: torch.Generator) -> StepOutput:
        """Return the loss of one micro-batch; all randomness comes from `generator` or is seeded.

        The loop seeds the global generators (dropout, stochastic depth) before each call.
        """
        raise NotImplementedError

    def after_step(self, step: int) -> Sequence[EventBase]:
        """Follow an optimizer step (moving averages, queues); return what is worth telling."""
        return []


class PicturedModule(nn.Module):
    """A module of a program that has something to show in the report."""

    def pictures(self) -> list[ImageTable]:
        """Return what it shows at the end of the run."""
        raise NotImplementedError


class Source(Protocol):
    """Where the loop takes batches from."""

    def fetch(self, positions: Indices) -> Batch: ...


def fetch_share(source: Source, world: World, positions: Indices) -> Batch:
    """Return this process's rows of the global batch of images at `positions`."""
    rows = world.share(len(positions))
    return replace(source.fetch(positions[rows]), shard=Shard(rows.start, len(positions)))


@dataclass
class Stage:
    """What the loop needs to train one stage."""

    method: Method
    source: Source
    sampler: EpochBatches
    epochs: int
    optimizer: torch.optim.Optimizer
    lr_at: Callable[[int], float]
    """Learning rate of an optimizer step, from 0; multiplied by a group's `lr_scale`."""
    accumulate_steps: int = 1
    clip_grad_norm: float | None = None
    """Largest norm of all gradients together."""
    clip_tensor_norm: float | None = None
    """In place of it: largest norm of each tensor's gradient by itself."""
    autocast_dtype: torch.dtype | None = None
    weight_decay_at: Callable[[int], float] | None = None
    """Weight decay of an optimizer step for the groups that are `decayed`; None: it is constant."""


@dataclass(frozen=True)
class StagePlan(PlannedStage):
    """A stage before its data and optimizer exist."""

    start: Callable[[], Stage]
    finishing: bool = False
    """Completes the model: still done when the run is asked to finish early."""
    trains_encoder: bool = True
    """Whether looks at the encoder during this stage say something."""

    @classmethod
    def of(cls, planned: PlannedStage, start: Callable[[], Stage], **flags: bool) -> "StagePlan":
        """Return what the config planned (`MethodConfigBase.plan`) with the way to start it."""
        return cls(planned.name, planned.total_steps, planned.image_passes, start, **flags)


@dataclass(frozen=True)
class Program:
    """All that a method does in one run."""

    modules: nn.ModuleDict
    """`encoder` and the heads; saved in every checkpoint."""
    plans: list[StagePlan]
    warnings: list[Warned] = field(default_factory=list)
    """What encoder and data call for before the first step."""
    advise: Callable[[JsonObject | None, JsonObject], list[Warned]] = lambda before, after: []
    """Warnings from the evaluations before (None when not asked for) and after."""

    @property
    def pictures(self) -> list[ImageTable]:
        """What its modules have to show in the report."""
        shown = [m.pictures() for m in self.modules.values() if isinstance(m, PicturedModule)]
        return [table for tables in shown for table in tables]


@dataclass
class RunContext:
    """What a method may use of the run it is part of."""

    encoder: Encoder
    train_images: Callable[[], ImageCache]
    """Decoded training images at working size; built on first use."""
    encode_train: Callable[[], Tensor]
    """Features of the training images under the frozen encoder, no augmentation: float [N, D]."""
    train_labels: np.ndarray
    """int64 [N]; -1 where an image has no label."""
    classes: list[str]
    seed: int
    device: torch.device
    from_scratch: bool
    world: World = field(default_factory=World)
    """The processes that train this run together."""
    heldout_images: Callable[[int], Tensor] | None = None
    """So many held-out images, or all where there are fewer, as the encoder takes them: uint8
    [n, 3, s, s], the same ones each time. Not to be trained on. None: nothing is held out."""
    encoder_is_mae: bool = False
    """Whether the encoder is known to be that of a masked autoencoder."""
    has_start_data: bool = True
    """Whether the training images are those of the job that made the encoder."""
    start_head: Callable[[str], dict[str, Tensor] | None] = lambda name: None
    """Tensors on the CPU of a head (`model_dir.HEADS`) of the model that the encoder comes from;
    None where there is none. Raises EncoderError ``model_damaged``."""


@dataclass(frozen=True)
class ImageSource:
    """Batches of uint8 images from the decoded cache."""

    cache: ImageCache
    labels: Tensor
    device: torch.device

    def fetch(self, positions: Indices) -> Batch:
        """Return the images at `positions` on the device."""
        return Batch(
            inputs=self.cache.batch(positions).to(self.device, non_blocking=True),
            labels=self.labels[positions].to(self.device, non_blocking=True),
            positions=positions,
            sizes_px=self.cache.sizes(positions),
        )


@dataclass(frozen=True)
class FeatureSource:
    """Batches of features that were computed once; features and labels are on the device."""

    features: Tensor
    labels: Tensor

    def fetch(self, positions: Indices) -> Batch:
        """Return the features at `positions`."""
        index = torch.as_tensor(positions, device=self.features.device)
        return Batch(
            inputs=self.features[index],
            labels=self.labels[index],
            positions=positions,
            sizes_px=torch.empty(0, 2, dtype=torch.int64),
        )
