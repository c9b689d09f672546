"""LaCViT: label-aware contrastive tuning, then a linear head (arXiv 2303.18013; lacvit.md)."""

import functools

import torch
from torch import Tensor, nn

from ctune.augment import ViewConfig, ViewPipeline
from ctune.backbones import Encoder
from ctune.errors import ConfigError
from ctune.events import Warned
from ctune.heads import ProjectionHead
from ctune.losses.contrastive import simplex_supcon_loss, supervised_contrastive_loss
from ctune.methods.base import (
    Batch,
    ImageSource,
    Method,
    Program,
    RunContext,
    Stage,
    StagePlan,
    StepOutput,
    steps_per_epoch,
)
from ctune.methods.lacvit.advice import CollapseWatch, advise, start_warnings
from ctune.methods.lacvit.config import ContrastiveConfig, LaCViTConfig
from ctune.methods.probe_stage import make_classifier, probe_plan
from ctune.optim import layer_decay_param_groups, warmup_cosine_decay_lr
from ctune.samplers import (
    ClassBalancedBatchSampler,
    EpochBatches,
    RandomBatchSampler,
    expected_cross_image_positive_fraction,
)
from ctune.seeding import seed_everything

RANDOM_IS_ENOUGH = 0.95
"""Share of anchors with a positive from another image above which random batches will do (2.5)."""


