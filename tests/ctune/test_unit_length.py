"""Vectors of length one, in which precision, and the vector of zeros."""

import torch

from ctune.unit_length import unit_length


def test_length_is_one_whatever_the_scale_and_zeros_stay() -> None:
    vectors = torch.tensor([[3e-5, 4e-5], [-3e5, 4e5], [0.0, 0.0]])
    expected = torch.tensor([[0.6, 0.8], [-0.6, 0.8], [0.0, 0.0]])
    torch.testing.assert_close(unit_length(vectors), expected)


def test_half_precision_becomes_float32_and_double_stays() -> None:
    vector = torch.tensor([[3.0, 4.0]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        from_half = unit_length(vector.bfloat16())
    torch.testing.assert_close(from_half, torch.tensor([[0.6, 0.8]]))
    assert unit_length(vector.double()).dtype == torch.float64
