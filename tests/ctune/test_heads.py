"""The projection head: its layers, the unit length of its output, guards."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from ctune.heads import ProjectionHead


def test_mlp_is_two_linear_layers_with_a_relu() -> None:
    head = ProjectionHead(6, out_dim=3)
    assert isinstance(head.mlp, nn.Sequential)
    assert [type(layer) for layer in head.mlp] == [nn.Linear, nn.ReLU, nn.Linear]
    first, last = head.mlp[0], head.mlp[2]
    assert isinstance(first, nn.Linear)
    assert isinstance(last, nn.Linear)
    assert (first.weight.shape, last.weight.shape) == ((6, 6), (3, 6))
    x = torch.randn(4, 6)
    raw = linear(linear(x, first.weight, first.bias).clamp(min=0), last.weight, last.bias)
    torch.testing.assert_close(head(x), raw / raw.norm(dim=1, keepdim=True))


def test_hidden_width_and_defaults() -> None:
    head = ProjectionHead(6, 10)
    assert isinstance(head.mlp, nn.Sequential)
    assert head.mlp[0].out_features == 10
    assert head(torch.randn(2, 6)).shape == (2, 128)


@pytest.mark.parametrize("kind", ["mlp", "linear", "none"])
def test_output_has_unit_length_and_the_declared_size(kind: Any) -> None:
    head = ProjectionHead(6, out_dim=3, kind=kind)
    z = head(torch.randn(5, 6))
    assert z.shape == (5, head.out_dim)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(5))


def test_none_without_normalisation_is_the_input() -> None:
    x = torch.randn(5, 6)
    head = ProjectionHead(6, kind="none", normalize=False)
    assert torch.equal(head(x), x)
    assert head.out_dim == 6
    assert not list(head.parameters())


def test_zero_features_stay_finite() -> None:
    assert ProjectionHead(6, kind="none")(torch.zeros(2, 6)).isfinite().all()


def test_unit_length_is_exact_under_autocast_and_float64_stays() -> None:
    head = ProjectionHead(64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = head(torch.randn(5, 64))
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.norm(dim=1), torch.ones(5))
    assert head.double()(torch.randn(2, 64, dtype=torch.float64)).dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_dim": 0}, "in_dim is 0"),
        ({"in_dim": 4, "hidden_dim": 0}, "hidden_dim is 0"),
        ({"in_dim": 4, "out_dim": -1}, "out_dim is -1"),
        ({"in_dim": 4, "kind": "deep"}, "kind is 'deep'"),
    ],
)
def test_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProjectionHead(**options)


def test_refuses_features_of_another_size() -> None:
    with pytest.raises(ValueError, match="the head takes 6 dimensions"):
        ProjectionHead(6)(torch.randn(2, 5))
