"""The encoder fine-tuned with few labels: how MAE and MAE-CT came by their 10 % (mae_ct.md 5.3).

Their recipe is not released. Ours is the method `finetune` with AdamW, layer decay and MAE's views:
50 epochs, 1e-3 per batch of 256, the first quarter of the blocks frozen, stochastic depth above.
"""

import copy
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from timm.layers.drop import DropPath
from torch import nn

from ctune.backbones import Encoder
from ctune.features import RunImages
from ctune.methods.base import Batch, ImageSource, RunContext
from ctune.methods.finetune.config import TuneConfig
from ctune.methods.finetune.method import make_stage
from ctune.methods.probe_stage import make_classifier
from ctune.optim import trainable_parameter_mask
from ctune.samplers import Indices
from ctune.schedules import scale_learning_rate
from ctune.train import Hooks, fit

BASE_LR, BATCH_SIZE, DROP_PATH = 1e-3, 256, 0.2


class Tuned(NamedTuple):
    """Result of `fine_tune`."""

    encoder: Encoder
    classifier: nn.Linear


def recipe(num_images: int, *, epochs: int) -> TuneConfig:
    """Return the training on so many images; a smaller batch has a lower learning rate."""
    batch_size = max(2, min(BATCH_SIZE, num_images))
    return TuneConfig(
        optimizer="adamw",
        lr=scale_learning_rate(BASE_LR, batch_size),
        weight_decay=0.05,
        layer_decay=0.75,
        lr_changes="per_step",
        min_lr=1e-6,
        warmup_epochs=min(5, epochs // 5),
        batch_size=batch_size,
        epochs=epochs,
        augment="mae",
        crop_scale_min=0.08,
        mixup_alpha=0.8,
        cutmix_alpha=1.0,
        label_smoothing=0.1,
        head_init_std=2e-5,
        precision="bf16",
    )


def fine_tune(
    encoder: Encoder,
    images: RunImages,
    rows: Indices,
    *,
    num_classes: int,
    epochs: int,
    seed: int,
    device: torch.device,
) -> Tuned:
    """Train a copy of the encoder and a classifier on some labelled training images.

    Every rank of the run must call it. torch's global generators are left as they were.

    Args:
        encoder: stays as it is.
        images: of the run.
        rows: [n] of the training images, with a label each.
        num_classes: outputs of the classifier.
        epochs: passes over these images.
        seed: of batches, views, start and dropped paths.
        device: of the encoder.

    Raises:
        DivergedError: the loss or a weight is not finite.
        StopRequested: a stop was asked for.
    """
    tuned = copy.deepcopy(encoder)
    make_trainable(tuned, num_frozen_blocks=tuned.num_blocks // 4)
    labels, world = images.labels("train"), images.world
    context = RunContext(
        encoder=tuned,
        train_images=lambda: images.for_training(encoder.image_size_px),
        encode_train=lambda: images.encode(tuned, "train", device),
        train_labels=labels[rows],
        classes=[str(label) for label in range(num_classes)],
        seed=seed,
        device=device,
        from_scratch=False,
        world=world,
    )
    config = recipe(len(rows), epochs=epochs)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        classifier = make_classifier(
            tuned.embed_dim, num_classes, seed=seed, std=config.head_init_std
        ).to(device)
        world.unite(nn.ModuleList([tuned, classifier]))
        stage = make_stage(config, context, classifier)
        every = ImageSource(context.train_images(), torch.from_numpy(labels), device)
        stage = replace(stage, source=_Chosen(every, rows))
        fit(stage, name="low shot", seed=seed, start_step=0, hooks=_hooks(images))
    return Tuned(tuned, classifier)


def _hooks(images: RunImages) -> Hooks:
    """Return hooks of a training that tells and saves nothing."""
    return Hooks(
        emit=lambda event: None,
        save=lambda step: None,
        report_progress=lambda step, pace: None,
        stop=images.stop,
        checkpoint_interval_s=math.inf,
        world=images.world,
    )


@dataclass(frozen=True)
class _Chosen:
    """Some rows of a source, counted from 0."""

    source: ImageSource
    rows: Indices

    def fetch(self, positions: Indices) -> Batch:
        return self.source.fetch(self.rows[positions])


def make_trainable(encoder: Encoder, *, num_frozen_blocks: int) -> None:
    """Freeze the stem and the lower blocks; give the others stochastic depth, more the higher.

    Frozen blocks have none, so that they do the same in training as in the test.
    """
    parameters = dict(encoder.backbone.named_parameters())
    depth = encoder.num_blocks
    mask = trainable_parameter_mask(
        parameters, num_blocks=depth, num_frozen_blocks=num_frozen_blocks
    )
    for parameter, is_trained in zip(parameters.values(), mask, strict=True):
        parameter.requires_grad_(is_trained)
    for number in range(depth):
        block = encoder.backbone.get_submodule(f"blocks.{number}")
        rate = DROP_PATH * number / max(1, depth - 1) if number >= num_frozen_blocks else 0.0
        for name in ("drop_path1", "drop_path2", "drop_path"):
            if hasattr(block, name):
                setattr(block, name, DropPath(rate))
