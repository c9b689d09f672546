"""N-pair loss on raw embeddings (Sohn, "Improved Deep Metric Learning with Multi-class N-pair Loss
Objective", NeurIPS 2016, Eq. 5), with the L2 term as LaCViT's comparison uses it.

Letters: N images, D dimensions, n pairs.
"""

import torch
from torch import Tensor


def n_pair_indices(labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Draw one (anchor, positive) pair of distinct images for each class with two or more.

    Args:
        labels: [N] integer class of each image.
        generator: source of the draw; its device need not be the labels'.

    Returns:
        [n, 2] int64 indices into the batch, classes ascending, on the labels' device.

    Raises:
        ValueError: labels not [N] integers; fewer than two classes with two images.
    """
    integer = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if labels.ndim != 1 or not integer:
        raise ValueError(
            f"labels has shape {list(labels.shape)} and dtype {labels.dtype}; it must be a 1-D "
            "tensor of integers"
        )
    device = torch.device("cpu") if generator is None else generator.device
    host = labels.to(device)
    pairs = []
    for label in torch.unique(host).tolist():
        members = torch.nonzero(host == label).flatten()
        if len(members) >= 2:
            drawn = torch.randperm(len(members), generator=generator, device=device)[:2]
            pairs.append(members[drawn])
    if len(pairs) < 2:
        raise ValueError(
            f"labels gives {len(pairs)} classes with two images, but N-pair needs at least 2; "
            "use a class-balanced sampler"
        )
    return torch.stack(pairs).to(labels.device)


def n_pair_loss(embeddings: Tensor, pairs: Tensor, *, l2_reg: float = 0.02) -> Tensor:
    """Mean of log(1 + sum over j != i of exp(a_i.p_j - a_i.p_i)), plus the L2 term.

    The other rows' positives are row i's negatives. The L2 term is l2_reg times the sum of all
    squared norms of anchors and positives, divided by n. One log-sum-exp with an entry of exactly 0
    (j = i), so large embeddings stay finite where the plain sum of exponentials overflows.

    Args:
        embeddings: [N, D], not normalised.
        pairs: [n, 2] integer rows (anchor, positive), from ``n_pair_indices``.
        l2_reg: weight of the L2 term.

    Returns:
        Scalar loss, float32 or float64.

    Raises:
        ValueError: embeddings not floating [N, D]; pairs not [n, 2] integers in [0, N) with
            n >= 2; l2_reg negative.
    """
    if embeddings.ndim != 2 or not embeddings.is_floating_point():
        raise ValueError(
            f"embeddings has shape {list(embeddings.shape)} and dtype {embeddings.dtype}; it must "
            "be floating point [N, D]"
        )
    _check_pairs(pairs, embeddings.shape[0])
    if not l2_reg >= 0:
        raise ValueError(f"l2_reg is {l2_reg}; it must be 0 or more, 0.02 is usual")
    dtype = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
    with torch.autocast(device_type=embeddings.device.type, enabled=False):
        anchors, positives = embeddings.to(dtype)[pairs.long()].unbind(1)
        logits = anchors @ positives.T
        contrast = (logits - logits.diagonal()[:, None]).logsumexp(1).mean()
        return contrast + l2_reg * squared_norm_per_pair(embeddings.to(dtype), pairs)


def squared_norm_per_pair(embeddings: Tensor, pairs: Tensor) -> Tensor:
    """Return the squared norms of all anchors and positives, summed and divided by n.

    Args:
        embeddings: [N, D].
        pairs: [n, 2] integer rows (anchor, positive).
    """
    with torch.autocast(device_type=embeddings.device.type, enabled=False):
        return embeddings[pairs.long()].square().sum() / len(pairs)


def _check_pairs(pairs: Tensor, count: int) -> None:
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.is_floating_point():
        raise ValueError(
            f"pairs has shape {list(pairs.shape)} and dtype {pairs.dtype}; it must be integer "
            "[n, 2]: anchor row, positive row"
        )
    if pairs.shape[0] < 2:
        raise ValueError(
            f"pairs holds {pairs.shape[0]} pairs, but each needs another as its negative; give "
            "at least 2, of different classes"
        )
    if bool((pairs < 0).any()) or bool((pairs >= count).any()):
        raise ValueError(f"pairs points outside the {count} embeddings; indices are 0..{count - 1}")
