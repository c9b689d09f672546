"""Every error of the API has one body: RFC 9457 problem details with OpenAI's `error` member.

ApiError                     status  code
├── InvalidError             422     invalid_request; one fault per wrong place, all at once
├── BadRequestError          400     bad_request
├── ForbiddenError           403     forbidden
├── NotFoundError            404     not_found
├── ConflictError            409     conflict; says that a retry is useless
├── TooLargeError            413     too_large
├── UnsupportedTypeError     415     unsupported_media_type
├── RangeError               416     range_not_satisfiable
├── UnavailableError         503     unavailable; says that a retry may help
└── StorageFullError         507     storage_full
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from http import HTTPStatus
from typing import Any, ClassVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import compile_path
from starlette.types import Scope

from ctune.schema import Fault, JsonObject
from service.db import DatabaseUnavailableError
from service.faults import request_faults

PROBLEM_JSON = "application/problem+json"
PROBLEM_TYPE = "https://ctune.dev/problems/"
RETRY_AFTER_S = 5
_TEXT = {"type": "string"}
_NULLABLE = {"type": ["string", "null"]}
PROBLEM_DOCS: dict[str, Any] = {
    "description": "Problem: what is wrong, where, and what to do",
    "content": {
        PROBLEM_JSON: {
            "schema": {
                "type": "object",
                "properties": {
                    **dict.fromkeys(("type", "title", "detail", "instance", "request_id"), _TEXT),
                    "status": {"type": "integer"},
                    "errors": {"type": "array", "items": Fault.model_json_schema()},
                    "error": {
                        "type": "object",
                        "properties": {
                            **dict.fromkeys(("message", "type", "code"), _TEXT),
                            "param": _NULLABLE,
                        },
                    },
                },
            }
        }
    },
}


class ApiError(HTTPException):
    """Base: `detail` says what is wrong, where, and what to do."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal"
    extra_headers: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        detail: str,
        *,
        code: str | None = None,
        faults: Sequence[Fault] = (),
        headers: Mapping[str, str] | None = None,
        members: JsonObject | None = None,
    ) -> None:
        super().__init__(self.status, detail, {**self.extra_headers, **(headers or {})})
        self.error_code = code or self.code
        self.faults = list(faults)
        self.members = members or {}


class InvalidError(ApiError):
    """The request is understood but wrong in the places that `faults` names."""

    status, code = 422, "invalid_request"

    def __init__(self, faults: Sequence[Fault]) -> None:
        listed = "; ".join(fault.detail.rstrip(".") for fault in faults[:5])
        more = f"; and {len(faults) - 5} more, see `errors`" if len(faults) > 5 else ""
        count = f"{len(faults)} faults: " if len(faults) > 1 else ""
        super().__init__(f"{count}{listed}{more}.", faults=faults)


class BadRequestError(ApiError):
    """The request cannot be read."""

    status, code = 400, "bad_request"


class ForbiddenError(ApiError):
    """This client may not do this."""

    status, code = 403, "forbidden"


class NotFoundError(ApiError):
    """There is nothing under this id or path."""

    status, code = 404, "not_found"


class ConflictError(ApiError):
    """The thing is in a state that does not allow this; trying again changes nothing."""

    status, code = 409, "conflict"
    extra_headers = {"x-should-retry": "false"}


class TooLargeError(ApiError):
    """The body is larger than the limit."""

    status, code = 413, "too_large"


class UnsupportedTypeError(ApiError):
    """The body has a media type that this endpoint does not read."""

    status, code = 415, "unsupported_media_type"


class RangeError(ApiError):
    """The range starts behind the end."""

    status, code = 416, "range_not_satisfiable"


class UnavailableError(ApiError):
    """A part that the answer needs is not there now."""

    status, code = 503, "unavailable"
    extra_headers = {"x-should-retry": "true", "retry-after": str(RETRY_AFTER_S)}


class StorageFullError(ApiError):
    """The disk of the data directory is full."""

    status, code = 507, "storage_full"


