"""HTTP for `ctune.client`: retries, problem bodies as errors, server-sent events.

ApiError                    status, faults, request_id
├── InvalidRequestError     400, 413, 415, 422: the request must change
├── NotFoundError           404
├── ConflictError           409: not in this state
└── OverloadedError         429, 503: also after all retries
ServiceUnreachableError     no answer, also after all retries
UnsuccessfulError           a data set or job ended, but not well

Never imports torch.
"""

import json
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, BinaryIO

import httpx

from ctune.errors import CtuneError, FaultSide
from ctune.schema import Fault, JsonObject

RETRIES = 4
FIRST_DELAY_S = 0.5
LONGEST_DELAY_S = 30.0
CONNECT_S = 5.0
KEEP_ALIVE_S = 2.0  # below the service's 5 s, so that no request meets a connection just closed
STREAM_IDLE_S = 60.0
RETRIED_STATUSES = (429, 503)
SAFE_METHODS = ("GET", "HEAD")


class ApiError(CtuneError):
    """The service answered with a problem; the text lists every fault with its pointer."""

    code = "api_error"
    fault: FaultSide = "user"

    def __init__(self, status: int, problem: JsonObject) -> None:
        self.status = status
        self.problem = problem
        self.faults = [_fault(item) for item in problem.get("errors") or []]
        self.request_id: str | None = problem.get("request_id")
        error = problem.get("error") or {}
        said = problem.get("detail") or problem.get("title") or f"HTTP {status}"
        if self.faults:
            found = [f"\n  {fault.pointer or '/'}: {fault.detail}" for fault in self.faults]
            said = f"the service refuses this ({status}):{''.join(found)}"
        super().__init__(said, code=error.get("code"))


class InvalidRequestError(ApiError):
    """The request must change: 400, 413, 415, 422."""


class NotFoundError(ApiError):
    """There is no such thing: 404."""


class ConflictError(ApiError):
    """Not possible in the present state: 409."""


class OverloadedError(ApiError):
    """The service has too much to do or is starting: 429, 503."""

    fault = "system"
    retryable = True


class ServiceUnreachableError(CtuneError):
    """The service does not answer."""

    code = "unreachable"
    retryable = True


class UnsuccessfulError(CtuneError):
    """A data set or a job ended, but not well; `resource` is its last state."""

    code = "unsuccessful"

    def __init__(self, kind: str, resource: JsonObject) -> None:
        self.resource = resource
        error = resource.get("error") or {}
        reason = f": {error['message']}" if error.get("message") else ""
        message = f"{kind} {resource['id']} {resource['status']}{reason}"
        super().__init__(message, hint=error.get("hint") or "", code=error.get("code"))

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


@dataclass(frozen=True)
class ServerEvent:
    """One server-sent event."""

    id: str
    kind: str
    data: JsonObject


