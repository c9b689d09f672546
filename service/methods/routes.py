"""GET /methods: what can be trained and how it is configured."""

from functools import cache
from typing import get_args

from fastapi import APIRouter

from ctune.methods import METHOD_CONFIGS
from ctune.methods.base_config import Preset
from ctune.schema import JsonObject
from service.errors import not_found

router = APIRouter(prefix="/methods", tags=["methods"])


@cache
def _described() -> dict[str, JsonObject]:
    return {name: _describe(name) for name in METHOD_CONFIGS}


def _describe(name: str) -> JsonObject:
    config = METHOD_CONFIGS[name]
    presets = {preset: config(preset=preset) for preset in get_args(Preset)}
    return {
        "id": name,
        "object": "method",
        "name": name,
        "description": config.DESCRIPTION,
        "needs": list(config.NEEDS),
        "defaults": {preset: made.model_dump(mode="json") for preset, made in presets.items()},
        "config_schema": config.model_json_schema(),
    }


@router.get("")
def list_methods() -> JsonObject:
    """List the methods: description, data needs, JSON schema, defaults per preset."""
    shown = list(_described().values())
    return {
        "object": "list",
        "data": shown,
        "first_id": shown[0]["id"],
        "last_id": shown[-1]["id"],
        "has_more": False,
    }


@router.get("/{name}")
def get_method(name: str) -> JsonObject:
    """Return one method."""
    found = _described().get(name)
    if found is None:
        raise not_found("method", name, "/methods")
    return found
