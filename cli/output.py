"""What the client commands share: their options, JSON or tables, times and sizes in words."""

import json
import time
from collections.abc import Iterable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ctune.client import DEFAULT_URL

Url = Annotated[str, typer.Option("--url", envvar="CTUNE_URL", help="Address of the service.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
Limit = Annotated[int, typer.Option(min=1, max=200, help="At most this many.")]
URL = DEFAULT_URL

console = Console(soft_wrap=True)
errors = Console(stderr=True)


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    print(json.dumps(value, indent=2, ensure_ascii=False))


def print_line(value: Any) -> None:
    """Print a value as one line of JSON."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def print_table(columns: Iterable[str], rows: Iterable[Iterable[Any]]) -> None:
    """Print a table; what is missing is shown as a dash."""
    table = Table(*columns, box=None, pad_edge=False, header_style="bold")
    for row in rows:
        table.add_row(*("-" if cell is None else escape(str(cell)) for cell in row))
    console.print(table)


def age(seconds: float | None) -> str:
    """Return how long ago a Unix time is: `5 min`."""
    if seconds is None:
        return "-"
    passed = max(0.0, time.time() - seconds)
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if passed >= size:
            return f"{passed / size:.0f} {unit}"
    return f"{passed:.0f} s"


def megabytes(size_bytes: int | None) -> str:
    """Return a size in MB."""
    return "-" if size_bytes is None else f"{size_bytes / 1e6:.1f} MB"
