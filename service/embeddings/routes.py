"""Endpoints of vectors and classes: passed on, as a stream, to the embedding process."""

from collections.abc import AsyncIterator

import httpx
from fastapi import APIRouter, Request
from starlette.background import BackgroundTask
from starlette.responses import Response, StreamingResponse

from service.errors import UnavailableError

router = APIRouter(tags=["embeddings"])

PATHS = ("/embed", "/classify", "/v1/embeddings")
ASKED = ("content-type", "content-length", "accept", "accept-encoding")
ANSWERED = ("content-type", "content-length", "content-encoding", "cache-control", "retry-after")


@router.post("/embed", response_model=None)
async def embed(request: Request) -> Response:
    """Return one vector per image: `{model, input: [data URI …]}` or multipart files."""
    return await _forward(request)


@router.post("/v1/embeddings", response_model=None)
async def embed_as_openai(request: Request) -> Response:
    """Return vectors in OpenAI's shape; images are data URIs."""
    return await _forward(request)


@router.post("/classify", response_model=None)
async def classify(request: Request) -> Response:
    """Return labels and probabilities per image, for models with a classifier."""
    return await _forward(request)


async def _forward(request: Request) -> Response:
    http: httpx.AsyncClient = request.app.state.http
    url = request.app.state.settings.embed_url.rstrip("/")
    headers = {name: request.headers[name] for name in ASKED if name in request.headers}
    headers["x-request-id"] = request.state.request_id
    outgoing = http.build_request(
        "POST", url + request.url.path, headers=headers, content=_body(request)
    )
    try:
        answer = await http.send(outgoing, stream=True)
    except httpx.TransportError as error:
        raise UnavailableError(
            f"the embedding process does not answer ({type(error).__name__}). Try again soon; if it"
            " stays away, start it with `ctune embed-server` and look at GET /readyz.",
            code="embedding_unavailable",
        ) from error
    kept = {name: value for name, value in answer.headers.items() if _passes(name)}
    return StreamingResponse(
        answer.aiter_raw(), answer.status_code, kept, background=BackgroundTask(answer.aclose)
    )


def _passes(name: str) -> bool:
    return name in ANSWERED or (name.startswith("x-") and name != "x-request-id")


async def _body(request: Request) -> AsyncIterator[bytes]:
    async for chunk in request.stream():
        if chunk:
            yield chunk
