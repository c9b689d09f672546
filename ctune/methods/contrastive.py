"""What contrastive methods share: from a batch to the vectors of all views of the global batch.

Letters: B images of the global batch, b of this process, V views, D encoder and d head dimensions.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ctune.augment import ViewPipeline
from ctune.distributed import World
from ctune.events import EventBase, Warned
from ctune.grad_cache import embed_in_micro_batches, has_batch_norm
from ctune.methods.base import Batch, Method, StepOutput
from ctune.methods.collapse import CollapseWatch


@dataclass(frozen=True)
class Embedding:
    """How the views of a batch become vectors."""

    views: ViewPipeline
    num_views: int = 2
    """V."""
    micro_batch_size: int | None = None
    """Images embedded at a time, by gradient caching; None: all of this process at once."""
    world: World = field(default_factory=World)
    """The processes that share the global batch."""


@dataclass(frozen=True)
class Images:
    """Which images the vectors of a global batch are of."""

    labels: Tensor
    """[B], -1 where an image has none."""
    ids: Tensor
    """[B]: their positions in the training split."""


@dataclass(frozen=True)
class ContrastiveLoss:
    """What a method makes of the vectors of a global batch."""

    loss: Tensor
    watched: Tensor
    """[B, V, d]: vectors whose spread tells of a collapse."""
    uniform_loss: float
    """What the loss would be if all vectors were alike, without `penalty`."""
    penalty: Tensor | float = 0.0
    """The part of the loss that compares nothing."""
    metrics: dict[str, Tensor] = field(default_factory=dict)


class ContrastiveMethod(Method):
    """A stage whose loss compares all views of the global batch with each other.

    Every process embeds its own images and computes the whole loss on the gathered vectors; the
    mean of the processes' gradients is then that of one process with the whole batch.

    Args:
        encoder: gives [n, D] for n views.
        embedding: see there.
        watch: of collapse.
        row_head: what follows the encoder row by row; None: the loss gets the encoder's vectors,
            and what looks at the batch as a whole belongs into `contrast`.
        trained: what must change for the stage to be of use; None: the encoder.
    """

    def __init__(
        self,
        encoder: nn.Module,
        embedding: Embedding,
        *,
        watch: CollapseWatch,
        row_head: nn.Module | None = None,
        trained: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.trained = encoder if trained is None else trained
        self.row_head = nn.Identity() if row_head is None else row_head
        self.watch = watch
        self._embedding = embedding

    def contrast(
        self, vectors: Tensor, images: Images, generator: torch.Generator
    ) -> ContrastiveLoss:
        """Return the loss of the global batch, alike in all processes.

        Args:
            vectors: [B, V, d] of `row_head`, image by image.
            images: of the batch.
            generator: in the same state in all processes.
        """
        raise NotImplementedError

    uses_labels = True
    """Whether the loss looks at labels."""

    def step(self, batch: Batch, generator: torch.Generator) -> StepOutput:
        """Return the loss of the global batch that `batch` is this process's share of."""
        self.watch.remember(self.trained)
        world = self._embedding.world
        vectors = world.gather(self.embed(batch, generator))
        ids = torch.from_numpy(batch.positions).to(batch.labels)
        labels, ids = world.gather(torch.stack((batch.labels, ids), dim=1)).unbind(dim=1)
        found = self.contrast(vectors, Images(labels, ids), generator)
        metrics = self.watch.observe(
            found.watched.detach(),
            labels if self.uses_labels else None,
            loss=found.loss.detach() - found.penalty,
            uniform_loss=found.uniform_loss,
        )
        return StepOutput(loss=found.loss, metrics=metrics | found.metrics)

    def embed(self, batch: Batch, generator: torch.Generator) -> Tensor:
        """Return the vectors [b, V, d] of V views of this process's images."""
        how = self._embedding
        drawn = how.views.draw(
            batch.sizes_px, generator, num_views=how.num_views, shard=batch.shard
        )

        def embed_rows(images: Tensor, rows: slice) -> Tensor:
            params = [view.select(rows) for view in drawn]
            vectors = self.row_head(self.encoder(how.views.render_all(images, params)))
            by_view: Tensor = vectors.view(how.num_views, len(images), -1)
            return by_view.transpose(0, 1).contiguous()

        if how.micro_batch_size is None:
            return embed_rows(batch.inputs, slice(None))
        return embed_in_micro_batches(
            embed_rows, batch.inputs, module=self, micro_batch_size=how.micro_batch_size
        )

    def after_step(self, step: int) -> Sequence[EventBase]:
        """Return the warnings that the last steps call for."""
        return self.watch.warnings(step, self.trained)


def grad_cache_warnings(encoder: nn.Module, *, micro_batch_size: int) -> list[Warned]:
    """Return what gradient caching changes for this encoder beside memory."""
    if not has_batch_norm(encoder):
        return []
    return [
        Warned(
            code="batch_norm_per_micro_batch",
            message="the encoder has batch norm, which normalises each micro-batch of"
            f" {micro_batch_size} images by itself: gradients are not exactly those of the whole"
            " batch",
            hint="raise micro_batch_size (32 or more will do), or choose an encoder without batch"
            " norm, such as a vision transformer",
        )
    ]
