"""SimCLR (arXiv 2002.05709) as in transformer_head.md: NT-Xent on two views of each image."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ctune.augment import ViewPipeline
from ctune.backbones import Encoder
from ctune.device import autocast_dtype
from ctune.heads import ProjectionHead
from ctune.losses.contrastive import nt_xent_loss
from ctune.methods.base import ImageSource, Program, RunContext, Stage, StagePlan
from ctune.methods.collapse import CollapseWatch, UniformLoss
from ctune.methods.contrastive import ContrastiveLoss, ContrastiveMethod, Embedding, Images
from ctune.methods.simclr.advice import COLLAPSE_HINT, advise, start_warnings
from ctune.methods.simclr.config import NUM_VIEWS, SimCLRConfig
from ctune.optim import layer_decay_param_groups, make_optimizer
from ctune.schedules import ExponentialDecay, WarmupCosine
from ctune.seeding import seed_everything
from ctune.view_presets import VIEW_PRESETS

EXPONENTIAL_RATE = 0.99


class SimCLR(ContrastiveMethod):
    """Encoder and projection head under NT-Xent.

    The head gets the encoder's vectors of all views of the global batch at once, [V * B, D], all
    first views and then all second: it may look at the batch as a whole.
    """

    uses_labels = False

    def __init__(
        self,
        encoder: Encoder,
        embedding: Embedding,
        *,
        head: nn.Module,
        temperature: float,
        watch: CollapseWatch,
    ) -> None:
        super().__init__(encoder, embedding, watch=watch)
        self.head = head
        self._temperature = temperature

    def contrast(
        self, vectors: Tensor, images: Images, generator: torch.Generator
    ) -> ContrastiveLoss:
        """Return NT-Xent over the global batch: vectors [B, V, D] of the encoder."""
        num_images, num_views, _ = vectors.shape
        rows: Tensor = self.head(vectors.transpose(0, 1).flatten(0, 1))
        z = rows.view(num_views, num_images, -1).transpose(0, 1)
        loss = nt_xent_loss(z, temperature=self._temperature, normalize=True)
        # Not z: after the head's batch norm it spreads however alike the encoder's vectors are.
        return ContrastiveLoss(loss, vectors, math.log(num_views * num_images - 1))


def make_views(config: SimCLRConfig, encoder: Encoder) -> ViewPipeline:
    """Return the views of a recipe with the values that the config changes."""
    recipe = VIEW_PRESETS[config.views](encoder.image_size_px, mean=encoder.mean, std=encoder.std)
    low = config.crop_scale_min
    changes: dict[str, Any] = {
        "scale": None if low is None else (low, 1.0),
        "flip_prob": config.flip_prob,
        "rotation_prob": config.rotation_prob,
        "rotation_degrees": config.rotation_degrees,
        "jitter": config.color_jitter,
        "jitter_prob": config.color_jitter_prob,
        "grayscale_prob": config.grayscale_prob,
        "blur_prob": config.blur_prob,
        "blur_sigma_px": config.blur_sigma_px,
    }
    given = {name: value for name, value in changes.items() if value is not None}
    return ViewPipeline(*(replace(view, **given) for view in recipe))


def make_head(config: SimCLRConfig, embed_dim: int) -> nn.Module:
    """Return the projection head; the loss takes care of unit length."""
    return ProjectionHead(
        embed_dim,
        config.head_hidden_dim,
        out_dim=config.output_dim,
        kind=config.projection_head,
        normalize=False,
        batch_norm=config.head_norm == "batch",
    )


def learning_rate(config: SimCLRConfig, steps_per_epoch: int) -> Callable[[int], float]:
    """Return the learning rate as a function of the step; it changes with the epochs."""
    lr = float(config.lr)
    if config.lr_schedule == "exponential":
        return ExponentialDecay(lr, EXPONENTIAL_RATE, hold=steps_per_epoch)
    end = 0.0 if config.lr_schedule == "cosine" else lr
    warmup_epochs = int(config.warmup_epochs)
    schedule = WarmupCosine(total=config.epochs, peak=lr, end=end, warmup=warmup_epochs)
    return schedule.in_steps(steps_per_epoch, per_epoch=True)


def _optimizer(config: SimCLRConfig, encoder: Encoder, head: nn.Module) -> torch.optim.Optimizer:
    assert config.optimizer != "auto"
    groups = layer_decay_param_groups(
        nn.ModuleDict({"encoder": encoder.backbone, "projection_head": head}),
        num_blocks=encoder.num_blocks,
        layer_decay=1.0,
        weight_decay=float(config.weight_decay),
        no_weight_decay=encoder.no_weight_decay,
        decay_all=config.optimizer in ("sgd", "adam"),
    )
    return make_optimizer(config.optimizer, groups, lr=float(config.lr), momentum=config.momentum)


def build(config: SimCLRConfig, context: RunContext) -> Program:
    """Return the program: one stage, `contrastive`."""
    encoder, num_images = context.encoder, len(context.train_labels)
    seed_everything(context.seed, "projection_head")
    head = make_head(config, encoder.embed_dim).to(context.device)
    sampler = config.sampler(num_images, seed=context.seed)
    watch = CollapseWatch(
        uniform=UniformLoss(margin=0.02, from_step=5 * len(sampler), steps=5 * len(sampler)),
        steps_per_epoch=len(sampler),
        warmup_epochs=int(config.warmup_epochs),
        hint=COLLAPSE_HINT,
        metric="feature_std",
    ).to(context.device)

    def start() -> Stage:
        encoder.requires_grad_(True)
        embedding = Embedding(
            make_views(config, encoder),
            num_views=NUM_VIEWS,
            micro_batch_size=config.micro_batch_size if config.grad_cache else None,
            world=context.world,
        )
        labels = torch.from_numpy(context.train_labels)
        return Stage(
            method=SimCLR(
                encoder, embedding, head=head, temperature=config.temperature, watch=watch
            ),
            source=ImageSource(context.train_images(), labels, context.device),
            sampler=sampler,
            epochs=config.epochs,
            optimizer=_optimizer(config, encoder, head),
            lr_at=learning_rate(config, len(sampler)),
            clip_grad_norm=config.clip_grad_norm,
            autocast_dtype=autocast_dtype(config.precision, context.device),
        )

    modules = nn.ModuleDict({"encoder": encoder, "projection_head": head, "watch": watch})
    plans = [StagePlan.of(config.planned(num_images), start)]
    return Program(modules, plans, start_warnings(config, context), advise)
