"""Sizes of the projection heads of `transformer_head.py` and what they count. Never imports torch.

Source: arXiv 2403.18681; HuanranLi/DeepFusion, ``src/TransFusion.py``. The paper says nothing of F;
only F = 8E together with the extra projections gives its 1.9 and 7.6 million parameters. Its "5
layers of 640" count 2.06 million, not 1.9: ``ffn_small`` keeps the words, ``ffn_small_matched`` the
count.

Letters: D input, E or w width, F hidden width of a block, H attention heads, L blocks, O output.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

HeadActivation = Literal["gelu", "relu"]
HeadNorm = Literal["layer", "batch", "none"]
SequenceMode = Literal["joint", "separate"]
SequenceScope = Literal["global", "local"]


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1")


@dataclass(frozen=True)
class TransformerSettings:
    """Blocks of attention over the batch.

    Raises:
        ValueError: a size below 1; E not divisible by H; an unknown activation or norm; a branch
            scale outside [0, 1].
    """

    dim: int = 128
    """E."""
    depth: int = 5
    """L."""
    num_heads: int = 8
    """H."""
    ffn_dim: int = 1024
    """F."""
    activation: HeadActivation = "gelu"
    """Of the hidden layer; GELU in its exact form."""
    norm: HeadNorm = "layer"
    """After each of the two sums of a block; ``batch``: over all rows of all sequences."""
    extra_qkv_projection: bool = True
    """Whether query, key and value have a Linear(E, E) before the attention's own."""
    attention_branch_scale: float = 1.0
    """What the attention is multiplied by before it is added; 0: no attention at all."""
    ffn_branch_scale: float = 1.0
    """The same for the two linear layers."""

    def __post_init__(self) -> None:
        for name in ("dim", "depth", "num_heads", "ffn_dim"):
            _at_least_one(name, getattr(self, name))
        if self.dim % self.num_heads:
            raise ValueError(
                f"the head's width {self.dim} is not divisible by its {self.num_heads} attention"
                " heads; change one of them"
            )
        for kind, value, known in (
            ("activation", self.activation, get_args(HeadActivation)),
            ("norm", self.norm, get_args(HeadNorm)),
        ):
            if value not in known:
                raise ValueError(f"{kind} is {value!r}; use one of {', '.join(known)}")
        for name in ("attention_branch_scale", "ffn_branch_scale"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be from 0 to 1")


@dataclass(frozen=True)
class FeedForwardSettings:
    """Blocks of a linear layer, batch norm and ReLU: the baseline.

    Raises:
        ValueError: a size below 1.
    """

    hidden_dim: int = 640
    """w."""
    depth: int = 5
    """L."""

    def __post_init__(self) -> None:
        for name in ("hidden_dim", "depth"):
            _at_least_one(name, getattr(self, name))


HEAD_SIZES: Mapping[str, TransformerSettings | FeedForwardSettings] = {
    "tf_small": TransformerSettings(dim=128, depth=5, num_heads=8, ffn_dim=1024),
    "tf_large": TransformerSettings(dim=256, depth=5, num_heads=16, ffn_dim=2048),
    "tf_mnist": TransformerSettings(dim=256, depth=10, num_heads=4, ffn_dim=1024),
    "ffn_small": FeedForwardSettings(hidden_dim=640, depth=5),
    "ffn_small_matched": FeedForwardSettings(hidden_dim=640, depth=3),
    "ffn_large": FeedForwardSettings(hidden_dim=1024, depth=7),
}
"""The published sizes, with D = O = 512 (``tf_mnist``: D = 256)."""


class ParameterCount(NamedTuple):
    """Trained parameters of a head."""

    blocks: int
    """Of its blocks alone, as the paper counts."""
    total: int
    """With input and output projection and the scale of the output's batch norm."""


def count_head_parameters(
    settings: TransformerSettings | FeedForwardSettings,
    *,
    input_dim: int,
    output_dim: int,
    output_norm: bool = True,
) -> ParameterCount:
    """Return how many parameters of a head are trained, without building it.

    Args:
        settings: of its blocks.
        input_dim: D.
        output_dim: O.
        output_norm: whether batch norm follows; its bias stays 0 and is not counted.
    """
    if isinstance(settings, TransformerSettings):
        width, F = settings.dim, settings.ffn_dim
        projections = 7 if settings.extra_qkv_projection else 4
        norms = 0 if settings.norm == "none" else 2
        block = projections * _linear(width, width) + 2 * norms * width
        block += _linear(width, F) + _linear(F, width)
    else:
        width = settings.hidden_dim
        block = _linear(width, width) + 2 * width
    blocks = settings.depth * block
    adapters = _linear(input_dim, width) + _linear(width, output_dim)
    return ParameterCount(blocks, blocks + adapters + output_norm * output_dim)


def _linear(in_dim: int, out_dim: int) -> int:
    return (in_dim + 1) * out_dim
