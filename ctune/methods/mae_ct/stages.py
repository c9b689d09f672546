"""The stages of MAE-CT that train the head: `head_init` and `contrastive_tuning` (mae_ct.md 2).

Letters: B images of the global batch, D dimensions of the encoder, o of the head, F frozen blocks.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ctune.acceleration import copy_accelerated
from ctune.augment import ViewPipeline
from ctune.backbones import Encoder
from ctune.device import autocast_dtype
from ctune.ema import ema_update
from ctune.errors import ConfigError
from ctune.events import EventBase
from ctune.masked_autoencoder import check_encoder, encode_visible
from ctune.methods.base import (
    ImageSource,
    RunContext,
    Stage,
    StagePlan,
    fetch_share,
    log_interval_steps,
)
from ctune.methods.base_config import PlannedStage
from ctune.methods.collapse import CollapseWatch
from ctune.methods.contrastive import ContrastiveLoss, ContrastiveMethod, Embedding, Images
from ctune.methods.mae_ct.advice import FeatureChange
from ctune.methods.mae_ct.config import HeadStageName, MaeCTConfig
from ctune.methods.mae_ct.stage_config import NUM_VIEWS, HeadInitConfig, TuningConfig, peak_lr
from ctune.methods.mae_ct.watch import NeighborWatch, make_collapse_watch
from ctune.nnclr_head import NNCLRHead, NNCLRSettings, PooledBatch
from ctune.optim import (
    ParameterGroups,
    layer_decay_param_groups,
    make_optimizer,
    trainable_parameter_mask,
)
from ctune.patches import num_visible
from ctune.pooling import pool_tokens
from ctune.schedules import WarmupCosine, warmup_steps
from ctune.seeding import make_generator, seed_everything
from ctune.view_presets import byol, mae_minimal

PatchPool = Literal["cls", "mean"]


class VisiblePatches(nn.Module):
    """An encoder that sees part of the patches, drawn anew at each call by torch's generator.

    Raises:
        ValueError: the encoder is none that this fits, as `check_encoder`; no patch would be left.
    """

    def __init__(self, encoder: Encoder, mask_ratio: float, *, pool: PatchPool) -> None:
        super().__init__()
        self.backbone = check_encoder(encoder.backbone)
        num_visible(self.backbone.patch_embed.num_patches, mask_ratio)
        self._mask_ratio = mask_ratio
        self._pool = pool

    def forward(self, images: Tensor) -> Tensor:
        """Return pooled features [n, D] of the visible patches of images [n, 3, s, s]."""
        kept = encode_visible(self.backbone, images, self._mask_ratio)
        return pool_tokens(kept.visible, pool=self._pool)


class HeadTraining(ContrastiveMethod):
    """Encoder and head under the loss of the neighbours.

    Args:
        encoder: gives [n, D].
        embedding: of two views.
        head: whose queue takes the first view of each batch.
        config: of the stage, resolved.
        has_labels: whether an image has a label: then it is told how good the neighbours are.
        watch: of collapse.
        neighbors: watch of them.
        frozen: modules that stay in eval mode.
        trained: see `ContrastiveMethod`.
    """

    uses_labels = False

    def __init__(
        self,
        encoder: nn.Module,
        embedding: Embedding,
        *,
        head: NNCLRHead,
        config: HeadInitConfig | TuningConfig,
        has_labels: bool,
        watch: CollapseWatch,
        neighbors: NeighborWatch,
        frozen: Sequence[nn.Module],
    ) -> None:
        trained = encoder if isinstance(config, TuningConfig) else head.projector
        super().__init__(encoder, embedding, watch=watch, trained=trained)
        self.head = head
        self.neighbors = neighbors
        self._settings = NNCLRSettings(
            temperature=float(config.temperature),
            top_k=int(config.top_k),
            variant=config.variant,
            oracle_fraction=config.oracle_fraction,
            exclude_self=config.exclude_self,
            symmetric=config.symmetric,
            transposed=config.transposed,
        )
        self._has_labels = has_labels
        self._frozen = list(frozen)

    def train(self, mode: bool = True) -> "HeadTraining":
        """Set the mode; what is frozen stays in eval mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def contrast(
        self, vectors: Tensor, images: Images, generator: torch.Generator
    ) -> ContrastiveLoss:
        """Return the loss of the global batch: vectors [B, 2, D] of the encoder."""
        step = self.head.training_loss(
            vectors.unbind(dim=1),
            images.ids,
            images.labels if self._has_labels else None,
            settings=self._settings,
            generator=generator,
        )
        uniform = math.log(len(vectors))
        metrics = self.neighbors.observe(step)
        return ContrastiveLoss(step.loss, step.z.transpose(0, 1), uniform, metrics=metrics)

    def after_step(self, step: int) -> Sequence[EventBase]:
        """Return the warnings that the last steps call for."""
        return [*super().after_step(step), *self.neighbors.warnings(step)]


