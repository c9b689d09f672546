"""What every request passes: host names, request id, limit of JSON bodies, the last resort."""

import logging
import re
import secrets
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import (
    ApiError,
    BadRequestError,
    ForbiddenError,
    TooLargeError,
    internal_error,
    problem_response,
)

MAX_JSON_BYTES = 2**20
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_log = logging.getLogger("ctune.api")


class RequestGuard:
    """Outermost middleware; see the module.

    Only requests whose `Host` (and `Origin`, from a browser) is one of `names` are answered:
    without keys, any web page that a user of this machine opens could otherwise use the service.
    Bodies above `MAX_JSON_BYTES` are refused but on the paths of `streaming`, which limit them by
    themselves.
    """

    def __init__(self, app: ASGIApp, *, names: Iterable[str], streaming: Iterable[str]) -> None:
        self._app = app
        self._names = frozenset(names)
        self._streaming = frozenset(streaming)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or pass on one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        scope.setdefault("state", {})["request_id"] = request_id
        stamped = _Stamped(send, request_id)
        refused = self._refuse(scope, headers)
        if refused is not None:
            await problem_response(refused, scope)(scope, receive, stamped)
            return
        limited = receive if scope["path"] in self._streaming else _limit(receive)
        try:
            await self._app(scope, limited, stamped)
        except ClientDisconnect:
            _log.info("client left: %s %s (%s)", scope["method"], scope["path"], request_id)
        except Exception:
            _log.exception("failed: %s %s (%s)", scope["method"], scope["path"], request_id)
            if stamped.started:
                raise  # the connection is closed: the client sees that the answer is not whole
            await problem_response(internal_error(), scope)(scope, receive, stamped)

    def _refuse(self, scope: Scope, headers: Headers) -> ApiError | None:
        host = headers.get("host", "")
        if _name(host) not in self._names:
            return BadRequestError(
                f"the Host header {host[:128]!r} is not a name of this service."
                f" Use one of: {', '.join(sorted(self._names))}.",
                code="invalid_host",
            )
        origin = headers.get("origin")
        if origin is not None and _name(origin.partition("://")[2]) not in self._names:
            return ForbiddenError(
                f"a web page of {origin[:128]!r} may not use this service: it has no keys that"
                " would tell pages from people. Call it from a program.",
                code="foreign_origin",
            )
        length = headers.get("content-length", "0")
        over = not length.isdecimal() or int(length) > MAX_JSON_BYTES
        if over and scope["path"] not in self._streaming:
            return _too_large()
        return None


class _Stamped:
    """`send` that adds the request id and remembers that the answer began."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id
        self.started = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            MutableHeaders(scope=message)["x-request-id"] = self._request_id
        await self._send(message)


def _name(host: str) -> str:
    return re.sub(r":\d*$", "", host).lower()


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"


def _limit(receive: Receive) -> Receive:
    taken = 0

    async def limited() -> Message:
        nonlocal taken
        message = await receive()
        taken += len(message.get("body", b""))
        if taken > MAX_JSON_BYTES:
            raise _too_large()
        return message

    return limited


def _too_large() -> TooLargeError:
    return TooLargeError(
        f"the body is larger than {MAX_JSON_BYTES} bytes. Upload images with POST /datasets;"
        " a job needs only a few kilobytes."
    )
