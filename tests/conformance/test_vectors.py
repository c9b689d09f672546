"""Every case of every vector file, through the adapter of its function.

The files are those of the directory CTUNE_VECTORS, by default ``vectors`` beside this file.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conformance.adapters import ADAPTERS

VECTORS = Path(os.environ.get("CTUNE_VECTORS", Path(__file__).parent / "vectors"))
SPECIAL = {"inf": math.inf, "Infinity": math.inf, "-inf": -math.inf, "nan": math.nan}


def load_cases() -> list[Any]:
    """One pytest parameter per case, named ``file-case``."""
    return [
        pytest.param(path.stem, case, id=f"{path.stem}-{case['name']}")
        for path in sorted(VECTORS.glob("*.json"))
        for case in json.loads(path.read_text(encoding="utf-8"))["cases"]
    ]


def differences(actual: Any, expected: Any, *, rtol: float, atol: float, at: str = "") -> list[str]:
    """Where ``actual`` differs from ``expected``, as readable lines; more keys are fine."""
    within = {"rtol": rtol, "atol": atol}
    if isinstance(expected, dict):
        if not isinstance(actual, dict):
            return [f"{at}: expected keys {sorted(expected)}, got {actual!r}"]
        lines = [f"{at}.{key}: missing, got {sorted(actual)}" for key in expected.keys() - actual]
        for key in expected.keys() & actual:
            lines += differences(actual[key], expected[key], at=f"{at}.{key}", **within)
        return sorted(lines)
    if isinstance(expected, list):
        if not isinstance(actual, list | tuple) or len(actual) != len(expected):
            return [f"{at}: expected {len(expected)} entries, got {str(actual)[:200]}"]
        if numeric(expected) and numeric(actual):
            return array_differences(actual, expected, at=at, **within)
        lines = []
        for i, (mine, theirs) in enumerate(zip(actual, expected, strict=True)):
            lines += differences(mine, theirs, at=f"{at}[{i}]", **within)
        return lines
    if isinstance(expected, str) and isinstance(actual, float):
        expected = SPECIAL.get(expected, expected)
    if is_number(expected) and is_number(actual):
        return array_differences([actual], [expected], at=at, **within)
    same = type(actual) is type(expected) and actual == expected
    return [] if same else [f"{at}: expected {expected!r}, got {actual!r}"]


def array_differences(
    actual: Any, expected: Any, *, rtol: float, atol: float, at: str
) -> list[str]:
    mine, theirs = np.asarray(actual, dtype=float), np.asarray(expected, dtype=float)
    if mine.shape != theirs.shape:
        return [f"{at}: expected shape {theirs.shape}, got {mine.shape}"]
    wrong = ~np.isclose(mine, theirs, rtol=rtol, atol=atol, equal_nan=True)
    if not wrong.any():
        return []
    error = np.abs(mine - theirs)
    first = [
        f"{at}{list(place)}: expected {theirs[place]!r}, got {mine[place]!r}"
        for place in [tuple(map(int, row)) for row in np.argwhere(wrong)[:5]]
    ]
    summary = (
        f"{at}: {int(wrong.sum())} of {wrong.size} differ beyond rtol {rtol} atol {atol}, "
        f"largest error {np.nanmax(error)!r}"
    )
    return [summary, *first]


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def numeric(value: Any) -> bool:
    """Whether a nested list is an array of numbers of one shape."""
    if isinstance(value, list | tuple):
        lengths = {len(v) if isinstance(v, list | tuple) else -1 for v in value}
        return len(lengths) <= 1 and all(numeric(v) for v in value)
    return is_number(value)


@pytest.mark.parametrize(("stem", "case"), load_cases())
def test_vector(stem: str, case: dict[str, Any]) -> None:
    function = case["function"]
    adapter = ADAPTERS.get((stem, function))
    if adapter is None:
        pytest.fail(f"no adapter for ({stem!r}, {function!r}): add it to ADAPTERS in adapters.py")
    actual = adapter(case["inputs"], case["parameters"])
    lines = differences(actual, case["expected"], rtol=case["rtol"], atol=case["atol"])
    assert not lines, f"{function}, case {case['name']}:\n" + "\n".join(lines)


def test_vectors_are_found() -> None:
    assert load_cases(), f"no vector file in {VECTORS}"


@pytest.mark.parametrize(
    ("actual", "expected", "count"),
    [
        ({"a": 1.0, "more": 2}, {"a": 1.0}, 0),
        ({"b": 1.0}, {"a": 1.0}, 1),
        ({"a": [1.0, 2.0]}, {"a": [1.0, 2.1]}, 2),
        ({"a": [[1.0], [2.0]]}, {"a": [[1.0, 2.0]]}, 1),
        ({"a": math.inf}, {"a": "inf"}, 0),
        ({"a": math.nan}, {"a": 1.0}, 2),
        ({"a": None}, {"a": 0.0}, 1),
        ({"a": True}, {"a": 1}, 1),
        ({"a": [1.0, None]}, {"a": [1.0, None]}, 0),
        ({"a": "x"}, {"a": "y"}, 1),
    ],
)
@pytest.mark.filterwarnings("ignore:All-NaN")
def test_differences(actual: Any, expected: Any, count: int) -> None:
    assert len(differences(actual, expected, rtol=1e-6, atol=1e-9)) == count
