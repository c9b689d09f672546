"""The queue of earlier vectors in which NNCLR looks for neighbours.

Sources: Dwibedi et al., arXiv 2104.14548; drawing among the k nearest and leaving out older vectors
of the same image as in MAE-CT (arXiv 2304.10520; ml-jku/MAE-CT, ``models/contrastive_heads``).

Letters: Q rows of the queue, B images, o dimensions, k nearest rows.
"""

import math

import torch
from torch import Tensor, nn

from ctune.unit_length import unit_length

CHUNK_ROWS = 8192
"""Rows of the queue that are compared at a time: 32 MB of similarities for 1024 images."""
SAME_CLASS_BONUS = 2.0
"""Cosines differ by 2 at most, so that this lifts every row of the class above the others."""


class NearestNeighborQueue(nn.Module):
    """The last Q vectors with the label and the id of their image; a ring, all of it buffers.

    It starts with random directions, drawn from torch's global generator, and -1 for labels and
    ids.

    Args:
        size: Q.
        dim: o.

    Raises:
        ValueError: a size below 2 or a width below 1.
    """

    features: Tensor
    labels: Tensor
    ids: Tensor
    pointer: Tensor

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        if size < 2 or dim < 1:
            raise ValueError(f"size is {size} and dim {dim}; they must be at least 2 and 1")
        self.register_buffer("features", unit_length(torch.randn(size, dim)))
        self.register_buffer("labels", torch.full((size,), -1))
        self.register_buffer("ids", torch.full((size,), -1))
        self.register_buffer("pointer", torch.tensor(0))

    def __len__(self) -> int:
        """Return Q."""
        return len(self.features)

    def forget_images(self) -> None:
        """Keep the vectors alone: labels and ids are those of another data set."""
        self.labels.fill_(-1)
        self.ids.fill_(-1)

    @torch.no_grad()
    def enqueue(self, features: Tensor, labels: Tensor, ids: Tensor) -> None:
        """Replace the oldest rows by those of the global batch, in the order of its images.

        Args:
            features: [N, o] of unit length.
            labels: [N] classes, -1 where there is none.
            ids: [N] positions of the images in the data set.

        Raises:
            ValueError: shapes that do not fit; Q not a multiple of N.
        """
        count, size = len(features), len(self)
        if features.shape != (count, self.features.shape[1]):
            raise ValueError(
                f"features has shape {list(features.shape)}; the queue takes "
                f"[N, {self.features.shape[1]}]"
            )
        if labels.shape != (count,) or ids.shape != (count,):
            raise ValueError(
                f"labels has shape {list(labels.shape)} and ids {list(ids.shape)}; {count} features"
                f" need [{count}]"
            )
        if count == 0 or size % count:
            raise ValueError(
                f"the queue has {size} rows, which is no multiple of the batch of {count}; choose a"
                " queue_size that is"
            )
        rows = (self.pointer + torch.arange(count, device=self.pointer.device)) % size
        self.features[rows] = features.to(self.features.dtype)
        self.labels[rows] = labels
        self.ids[rows] = ids
        self.pointer.copy_((self.pointer + count) % size)


@torch.no_grad()
def find_nearest_neighbors(
    z: Tensor,
    ids: Tensor | None = None,
    *,
    queue: NearestNeighborQueue,
    top_k: int = 1,
    oracle_labels: Tensor | None = None,
) -> Tensor:
    """Return the k rows of the queue [B, k] that are most similar to each vector, best first.

    Similarities are computed in float32 at least, whatever autocast says, over a part of the queue
    at a time. MAE-CT sets the similarity of excluded rows to -1; here they cannot be returned.

    Args:
        z: [B, o] of unit length.
        ids: [B]; rows with the same id, which are older vectors of the same image, are left out.
            None: none is.
        queue: where to look.
        top_k: k.
        oracle_labels: [B]; rows of the same class come before all others. -1: not for this image.
            None: for none.

    Raises:
        ValueError: z not [B, o]; ids or labels not [B]; an image for which fewer than k rows are
            left.
    """
    if z.ndim != 2 or z.shape[1] != queue.features.shape[1]:
        raise ValueError(
            f"z has shape {list(z.shape)}; the queue has vectors of {queue.features.shape[1]}"
        )
    for name, values in (("ids", ids), ("oracle_labels", oracle_labels)):
        if values is not None and values.shape != z.shape[:1]:
            raise ValueError(f"{name} has shape {list(values.shape)}; z needs [{len(z)}]")
    if not 1 <= top_k <= len(queue):
        raise ValueError(f"top_k is {top_k}; it must be in [1, {len(queue)}], the queue's size")
    exact = z if z.dtype == torch.float64 else z.float()
    best, found = exact.new_empty(len(z), 0), queue.ids.new_empty(len(z), 0)
    for start in range(0, len(queue), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        similarities = _similarities(exact, ids, queue, rows, oracle_labels)
        values, index = similarities.topk(min(top_k, similarities.shape[1]))
        best, found = torch.cat([best, values], 1), torch.cat([found, index + start], 1)
        best, order = best.topk(min(top_k, best.shape[1]))
        found = found.gather(1, order)
    if bool((best == -math.inf).any()):
        raise ValueError(
            f"an image has fewer than top_k = {top_k} rows of other images in the queue of "
            f"{len(queue)}; lower top_k or use more images"
        )
    return found


def _similarities(
    z: Tensor,
    ids: Tensor | None,
    queue: NearestNeighborQueue,
    rows: slice,
    oracle_labels: Tensor | None,
) -> Tensor:
    """Return cosines with some rows of the queue; -inf: excluded."""
    with torch.autocast(device_type=z.device.type, enabled=False):
        similarities = z @ queue.features[rows].to(z.dtype).T
    if oracle_labels is not None:
        wanted = oracle_labels[:, None]
        same = (wanted == queue.labels[None, rows]) & (wanted >= 0)
        similarities += SAME_CLASS_BONUS * same
    if ids is not None:
        similarities.masked_fill_(ids[:, None] == queue.ids[None, rows], -math.inf)
    return similarities


def draw_neighbors(
    ranked: Tensor, *, choice: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Return one row [B] of each image's k nearest, drawn uniformly and independently.

    Args:
        ranked: [B, k] of ``find_nearest_neighbors``.
        choice: [B], which to take instead of drawing; 0: the most similar.
        generator: source of the draw; its device need not be that of `ranked`.

    Raises:
        ValueError: choice not [B] in [0, k).
    """
    count, top_k = ranked.shape
    if choice is None:
        device = torch.device("cpu") if generator is None else generator.device
        choice = torch.randint(top_k, (count,), generator=generator, device=device)
    elif choice.shape != (count,) or bool(((choice < 0) | (choice >= top_k)).any()):
        raise ValueError(
            f"choice has shape {list(choice.shape)} and must be [{count}] of 0..{top_k - 1}"
        )
    return ranked.gather(1, choice.to(ranked.device)[:, None])[:, 0]


def oracle_part(labels: Tensor, fraction: float) -> Tensor:
    """Return the labels [B] of the first floor(B * fraction) images, -1 for the others.

    Raises:
        ValueError: a fraction outside [0, 1].
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"oracle_fraction is {fraction}; it must be in [0, 1]")
    # 100 * 0.29 is 28.999..., which means 29.
    first = math.floor(len(labels) * fraction + 1e-9)
    told = torch.arange(len(labels), device=labels.device) < first
    return labels.where(told, -1)
