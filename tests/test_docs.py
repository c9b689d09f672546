"""The argument tables in docs are those of the configs; `make docs` writes them."""

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ctune.config import EvaluationConfig
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
    choices = choices_of(schema)
    made = [config.model_validate(choice).model_dump(mode="json") for choice in choices]
    columns = [f"`{' '.join(choice.values())}`" for choice in choices]
    return table(schema, columns, made)


def evaluation_table() -> str:
    """Return the table of all fields of `evaluation`, as Markdown."""
    made = EvaluationConfig().model_dump(mode="json")
    return table(EvaluationConfig.model_json_schema(), ["default"], [made])


def table(schema: JsonObject, columns: list[str], made: list[JsonObject]) -> str:
    """Return a row per field: what it may be, its value in each of `made`, what it is."""
    lines = [
        "| " + " | ".join(["argument", "values", *columns, "what it is"]) + " |",
        "|" + "---|" * (len(columns) + 3),
    ]
    for path, field in walk(schema, schema["properties"], ()):
        words = " ".join(field.get("description", "").split())
        defaults = [default(values_of, path) for values_of in made]
        cells = [f"`{'.'.join(path)}`", values(field), *defaults, words]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def choices_of(schema: JsonObject) -> list[dict[str, str]]:
    """Return what supplies defaults: the presets, for each recipe where a method has recipes."""
    presets = [{"preset": "small"}, {"preset": "paper"}]
    recipes = schema["properties"].get("recipe", {}).get("enum")
    if recipes is None:
        return presets
    return [{"recipe": recipe} | preset for recipe in recipes for preset in presets]


def walk(
    schema: JsonObject, properties: JsonObject, above: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], JsonObject]]:
    """Yield (path, JSON schema) of every argument, those of blocks below them."""
    for key, field in properties.items():
        if key in ("name", "preset", "recipe") and not above:
            continue
        options = [field, *field.get("anyOf", [])]
        references = [option["$ref"] for option in options if "$ref" in option]
        block = schema["$defs"][references[0].rpartition("/")[2]] if references else None
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
        if "items" in field:
            return f"list of {values(field['items'])}"
        return "list: " + "; ".join(values(item) for item in field["prefixItems"])
    if field.get("type") == "object":
        (named,) = field["patternProperties"].values()
        return f"names to {values(named)}"
    kinds = {name: name for name in ("number", "integer", "null")}
    kinds |= {"boolean": "true or false", "string": "text"}
    kind = kinds[field["type"]]
    bounds = [text.format(f"{field[key]:,}") for key, text in BOUNDS.items() if key in field]
    return " ".join([kind, ", ".join(bounds)]).strip()


def default(value: Any, path: tuple[str, ...]) -> str:
    """Return the value at `path`, or a dash where its block is null."""
    for key in path:
        if value is None:
            return "–"
        value = value[key]
    return show(value)


def show(value: Any) -> str:
    return f"`{value if isinstance(value, str) else json.dumps(value)}`"


def with_table(page: str, table: str) -> str:
    """Return a page with `table` between its markers."""
    head, rest = page.split(BEGIN)
    tail = rest.split(END)[1]
    return f"{head}{BEGIN}\n{table}\n{END}{tail}"


def tables() -> dict[str, str]:
    """Return page -> its table."""
    methods = {f"methods/{name}.md": arguments_table(name) for name in METHOD_CONFIGS}
    return {"evaluation.md": evaluation_table(), **methods}


@pytest.mark.parametrize("name", tables())
def test_table_is_that_of_the_config(name: str) -> None:
    page = (DOCS / name).read_text(encoding="utf-8")
    wanted = with_table(page, tables()[name])
    changes = difflib.unified_diff(page.splitlines(), wanted.splitlines(), lineterm="", n=0)
    assert page == wanted, "run `make docs`:\n" + "\n".join(changes)


def test_every_event_kind_is_described() -> None:
    page = (DOCS / "events.md").read_text(encoding="utf-8")
    for variant in EVENT.json_schema()["discriminator"]["mapping"]:
        assert f"| `{variant}` |" in page


def write() -> None:
    """Write every table into its page."""
    for name, text in tables().items():
        path = DOCS / name
        page = path.read_text(encoding="utf-8")
        path.write_text(with_table(page, text), encoding="utf-8")
        print(path)


if __name__ == "__main__":
    write()
