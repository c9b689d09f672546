import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ctune.position_embedding import (
    get_2d_sincos_pos_embed,
    is_fixed_table,
    recompute_pos_embed,
    resize_pos_embed,
)


def test_the_first_half_tells_the_column_and_the_second_the_row() -> None:
    table = get_2d_sincos_pos_embed(8, (2, 3)).reshape(2, 3, 8)
    assert np.array_equal(table[0, :, :4], table[1, :, :4])
    assert np.array_equal(table[:, 0, 4:], table[:, 2, 4:])
    assert not np.allclose(table[0, 0, :4], table[0, 1, :4])
    frequencies = np.array([1.0, 10000**-0.5])
    angles = (2 * frequencies, frequencies)
    waves = [wave(angle) for angle in angles for wave in (np.sin, np.cos)]
    assert np.allclose(table[1, 2], np.concatenate(waves))


def test_the_class_token_has_no_position() -> None:
    table = get_2d_sincos_pos_embed(8, 3, cls_token=True)
    assert table.shape == (10, 8)
    assert not table[0].any()
    assert np.array_equal(table[1:], get_2d_sincos_pos_embed(8, 3))


@pytest.mark.parametrize(
    ("dim", "grid", "message"),
    [(6, 2, "multiple of 4"), (0, 2, "multiple of 4"), (8, (2, 0), "2 x 0")],
)
def test_what_makes_no_table_is_refused(
    dim: int, grid: int | tuple[int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        get_2d_sincos_pos_embed(dim, grid)


def test_another_grid_is_interpolated_without_antialiasing() -> None:
    table = torch.randn(1, 2 + 64, 4, generator=torch.Generator().manual_seed(0)).double()
    resized = resize_pos_embed(table, 6, num_prefix_tokens=2)
    assert resized.shape == (1, 2 + 36, 4)
    assert torch.equal(resized[:, :2], table[:, :2])
    grid = table[:, 2:].reshape(1, 8, 8, 4).permute(0, 3, 1, 2)
    smooth = F.interpolate(grid, size=(6, 6), mode="bicubic", antialias=True)
    difference = resized[:, 2:].reshape(1, 6, 6, 4).permute(0, 3, 1, 2) - smooth
    assert difference.abs().max() > 0.1


def test_the_same_grid_stays_as_it_is_and_half_types_stay_half() -> None:
    table = torch.randn(1, 10, 4).bfloat16()
    assert resize_pos_embed(table, 3) is table
    assert resize_pos_embed(table, 4).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(1, 9, 4), (2, 10, 4), (10, 4), (1, 1, 4)])
def test_a_table_of_no_square_grid_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="a square number"):
        resize_pos_embed(torch.zeros(shape), 2)


def fixed(width: int, grid: int) -> torch.Tensor:
    return torch.from_numpy(get_2d_sincos_pos_embed(width, grid, cls_token=True)).float()[None]


@pytest.mark.parametrize("grid", [1, 3, 6])
def test_a_fixed_table_is_recomputed_for_another_grid(grid: int) -> None:
    table = fixed(8, 4)
    table[:, 0] = 7  # a class token's position stays
    recomputed = recompute_pos_embed(table, grid)
    assert torch.equal(recomputed[:, 1:], fixed(8, grid)[:, 1:])
    assert torch.equal(recomputed[:, 0], table[:, 0])
    assert recompute_pos_embed(table.bfloat16(), grid).dtype == torch.bfloat16
    if grid > 1:
        assert not torch.allclose(recomputed, resize_pos_embed(table, grid), atol=0.05)


def test_only_a_fixed_table_is_one() -> None:
    assert is_fixed_table(fixed(8, 4)) and is_fixed_table(fixed(8, 4).bfloat16())
    assert is_fixed_table(fixed(8, 4)[:, 1:], num_prefix_tokens=0)
    swapped = fixed(8, 4)[..., [4, 5, 6, 7, 0, 1, 2, 3]]  # rows first
    for trained in (
        fixed(8, 4) + 0.05,
        swapped,
        resize_pos_embed(fixed(8, 4), 3),
        fixed(8, 4)[..., :6],
    ):
        assert not is_fixed_table(trained)
        with pytest.raises(ValueError, match="they were trained"):
            recompute_pos_embed(trained, 4)
    with pytest.raises(ValueError, match="a square number"):
        recompute_pos_embed(torch.zeros(1, 9, 4), 2)