def not_found(kind: str, wanted: str, listing: str) -> NotFoundError:
    """Return the error for an id under which there is nothing."""
    shown = wanted if len(wanted) <= 64 else wanted[:61] + "…"
    said = f"there is no {kind} {shown!r}. It may have been deleted;"
    return NotFoundError(f"{said} GET {listing} lists those there are.")


def problem_response(error: ApiError, scope: Scope) -> Response:
    """Return the one error body; never cached."""
    request_id = scope.get("state", {}).get("request_id")
    title = HTTPStatus(error.status_code).phrase
    first = error.faults[0] if error.faults else None
    body: JsonObject = {
        "type": PROBLEM_TYPE + error.error_code.replace("_", "-"),
        "title": title,
        "status": error.status_code,
        "detail": error.detail,
        "instance": scope.get("path", ""),
        "request_id": request_id,
        "errors": [fault.model_dump() for fault in error.faults],
        "error": {
            "message": error.detail,
            "type": "server_error" if error.status_code >= 500 else "invalid_request_error",
            "param": first.pointer.strip("/").replace("/", ".") or None if first else None,
            "code": first.code if first else error.error_code,
        },
        **error.members,
    }
    content = json.dumps(body, ensure_ascii=True, allow_nan=False)
    headers = {"cache-control": "no-store", **(error.headers or {})}
    return Response(content, error.status_code, headers, media_type=PROBLEM_JSON)


def internal_error() -> ApiError:
    """Return the error for a fault of the service; what happened is only in its log."""
    return ApiError(
        "the service made a mistake; its log tells more under this request id."
        " Try again, and report the request id if it happens again."
    )


def install_handlers(app: FastAPI) -> None:
    """Make `app` answer every error with the one body."""
    handlers: list[tuple[type[Exception], Callable[[Request, Exception], Response]]] = [
        (HTTPException, _on_http_error),
        (RequestValidationError, _on_invalid_request),
        (DatabaseUnavailableError, _on_database_unavailable),
    ]
    for kind, handler in handlers:
        app.add_exception_handler(kind, handler)


def _on_http_error(request: Request, error: Exception) -> Response:
    if isinstance(error, ApiError):
        return problem_response(error, request.scope)
    assert isinstance(error, HTTPException)
    return problem_response(_from_framework(request, error), request.scope)


def _from_framework(request: Request, error: HTTPException) -> ApiError:
    path = request.scope["path"]
    if error.status_code == 404:
        return NotFoundError(f"there is no path {path!r}. GET /docs lists those there are.")
    if error.status_code == 405:
        allowed = ", ".join(_allowed_methods(request.app, path))
        said = f"{request.method} is not allowed on {path!r}. Allowed here: {allowed or 'nothing'}."
        made = ApiError(said, code="method_not_allowed", headers={"allow": allowed})
    elif error.status_code == 400:
        return BadRequestError(
            "the body cannot be read as JSON: it is nested too deeply, holds a number of thousands"
            " of digits, or is not UTF-8. Send plain JSON in UTF-8."
        )
    else:
        made = ApiError(str(error.detail), code="http_error", headers=error.headers)
    made.status_code = error.status_code
    return made


@cache
def _paths(app: FastAPI) -> list[tuple[re.Pattern[str], list[str]]]:
    described = app.openapi()["paths"].items()
    return [(compile_path(path)[0], [m.upper() for m in methods]) for path, methods in described]


def _allowed_methods(app: FastAPI, path: str) -> list[str]:
    return sorted({m for regex, methods in _paths(app) if regex.match(path) for m in methods})


def _on_invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return problem_response(InvalidError(request_faults(error.errors())), request.scope)


def _on_database_unavailable(request: Request, error: Exception) -> Response:
    said = (
        f"the database does not answer. Try again in {RETRY_AFTER_S} s; GET /readyz says when"
        " the service is ready."
    )
    return problem_response(UnavailableError(said), request.scope)
