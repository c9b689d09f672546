"""What pydantic says about a request, as faults with JSON pointers that clients can act on."""

import difflib
import math
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from ctune.schema import Fault

# Kinds of pydantic by prefix; anything else is `invalid_value`.
CODES = {
    "extra_forbidden": "unknown_field",
    "missing": "missing",
    "union_tag_not_found": "missing",
    "union_tag_invalid": "invalid_choice",
    "literal_error": "invalid_choice",
    "enum": "invalid_choice",
    "greater_than": "out_of_range",
    "less_than": "out_of_range",
    "too_long": "out_of_range",
    "too_short": "out_of_range",
    "string_too": "out_of_range",
    "finite_number": "not_finite",
    "json_invalid": "invalid_json",
}
MAX_FAULTS = 100
MAX_SHOWN = 80
MAX_DEPTH = 64


def escape(part: str | int) -> str:
    """Return one step of an RFC 6901 pointer."""
    return str(part).replace("~", "~0").replace("/", "~1")


def pointer(parts: Sequence[str | int]) -> str:
    """Return the RFC 6901 pointer of a place."""
    return "".join("/" + escape(part) for part in parts)


def show(value: Any) -> str:
    """Return a value as a message shows it: short, on one line."""
    text = ascii(value) if isinstance(value, str) else repr(value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"


def request_faults(errors: Sequence[Any]) -> list[Fault]:
    """Return the faults of query, path, header and unread bodies, as FastAPI reports them."""
    faults = []
    for error in errors[:MAX_FAULTS]:
        where, *parts = error["loc"]
        if error["type"] == "json_invalid":
            place = f"the body is not JSON at character {parts[0]}"
            detail = f"{place}: {error['ctx']['error']}. Send one JSON object."
            faults.append(Fault(pointer="", code="invalid_json", detail=detail))
            continue
        name = f"{where} parameter {parts[-1]!r}" if parts else f"the {where}"
        faults.append(Fault(pointer=pointer(parts), code=_code(error), detail=_said(error, name)))
    return faults


def body_faults(
    errors: Sequence[Any], model: type[BaseModel], under: Sequence[str] = ()
) -> list[Fault]:
    """Return the faults of a body that should be a `model`, one per place.

    `under` says where in the request that body stands.

    The tags that pydantic puts into the place of a discriminated union are left out, and the
    members of a plain union that all refuse one value become one fault.
    """
    faults: dict[str, Fault] = {}
    for error in errors:
        inside, owner = _place(error["loc"], model)
        parts = [*under, *inside]
        if error["type"].startswith("union_tag"):
            parts.append(error["ctx"]["discriminator"].strip("'"))
        place = pointer(parts)
        detail = _said(error, _name(parts), owner)
        before = faults.get(place)
        if before is not None:
            also = detail.partition("; it should ")[2]
            detail = f"{before.detail.rstrip('.')} or {also}" if also else before.detail
        code = before.code if before else _code(error)
        faults[place] = Fault(pointer=place, code=code, detail=detail)
    return list(faults.values())[:MAX_FAULTS]


def unstorable_faults(body: Any, under: Sequence[str] = ()) -> list[Fault]:
    """Return a fault for every value of a parsed body that JSON or a database cannot hold."""
    faults = []
    for parts, what in _unstorable(body, [*under]):
        detail = f"{_name(parts)} holds {what}. Leave it out."
        faults.append(Fault(pointer=pointer(parts), code="not_storable", detail=detail))
    return faults[:MAX_FAULTS]


def _unstorable(value: Any, parts: list[str | int]) -> Iterator[tuple[list[str | int], str]]:
    if len(parts) > MAX_DEPTH:
        yield parts, f"more than {MAX_DEPTH} levels"
    elif isinstance(value, float) and not math.isfinite(value):
        yield parts, f"{value}, which JSON does not have"
    elif isinstance(value, str) and "\0" in value:
        yield parts, "a NUL character"
    elif isinstance(value, str) and not value.isprintable() and _has_surrogate(value):
        yield parts, "half of a surrogate pair"
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _unstorable(key, parts)
            yield from _unstorable(item, [*parts, key])
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _unstorable(item, [*parts, index])


def _has_surrogate(text: str) -> bool:
    return any(0xD800 <= ord(char) <= 0xDFFF for char in text)


def _name(parts: Sequence[str | int]) -> str:
    return "`" + ".".join(str(part) for part in parts) + "`" if parts else "the body"


def _code(error: Any) -> str:
    kind = error["type"]
    if kind.endswith(("_type", "_parsing")):
        return "invalid_type"
    return next((code for start, code in CODES.items() if kind.startswith(start)), "invalid_value")


def _said(error: Any, name: str, owner: type[BaseModel] | None = None) -> str:
    """Return what is wrong, where, and what to send instead."""
    kind, message = error["type"], str(error["msg"])
    context = error.get("ctx", {})
    if kind in ("missing", "union_tag_not_found"):
        return f"{name} is missing. Send it{_choices(context)}."
    if kind == "extra_forbidden":
        return f"there is no {name}.{_advice(str(error['loc'][-1]), owner)}"
    if kind == "union_tag_invalid":
        return f"{name} is {show(context['tag'])}; it should be one of {context['expected_tags']}."
    if kind == "value_error":
        return message.removeprefix("Value error, ").rstrip(".") + "."
    if kind in ("model_attributes_type", "model_type", "dict_type"):
        return f"{name} is {show(error['input'])}; it should be a JSON object."
    wanted = message.partition("should ")[2].partition(", unable to")[0]
    wanted = wanted.replace(" after validation", "")
    if wanted:
        return f"{name} is {show(error['input'])}; it should {wanted}."
    return f"{name} is {show(error['input'])}: {message[0].lower()}{message[1:]}."


def _choices(context: Mapping[str, Any]) -> str:
    return f": one of {context['expected_tags']}" if "expected_tags" in context else ""


def _advice(key: str, owner: type[BaseModel] | None) -> str:
    if owner is None:
        return " Leave it out."
    close = difflib.get_close_matches(key, owner.model_fields, n=3)
    if close:
        return f" Close names: {', '.join(close)}."
    return f" Leave it out; there are: {', '.join(sorted(owner.model_fields))}."


def _place(
    loc: Sequence[str | int], model: type[BaseModel]
) -> tuple[list[str | int], type[BaseModel] | None]:
    """Return where in the body `loc` is, and the model that holds its last step.

    Follows the types, because only they tell a field from the tag or label of a union.
    """
    parts: list[str | int] = []
    node: Any = model
    owner: type[BaseModel] | None = None
    tagged = False
    for step in loc:
        if tagged:
            node, tagged = _variant(node, step), False
        elif isinstance(node, type) and issubclass(node, BaseModel):
            owner = node
            field = node.model_fields.get(str(step))
            parts.append(step)
            node = _without_none(field.annotation) if field else None
            tagged = bool(field and field.discriminator)
        elif isinstance(step, int) or get_origin(node) is dict:
            parts.append(step)
            node, owner = _item(node), None
    return parts, owner


def _item(container: Any) -> Any:
    """Return the type of what a list or a mapping holds; none where it does not matter."""
    kinds = get_args(container)
    return kinds[-1] if get_origin(container) in (list, dict) else None


def _variant(union: Any, tag: str | int) -> Any:
    for variant in get_args(union):
        fields = getattr(variant, "model_fields", {}).values()
        if any(tag in get_args(field.annotation) for field in fields):
            return variant
    return None


def _without_none(annotation: Any) -> Any:
    kept = [item for item in get_args(annotation) if item is not NoneType]
    nullable = len(kept) == 1 and len(get_args(annotation)) == 2
    return kept[0] if nullable else annotation
