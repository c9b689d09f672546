"""A table of small images that a method shows in the report. Never imports torch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class ImageTable:
    """Images in rows and named columns."""

    title: str
    text: str
    """What they say, in a sentence or two."""
    columns: Sequence[str]
    images: NDArray[np.uint8]
    """RGB: [rows, columns, height, width, 3]."""
