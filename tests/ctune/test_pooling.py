"""Pooling against a vision transformer of timm, and the guards."""

import re
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn.functional import layer_norm

from ctune.pooling import pool_tokens

TOKENS = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
WEIGHT, BIAS = torch.tensor([1.0, 2, 3, 4]).double(), torch.tensor([0.1, 0.2, 0.3, 0.4]).double()


@pytest.mark.parametrize(("pool", "timm_pool"), [("mean", "avg"), ("cls", "token")])
@pytest.mark.parametrize("registers", [0, 2])
def test_equals_timm(pool: Any, timm_pool: Any, registers: int) -> None:
    torch.manual_seed(0)
    model: Any = VisionTransformer(
        img_size=8, patch_size=4, embed_dim=12, depth=1, num_heads=2, num_classes=0,
        global_pool=timm_pool, reg_tokens=registers,
    ).eval()  # fmt: skip
    norm = model.fc_norm if pool == "mean" else model.norm
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    images = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        tokens = _tokens_before_norm(model, images)
        pooled = pool_tokens(
            tokens,
            norm.weight,
            norm.bias,
            pool=pool,
            num_prefix_tokens=model.num_prefix_tokens,
            eps=norm.eps,
        )
        torch.testing.assert_close(pooled, model(images), rtol=1e-5, atol=1e-5)


def _tokens_before_norm(model: Any, images: Tensor) -> Tensor:
    norm, model.norm = model.norm, torch.nn.Identity()
    tokens: Tensor = model.forward_features(images)
    model.norm = norm
    return tokens


def test_cls_is_the_first_token_of_the_normalised_sequence() -> None:
    expected = layer_norm(TOKENS, (4,), WEIGHT, BIAS, 1e-6)[:, 0]
    torch.testing.assert_close(pool_tokens(TOKENS, WEIGHT, BIAS, pool="cls"), expected)


def test_mean_leaves_the_prefix_out_and_ignores_the_order_of_patches() -> None:
    pooled = pool_tokens(TOKENS, pool="mean", num_prefix_tokens=2)
    torch.testing.assert_close(pooled, TOKENS[:, 2:].mean(1))
    shuffled = TOKENS[:, [0, 1, 4, 2, 3]]
    torch.testing.assert_close(pool_tokens(shuffled, pool="mean", num_prefix_tokens=2), pooled)


def test_mean_without_prefix() -> None:
    pooled = pool_tokens(TOKENS, pool="mean", num_prefix_tokens=0)
    torch.testing.assert_close(pooled, TOKENS.mean(1))


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        ("mean_all", TOKENS.mean(1)),
        ("cls_mean", (TOKENS[:, 0] + TOKENS[:, 2:].mean(1)) / 2),
        ("cls_concat_mean", torch.cat([TOKENS[:, 0], TOKENS[:, 2:].mean(1)], 1)),
    ],
)
def test_poolings_of_normalised_tokens(pool: Any, expected: Tensor) -> None:
    """With a class token and a register."""
    torch.testing.assert_close(pool_tokens(TOKENS, pool=pool, num_prefix_tokens=2), expected)


@pytest.mark.parametrize(
    ("tokens", "options", "message"),
    [
        (TOKENS[0], {"pool": "mean"}, "must be [B, T, D]"),
        (TOKENS, {"pool": "mean", "num_prefix_tokens": 5}, "leaves no patch token of 5"),
        (TOKENS, {"pool": "mean", "num_prefix_tokens": -1}, "num_prefix_tokens is -1"),
        (TOKENS, {"pool": "cls", "num_prefix_tokens": 0}, "needs pool='mean'"),
        (TOKENS, {"pool": "max"}, "pool is 'max'"),
        (TOKENS, {"pool": "cls_mean", "num_prefix_tokens": 0}, "needs pool='mean'"),
        (TOKENS, {"pool": "cls_concat_mean", "num_prefix_tokens": 5}, "leaves no patch token"),
        (TOKENS, {"pool": "mean_all", "norm_weight": WEIGHT, "norm_bias": BIAS}, "give no norm"),
        (TOKENS, {"pool": "cls", "norm_weight": WEIGHT}, "both be given"),
        (TOKENS, {"pool": "cls", "norm_weight": WEIGHT[:3], "norm_bias": BIAS}, "need [4]"),
    ],
)
def test_refuses(tokens: Tensor, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        pool_tokens(tokens, **options)
