"""Projection heads whose sequence is the batch: a Transformer, and its feed-forward baseline.

Source: arXiv 2403.18681 ("Deep Fusion"); HuanranLi/DeepFusion, ``src/TransFusion.py``. Its blocks
are post-norm encoder blocks; its paper calls them decoder blocks, but nothing is causal. The batch
norm at the end is in its code, not in the paper.

There is neither a position embedding nor a mask, and there must be none: a position tells row i
that i + B is its partner, and a mask that hides the partner tells it by omission. Without them the
blocks treat all rows alike, so that a partner is found by its content only. ``separate`` sequences
do depend on the view, but not on the pairs.

Several processes: each runs the whole head on the rows of all, gathered with gradient, as
`ctune.methods.contrastive` does. Batch norm is then over all rows on every backend; where
`SyncBatchNorm` takes its place on GPUs, it normalises alike, and its running variance alone differs
(see `nnclr_head.py`).

Letters: B images, V views, N = V * B rows, S sequences of n rows; D, E, F, H, O as in
`head_sizes.py`.
"""

from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ctune.distributed import World
from ctune.head_sizes import FeedForwardSettings, SequenceMode, SequenceScope, TransformerSettings

ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU}
NORMS = {"layer": nn.LayerNorm, "batch": nn.BatchNorm1d, "none": nn.Identity}


def images_in_scope(vectors: Tensor, scope: SequenceScope, world: World) -> Tensor:
    """Return the images whose views one head sees and one loss contrasts, [B or b, V, D].

    ``global``: all, so that several processes compute what one would. ``local``: the b images of
    this process, as the authors' code does it; the mean of the processes' losses and gradients is
    then another loss, with fewer negatives, and depends on their number.

    Args:
        vectors: [B, V, D] of all processes, in rank order, gathered with gradient.
        scope: see above.
        world: the processes.
    """
    return vectors if scope == "global" else vectors[world.share(len(vectors))]


class TransformerProjectorBlock(nn.Module):
    """Attention of all rows of a sequence to each other, then two linear layers, each post-norm.

    x <- norm(x + s_a * attention(x)), x <- norm(x + s_f * ffn(x)). PyTorch's own initialisation, no
    dropout.

    Args:
        settings: see there; its depth is the head's.
    """

    def __init__(self, settings: TransformerSettings) -> None:
        super().__init__()
        E, F = settings.dim, settings.ffn_dim
        extra = settings.extra_qkv_projection
        self.query = nn.Linear(E, E) if extra else nn.Identity()
        self.key = nn.Linear(E, E) if extra else nn.Identity()
        self.value = nn.Linear(E, E) if extra else nn.Identity()
        self.attention = nn.MultiheadAttention(E, settings.num_heads, batch_first=True)
        self.norm1 = NORMS[settings.norm](E)
        self.ffn = nn.Sequential(
            nn.Linear(E, F), ACTIVATIONS[settings.activation](), nn.Linear(F, E)
        )
        self.norm2 = NORMS[settings.norm](E)
        self._scales = settings.attention_branch_scale, settings.ffn_branch_scale

    def forward(self, x: Tensor) -> Tensor:
        """Return [n, E], or [S, n, E] of S sequences; the attention is never laid out."""
        return self._blend(x, need_attention=False)[0]

    def forward_with_attention(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the same, and the attention [H, n, n], or [S, H, n, n], whose rows sum to 1."""
        output, attention = self._blend(x, need_attention=True)
        assert attention is not None
        return output, attention

    def _blend(self, x: Tensor, *, need_attention: bool) -> tuple[Tensor, Tensor | None]:
        mixed, attention = self.attention(
            self.query(x),
            self.key(x),
            self.value(x),
            need_weights=need_attention,
            average_attn_weights=False,
        )
        x = _norm_rows(self.norm1, x + self._scales[0] * mixed)
        return _norm_rows(self.norm2, x + self._scales[1] * self.ffn(x)), attention


def _norm_rows(norm: nn.Module, x: Tensor) -> Tensor:
    """Normalise [..., E] as rows: batch norm is over the rows of all sequences together."""
    normed: Tensor = norm(x.flatten(0, -2))
    return normed.view_as(x)


class _AdaptedHead(nn.Module):
    """Linear(D, width), blocks, Linear(width, O) and batch norm without a bias.

    Args:
        input_dim: D.
        output_dim: O.
        width: of the blocks.
        blocks: any modules.
        output_norm: whether batch norm ends the head.

    Raises:
        ValueError: D below 1 or O below 2; in ``forward``, see there.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        *,
        width: int,
        blocks: list[nn.Module],
        output_norm: bool,
    ) -> None:
        super().__init__()
        for name, value, least in (("input_dim", input_dim, 1), ("output_dim", output_dim, 2)):
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        self.in_dim, self.out_dim = input_dim, output_dim
        self.input_projection = nn.Linear(input_dim, width)
        self.blocks = nn.ModuleList(blocks)
        self.output_projection = nn.Linear(width, output_dim)
        self.output_norm: nn.Module = nn.Identity()
        if output_norm:
            norm = nn.BatchNorm1d(output_dim)
            norm.bias.requires_grad_(False)
            self.output_norm = norm

    def forward(self, h: Tensor, *, num_views: int = 2) -> Tensor:
        """Return z [N, O], not of unit length.

        Args:
            h: [N, D]: the first views of all images, then their second views in the same order.
            num_views: V; 1 for images that have no partner, as in evaluation.

        Raises:
            ValueError: h is not [N, D], or N no multiple of V; one image only in training.
        """
        self._check(h, num_views)
        x = self._run_blocks(self.input_projection(h), num_views)
        z: Tensor = self.output_norm(self.output_projection(x))
        return z

    def _run_blocks(self, x: Tensor, num_views: int) -> Tensor:
        raise NotImplementedError

    def _check(self, h: Tensor, num_views: int) -> None:
        if h.ndim != 2 or h.shape[1] != self.in_dim:
            raise ValueError(
                f"h has shape {list(h.shape)}, but the head takes rows of {self.in_dim} dimensions;"
                " build it with the encoder's feature size"
            )
        if num_views < 1 or not len(h) or len(h) % num_views:
            raise ValueError(f"{len(h)} rows are not {num_views} views of as many images each")
        if self.training and len(h) == num_views:
            raise ValueError("the batch is one image; a head over the batch needs at least two")