class Tuning(HeadTraining):
    """`contrastive_tuning`: averages of the projector and of the encoder follow each step.

    Args:
        online: the encoder that is trained.
        average: the encoder that is the result.
        config: of the stage, resolved.
        others: what `HeadTraining` takes beside it.
    """

    def __init__(
        self, *, online: Encoder, average: Encoder, config: TuningConfig, **others: Any
    ) -> None:
        super().__init__(config=config, **others)
        self._online = online
        self._average = average
        self._target_momentum = float(config.target_momentum)
        self._ema_momentum = float(config.ema_momentum)

    def after_step(self, step: int) -> Sequence[EventBase]:
        """Let both averages follow an optimizer step; return the warnings."""
        self.head.update_target(self._target_momentum)
        ema_update(
            self._online.state_dict(), self._average.state_dict(), momentum=self._ema_momentum
        )
        return super().after_step(step)


@dataclass(frozen=True)
class HeadStages:
    """What the stages of one run that train the head share.

    Args:
        config: of the method, resolved.
        context: of the run; its encoder is the one that is evaluated.
        head: for both stages.
    """

    config: MaeCTConfig
    context: RunContext
    head: NNCLRHead

    def plan_head_init(self) -> tuple[StagePlan, dict[str, nn.Module]]:
        """Return the stage `head_init`, and what the program must hold for it.

        Raises:
            ConfigError: as `_masked`.
        """
        stage, encoder = self.config.head_init, self.context.encoder
        seen = self._masked(stage, encoder)
        planned = self._planned("head_init")
        watches = self._watches(stage, planned)

        def start() -> Stage:
            encoder.requires_grad_(False)
            method = HeadTraining(**self._parts(seen), **watches, frozen=[encoder], config=stage)
            started = self._stage(
                stage,
                method,
                planned,
                groups=self._head_groups(stage),
                lr=peak_lr(stage.head_base_lr, self._batch_size),
            )
            if self.config.head.queue_init == "prefill":
                seed_everything(self.context.seed, "prefill")
                self.head.prefill(self._pooled_batches(method, started))
            return started

        plan = StagePlan.of(planned, start, trains_encoder=False)
        return plan, {"head_init_watches": nn.ModuleDict(watches)}

    def plan_tuning(self, change: FeatureChange) -> tuple[StagePlan, dict[str, nn.Module]]:
        """Return the stage `contrastive_tuning`, and what the program must hold for it.

        Args:
            change: notes the encoder's vectors at the start.

        Raises:
            ConfigError: there are no more blocks than those to be frozen; as `_masked`.
        """
        stage, average = self.config.contrastive_tuning, self.context.encoder
        online = copy_accelerated(average)
        seen = self._masked(stage, online)
        frozen = freeze_lower_blocks(online, stage)
        planned = self._planned("contrastive_tuning")
        watches = self._watches(stage, planned)

        def start() -> Stage:
            average.requires_grad_(False)
            if not change.noted:  # else the run resumes within the stage
                online.load_state_dict(average.state_dict())
                self.head.restart_target()
                change.remember(self.context)
            method = Tuning(
                **self._parts(seen),
                **watches,
                frozen=[*frozen, average],
                online=online,
                average=average,
                config=stage,
            )
            head_scale = float(stage.head_base_lr) / stage.base_lr
            groups = layer_decay_param_groups(
                online.backbone,
                num_blocks=online.num_blocks,
                layer_decay=stage.layer_decay,
                weight_decay=stage.weight_decay,
            )
            return self._stage(
                stage,
                method,
                planned,
                groups=groups + self._head_groups(stage, lr_scale=head_scale),
                lr=peak_lr(stage.base_lr, self._batch_size),
            )

        modules = {"online_encoder": online, "tuning_watches": nn.ModuleDict(watches)}
        return StagePlan.of(planned, start), modules

    @property
    def _batch_size(self) -> int:
        return int(self.config.batch_size)

    def _planned(self, name: HeadStageName) -> PlannedStage:
        return self.config.planned(name, len(self.context.train_labels))

    def _watches(
        self, stage: HeadInitConfig | TuningConfig, planned: PlannedStage
    ) -> dict[str, Any]:
        collapse = make_collapse_watch(
            warmup_steps=warmup_steps(planned.total_steps, stage.warmup_fraction),
            steps_per_epoch=planned.total_steps // int(stage.epochs),
        )
        neighbors = NeighborWatch(
            len(self.head.queue),
            planned.name,
            log_steps=log_interval_steps(planned.total_steps),
        )
        watches = {"watch": collapse, "neighbors": neighbors}
        return {name: watch.to(self.context.device) for name, watch in watches.items()}

    def _masked(self, stage: HeadInitConfig | TuningConfig, encoder: Encoder) -> nn.Module:
        """Return the encoder as the stage lets it see images.

        Raises:
            ConfigError: its patches cannot be dropped, or all of them would be.
        """
        if stage.mask_ratio == 0:
            return encoder
        pool: PatchPool = "cls" if self.config.pool == "cls" else "mean"
        try:
            return VisiblePatches(encoder, stage.mask_ratio, pool=pool)
        except ValueError as error:
            raise ConfigError(
                f"{encoder.architecture} cannot see a part of the patches: {error}",
                hint="lower mask_ratio, or set it to 0 where the encoder is no plain vision"
                " transformer",
            ) from error

    def _parts(self, encoder: nn.Module) -> dict[str, Any]:
        """Return what the methods of both stages are made of."""
        config, context = self.config, self.context
        return {
            "encoder": encoder,
            "embedding": Embedding(
                make_views(config, context.encoder),
                num_views=NUM_VIEWS,
                micro_batch_size=config.micro_batch_size if config.grad_cache else None,
                world=context.world,
            ),
            "head": self.head,
            "has_labels": bool((context.train_labels >= 0).any()),
        }

    def _head_groups(
        self, stage: HeadInitConfig | TuningConfig, *, lr_scale: float = 1.0
    ) -> ParameterGroups:
        groups = layer_decay_param_groups(
            self.head, num_blocks=0, layer_decay=1.0, weight_decay=stage.head_weight_decay
        )
        return [group | {"lr_scale": lr_scale} for group in groups]

    def _stage(
        self,
        stage: HeadInitConfig | TuningConfig,
        method: HeadTraining,
        planned: PlannedStage,
        *,
        groups: ParameterGroups,
        lr: float,
    ) -> Stage:
        config, context = self.config, self.context
        labels = torch.from_numpy(context.train_labels)
        return Stage(
            method=method,
            source=ImageSource(context.train_images(), labels, context.device),
            sampler=config.sampler(len(labels), seed=context.seed),
            epochs=int(stage.epochs),
            optimizer=make_optimizer("adamw", groups, lr=lr, betas=stage.betas),
            lr_at=WarmupCosine(
                total=planned.total_steps,
                peak=lr,
                warmup=warmup_steps(planned.total_steps, stage.warmup_fraction),
                ramp="neither",
            ),
            autocast_dtype=autocast_dtype(config.precision, context.device),
        )

    @torch.no_grad()
    def _pooled_batches(self, method: HeadTraining, stage: Stage) -> Iterator[PooledBatch]:
        """Yield the first views of the batches that the stage begins with."""
        world, generator = self.context.world, make_generator(self.context.seed, "prefill")
        for epoch in itertools.count():
            for positions in stage.sampler.batches(epoch):
                batch = fetch_share(stage.source, world, positions)
                pooled = world.gather(method.embed(batch, generator)[:, 0].contiguous())
                ids = torch.from_numpy(positions).to(pooled.device)
                yield PooledBatch(pooled, ids, world.gather(batch.labels))


