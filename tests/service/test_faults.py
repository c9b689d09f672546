"""Pydantic's errors as faults: the place is right whatever the types do."""

import json
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from ctune.schema import Fault, Schema
from service.faults import body_faults, pointer, show, unstorable_faults


class Cat(Schema):
    kind: Literal["cat"]
    lives: Annotated[int, Field(le=9)] = 9
    cat: int = 0


class Dog(Schema):
    kind: Literal["dog"]
    friends: Annotated[list[Cat], Field(max_length=2)] = []


class Home(Schema):
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    spare: Cat | None = None
    rate: Annotated[float, Field(gt=0)] | Literal["auto"] = "auto"
    sizes: tuple[int, Annotated[int, Field(ge=1)]] = (1, 1)
    notes: dict[str, int] = {}


def found(body: Any) -> dict[str, Fault]:
    try:
        Home.model_validate(body)
    except ValidationError as error:
        return {fault.pointer: fault for fault in body_faults(error.errors(), Home)}
    return {}


CAT = {"kind": "cat"}


@pytest.mark.parametrize(
    ("body", "place", "code"),
    [
        ({}, "/pet", "missing"),
        ([], "", "invalid_type"),
        ({"pet": {}}, "/pet/kind", "missing"),
        ({"pet": {"kind": "cow"}}, "/pet/kind", "invalid_choice"),
        ({"pet": {**CAT, "lives": 10}}, "/pet/lives", "out_of_range"),
        ({"pet": {**CAT, "cat": "x"}}, "/pet/cat", "invalid_type"),
        ({"pet": {**CAT, "dog": 1}}, "/pet/dog", "unknown_field"),
        ({"pet": {"kind": "dog", "dog": 1}}, "/pet/dog", "unknown_field"),
        (
            {"pet": {"kind": "dog", "friends": [CAT, {**CAT, "lives": "x"}]}},
            "/pet/friends/1/lives",
            "invalid_type",
        ),
        ({"pet": CAT, "spare": {**CAT, "lives": 11}}, "/spare/lives", "out_of_range"),
        ({"pet": CAT, "rate": "fast"}, "/rate", "invalid_type"),
        ({"pet": CAT, "rate": float("inf")}, "/rate", "not_finite"),
        ({"pet": CAT, "sizes": [1, 0]}, "/sizes/1", "out_of_range"),
        ({"pet": CAT, "sizes": [1]}, "/sizes/1", "missing"),
        ({"pet": CAT, "notes": {"a/b~c": "x"}}, "/notes/a~1b~0c", "invalid_type"),
    ],
)
def test_places_and_codes(body: Any, place: str, code: str) -> None:
    assert {where: fault.code for where, fault in found(body).items()} == {place: code}


def test_details_say_the_value_and_what_to_send() -> None:
    faults = found({"pet": {**CAT, "lives": 10, "lifes": 3}, "rate": "fast"})
    assert faults["/pet/lives"].detail == (
        "`pet.lives` is 10; it should be less than or equal to 9."
    )
    assert faults["/pet/lifes"].detail == "there is no `pet.lifes`. Close names: lives."
    assert faults["/rate"].detail == "`rate` is 'fast'; it should be a valid number or be 'auto'."


def test_the_words_are_those_of_requests() -> None:
    detail = found({"pet": {"kind": "dog", "friends": [CAT] * 3}})["/pet/friends"].detail
    assert detail.endswith("it should have at most 2 items, not 3.")


def test_what_stands_inside_something_is_named_so() -> None:
    with pytest.raises(ValidationError) as caught:
        Cat.model_validate({"kind": "cat", "lives": 10})
    (fault,) = body_faults(caught.value.errors(), Cat, ("options",))
    assert fault.pointer == "/options/lives" and fault.detail.startswith("`options.lives`")


def test_a_flood_of_faults_is_cut() -> None:
    assert len(found({"pet": CAT} | {f"x{n}": n for n in range(500)})) == 100
    assert len(unstorable_faults([float("nan")] * 500)) == 100


def test_values_are_shown_short_and_on_one_line() -> None:
    assert show("a\nb\u2028c") == "'a\\nb\\u2028c'"
    assert len(show("x" * 10_000)) == 80 and len(show({"a": ["x" * 10_000]})) == 80


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(st.characters(codec=None), max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@given(JSON)
def test_what_passes_can_be_stored(value: Any) -> None:
    def storable() -> bool:
        try:
            text = json.dumps(value, allow_nan=False, ensure_ascii=False)
            return b"\\u0000" not in text.encode("utf-8")
        except (ValueError, UnicodeEncodeError):
            return False

    assert (not unstorable_faults(value)) == storable()


@given(JSON)
def test_any_body_is_answered(value: Any) -> None:
    found(value)
    found({"pet": value})


def test_pointers_are_escaped() -> None:
    assert pointer(["a/b", 0, "~"]) == "/a~1b/0/~0" and pointer([]) == ""
