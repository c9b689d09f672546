"""Gradient caching: a loss over a large batch in the memory of a small one.

A contrastive loss needs the embeddings of the whole batch at once, but not the activations behind
them. Each micro-batch is embedded without keeping its activations; the backward pass embeds it once
more, with the same random numbers, just before it needs them. The gradients are those of the whole
batch, for one more forward pass. Source of the idea: Gao et al., "Scaling Deep Contrastive Learning
Batch Size under Memory Limited Setup", arXiv 2101.06983; here it is `torch.utils.checkpoint` around
each micro-batch, which keeps any loss and any whole-batch head ordinary autograd.

Letters: B rows of the batch, M rows of a micro-batch.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils.checkpoint import checkpoint

Embed = Callable[[Tensor, slice], Tensor]
"""From inputs of M rows, and which rows of the batch they are, to [M, ...]: row by row alone."""


def embed_in_micro_batches(
    embed: Embed, inputs: Tensor, *, module: nn.Module, micro_batch_size: int
) -> Tensor:
    """Return `embed` of all rows [B, ...], holding activations of one micro-batch at a time.

    Forward and backward both hold them for M rows at most. Dropout and the like draw in the second
    pass what they drew in the first; batch norms normalise each micro-batch by itself and count it
    once in their running statistics. Autocast casts the weights anew for each micro-batch: with its
    own cache their gradients would be summed over the micro-batches in half precision.

    Args:
        embed: differentiable in the parameters of `module`; everything costly happens inside.
        inputs: [B, ...]; no gradient flows to them.
        module: what `embed` runs.
        micro_batch_size: M; the last micro-batch may be smaller.

    Raises:
        ValueError: B or M is below 1.
    """
    if micro_batch_size < 1 or not len(inputs):
        raise ValueError(
            f"{len(inputs)} rows in micro-batches of {micro_batch_size}; both must be at least 1"
        )
    device = inputs.device.type

    def embed_rows(part: Tensor, rows: slice) -> Tensor:
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        with torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False):
            return embed(part, rows)

    parts: list[Tensor] = []
    for start in range(0, len(inputs), micro_batch_size):
        rows = slice(start, min(start + micro_batch_size, len(inputs)))
        part: Tensor = checkpoint(
            embed_rows,
            inputs[rows],
            rows,
            use_reentrant=False,
            preserve_rng_state=True,
            context_fn=lambda: (nullcontext(), unchanged_running_statistics(module)),
        )
        parts.append(part)
    return torch.cat(parts)


def has_batch_norm(module: nn.Module) -> bool:
    """Return whether an image's output in training depends on the rest of its batch."""
    return any(isinstance(layer, _BatchNorm) for layer in module.modules())


def unchanged_running_statistics(module: nn.Module) -> AbstractContextManager[None]:
    """Return a context after which the running statistics of `module` are as before it."""
    layers = [layer for layer in module.modules() if isinstance(layer, _NormBase)]
    return _unchanged([buffer for layer in layers for buffer in layer.buffers()])


@contextmanager
def _unchanged(buffers: list[Tensor]) -> Iterator[None]:
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, before, strict=True):
                buffer.copy_(value)
