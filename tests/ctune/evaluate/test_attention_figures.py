"""Pictures of attention: colours, order, lines, which heads and blocks; charts over the blocks."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ctune.attention_maps import HeadAttention, attention_statistics
from ctune.evaluate.attention_figures import attention_charts, attention_table
from ctune.figures_file import TABLE_PX

LABELS = torch.tensor([1, 0, 2, 0, 1, 2, 2, 0])
SAME = (LABELS[:, None] == LABELS).double()
NAMES = ["oak", "pine", "yew"]
LESS, EVEN, MORE, LINE = (30, 80, 160), (245, 245, 245), (180, 30, 40), (150, 150, 150)


def pictures(*layers: Tensor, labels: Tensor = LABELS) -> np.ndarray:
    names = [f"class {n}" for n in range(int(labels.max()) + 1)]
    return attention_table(iter(layers), labels, classes=names, title="t").images


def test_even_attention_is_white_between_lines_at_the_classes() -> None:
    images = pictures(torch.full((1, 8, 8), 1 / 8))
    assert images.shape == (1, 1, TABLE_PX, TABLE_PX, 3)
    image = images[0, 0]
    lines = [3 * TABLE_PX // 8, 5 * TABLE_PX // 8]
    assert bool((image[lines] == LINE).all()) and bool((image[:, lines] == LINE).all())
    rest = np.delete(np.delete(image, lines, 0), lines, 1)
    assert bool((rest == EVEN).all())


def test_classes_that_attend_to_themselves_are_red_squares_along_the_diagonal() -> None:
    image = pictures(SAME[None] / SAME.sum(1, keepdim=True))[0, 0]
    places = (np.arange(8) + 0.5) * TABLE_PX / 8
    seen = image[np.ix_(places.astype(int), places.astype(int))]
    order = LABELS.argsort(stable=True)
    same = SAME[order][:, order].bool().numpy()
    assert bool((seen[~same] == LESS).all()), "nothing is the deepest blue"
    # 8/3 times even attention is log2(8/3) / 4 of the way to red
    share = math.log2(8 / 3) / 4
    red = [round(a + share * (b - a)) for a, b in zip(EVEN, MORE, strict=True)]
    three = same & (same.sum(1) == 3)
    assert bool((seen[three] == red).all())
    assert bool((pictures(1e9 * SAME[None])[0, 0][0, 0] == MORE).all()), "colours end"


def test_many_images_are_averaged_and_many_classes_have_no_lines() -> None:
    n = 4 * TABLE_PX
    labels = torch.arange(n) // 16
    # Each 4 x 4 cell holds one entry of twice its mean, and three quarters of nothing.
    cell = torch.zeros(4, 4)
    cell[::2, ::2] = 4 / n
    image = pictures(cell.repeat(TABLE_PX, TABLE_PX)[None], labels=labels)[0, 0]
    assert bool((image == EVEN).all())


def test_the_first_heads_of_blocks_from_the_first_to_the_last() -> None:
    layers = [torch.full((5, 8, 8), 2.0 ** (n - 3) / 8) for n in range(7)]
    for layer in layers:
        layer[1] = 0
    table = attention_table(layers, LABELS, classes=NAMES, title="After")
    assert (table.title, table.columns) == ("After", ["block 1", "block 3", "block 5", "block 7"])
    assert "oak, pine, yew" in table.text
    assert table.images.shape == (3, 4, TABLE_PX, TABLE_PX, 3)
    corner = table.images[:, :, 0, 0].astype(int)
    assert bool((corner[1] == LESS).all())
    assert bool((corner[0] == corner[2]).all())
    redder = corner[0, :, 0] - corner[0, :, 2]
    assert redder.tolist() == sorted(redder.tolist()) and redder[0] < 0 < redder[-1]
    few = attention_table(layers[:2], LABELS, classes=NAMES, title="t")
    assert few.columns == ["block 1", "block 2"]


def test_a_head_without_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="layers is empty"):
        pictures()


def head(lift: float, sharpness: float) -> HeadAttention:
    drawn = torch.rand(8, 8, generator=torch.Generator().manual_seed(0))
    ((found,),) = attention_statistics([drawn[None]], LABELS)
    return {**found, "lift": lift, "sharpness": sharpness}


def test_charts_show_the_median_of_each_block() -> None:
    blocks = [
        [head(1, 0.1), head(9, 0.01), head(2, math.nan)],
        [head(4, 0), head(5, 0), head(6, 1)],
        [head(7, math.inf), head(7, 100), head(7, 1)],
    ]
    charts = attention_charts(blocks)
    assert list(charts) == ["attention_lift", "attention_sharpness"]
    assert all(one.labels == ["block 1", "block 2", "block 3"] for one in charts.values())
    assert charts["attention_lift"].y == [2, 5, 7]
    assert charts["attention_sharpness"].y == pytest.approx([-2, None, 2])
    assert list(attention_charts([[head(1, 0)]])) == ["attention_lift"]
