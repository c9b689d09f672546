"""The stage `mae`: reconstructing hidden patches (arXiv 2111.06377, mae.md 2).

Letters: b images of this process, V views, L patches, K visible ones, D dimensions.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ctune.augment import Shard, ViewPipeline
from ctune.backbones import Encoder
from ctune.device import autocast_dtype
from ctune.distributed import World
from ctune.errors import ConfigError
from ctune.events import EventBase, Warned
from ctune.masked_autoencoder import MaskedAutoencoder
from ctune.methods.base import (
    Batch,
    ImageSource,
    Method,
    RunContext,
    Stage,
    StagePlan,
    StepOutput,
)
from ctune.methods.base_config import PlannedStage
from ctune.methods.mae_config import MaePretrainConfig
from ctune.methods.mae_monitor import HeldoutReconstruction
from ctune.optim import layer_decay_param_groups, make_optimizer
from ctune.patches import num_visible
from ctune.schedules import WarmupCosine
from ctune.seeding import make_generator, seed_everything
from ctune.view_presets import mae_minimal

PADDING_PX = 4
ENDPOINTS: Mapping[str, dict[str, Any]] = {
    "exclusive": {"ramp": "neither"},
    "inclusive": {"ramp": "both", "reach_end": True},
}
CHECK_STEPS = 10
"""A check waits for the device, so that it is done now and then only."""
UNLEARNED_SHARE = 0.98
UNLEARNED_AFTER = 0.05
FEWEST_STEPS = 50
COLLAPSED_SPREAD = 1e-4
MONITORED_IMAGES = 256


class ReconstructionWatch(nn.Module):
    """Watches loss and features for what goes wrong (mae.md 7); its state survives a resume.

    Args:
        unlearned_loss: the loss of a decoder that always answers 0; None where that is not known.
        total_steps: optimizer steps of the stage.
    """

    loss_mean: Tensor
    collapsed: Tensor
    told: Tensor

    def __init__(self, *, unlearned_loss: float | None, total_steps: int) -> None:
        super().__init__()
        self._unlearned_loss = unlearned_loss
        self._due = max(math.ceil(UNLEARNED_AFTER * total_steps), FEWEST_STEPS)
        self.register_buffer("loss_mean", torch.full((), math.nan))
        self.register_buffer("collapsed", torch.zeros((), dtype=torch.int64))
        self.register_buffer("told", torch.zeros((), dtype=torch.bool))

    def observe(self, loss: Tensor, spread: Tensor) -> None:
        """Take in one micro-batch: its loss and `feature_spread`, alike in all processes."""
        known = self.loss_mean.isfinite()
        self.loss_mean.copy_(torch.where(known, torch.lerp(self.loss_mean, loss, 0.1), loss))
        self.collapsed.copy_(torch.where(spread < COLLAPSED_SPREAD, self.collapsed + 1, 0))

    def warnings(self, step: int) -> list[Warned]:
        """Return what the state after optimizer step `step` (from 0) calls for."""
        found = []
        if step + 1 == self._due and self._unlearned_loss is not None:
            limit = UNLEARNED_SHARE * self._unlearned_loss
            if float(self.loss_mean) >= limit:
                found.append(
                    Warned(
                        code="not_learning",
                        message=f"step {step}: the loss is {float(self.loss_mean):.3f}; one that"
                        f" predicts nothing has {self._unlearned_loss:.3f}",
                        hint="raise base_lr, or wait for the end of the warm-up",
                    )
                )
        due = (step + 1) % CHECK_STEPS == 0 and not bool(self.told)
        if due and int(self.collapsed) >= FEWEST_STEPS:
            self.told.fill_(True)
            found.append(
                Warned(
                    code="feature_collapse",
                    message=f"step {step}: the class token's features are alike for all images",
                    hint="lower base_lr, or lengthen the warm-up",
                )
            )
        return found


class MaskedPretraining(Method):
    """Encoder and decoder under the loss of the hidden patches."""

    def __init__(
        self,
        autoencoder: MaskedAutoencoder,
        config: MaePretrainConfig,
        *,
        views: ViewPipeline,
        watch: ReconstructionWatch,
        world: World,
        monitor: HeldoutReconstruction | None = None,
    ) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.watch = watch
        self.monitor = monitor
        self._config = config
        self._views = views
        self._world = world

    def step(self, batch: Batch, generator: torch.Generator) -> StepOutput:
        """Return the mean loss of all views of one micro-batch."""
        return self.reconstruct(batch, generator)[0]

    def reconstruct(self, batch: Batch, generator: torch.Generator) -> tuple[StepOutput, Tensor]:
        """Return what `step` does, and the encoder's tokens [V * b, 1 + K, D] of visible patches.

        All first views come first.
        """
        config = self._config
        shard = batch.shard or Shard(0, len(batch.labels))
        imgs = self._views.views(
            batch.inputs, batch.sizes_px, generator, num_views=int(config.num_views), shard=shard
        )
        noise = masking_noise(
            self.autoencoder.grid_size,
            generator,
            num_images=len(batch.labels),
            num_views=int(config.num_views),
            block=config.mask_block,
            shard=shard,
        )
        result = self.autoencoder(imgs, config.mask_ratio, noise.to(imgs.device, non_blocking=True))
        spread = feature_spread(result.latent[:, 0])
        weight = self._world.weight(len(batch.labels), shard.total)
        self.watch.observe(*self._world.mean(torch.stack((result.loss, spread)).detach() * weight))
        return StepOutput(loss=result.loss, metrics={"feature_spread": spread}), result.latent

    def after_step(self, step: int) -> list[EventBase]:
        """Return the warnings that the last steps call for, and what a look at others shows."""
        told: list[EventBase] = [*self.watch.warnings(step)]
        if self.monitor is not None:
            told += self.monitor.look(step, self.autoencoder, self.watch.loss_mean)
        return told


@torch.no_grad()
def feature_spread(features: Tensor) -> Tensor:
    """Return the standard deviation of features [N, D] over their mean norm; 1 for one image."""
    wide = features.float()
    if len(wide) == 1:
        return wide.new_ones(())
    spread: Tensor = wide.std(dim=0, correction=0).mean() / wide.norm(dim=1).mean()
    return spread


def masking_noise(
    grid_size: tuple[int, int],
    generator: torch.Generator,
    *,
    num_images: int,
    shard: Shard,
    num_views: int = 1,
    block: int = 1,
) -> Tensor:
    """Return the noise [V * b, L] that decides which patches are hidden: all first views first.

    Processes with equal generators draw for their shards what one draws for the whole batch.

    Args:
        grid_size: patches as (rows, columns).
        generator: CPU generator.
        num_images: b.
        shard: where they are in the global batch.
        num_views: V.
        block: patches of blocks of so many by so many have equal noise; blocks at the right and
            lower edge may be cut.
    """
    rows, columns = grid_size
    cells = (-(-rows // block), -(-columns // block))
    drawn = torch.rand(num_views, shard.total, *cells, generator=generator)
    noise = drawn[:, shard.start : shard.start + num_images].flatten(0, 1)
    if block > 1:
        noise = noise.repeat_interleave(block, dim=1).repeat_interleave(block, dim=2)
    return noise[:, :rows, :columns].flatten(1)


def make_mae_views(config: MaePretrainConfig, encoder: Encoder) -> ViewPipeline:
    """Return the views: crop or shift, and flip (mae.md 2.2)."""
    (view,) = mae_minimal(encoder.image_size_px, mean=encoder.mean, std=encoder.std)
    return ViewPipeline(
        replace(
            view,
            scale=(config.crop_scale_min, 1.0),
            interpolation=config.crop_interpolation,
            pad_px=PADDING_PX if config.augment == "pad_flip" else None,
            flip_prob=config.flip_prob,
        )
    )


def make_autoencoder(config: MaePretrainConfig, context: RunContext) -> MaskedAutoencoder:
    """Return the run's encoder with a decoder, on its device; from scratch it is started anew.

    Raises:
        ConfigError: an encoder that this does not fit; a mask_ratio that hides none or all patches.
    """
    seed_everything(context.seed, "mae")
    encoder = context.encoder
    try:
        autoencoder = MaskedAutoencoder(
            encoder.backbone,
            config.decoder_embed_dim,
            decoder_depth=config.decoder_depth,
            decoder_num_heads=config.decoder_num_heads,
            norm_pix_loss=config.norm_pix_loss,
        )
        visible = num_visible(autoencoder.num_patches, config.mask_ratio)
        if visible == autoencoder.num_patches:
            raise ValueError(f"mask_ratio {config.mask_ratio} hides none of {visible} patches")
        if context.from_scratch:
            autoencoder.initialise_encoder()
    except ValueError as error:
        raise ConfigError(
            f"{encoder.architecture} cannot be trained as a masked autoencoder: {error}",
            hint="choose a vision transformer with a class token, such as vit_base_patch16_224, and"
            " a mask_ratio that fits its number of patches",
        ) from error
    return autoencoder.to(context.device)


def make_monitor(
    config: MaePretrainConfig,
    context: RunContext,
    *,
    grid_size: tuple[int, int],
    planned: PlannedStage,
) -> HeldoutReconstruction | None:
    """Return what looks at held-out images during the stage, None where there are none.

    They are seen whole: without a crop.
    """
    if context.heldout_images is None:
        return None
    pixels = context.heldout_images(min(MONITORED_IMAGES, int(config.batch_size)))
    noise = masking_noise(
        grid_size,
        make_generator(context.seed, planned.name, "held-out"),
        num_images=len(pixels),
        shard=Shard(0, len(pixels)),
        block=config.mask_block,
    )
    return HeldoutReconstruction(
        pixels,
        noise,
        preprocessing=context.encoder.preprocessing,
        mask_ratio=config.mask_ratio,
        stage=planned.name,
        total_steps=planned.total_steps,
        autocast_dtype=autocast_dtype(config.precision, context.device),
    ).to(context.device)


def mae_plan(
    config: MaePretrainConfig, context: RunContext
) -> tuple[StagePlan, dict[str, nn.Module]]:
    """Return the stage `mae`, and what the program must hold for it beside the encoder.

    Args:
        config: resolved.
        context: of the run.

    Raises:
        ConfigError: as `make_autoencoder`.
    """
    num_images = len(context.train_labels)
    sampler = config.sampler(num_images, seed=context.seed)
    planned = config.planned(num_images)
    autoencoder = make_autoencoder(config, context)
    values = autoencoder.decoder.pred.out_features
    watch = ReconstructionWatch(
        unlearned_loss=(values - 1) / values if config.norm_pix_loss else None,
        total_steps=planned.total_steps,
    ).to(context.device)
    monitor = make_monitor(config, context, grid_size=autoencoder.grid_size, planned=planned)

    def start() -> Stage:
        autoencoder.train_all()
        labels = torch.from_numpy(context.train_labels)
        groups = layer_decay_param_groups(
            autoencoder,
            num_blocks=context.encoder.num_blocks,
            layer_decay=1.0,
            weight_decay=config.weight_decay,
        )
        return Stage(
            method=MaskedPretraining(
                autoencoder,
                config,
                views=make_mae_views(config, context.encoder),
                watch=watch,
                world=context.world,
                monitor=monitor,
            ),
            source=ImageSource(context.train_images(), labels, context.device),
            sampler=sampler,
            epochs=config.epochs,
            optimizer=make_optimizer("adamw", groups, lr=config.peak_lr, betas=config.betas),
            lr_at=mae_learning_rate(config, planned.total_steps),
            accumulate_steps=int(config.accumulate_steps),
            autocast_dtype=autocast_dtype(config.precision, context.device),
        )

    modules: dict[str, nn.Module] = {"mae_decoder": autoencoder.decoder, "mae_watch": watch}
    if monitor is not None:
        modules["mae_monitor"] = monitor
    return StagePlan.of(planned, start), modules


def mae_learning_rate(config: MaePretrainConfig, total_steps: int) -> WarmupCosine:
    """Return the learning rate as a function of the step: a linear warm-up, then half a cosine."""
    return WarmupCosine(
        total=total_steps,
        peak=config.peak_lr,
        end=config.min_lr,
        warmup=config.warmup_steps(total_steps // config.epochs),
        **ENDPOINTS[config.schedule_endpoints],
    )
