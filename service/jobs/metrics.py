"""The metrics of a job: all points as lines, or each series thinned so that a chart stays true."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Select,
    cast,
    func,
    literal,
    select,
    tuple_,
    union,
)
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


def columns(session: Session, wanted: Wanted, max_points: int) -> list[JsonObject]:
    """Return each series as parallel lists of at most `max_points` steps and values."""
    series = select(
        Metric.stage, Metric.name, func.count(), func.min(Metric.step), func.max(Metric.step)
    )
    series = series.where(*wanted.where()).group_by(Metric.stage, Metric.name)
    found = []
    for stage, name, count, first, last in session.execute(
        series.order_by(Metric.stage, Metric.name)
    ).all():
        one = wanted._replace(filters=wanted.filters._replace(stage=stage, name=name))
        if count <= max_points:
            whole = select(Metric.step, Metric.value).where(*one.where(), Metric.step <= last)
            points = session.execute(whole.order_by(Metric.step)).all()
        else:
            points = session.execute(_thinned(one.where(), (first, last), max_points)).all()
        found.append(
            {
                "stage": stage,
                "name": name,
                "steps": [step for step, _ in points],
                "values": [storable(value) for _, value in points],
                "num_points": count,
                "last_step": last,
            }
        )
    return found


def _thinned(
    series: list[ColumnElement[bool]], ends: tuple[int, int], max_points: int
) -> Select[int, float | None]:
    """Select at most `max_points` points of one series, in their order.

    The first and the last point stay, and the lowest and the highest of each of equally wide
    stretches of steps between them: so the lowest and highest of all stay too. A gap (value NULL)
    stays where a stretch holds nothing else. The database does the work: two scans of the primary
    key, each stretch by itself, whatever the planner knows of the table.
    """
    first, last = ends
    width = max(1, -(-(last - first - 1) // max(1, (max_points - 2) // 2)))
    stretch = select(_step(first + 1).label("begin")).cte("stretch", recursive=True)
    following = stretch.c.begin + width
    stretch = stretch.union_all(select(following).where(following < last))
    inside = select(Metric.step).where(
        *series,
        Metric.step >= stretch.c.begin,
        Metric.step < stretch.c.begin + width,
        Metric.step < last,
    )
    lowest, highest = (
        inside.order_by(order.nulls_last(), Metric.step).limit(1).correlate(stretch)
        for order in (Metric.value.asc(), Metric.value.desc())
    )
    kept = union(
        select(lowest.scalar_subquery().label("step")).select_from(stretch),
        select(highest.scalar_subquery()).select_from(stretch),
        select(_step(first)),
        select(_step(last)),
    ).cte("kept")
    # Not a join: without statistics Postgres would go through `kept` once for every point.
    value = select(Metric.value).where(*series, Metric.step == kept.c.step).correlate(kept)
    chosen = select(kept.c.step, value.scalar_subquery()).where(kept.c.step.is_not(None))
    return chosen.order_by(kept.c.step)


def _step(step: int) -> ColumnElement[int]:
    return cast(literal(step), BigInteger)


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
