"""Sizes of the heads over the batch: the specified counts, and that built heads have them."""

from typing import Any

import pytest
import torch
from torch import nn

from ctune.head_sizes import (
    HEAD_SIZES,
    FeedForwardSettings,
    TransformerSettings,
    count_head_parameters,
)
from ctune.transformer_head import FeedForwardProjectionHead, TransformerProjectionHead

COUNTS = {
    "tf_small": (512, 1_896_960, 2_029_184),
    "tf_large": (512, 7_562_240, 7_825_664),
    "tf_mnist": (256, 9_871_360, 10_069_248),
    "ffn_small": (512, 2_057_600, 2_714_624),
    "ffn_small_matched": (512, 1_234_560, 1_891_584),
    "ffn_large": (512, 7_361_536, 8_412_160),
}
"""Input width, trained parameters of the blocks, of all; the output has 512 dimensions."""
Settings = TransformerSettings | FeedForwardSettings


def build(settings: Settings, input_dim: int, output_norm: bool = True) -> nn.Module:
    with torch.device("meta"):
        if isinstance(settings, TransformerSettings):
            return TransformerProjectionHead(
                input_dim, 512, settings=settings, output_norm=output_norm
            )
        return FeedForwardProjectionHead(input_dim, 512, settings=settings, output_norm=output_norm)


def trained(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def test_every_size_has_its_count() -> None:
    assert COUNTS.keys() == HEAD_SIZES.keys()


@pytest.mark.parametrize("name", COUNTS)
def test_published_sizes(name: str) -> None:
    input_dim, blocks, total = COUNTS[name]
    head = build(HEAD_SIZES[name], input_dim)
    count = count_head_parameters(HEAD_SIZES[name], input_dim=input_dim, output_dim=512)
    assert count == (blocks, total)
    assert trained(head.get_submodule("blocks")) == blocks
    assert trained(head) == total


@pytest.mark.parametrize(
    ("settings", "output_norm"),
    [
        (TransformerSettings(dim=6, depth=2, num_heads=3, ffn_dim=5, norm="none"), True),
        (TransformerSettings(dim=6, depth=2, num_heads=3, ffn_dim=5, norm="batch"), False),
        (TransformerSettings(dim=6, num_heads=1, ffn_dim=5, extra_qkv_projection=False), True),
        (FeedForwardSettings(hidden_dim=7, depth=1), False),
    ],
)
def test_other_sizes_are_counted_as_built(settings: Settings, output_norm: bool) -> None:
    count = count_head_parameters(settings, input_dim=9, output_dim=512, output_norm=output_norm)
    head = build(settings, 9, output_norm)
    assert (count.blocks, count.total) == (trained(head.get_submodule("blocks")), trained(head))


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (TransformerSettings, {"dim": 10, "num_heads": 4}, "10 is not divisible by its 4"),
        (TransformerSettings, {"num_heads": 0}, "num_heads is 0"),
        (TransformerSettings, {"depth": 0}, "depth is 0"),
        (TransformerSettings, {"ffn_dim": 0}, "ffn_dim is 0"),
        (TransformerSettings, {"activation": "tanh"}, "activation is 'tanh'; use one of gelu"),
        (TransformerSettings, {"norm": "group"}, "norm is 'group'; use one of layer"),
        (TransformerSettings, {"attention_branch_scale": 1.5}, "attention_branch_scale is 1.5"),
        (TransformerSettings, {"ffn_branch_scale": float("nan")}, "ffn_branch_scale is nan"),
        (FeedForwardSettings, {"hidden_dim": 0}, "hidden_dim is 0"),
        (FeedForwardSettings, {"depth": 0}, "depth is 0"),
    ],
)
def test_what_is_no_size(kind: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**values)
