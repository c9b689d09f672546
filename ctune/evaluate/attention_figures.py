"""What a report shows of attention over a batch: maps sorted by class, and how they go with depth.

Letters: n images, L blocks of the head, H attention heads.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import median_low

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from ctune.attention_maps import HeadAttention, sort_attention_by_class
from ctune.figures_file import TABLE_PX, Diagnostic
from ctune.image_table import ImageTable

SHOWN_BLOCKS = 4
SHOWN_HEADS = 3
NAMED_CLASSES = 20
"""Beyond these neither names nor lines between classes can be read."""
DOUBLINGS = 4
"""The deepest colours are even attention times and divided by 2^4."""
LESS, EVEN, MORE, LINE = (
    torch.tensor(rgb, dtype=torch.float64)
    for rgb in ((30, 80, 160), (245, 245, 245), (180, 30, 40), (150, 150, 150))
)


def attention_table(
    layers: Iterable[Tensor], labels: Tensor, *, classes: Sequence[str], title: str
) -> ImageTable:
    """Return pictures of attention between images in the order of their classes.

    A column for each of up to 4 blocks, evenly from the first to the last, and a row for each of
    the first 3 heads. Colours are the same in every picture, so that they can be compared.

    Args:
        layers: L of [H, n, n]; they may be made one at a time.
        labels: [n] integers.
        classes: the name of every label.
        title: of the table.

    Raises:
        ValueError: no layer; attention not finite [n, n]; labels not [n] integers.
    """
    present, sizes = torch.unique(labels, return_counts=True)
    lined = len(present) <= NAMED_CLASSES
    places = sizes.cumsum(0)[:-1] * TABLE_PX // len(labels)
    lines = places if lined else places[:0]
    drawn = [[_picture(head, labels, lines) for head in layer[:SHOWN_HEADS]] for layer in layers]
    if not drawn:
        raise ValueError("layers is empty; a head without attention has no maps")
    blocks = np.linspace(0, len(drawn) - 1, min(SHOWN_BLOCKS, len(drawn))).round().astype(int)
    names = ", ".join(classes[label] for label in present.tolist())
    order = f"{names}; lines are between classes" if lined else f"{len(present)} classes"
    return ImageTable(
        title=title,
        text=f"What each of {len(labels)} images (from top to bottom) takes from every other (from"
        f" left to right), both in the order of their classes: {order}. White is even attention,"
        f" red is more and blue is less, up to {2**DOUBLINGS} times. Red squares along the"
        " diagonal: images attend to their own class. A row for each of the first heads.",
        columns=[f"block {n + 1}" for n in blocks],
        images=np.stack([np.stack(drawn[n]) for n in blocks], axis=1),
    )


def attention_charts(blocks: Sequence[Sequence[HeadAttention]]) -> dict[str, Diagnostic]:
    """Return how class statistics go from block to block; a chart without any value is left out.

    Args:
        blocks: of `ctune.attention_maps.attention_statistics`.
    """
    charts = {
        "attention_lift": Diagnostic(
            title="same-class attention",
            text="What goes to other images of the same class, as a multiple of even attention:"
            " the median of the heads of each block. 1: classes make no difference.",
            labels=_block_names(blocks),
            y=_medians(blocks, lambda head: head["lift"]),
        ),
        "attention_sharpness": Diagnostic(
            title="log10 of sharpness",
            text="The least attention within a class over the largest between classes: the median"
            " of the heads of each block. Above 0 classes are wholly apart.",
            labels=_block_names(blocks),
            y=_medians(blocks, _log_sharpness),
        ),
    }
    return {name: chart for name, chart in charts.items() if any(y is not None for y in chart.y)}


def _picture(attention: Tensor, labels: Tensor, lines: Tensor) -> NDArray[np.uint8]:
    """Return attention [n, n] in colours, with `lines` [K-1] down and across: [side, side, 3]."""
    ordered = sort_attention_by_class(attention, labels)["attention"].double()
    cells = adaptive_avg_pool2d(ordered[None], TABLE_PX)[0].cpu()
    depth = (cells * len(labels)).log2().clamp(-DOUBLINGS, DOUBLINGS)[..., None] / DOUBLINGS
    rgb = EVEN + depth.abs() * (torch.where(depth < 0, LESS, MORE) - EVEN)
    rgb[lines] = LINE
    rgb[:, lines] = LINE
    picture: NDArray[np.uint8] = rgb.round().to(torch.uint8).numpy()
    return picture


def _log_sharpness(head: HeadAttention) -> float:
    return -math.inf if head["sharpness"] == 0 else math.log10(head["sharpness"])


def _medians(
    blocks: Sequence[Sequence[HeadAttention]], value: Callable[[HeadAttention], float]
) -> list[float | None]:
    """Return the lower median of every block's heads; None where it is not finite."""
    found = []
    for heads in blocks:
        known = [one for one in map(value, heads) if not math.isnan(one)]
        median = median_low(known) if known else math.nan
        found.append(median if math.isfinite(median) else None)
    return found


def _block_names(blocks: Sequence[object]) -> list[str]:
    return [f"block {n + 1}" for n in range(len(blocks))]
