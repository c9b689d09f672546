"""Fine-tuning: encoder and linear classifier under cross-entropy (lacvit.md 2.3), or a probe."""

import functools
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctune.augment import ViewConfig, ViewPipeline
from ctune.backbones import Encoder
from ctune.device import autocast_dtype
from ctune.methods.base import (
    Batch,
    ImageSource,
    Method,
    Program,
    RunContext,
    Stage,
    StagePlan,
    StepOutput,
)
from ctune.methods.finetune.config import FinetuneConfig, TuneConfig
from ctune.methods.probe_stage import make_classifier, probe_plan
from ctune.mixing import Mixing, mix
from ctune.optim import layer_decay_param_groups, make_optimizer
from ctune.samplers import steps_per_epoch
from ctune.schedules import WarmupCosine, cosine_to_cube
from ctune.view_presets import finetune


class Finetune(Method):
    """Encoder and classifier on one view per image; C classes.

    The classifier takes the features h [B, D] as serving and evaluation do: what follows pooling
    (MAE's fresh LayerNorm) is part of the encoder.
    """

    def __init__(
        self,
        encoder: Encoder,
        classifier: nn.Linear,
        *,
        views: ViewPipeline,
        mixing: Mixing,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.classifier = classifier
        self._views = views
        self._mixing = mixing

    def step(self, batch: Batch, generator: torch.Generator) -> StepOutput:
        """Return the mean cross-entropy of one micro-batch of mixed views."""
        views = self._views(batch.inputs, batch.sizes_px, generator, shard=batch.shard)
        num_classes = self.classifier.out_features
        views, targets = mix(
            views, batch.labels, generator, num_classes=num_classes, config=self._mixing
        )
        logits: Tensor = self.classifier(self.encoder(views)).float()
        loss = F.cross_entropy(logits, targets)
        accuracy = (logits.detach().argmax(dim=1) == targets.argmax(dim=1)).float().mean()
        return StepOutput(loss=loss, metrics={"train_top1": accuracy})


def make_views(config: TuneConfig, encoder: Encoder) -> ViewConfig:
    """Return the view of an image that the recipe trains on."""
    scale = (config.crop_scale_min, 1.0)
    if config.augment == "mae":
        (views,) = finetune(encoder.image_size_px, mean=encoder.mean, std=encoder.std)
        return replace(views, scale=scale)
    size_px = encoder.image_size_px
    return ViewConfig(size_px=size_px, scale=scale, mean=encoder.mean, std=encoder.std)


def make_schedule(config: TuneConfig, per_epoch: int) -> WarmupCosine:
    """Return the learning rate by optimizer step; the config is settled."""
    lr, epochs, warmup = config.lr, int(config.epochs), int(config.warmup_epochs)
    assert lr is not None, "settled"
    schedule = cosine_to_cube(
        lr=lr, lr_decay_rate=config.lr_decay_rate, epochs=epochs, warmup_epochs=warmup
    )
    if config.min_lr is not None:
        schedule = replace(schedule, end=config.min_lr)
    return schedule.in_steps(per_epoch, per_epoch=config.lr_changes == "per_epoch")


def make_stage(config: TuneConfig, context: RunContext, classifier: nn.Linear) -> Stage:
    """Return the stage `tune`, which trains what of the encoder takes a gradient."""
    encoder = context.encoder
    sampler = config.sampler(len(context.train_labels), seed=context.seed)
    schedule = make_schedule(config, steps_per_epoch(sampler, config.accumulate_steps))
    groups = layer_decay_param_groups(
        nn.ModuleDict({"encoder": encoder.backbone, "classifier": classifier}),
        num_blocks=encoder.num_blocks,
        layer_decay=float(config.layer_decay),
        weight_decay=config.weight_decay,
        no_weight_decay=encoder.no_weight_decay,
        decay_all=config.optimizer == "sgd",
    )
    method = Finetune(
        encoder,
        classifier,
        views=ViewPipeline(make_views(config, encoder)),
        mixing=Mixing(
            mixup_alpha=config.mixup_alpha,
            cutmix_alpha=config.cutmix_alpha,
            label_smoothing=config.label_smoothing,
        ),
    )
    return Stage(
        method=method,
        source=ImageSource(
            context.train_images(), torch.from_numpy(context.train_labels), context.device
        ),
        sampler=sampler,
        epochs=int(config.epochs),
        optimizer=make_optimizer(
            config.optimizer, groups, lr=schedule.peak, momentum=config.momentum
        ),
        lr_at=schedule,
        accumulate_steps=config.accumulate_steps,
        clip_grad_norm=config.clip_grad_norm,
        autocast_dtype=autocast_dtype(config.precision, context.device),
    )


def build(config: FinetuneConfig, context: RunContext) -> Program:
    """Return the program: `tune`, or `probe` where the recipe is `linear`."""
    tune, probe = config.tune, config.probe
    classifier = make_classifier(
        context.encoder.embed_dim,
        len(context.classes),
        seed=context.seed,
        std=tune.head_init_std if tune else 0.02,
    ).to(context.device)
    modules = nn.ModuleDict({"encoder": context.encoder, "classifier": classifier})
    if probe is not None:
        return Program(modules, [probe_plan(probe, context, classifier)])
    assert tune is not None, "a config has the stage of its recipe"
    context.encoder.requires_grad_(True)
    planned = tune.planned(len(context.train_labels))
    start = functools.partial(make_stage, tune, context, classifier)
    return Program(modules, [StagePlan.of(planned, start)])
