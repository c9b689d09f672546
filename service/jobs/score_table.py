"""Scores before and after as the rows of a table."""

from collections.abc import Mapping
from typing import Any

from ctune.schema import JsonObject
from ctune.scores import SETTINGS
from service.jobs.numerals import number, score_order, words

FINER_ROWS = 3
"""Finer scores of one family that get a heading of their own."""


def score_groups(report: JsonObject) -> list[JsonObject]:
    """Return the comparison of a report in groups: a protocol, or a family of its finer scores.

    A group has `name`, `settings` (how it was measured, in words) and `rows`; a row is one of the
    report's with `said`, its name.
    """
    evaluation = report["evaluation"] or {}
    scored = evaluation.get("after") or evaluation.get("before") or {}
    rows = sorted(report["comparison"], key=lambda row: score_order(row["protocol"], row["metric"]))
    groups: dict[tuple[str, str], JsonObject] = {}
    for row in rows:
        protocol = row["protocol"]
        finer = row["metric"].rpartition(".")[0]
        if finer and sum(_is_in(other, protocol, finer) for other in rows) < FINER_ROWS:
            finer = ""  # too few for a heading of their own
        name = f"{words(protocol)}: {words(finer)}" if finer else words(protocol)
        settings = "" if finer else _settings(scored.get(protocol) or {})
        group = groups.setdefault(
            (protocol, finer), {"name": name, "settings": settings, "rows": []}
        )
        said = words(row["metric"].removeprefix(f"{finer}.") if finer else row["metric"])
        group["rows"].append({**row, "said": said})
    order = {protocol: place for place, (protocol, _) in reversed([*enumerate(groups)])}
    return [groups[key] for key in sorted(groups, key=lambda key: order[key[0]])]


def _is_in(row: JsonObject, protocol: str, finer: str) -> bool:
    metric: str = row["metric"]
    return row["protocol"] == protocol and metric.rpartition(".")[0] == finer


def _settings(results: Mapping[str, Any]) -> str:
    """Return how a protocol measured, where that is said in single numbers and words."""
    found = (results.get(SETTINGS) or {}).items()
    shown = ((key, v) for key, v in found if isinstance(v, int | float | str))
    return ", ".join(
        f"{'by' if key == 'classifier' else words(key)} {number(v) if isinstance(v, float) else v}"
        for key, v in shown
    )