def freeze_lower_blocks(encoder: Encoder, stage: TuningConfig) -> list[nn.Module]:
    """Let the upper blocks and the final norm be trained alone; return what stays in eval mode.

    Raises:
        ConfigError: there are no more blocks than those to be frozen.
    """
    depth, count = encoder.num_blocks, stage.num_frozen_blocks
    if count == "auto":  # the depth was not known before
        count = depth // 2
    if count >= depth:
        raise ConfigError(
            f"num_frozen_blocks is {count}, but {encoder.architecture} has {depth} blocks",
            hint=f"lower contrastive_tuning.num_frozen_blocks to {max(0, depth - 1)} or less"
            if depth
            else "choose a vision transformer, such as vit_base_patch16_224",
        )
    parameters = dict(encoder.backbone.named_parameters())
    mask = trainable_parameter_mask(parameters, num_blocks=depth, num_frozen_blocks=count)
    for parameter, trained in zip(parameters.values(), mask, strict=True):
        parameter.requires_grad_(trained)
    blocks: Any = encoder.backbone.blocks
    below = itertools.takewhile(lambda part: part is not blocks, encoder.backbone.children())
    return [*below, *blocks[:count]] if count else []


def make_views(config: MaeCTConfig, encoder: Encoder) -> ViewPipeline:
    """Return the two views of an image (mae_ct.md 2.2)."""
    preset = {"minimal": mae_minimal, "byol": byol}[config.augmentation]
    views = preset(encoder.image_size_px, mean=encoder.mean, std=encoder.std)
    scale = (config.crop_scale_min, 1.0)
    return ViewPipeline(*(replace(v, scale=scale, flip_prob=config.flip_prob) for v in views))
