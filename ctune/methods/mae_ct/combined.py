"""The stage `combined`: masked autoencoder and NNCLR at once, the baseline of MAE-CT.

Source: arXiv 2304.10520, combined pre-training (mae_ct.md 4). The factor of the second loss is not
published.

Letters: b images of this process, B of the global batch, K visible patches, D dimensions.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ctune.distributed import World
from ctune.events import EventBase, Warned
from ctune.methods.base import (
    Batch,
    Method,
    RunContext,
    Stage,
    StagePlan,
    StepOutput,
    log_interval_steps,
)
from ctune.methods.collapse import CollapseWatch
from ctune.methods.mae_ct.combined_config import CombinedConfig
from ctune.methods.mae_ct.watch import NeighborWatch, make_collapse_watch
from ctune.methods.mae_stage import MaskedPretraining, mae_plan
from ctune.nnclr_head import NNCLRHead, NNCLRSettings, NNCLRStep
from ctune.optim import layer_decay_param_groups

SETTINGS = NNCLRSettings(variant="nnclr", temperature=0.15, top_k=1)
SHORTCUT_SHARE = 0.75
SHORTCUT_AFTER = 0.01
FEWEST_STEPS = 10


class ShortcutWatch(nn.Module):
    """Watches whether the loss of the neighbours falls at once; its state survives a resume.

    A fall of more than 25 % in the first 1 % of the steps, at least 10, is faster than objects are
    learned: views are told by their colours. A tenth of these steps is averaged at either end.

    Args:
        total_steps: optimizer steps of the stage.
    """

    latest: Tensor
    first: Tensor
    last: Tensor

    def __init__(self, total_steps: int) -> None:
        super().__init__()
        self._due = max(math.ceil(SHORTCUT_AFTER * total_steps), FEWEST_STEPS)
        self._averaged = self._due // FEWEST_STEPS
        for name in ("latest", "first", "last"):
            self.register_buffer(name, torch.zeros(()))

    def observe(self, loss: Tensor) -> None:
        """Take in the loss of a step."""
        self.latest.copy_(loss.detach())

    def warnings(self, step: int) -> list[Warned]:
        """Return what the state after optimizer step `step` (from 0) calls for."""
        if step < self._averaged:
            self.first += self.latest / self._averaged
        if self._due - self._averaged <= step < self._due:
            self.last += self.latest / self._averaged
        if step + 1 != self._due or not float(self.last) < SHORTCUT_SHARE * float(self.first):
            return []
        return [
            Warned(
                code="shortcut_suspected",
                message=f"the loss of the neighbours fell from {float(self.first):.2f} to"
                f" {float(self.last):.2f} within {self._due} steps: views are found by something"
                " simple, such as colours",
                hint="train mae, head_init and contrastive_tuning one after the other",
            )
        ]


class CombinedPretraining(Method):
    """Encoder, decoder and head under both losses.

    Args:
        masked: reconstructs two views, each with its own mask.
        head: gets the pooled visible patches of both.
        pool: tokens [n, 1 + K, D] after the encoder's norm to vectors [n, D].
        config: of the stage.
        watches: `collapse`, `neighbors` and `shortcut`.
        has_labels: whether an image has a label: then it is told how good the neighbours are.
        world: the processes that share the global batch.
    """

    def __init__(
        self,
        masked: MaskedPretraining,
        head: NNCLRHead,
        *,
        pool: Callable[[Tensor], Tensor],
        config: CombinedConfig,
        watches: Mapping[str, nn.Module],
        has_labels: bool,
        world: World,
    ) -> None:
        super().__init__()
        self.masked = masked
        self.head = head
        self.collapse: CollapseWatch = watches["collapse"]  # type: ignore[assignment]
        self.neighbors: NeighborWatch = watches["neighbors"]  # type: ignore[assignment]
        self.shortcut: ShortcutWatch = watches["shortcut"]  # type: ignore[assignment]
        self._pool = pool
        self._config = config
        self._has_labels = has_labels
        self._world = world

    def step(self, batch: Batch, generator: torch.Generator) -> StepOutput:
        """Return the sum of the losses: of this process's patches and of the global batch."""
        self.collapse.remember(self.head.projector)
        reconstruction, latent = self.masked.reconstruct(batch, generator)
        pooled = self._pool(latent.detach() if self._config.detach_head else latent)
        vectors = pooled.view(2, len(batch.labels), -1).transpose(0, 1)
        found = self._contrast(self._world.gather(vectors.contiguous()), batch, generator)
        metrics = self.collapse.observe(
            found.z.transpose(0, 1),
            None,
            loss=found.loss.detach(),
            uniform_loss=math.log(found.z.shape[1]),
        )
        self.shortcut.observe(found.loss)
        losses = {"mae_loss": reconstruction.loss.detach(), "nnclr_loss": found.loss.detach()}
        return StepOutput(
            loss=reconstruction.loss + self._config.nnclr_weight * found.loss,
            metrics=reconstruction.metrics | losses | metrics | self.neighbors.observe(found),
        )

    def _contrast(self, vectors: Tensor, batch: Batch, generator: torch.Generator) -> NNCLRStep:
        """Return the head's loss of the global batch [B, 2, D]."""
        ids = torch.from_numpy(batch.positions).to(batch.labels)
        labels, ids = self._world.gather(torch.stack((batch.labels, ids), dim=1)).unbind(dim=1)
        return self.head.training_loss(
            vectors.unbind(dim=1),
            ids,
            labels if self._has_labels else None,
            settings=SETTINGS,
            generator=generator,
        )

    def after_step(self, step: int) -> Sequence[EventBase]:
        """Return the warnings that the last steps call for."""
        return [
            *self.masked.after_step(step),
            *self.collapse.warnings(step, self.head.projector),
            *self.neighbors.warnings(step),
            *self.shortcut.warnings(step),
        ]


def combined_plan(
    config: CombinedConfig, context: RunContext, head: NNCLRHead
) -> tuple[StagePlan, dict[str, nn.Module]]:
    """Return the stage `combined`, and what the program must hold for it beside encoder and head.

    Args:
        config: resolved.
        context: of the run.
        head: on the run's device; its queue is a multiple of the batch.

    Raises:
        ConfigError: as `mae_plan`.
    """
    plan, modules = mae_plan(config, context)
    steps_per_epoch = plan.total_steps // config.epochs
    watches = nn.ModuleDict(
        {
            "collapse": make_collapse_watch(
                warmup_steps=config.warmup_steps(steps_per_epoch), steps_per_epoch=steps_per_epoch
            ),
            "neighbors": NeighborWatch(
                len(head.queue), plan.name, log_steps=log_interval_steps(plan.total_steps)
            ),
            "shortcut": ShortcutWatch(plan.total_steps),
        }
    ).to(context.device)

    def start() -> Stage:
        stage = plan.start()
        assert isinstance(stage.method, MaskedPretraining)
        transformer = stage.method.autoencoder.encoder
        stage.method = CombinedPretraining(
            stage.method,
            head,
            pool=lambda tokens: transformer.forward_head(tokens, pre_logits=True),
            config=config,
            watches=dict(watches.items()),
            has_labels=bool((context.train_labels >= 0).any()),
            world=context.world,
        )
        for group in layer_decay_param_groups(
            head, num_blocks=0, layer_decay=1.0, weight_decay=config.weight_decay
        ):
            stage.optimizer.add_param_group(group)
        return stage

    return StagePlan.of(plan, start), {**modules, "combined_watches": watches}
