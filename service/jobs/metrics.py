"""The metrics of a job: all points as lines, or each series thinned so that a chart stays true."""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, func, select, tuple_
from sqlalchemy.orm import Session

from ctune.events import storable
from ctune.schema import JsonObject
from service.db import Database
from service.tables import Metric

ROWS_PER_LOOK = 5_000


class Filters(NamedTuple):
    """Which points of a job are asked for; None: all."""

    name: str | None = None
    stage: str | None = None
    after_step: int | None = None


class Wanted(NamedTuple):
    """Points of one job."""

    job_id: str
    filters: Filters

    def where(self) -> list[ColumnElement[bool]]:
        """Return the conditions on `Metric`."""
        name, stage, after_step = self.filters
        found = [Metric.job_id == self.job_id]
        if stage is not None:
            found.append(Metric.stage == stage)
        if name is not None:
            found.append(Metric.name == name)
        if after_step is not None:
            found.append(Metric.step > after_step)
        return found


Point = tuple[int, float | None]


def columns(session: Session, wanted: Wanted, max_points: int) -> list[JsonObject]:
    """Return each series as parallel lists of at most `max_points` steps and values."""
    series = select(Metric.stage, Metric.name, func.count(), func.max(Metric.step))
    series = series.where(*wanted.where()).group_by(Metric.stage, Metric.name)
    found = []
    for stage, name, count, last_step in session.execute(
        series.order_by(Metric.stage, Metric.name)
    ):
        one = Wanted(wanted.job_id, wanted.filters._replace(stage=stage, name=name))
        rows = select(Metric.step, Metric.value).where(*one.where()).order_by(Metric.step)
        with session.execute(rows.execution_options(yield_per=ROWS_PER_LOOK)) as points:
            kept = thin(((step, value) for step, value in points), count, max_points)
        found.append(
            {
                "stage": stage,
                "name": name,
                "steps": [step for step, _ in kept],
                "values": [storable(value) for _, value in kept],
                "num_points": count,
                "last_step": last_step,
            }
        )
    return found


def thin(points: Iterable[Point], count: int, max_points: int) -> list[Point]:
    """Return at most `max_points` of `count` points in their order.

    The first, the last, the lowest and the highest point always stay; between first and last each
    of equally long stretches gives its lowest and its highest. A gap (value None) stays where a
    stretch holds nothing else.
    """
    points = islice(points, count)  # more may have come since they were counted
    if count <= max_points:
        return list(points)
    stretches = max(1, (max_points - 2) // 2)
    kept: list[Point] = []
    stretch: list[Point] = []
    inner = count - 2
    for place, point in enumerate(points):
        if place in (0, count - 1):
            kept += _extremes(stretch)
            stretch = []
            kept.append(point)
            continue
        if stretch and (place - 1) * stretches // inner != (place - 2) * stretches // inner:
            kept += _extremes(stretch)
            stretch = []
        stretch.append(point)
    return kept + _extremes(stretch)


def _extremes(stretch: list[Point]) -> list[Point]:
    values = [(value, step) for step, value in stretch if value is not None]
    if not values:
        return stretch[:1]
    low, high = min(values), max(values)
    return [(step, value) for value, step in sorted({low, high}, key=lambda pair: pair[1])]


def lines(database: Database, wanted: Wanted) -> Iterator[bytes]:
    """Yield every point as one line of JSON; each look is a transaction of its own."""
    key = (Metric.stage, Metric.name, Metric.step)
    columns = select(*key, Metric.value, Metric.attempt, Metric.created_at).order_by(*key)
    columns = columns.where(*wanted.where()).limit(ROWS_PER_LOOK)
    behind: tuple[Any, ...] | None = None
    while True:
        here = columns if behind is None else columns.where(tuple_(*key) > tuple_(*behind))
        with database.reading() as session:
            rows = session.execute(here).all()
        yield "".join(_line(*row) for row in rows).encode()
        if len(rows) < ROWS_PER_LOOK:
            return
        behind = tuple(rows[-1])[:3]


def _line(
    stage: str, name: str, step: int, value: float | None, attempt: int, created_at: float
) -> str:
    point = {
        "stage": stage,
        "name": name,
        "step": step,
        "value": storable(value),
        "attempt": attempt,
        "created_at": int(created_at),
    }
    return json.dumps(point, allow_nan=False) + "\n"