class Http:
    """Requests to one service."""

    def __init__(self, base_url: str, *, timeout_s: float = 60.0, retries: int = RETRIES) -> None:
        self.base_url = base_url.rstrip("/")
        self._retries = retries
        self._client = httpx.Client(
            base_url=self.base_url,
            timeout=httpx.Timeout(timeout_s, connect=CONNECT_S),
            limits=httpx.Limits(keepalive_expiry=KEEP_ALIVE_S),
            trust_env=not _on_this_machine(self.base_url),  # no proxy between us and ourselves
        )

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def build(self, method: str, path: str, **options: Any) -> httpx.Request:
        """Return a request; `options` are httpx's."""
        return self._client.build_request(method, path, **options)

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Send a request, with retries, and return a good answer.

        Raises:
            ApiError: the service refuses it.
            ServiceUnreachableError: the service does not answer.
        """
        return self.send(lambda: self.build(method, path, **options))

    def json(self, method: str, path: str, **options: Any) -> JsonObject:
        """Send a request and return the JSON object of the answer."""
        return self.answer(self.request(method, path, **options))

    def data_of(self, path: str, params: dict[str, Any] | None = None) -> list[JsonObject]:
        """Return the items of a list."""
        items: list[JsonObject] = self.json("GET", path, params=params)["data"]
        return items

    def answer(self, response: httpx.Response) -> JsonObject:
        """Return the JSON object in `response`.

        Raises:
            ApiError: it holds none.
        """
        try:
            body = response.json()
        except ValueError:
            body = None
        if not isinstance(body, dict):
            detail = f"{response.url} is no answer of ctune: {response.text[:200]!r}"
            raise ApiError(response.status_code, {"detail": detail})
        return body

    def send(self, build: Callable[[], httpx.Request], *, stream: bool = False) -> httpx.Response:
        """Send what `build` makes, anew for each try, and return a good answer.

        A request that may have reached the service is sent again only if it changes nothing.

        Raises:
            ApiError: the service refuses it.
            ServiceUnreachableError: the service does not answer.
        """
        for tried in range(self._retries + 1):
            last = tried == self._retries
            request = build()
            try:
                response = self._client.send(request, stream=stream)
            except httpx.TransportError as error:
                if last or not _harmless(request, error):
                    raise self._unreachable(error) from error
                time.sleep(delay_s(tried))
                continue
            if response.status_code in RETRIED_STATUSES and not last:
                response.close()
                time.sleep(delay_s(tried, response.headers.get("retry-after")))
                continue
            if response.is_error:
                response.read()
                raise _api_error(response)
            return response
        raise AssertionError("unreachable: the last try returns or raises")

    @contextmanager
    def download(self, path: str) -> Iterator[BinaryIO]:
        """Yield the body of an answer as a temporary file, at its beginning."""
        response = self.send(lambda: self.build("GET", path), stream=True)
        with tempfile.TemporaryFile() as file:
            try:
                for piece in response.iter_bytes():
                    file.write(piece)
            except httpx.TransportError as error:
                raise self._unreachable(error) from error
            finally:
                response.close()
            file.seek(0)
            yield file

    def events(self, path: str, last_id: str | None = None) -> Iterator[ServerEvent]:
        """Yield server-sent events up to `done`; a lost stream goes on where it broke off.

        Raises:
            ApiError: the service refuses it.
            ServiceUnreachableError: the service stays away.
        """
        failures = 0
        while True:
            try:
                for event in self._stream_once(path, last_id):
                    failures = 0
                    last_id = event.id or last_id
                    yield event
                    if event.kind == "done":
                        return
            except httpx.TransportError as error:
                if failures == self._retries:
                    raise self._unreachable(error) from error
            time.sleep(delay_s(failures))
            failures = min(failures + 1, self._retries)

    def _stream_once(self, path: str, last_id: str | None) -> Iterator[ServerEvent]:
        headers = {"accept": "text/event-stream"}
        if last_id is not None:
            headers["last-event-id"] = last_id
        timeout = httpx.Timeout(STREAM_IDLE_S, connect=CONNECT_S)
        response = self.send(
            lambda: self.build("GET", path, headers=headers, timeout=timeout), stream=True
        )
        try:
            yield from parse_events(lines_of(response.iter_bytes()))
        finally:
            response.close()

    def _unreachable(self, error: httpx.TransportError) -> ServiceUnreachableError:
        return ServiceUnreachableError(
            f"{self.base_url} does not answer: {error or type(error).__name__}",
            hint="is it running? `ctune up` starts one; --url or CTUNE_URL names another",
        )


def lines_of(pieces: Iterable[bytes]) -> Iterator[str]:
    """Yield lines; unlike `str.splitlines`, only a line feed ends one."""
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r").decode("utf-8")


def parse_events(lines: Iterable[str]) -> Iterator[ServerEvent]:
    """Yield the events of a `text/event-stream` whose data are JSON objects."""
    fields: dict[str, list[str]] = {}
    for line in lines:
        if line:
            name, _, value = line.partition(":")
            fields.setdefault(name, []).append(value.removeprefix(" "))
            continue
        if "data" in fields:
            kind = fields.get("event", ["message"])[-1]
            data = json.loads("\n".join(fields["data"]))
            yield ServerEvent(fields.get("id", [""])[-1], kind, data)
        fields = {}


def delay_s(tried: int, retry_after: str | None = None) -> float:
    """Return how long to wait after try number `tried`: what the service says, else doubling."""
    if retry_after is not None and retry_after.isdecimal():
        return min(float(retry_after), LONGEST_DELAY_S)
    longest: float = min(FIRST_DELAY_S * 2**tried, LONGEST_DELAY_S)
    return random.uniform(longest / 2, longest)


def _on_this_machine(url: str) -> bool:
    host = httpx.URL(url).host
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _harmless(request: httpx.Request, error: httpx.TransportError) -> bool:
    unsent = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
    return unsent or request.method in SAFE_METHODS


def _api_error(response: httpx.Response) -> ApiError:
    try:
        problem = response.json()
    except ValueError:
        problem = None
    if not isinstance(problem, dict):
        problem = {"detail": f"HTTP {response.status_code}: {response.text[:200]}"}
    status = response.status_code
    kinds: dict[int, type[ApiError]] = {404: NotFoundError, 409: ConflictError}
    kinds |= dict.fromkeys((400, 413, 415, 422), InvalidRequestError)
    kinds |= dict.fromkeys(RETRIED_STATUSES, OverloadedError)
    return kinds.get(status, ApiError)(status, problem)


def _fault(item: JsonObject) -> Fault:
    known = {key: str(item.get(key) or "") for key in ("pointer", "code", "detail")}
    return Fault(**known)