class BlockOutput(NamedTuple):
    """What a block of `TransformerProjectionHead` makes of a batch."""

    tokens: Tensor
    """[N, E]."""
    attention: Tensor
    """[H, N, N]: probabilities, row by row; 0 between rows of different sequences."""


class TransformerProjectionHead(_AdaptedHead):
    """Map a whole batch [N, D] to [N, O]; every row may look at every other.

    Args:
        input_dim: D.
        output_dim: O.
        settings: of the blocks.
        sequence_mode: ``joint``: one sequence of all rows, as in the authors' code; ``separate``:
            one per view, with the same weights.
        output_norm: whether batch norm ends the head.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        *,
        settings: TransformerSettings,
        sequence_mode: SequenceMode = "joint",
        output_norm: bool = True,
    ) -> None:
        super().__init__(
            input_dim,
            output_dim,
            width=settings.dim,
            blocks=[TransformerProjectorBlock(settings) for _ in range(settings.depth)],
            output_norm=output_norm,
        )
        if sequence_mode not in ("joint", "separate"):
            raise ValueError(f"sequence_mode is {sequence_mode!r}; use 'joint' or 'separate'")
        self._sequence_mode = sequence_mode

    @torch.no_grad()
    def block_outputs(self, h: Tensor, *, num_views: int = 2) -> Iterator[BlockOutput]:
        """Yield what each block makes of a batch, in eval mode, one at a time.

        An attention map takes 4 * H * N * N bytes: keep those of interest only.

        Args:
            h: [N, D], as `forward` takes them.
            num_views: V.

        Raises:
            ValueError: the head is in training mode; h holds NaN or infinity; as `forward`.
        """
        if self.training:
            raise ValueError("the head is in training mode; call eval() before block_outputs()")
        self._check(h, num_views)
        if not bool(h.isfinite().all()):
            raise ValueError("h holds NaN or infinity; the encoder has diverged")
        x = self._as_sequences(self.input_projection(h), num_views)
        for block in self.blocks:
            assert isinstance(block, TransformerProjectorBlock)
            x, attention = block.forward_with_attention(x)
            by_head = [
                torch.block_diag(*maps)  # type: ignore[no-untyped-call]
                for maps in attention.transpose(0, 1)
            ]
            yield BlockOutput(x.flatten(0, 1), torch.stack(by_head))

    def attention_maps(self, h: Tensor, *, num_views: int = 2) -> list[Tensor]:
        """Return the attention [H, N, N] of every block; see `block_outputs`."""
        return [block.attention for block in self.block_outputs(h, num_views=num_views)]

    def _run_blocks(self, x: Tensor, num_views: int) -> Tensor:
        x = self._as_sequences(x, num_views)
        for block in self.blocks:
            x = block(x)
        return x.flatten(0, 1)

    def _as_sequences(self, x: Tensor, num_views: int) -> Tensor:
        """Return [S, n, E] of rows [N, E]."""
        num_sequences = 1 if self._sequence_mode == "joint" else num_views
        return x.view(num_sequences, -1, x.shape[1])


class FeedForwardProjectionHead(_AdaptedHead):
    """The baseline, [N, D] -> [N, O]: blocks of linear layer, batch norm and ReLU, row by row.

    Args:
        input_dim: D.
        output_dim: O.
        settings: of the blocks.
        output_norm: whether batch norm ends the head.
    """

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        *,
        settings: FeedForwardSettings,
        output_norm: bool = True,
    ) -> None:
        w = settings.hidden_dim
        super().__init__(
            input_dim,
            output_dim,
            width=w,
            blocks=[
                nn.Sequential(
                    OrderedDict(
                        linear=nn.Linear(w, w), norm=nn.BatchNorm1d(w), activation=nn.ReLU()
                    )
                )
                for _ in range(settings.depth)
            ],
            output_norm=output_norm,
        )

    def _run_blocks(self, x: Tensor, num_views: int) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x
