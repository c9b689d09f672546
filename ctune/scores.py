"""An evaluation's nested results as rows. Never imports torch."""

from collections.abc import Iterator, Mapping
from typing import Any

SETTINGS = "settings"
"""Block of a protocol's results that says how it was measured; it is no score."""


def score_rows(
    results: Mapping[str, Any], path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], float | None]]:
    """Yield every number of nested results by its path; settings and histograms are left out.

    None stands for a value that was not finite, as JSON has it.
    """
    for name, value in results.items():
        here = (*path, str(name))
        if isinstance(value, Mapping):
            if name != SETTINGS:
                yield from score_rows(value, here)
        elif value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
            yield here, value
