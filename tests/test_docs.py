"""The argument tables in docs/methods/*.md are those of the configs; `make docs` writes them."""

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ctune.events import EVENT
from ctune.methods import METHOD_CONFIGS
from ctune.schema import JsonObject

DOCS = Path(__file__).parent.parent / "docs"
BEGIN = "<!-- arguments: written by `make docs` -->"
END = "<!-- end of arguments -->"
BOUNDS = {
    "exclusiveMinimum": "> {}",
    "minimum": "≥ {}",
    "exclusiveMaximum": "< {}",
    "maximum": "≤ {}",
}


def arguments_table(name: str) -> str:
    """Return the table of all arguments of a method, as Markdown."""
    config = METHOD_CONFIGS[name]
    schema = config.model_json_schema()
    presets = [config.model_validate({"preset": p}).model_dump(mode="json") for p in presets_of()]
    lines = ["| argument | values | `small` | `paper` | what it is |", "|---|---|---|---|---|"]
    for path, field in walk(schema, schema["properties"], ()):
        small, paper = (show(at(preset, path)) for preset in presets)
        words = " ".join(field.get("description", "").split())
        cells = [f"`{'.'.join(path)}`", values(field), small, paper, words]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def presets_of() -> tuple[str, str]:
    return ("small", "paper")


def walk(
    schema: JsonObject, properties: JsonObject, above: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], JsonObject]]:
    """Yield (path, JSON schema) of every argument, those of blocks below them."""
    for key, field in properties.items():
        if key in ("name", "preset") and not above:
            continue
        block = schema.get("$defs", {}).get(field.get("$ref", "").rpartition("/")[2])
        if block is None:
            yield (*above, key), field
        else:
            yield from walk(schema, block["properties"], (*above, key))


def values(field: JsonObject) -> str:
    """Return what a field may be, in words."""
    if "anyOf" in field:
        return " or ".join(values(option) for option in field["anyOf"])
    if "const" in field:
        return show(field["const"])
    if "enum" in field:
        return ", ".join(show(value) for value in field["enum"])
    if field.get("type") == "array":
        return "list: " + "; ".join(values(item) for item in field["prefixItems"])
    kind = {"number": "number", "integer": "integer", "null": "null"}[field["type"]]
    bounds = [text.format(f"{field[key]:,}") for key, text in BOUNDS.items() if key in field]
    return " ".join([kind, ", ".join(bounds)]).strip()


def at(value: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def show(value: Any) -> str:
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def with_table(page: str, table: str) -> str:
    """Return a page with `table` between its markers."""
    head, rest = page.split(BEGIN)
    tail = rest.split(END)[1]
    return f"{head}{BEGIN}\n{table}\n{END}{tail}"


@pytest.mark.parametrize("name", METHOD_CONFIGS)
def test_table_is_that_of_the_config(name: str) -> None:
    page = (DOCS / "methods" / f"{name}.md").read_text(encoding="utf-8")
    wanted = with_table(page, arguments_table(name))
    changes = difflib.unified_diff(page.splitlines(), wanted.splitlines(), lineterm="", n=0)
    assert page == wanted, "run `make docs`:\n" + "\n".join(changes)


def test_every_event_kind_is_described() -> None:
    page = (DOCS / "events.md").read_text(encoding="utf-8")
    for variant in EVENT.json_schema()["discriminator"]["mapping"]:
        assert f"| `{variant}` |" in page


def write() -> None:
    """Write every method's table into its page."""
    for name in METHOD_CONFIGS:
        path = DOCS / "methods" / f"{name}.md"
        page = path.read_text(encoding="utf-8")
        path.write_text(with_table(page, arguments_table(name)), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    write()
