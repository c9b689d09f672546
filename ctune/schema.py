"""Strict pydantic base and the field types that configurations share. Never imports torch."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


class Schema(BaseModel):
    """Base of every configuration and message: unknown keys are refused, instances are frozen."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Fault(Schema):
    """One thing wrong with a request, placed by a JSON pointer into its body."""

    pointer: str
    """Where: an RFC 6901 JSON pointer, for example ``/method/contrastive/temperature``."""
    code: str
    """Machine-readable kind, for example ``out_of_range``."""
    detail: str
    """What is wrong, with the value, and what to do."""


Fraction = Annotated[float, Field(ge=0, le=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
PositiveInt = Annotated[int, Field(ge=1)]
JsonObject = dict[str, Any]


def merge_defaults(defaults: JsonObject, given: JsonObject) -> JsonObject:
    """Return ``given`` laid over ``defaults``, block by block; explicit values win."""
    merged = dict(defaults)
    for key, value in given.items():
        below = merged.get(key)
        both_blocks = isinstance(below, dict) and isinstance(value, dict)
        merged[key] = merge_defaults(below, value) if both_blocks else value  # type: ignore[arg-type]
    return merged