class LaCViT(Method):
    """Stage 1: encoder and projection head under the supervised contrastive loss.

    Letters: B images, V views, d projection dimensions.
    """

    def __init__(
        self,
        encoder: Encoder,
        head: nn.Module,
        *,
        config: ContrastiveConfig,
        views: ViewPipeline,
        watch: CollapseWatch,
        loss_floor: float | None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = head
        self.watch = watch
        self._config = config
        self._views = views
        self._loss_floor = loss_floor

    def step(self, batch: Batch, generator: torch.Generator) -> StepOutput:
        """Return the loss of one micro-batch; its images are the whole contrast set."""
        num_views = self._config.num_views
        self.watch.remember(self.encoder)
        views = self._views.views(batch.inputs, batch.sizes_px, generator, num_views=num_views)
        z: Tensor = self.head(self.encoder(views))  # view-major [V·B, d]
        features = z.float().view(num_views, len(batch.labels), -1).transpose(0, 1)
        loss = supervised_contrastive_loss(
            features,
            batch.labels,
            temperature=self._config.temperature,
            base_temperature=self._config.base_temperature,
            contrast_mode=self._config.contrast_mode,
        )
        metrics = self.watch.observe(features.detach(), batch.labels, loss.detach())
        if self._loss_floor is not None:
            metrics["loss_above_floor"] = loss.detach() - self._loss_floor
        return StepOutput(loss=loss, metrics=metrics)

    def after_step(self, step: int) -> list[Warned]:
        """Return the warnings that the last steps call for."""
        return self.watch.warnings(step, self.encoder)


def choose_sampler(config: ContrastiveConfig, context: RunContext) -> EpochBatches:
    """Return the batches of stage 1; `auto` decides by the share of anchors with a positive (2.5).

    Raises:
        ConfigError: an epoch would have no batch, or the batch does not divide by K.
    """
    labels = context.train_labels
    if len(labels) < config.batch_size:
        raise ConfigError(
            f"contrastive.batch_size {config.batch_size} exceeds the {len(labels)} training images",
            hint="lower contrastive.batch_size",
        )
    kind = config.batch_sampler
    if kind == "auto":
        share = expected_cross_image_positive_fraction(labels, config.batch_size)
        fits = config.batch_size % config.samples_per_class == 0
        classes_fit = config.batch_size // config.samples_per_class <= len(set(labels.tolist()))
        balanced = share < RANDOM_IS_ENOUGH and fits and classes_fit
        kind = "class_balanced" if balanced else "random"
    if kind == "random":
        return RandomBatchSampler(len(labels), config.batch_size, seed=context.seed, drop_last=True)
    return ClassBalancedBatchSampler(
        labels,
        config.batch_size // config.samples_per_class,
        config.samples_per_class,
        seed=context.seed,
    )


def loss_floor(config: ContrastiveConfig, sampler: EpochBatches) -> float | None:
    """Return the least loss of a class-balanced batch (lacvit.md 7), None for random batches."""
    if not isinstance(sampler, ClassBalancedBatchSampler):
        return None
    return simplex_supcon_loss(
        sampler.batch_size // config.samples_per_class,
        config.samples_per_class,
        num_views=config.num_views,
        temperature=config.temperature,
        base_temperature=config.base_temperature,
    )


def contrastive_plan(
    config: ContrastiveConfig,
    context: RunContext,
    head: nn.Module,
    *,
    sampler: EpochBatches,
    watch: CollapseWatch,
) -> StagePlan:
    """Plan stage 1."""
    per_epoch = steps_per_epoch(sampler, config.accumulate_steps)

    def start() -> Stage:
        context.encoder.requires_grad_(True)
        encoder = context.encoder
        views = ViewConfig(
            size_px=encoder.image_size_px,
            scale=(config.crop_scale_min, 1.0),
            jitter=config.color_jitter,
            jitter_prob=config.color_jitter_prob,
            grayscale_prob=config.grayscale_prob,
            mean=encoder.mean,
            std=encoder.std,
        )
        method = LaCViT(
            encoder,
            head,
            config=config,
            views=ViewPipeline(views),
            watch=watch,
            loss_floor=loss_floor(config, sampler),
        )
        return Stage(
            method=method.to(context.device),
            source=ImageSource(
                context.train_images(), torch.from_numpy(context.train_labels), context.device
            ),
            sampler=sampler,
            epochs=config.epochs,
            optimizer=make_optimizer(config, encoder, head),
            lr_at=functools.partial(
                warmup_cosine_decay_lr,
                steps_per_epoch=per_epoch,
                base_lr=config.lr,
                epochs=config.epochs,
                lr_decay_rate=config.lr_decay_rate,
                warmup_epochs=int(config.warmup_epochs),
            ),
            accumulate_steps=config.accumulate_steps,
            clip_grad_norm=config.clip_grad_norm,
            autocast_dtype=_autocast_dtype(config, context.device),
        )

    passes = config.epochs * len(sampler) * sampler.batch_size * config.num_views
    return StagePlan("contrastive", config.epochs * per_epoch, passes, start)


def make_optimizer(
    config: ContrastiveConfig, encoder: Encoder, head: nn.Module
) -> torch.optim.Optimizer:
    """Return SGD (weight decay on everything, as published) or AdamW with its usual exceptions."""
    groups = layer_decay_param_groups(
        nn.ModuleDict({"encoder": encoder.backbone, "projection_head": head}),
        num_blocks=encoder.num_blocks,
        layer_decay=float(config.layer_decay),
        weight_decay=config.weight_decay,
        no_weight_decay=encoder.no_weight_decay,
        decay_all=config.optimizer == "sgd",
    )
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    return torch.optim.AdamW(groups, lr=config.lr)


def _autocast_dtype(config: ContrastiveConfig, device: torch.device) -> torch.dtype | None:
    on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.bfloat16 if config.precision == "bf16" and on_gpu else None


def build(config: LaCViTConfig, context: RunContext) -> Program:
    """Return the program: `contrastive`, then `probe`."""
    encoder, stage = context.encoder, config.contrastive
    seed_everything(context.seed, "projection_head")
    head = ProjectionHead(
        encoder.embed_dim,
        stage.projection_hidden_dim,
        out_dim=stage.projection_dim,
        kind=stage.projection_kind,
    ).to(context.device)
    classifier = make_classifier(encoder.embed_dim, len(context.classes), seed=context.seed)
    classifier = classifier.to(context.device)
    sampler = choose_sampler(stage, context)
    per_epoch = steps_per_epoch(sampler, stage.accumulate_steps)
    watch = CollapseWatch(
        stage, total_steps=stage.epochs * per_epoch, steps_per_epoch=per_epoch
    ).to(context.device)
    modules = {
        "encoder": encoder,
        "projection_head": head,
        "classifier": classifier,
        "watch": watch,
    }
    plans = [
        contrastive_plan(stage, context, head, sampler=sampler, watch=watch),
        probe_plan(config.probe, context, classifier),
    ]
    return Program(nn.ModuleDict(modules), plans, start_warnings(context), advise)
