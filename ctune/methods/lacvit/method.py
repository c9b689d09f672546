"""LaCViT: label-aware contrastive tuning, then a linear head (arXiv 2303.18013; lacvit.md)."""

import math

import torch
from torch import Tensor, nn

from ctune.augment import ViewConfig, ViewPipeline
from ctune.backbones import Encoder
from ctune.device import autocast_dtype
from ctune.errors import ConfigError
from ctune.heads import ProjectionHead
from ctune.losses.contrastive import simplex_supcon_loss, supervised_contrastive_loss
from ctune.losses.n_pair import n_pair_indices, n_pair_loss, squared_norm_per_pair
from ctune.methods.base import ImageSource, Program, RunContext, Stage, StagePlan
from ctune.methods.collapse import CollapseWatch, UniformLoss
from ctune.methods.contrastive import ContrastiveLoss, ContrastiveMethod, Embedding, Images
from ctune.methods.lacvit.advice import COLLAPSE_HINTS, advise, start_warnings
from ctune.methods.lacvit.config import ContrastiveConfig, LaCViTConfig
from ctune.methods.probe_stage import make_classifier, probe_plan
from ctune.optim import ParameterGroups, layer_decay_param_groups, make_optimizer
from ctune.samplers import ClassBalancedBatchSampler, EpochBatches, steps_per_epoch
from ctune.schedules import cosine_to_cube
from ctune.seeding import seed_everything


class LaCViT(ContrastiveMethod):
    """Stage 1: encoder and projection head under a contrastive loss.

    Letters: B images of the global batch, V views, d projection dimensions.
    """

    def __init__(
        self,
        encoder: Encoder,
        embedding: Embedding,
        *,
        head: nn.Module,
        config: ContrastiveConfig,
        watch: CollapseWatch,
        loss_floor: float | None,
    ) -> None:
        super().__init__(encoder, embedding, watch=watch, row_head=head)
        self.uses_labels = config.uses_labels
        self._config = config
        self._loss_floor = loss_floor

    def contrast(
        self, vectors: Tensor, images: Images, generator: torch.Generator
    ) -> ContrastiveLoss:
        """Return the loss over the global batch: vectors [B, V, d]."""
        if self._config.loss == "n_pair":
            return self._n_pair(vectors, images.labels, generator)
        config = self._config
        loss = supervised_contrastive_loss(
            vectors,
            images.labels if config.uses_labels else None,
            temperature=config.temperature,
            base_temperature=config.base_temperature,
            contrast_mode=config.contrast_mode,
        )
        factor = config.temperature / (config.base_temperature or config.temperature)
        uniform = factor * math.log(vectors.shape[0] * vectors.shape[1] - 1)
        metrics = {}
        if self._loss_floor is not None:
            metrics["loss_above_floor"] = loss.detach() - self._loss_floor
        return ContrastiveLoss(loss, vectors, uniform, metrics=metrics)

    def _n_pair(
        self, vectors: Tensor, labels: Tensor, generator: torch.Generator
    ) -> ContrastiveLoss:
        embeddings, l2_reg = vectors[:, 0], self._config.l2_reg
        pairs = n_pair_indices(labels, generator)
        loss = n_pair_loss(embeddings, pairs, l2_reg=l2_reg)
        l2 = squared_norm_per_pair(embeddings.detach(), pairs)
        return ContrastiveLoss(
            loss, vectors, math.log(len(pairs)), l2_reg * l2, {"squared_norm": l2}
        )


def choose_sampler(config: ContrastiveConfig, context: RunContext) -> EpochBatches:
    """Return the batches of stage 1.

    Raises:
        ConfigError: an epoch would have no batch.
    """
    labels = context.train_labels
    if len(labels) < config.batch_size:
        raise ConfigError(
            f"contrastive.batch_size {config.batch_size} exceeds the {len(labels)} training images",
            hint="lower contrastive.batch_size",
        )
    return config.sampler(labels, seed=context.seed)


def loss_floor(config: ContrastiveConfig, sampler: EpochBatches) -> float | None:
    """Return the least SupCon loss of a class-balanced batch (lacvit.md 7), else None."""
    if config.loss != "supcon" or not isinstance(sampler, ClassBalancedBatchSampler):
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
        embedding = Embedding(
            ViewPipeline(views),
            num_views=config.num_views,
            micro_batch_size=config.micro_batch_size if config.grad_cache else None,
            world=context.world,
        )
        method = LaCViT(
            encoder,
            embedding,
            head=head,
            config=config,
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
            optimizer=make_optimizer(
                config.optimizer,
                _parameter_groups(config, encoder, head),
                lr=config.lr,
                momentum=config.momentum,
            ),
            lr_at=cosine_to_cube(
                lr=config.lr,
                lr_decay_rate=config.lr_decay_rate,
                epochs=config.epochs,
                warmup_epochs=int(config.warmup_epochs),
            ).in_steps(per_epoch, per_epoch=True),
            accumulate_steps=config.accumulate_steps,
            clip_grad_norm=config.clip_grad_norm,
            autocast_dtype=autocast_dtype(config.precision, context.device),
        )

    return StagePlan.of(config.planned(sampler), start)


def _parameter_groups(
    config: ContrastiveConfig, encoder: Encoder, head: nn.Module
) -> ParameterGroups:
    """Weight decay on everything, as published; with its usual exceptions for AdamW."""
    return layer_decay_param_groups(
        nn.ModuleDict({"encoder": encoder.backbone, "projection_head": head}),
        num_blocks=encoder.num_blocks,
        layer_decay=float(config.layer_decay),
        weight_decay=config.weight_decay,
        no_weight_decay=encoder.no_weight_decay,
        decay_all=config.optimizer != "adamw",
    )


def build(config: LaCViTConfig, context: RunContext) -> Program:
    """Return the program: `contrastive`, then `probe`."""
    encoder, stage = context.encoder, config.contrastive
    seed_everything(context.seed, "projection_head")
    head = ProjectionHead(
        encoder.embed_dim,
        stage.projection_hidden_dim,
        out_dim=stage.projection_dim,
        kind=stage.projection_kind,
        normalize=stage.loss != "n_pair",
    ).to(context.device)
    classifier = make_classifier(encoder.embed_dim, len(context.classes), seed=context.seed)
    classifier = classifier.to(context.device)
    sampler = choose_sampler(stage, context)
    per_epoch = steps_per_epoch(sampler, stage.accumulate_steps)
    watch = CollapseWatch(
        uniform=UniformLoss(share=0.01, from_step=0.2 * stage.epochs * per_epoch),
        steps_per_epoch=per_epoch,
        batches_per_step=min(stage.accumulate_steps, len(sampler)),
        warmup_epochs=int(stage.warmup_epochs),
        hint=COLLAPSE_HINTS[stage.loss],
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
    return Program(nn.ModuleDict(modules), plans, start_warnings(config, context), advise)
