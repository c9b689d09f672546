"""Lists: newest first, paged by the last id, in OpenAI's envelope."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple, TypeVar

from fastapi import Depends, Query
from sqlalchemy import Select
from sqlalchemy.orm import InstrumentedAttribute, Session

from ctune.schema import JsonObject

MAX_LIMIT = 200
DEFAULT_LIMIT = 20

Row = TypeVar("Row")
Text = Annotated[str, Query(max_length=256, pattern=r"^[^\x00]*$")]


class Page(NamedTuple):
    """Which part of a list is asked for."""

    after: str | None
    limit: int


def _page(
    after: Annotated[
        str | None,
        Query(
            max_length=64, pattern=r"^[A-Za-z0-9_]+$", description="`last_id` of the page before"
        ),
    ] = None,
    limit: Annotated[
        int, Query(ge=1, le=MAX_LIMIT, description="entries per page")
    ] = DEFAULT_LIMIT,
) -> Page:
    return Page(after, limit)


PageQuery = Annotated[Page, Depends(_page)]


def envelope(shown: Sequence[JsonObject], *, has_more: bool) -> JsonObject:
    """Return the list object around the entries of one page."""
    return {
        "object": "list",
        "data": list(shown),
        "first_id": shown[0]["id"] if shown else None,
        "last_id": shown[-1]["id"] if shown else None,
        "has_more": has_more,
    }


def list_page(
    session: Session,
    wanted: Select[Row],
    *,
    key: InstrumentedAttribute[Any],
    page: Page,
    shape: Callable[[Row], JsonObject],
    after: Any = None,
) -> JsonObject:
    """Return one page of `wanted`, ordered by falling `key`; each row as `shape` shows it.

    `after` is the key behind which the page begins where that is not the id that clients see.
    """
    behind = after if after is not None else page.after
    if behind is not None:
        wanted = wanted.where(key < behind)
    rows = session.scalars(wanted.order_by(key.desc()).limit(page.limit + 1)).all()
    shown = [shape(row) for row in rows[: page.limit]]
    return envelope(shown, has_more=len(rows) > page.limit)
