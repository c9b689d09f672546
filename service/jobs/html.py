"""Pages made from templates: whatever comes from outside is escaped, nothing is loaded."""

from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import Query
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import HTMLResponse

from ctune import __version__
from service.jobs import numerals

TEMPLATES = Path(__file__).parent / "templates"
HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; img-src data:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "cache-control": "no-cache",
    "referrer-policy": "no-referrer",
    "vary": "accept",
    "x-content-type-options": "nosniff",
}
Format = Annotated[
    Literal["json", "html"] | None, Query(description="default: what `Accept` asks for")
]
_FILTERS = (
    numerals.difference,
    numerals.duration,
    numerals.moment,
    numerals.percent,
    numerals.score,
    numerals.verdict,
    numerals.words,
)


@cache
def _environment() -> Environment:
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {function.__name__: function for function in _FILTERS}
    made.globals["version"] = __version__
    made.globals["style"] = Markup((TEMPLATES / "style.css").read_text(encoding="utf-8"))
    return made


def docs(answer: type[BaseModel] | None = None) -> dict[int | str, dict[str, Any]]:
    """Return what the description of the API says of an endpoint that also gives a page."""
    found: dict[str, Any] = {"content": {"text/html": {}}}
    return {200: found | ({"model": answer} if answer else {})}


def render(template: str, made_at: float, **values: Any) -> str:
    """Return a page; `made_at` is its time."""
    return _environment().get_template(template).render(made_at=made_at, **values)


def wants_html(request: Request, given: str | None) -> bool:
    """Return whether to answer with a page: `?format=`, else whether `Accept` names text/html."""
    if given is not None:
        return given == "html"
    return "text/html" in request.headers.get("accept", "").lower()


def page_response(page: str) -> HTMLResponse:
    """Return a page as an answer that a browser shows without loading or running anything."""
    return HTMLResponse(page, headers=HEADERS)
