"""From a request's body to options and encoded images; JSON and multipart give the same.

All functions but `read_body` block; call them from threads.
"""

import base64
from dataclasses import dataclass
from typing import Generic, TypeVar

from multipart import MultipartError, PushMultipartParser, parse_options_header
from pydantic import BaseModel, ValidationError
from starlette.requests import Request

from ctune.errors import DataError
from ctune.schema import Fault
from service.errors import BadRequestError, InvalidError, TooLargeError, UnsupportedTypeError
from service.faults import body_faults, show

Options = TypeVar("Options", bound=BaseModel)
MAX_FIELDS = 16
MAX_FIELD_BYTES = 4096
URL_SCHEMES = ("http://", "https://")


@dataclass(frozen=True)
class Parsed(Generic[Options]):
    """A request that was understood; its images are not decoded yet."""

    options: Options
    images: list[str | bytes]
    """Data URIs or base64 as text, file contents as bytes."""


async def read_body(request: Request, limit_bytes: int) -> bytes:
    """Return the body.

    Raises:
        TooLargeError: it has more than `limit_bytes`.
    """
    chunks = []
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit_bytes:
            raise TooLargeError(
                f"the body is larger than {limit_bytes} bytes. Send fewer images per request."
            )
        chunks.append(chunk)
    return b"".join(chunks)


def parse_body(
    body: bytes, content_type: str, *, options: type[Options], whole: type[Options]
) -> Parsed[Options]:
    """Return options and images of a body.

    Args:
        body: the bytes.
        content_type: of the request.
        options: model of the fields besides the images.
        whole: the same with `input`, for JSON.

    Raises:
        ApiError: another media type, fields that are wrong, or no image.
    """
    media_type, parameters = parse_options_header(content_type)
    if media_type == "multipart/form-data":
        parsed = _parse_multipart(body, parameters.get("boundary", ""), options)
    elif media_type == "application/json" or media_type.endswith("+json"):
        parsed = _parse_json(body, whole)
    else:
        raise UnsupportedTypeError(
            f"the body is sent as {content_type or 'no Content-Type'!r}. Send application/json or"
            " multipart/form-data."
        )
    if not parsed.images:
        detail = "there is no image. Send at least one as `input`."
        raise InvalidError([Fault(pointer="/input", code="missing", detail=detail)])
    return parsed


def image_bytes(image: str | bytes) -> bytes:
    """Return the bytes of an image file.

    Raises:
        DataError: the text is neither a data URI nor base64.
    """
    if isinstance(image, bytes):
        return image
    if image[:8].lower().startswith(URL_SCHEMES):
        raise DataError(
            "this is a URL, and URLs are not fetched; send the image itself as a data URI",
            code="url_not_supported",
        )
    encoded = image
    if image[:5].lower() == "data:":
        head, comma, encoded = image.partition(",")
        if not comma or not head.lower().endswith(";base64"):
            raise DataError(
                "this data URI is not base64; send data:image/png;base64,…", code="invalid_base64"
            )
    try:
        return base64.b64decode("".join(encoded.splitlines()), validate=True)
    except ValueError as error:
        raise DataError(
            f"{show(image[:40])} is neither a data URI nor base64; only images can be embedded,"
            " send data:image/png;base64,…",
            code="invalid_base64",
        ) from error


def _parse_json(body: bytes, whole: type[Options]) -> Parsed[Options]:
    try:
        request = whole.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_url=False)
        if found[0]["type"] == "json_invalid":
            detail = f"the body is not JSON: {found[0]['ctx']['error']}. Send one JSON object."
            raise InvalidError([Fault(pointer="", code="invalid_json", detail=detail)]) from error
        raise InvalidError(body_faults(found, whole)) from error
    images: list[str] = request.input  # type: ignore[attr-defined]
    return Parsed(request, list(images))


def _parse_multipart(body: bytes, boundary: str, options: type[Options]) -> Parsed[Options]:
    fields: dict[str, str] = {}
    images: list[str | bytes] = []
    try:
        for name, is_file, content in _parts(body, boundary):
            if is_file:
                images.append(content)
            elif name == "input":
                images.append(content.decode())
            elif len(content) > MAX_FIELD_BYTES or len(fields) >= MAX_FIELDS:
                raise BadRequestError(f"the field {name!r} is too long or one of too many.")
            else:
                fields[name] = content.decode()
    except (MultipartError, UnicodeDecodeError) as error:
        raise BadRequestError(
            f"the body cannot be read as multipart/form-data: {error}. Send images as files and the"
            " other fields as text."
        ) from error
    try:
        return Parsed(options.model_validate(fields), images)
    except ValidationError as error:
        raise InvalidError(body_faults(error.errors(include_url=False), options)) from error


def _parts(body: bytes, boundary: str) -> list[tuple[str, bool, bytes]]:
    """Return (name, whether a file, content) of every part."""
    parts = []
    with PushMultipartParser(boundary, content_length=len(body), strict=True) as parser:
        name, is_file, content = "", False, bytearray()
        for event in parser.parse(body):
            if event is None:
                parts.append((name, is_file, bytes(content)))
            elif isinstance(event, bytes | bytearray):
                content += event
            else:
                name, is_file, content = event.name, event.filename is not None, bytearray()
    return parts
