"""Endpoints of the embedding process: images in, vectors or classes out."""

import asyncio
import base64
import json
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import APIRouter, Depends, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from ctune.errors import DataError, EncoderError
from ctune.schema import Fault
from service.embeddings.batcher import Batcher, BatchFailedError, Done, QueueFullError
from service.embeddings.body import Parsed, image_bytes, parse_body, read_body
from service.embeddings.engine import Engine, ModelUnusableError, UnknownModelError, Vectors
from service.embeddings.schemas import (
    Classifications,
    ClassifyOptions,
    ClassifyRequest,
    Embeddings,
    EmbedOptions,
    EmbedRequest,
    Health,
)
from service.errors import ApiError, InvalidError, TooLargeError, UnavailableError, not_found
from service.settings import Settings

OPENAI_PATH = "/v1/embeddings"
OCTET_STREAM = "application/octet-stream"
MILLISECONDS = 1000
EPS = 1e-12
Value = TypeVar("Value")


class OverloadedError(ApiError):
    """Too many images wait."""

    status, code = 429, "overloaded"
    extra_headers = {"retry-after": "1", "x-should-retry": "true"}


class BrokenModelError(ApiError):
    """The model cannot be used; trying again changes nothing."""

    status, code = 500, "model_unusable"
    extra_headers = {"x-should-retry": "false"}


@dataclass(frozen=True)
class Serving:
    """What the endpoints share."""

    settings: Settings
    engine: Engine
    batcher: Batcher[Any, Any, Vectors]
    pool: ThreadPoolExecutor
    max_body_bytes: int
    loads: dict[str, asyncio.Task[Any]] = field(default_factory=dict)
    """Models that are being looked up or loaded: one thread each, however many calls wait."""

    async def call(self, function: Callable[..., Value], *args: Any) -> Value:
        """Run a function that blocks in the pool."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, function, *args)

    async def model(self, model_id: str) -> Any:
        """Return a model; see `Engine.model`."""
        load = self.loads.get(model_id)
        if load is None:
            load = asyncio.create_task(asyncio.to_thread(self.engine.model, model_id))
            self.loads[model_id] = load
            load.add_done_callback(lambda done: self._loaded(model_id, done))
        return await asyncio.shield(load)

    def _loaded(self, model_id: str, load: asyncio.Task[Any]) -> None:
        self.loads.pop(model_id, None)
        if not load.cancelled():
            load.exception()  # every caller may have left; asyncio would call it lost


@dataclass
class Timer:
    """Where the time of a request went."""

    started_at: float = field(default_factory=time.monotonic)
    decode_s: float = 0.0
    queue_s: float = 0.0
    inference_s: float = 0.0

    def headers(self) -> dict[str, str]:
        """Return the response headers, in milliseconds."""
        seconds = {
            "X-Queue-Time": self.queue_s,
            "X-Decode-Time": self.decode_s,
            "X-Inference-Time": self.inference_s,
            "X-Total-Time": time.monotonic() - self.started_at,
        }
        return {name: f"{value * MILLISECONDS:.3f}" for name, value in seconds.items()}


def _serving(request: Request) -> Serving:
    serving: Serving = request.app.state.serving
    return serving


ServingDep = Annotated[Serving, Depends(_serving)]
router = APIRouter()


@router.post("/embed", response_model=Embeddings)
@router.post(OPENAI_PATH, response_model=Embeddings)
async def embed(request: Request, serving: ServingDep) -> Response:
    """Vectors of images, in the shape of OpenAI's embeddings, or as float32 rows.

    JSON or multipart/form-data. With `Accept: application/octet-stream` the answer is little-endian
    float32 rows, their shape in `X-Rows` and `X-Dim`.
    """
    timer = Timer()
    body = await read_body(request, serving.max_body_bytes)
    sent_as = request.headers.get("content-type", "")
    parsed = await serving.call(_parse_embed, body, sent_as)
    return await _while_connected(request, _embed(request, serving, parsed, timer))


@router.post("/classify", response_model=Classifications)
async def classify(request: Request, serving: ServingDep) -> Response:
    """The most probable classes of images, for models with a classifier."""
    timer = Timer()
    body = await read_body(request, serving.max_body_bytes)
    sent_as = request.headers.get("content-type", "")
    parsed = await serving.call(_parse_classify, body, sent_as)
    return await _while_connected(request, _classify(serving, parsed, timer))


@router.get("/healthz")
async def healthz() -> Health:
    """The process answers."""
    return Health()


@router.get("/readyz")
async def readyz(serving: ServingDep) -> Health:
    """The process can embed."""
    if not serving.batcher.alive:
        raise UnavailableError("the batcher has ended; the log of this process says why.")
    pending = serving.batcher.pending
    return Health(detail={"models": serving.engine.loaded, "pending_images": pending})


async def _embed(
    request: Request, serving: Serving, parsed: Parsed[EmbedOptions], timer: Timer
) -> Response:
    options = parsed.options
    model = await _model(serving, options.model)
    wanted, most = options.dimensions, model.info.embed_dim
    if wanted is not None and wanted > most:
        detail = f"`dimensions` is {wanted}; the vectors of this model have {most}."
        raise InvalidError([Fault(pointer="/dimensions", code="out_of_range", detail=detail)])
    vectors = await _vectors(serving, model, parsed.images, timer)
    normalize = options.normalize
    if normalize is None:
        normalize = request.url.path == OPENAI_PATH
    vectors = shape_vectors(vectors, dimensions=options.dimensions, normalize=normalize)
    headers = timer.headers()
    if OCTET_STREAM in request.headers.get("accept", ""):
        rows, dim = vectors.shape
        headers |= {"X-Rows": str(rows), "X-Dim": str(dim)}
        content = vectors.astype("<f4").tobytes()
        return Response(content, headers=headers, media_type=OCTET_STREAM)
    content = await serving.call(_embeddings_json, vectors, options)
    return Response(content, headers=timer.headers(), media_type="application/json")


async def _classify(serving: Serving, parsed: Parsed[ClassifyOptions], timer: Timer) -> Response:
    options = parsed.options
    model = await _model(serving, options.model)
    if model.classes is None:
        detail = f"model {options.model!r} has no classifier; POST /embed gives its vectors."
        raise InvalidError([Fault(pointer="/model", code="no_classifier", detail=detail)])
    vectors = await _vectors(serving, model, parsed.images, timer)
    probabilities = await serving.call(serving.engine.probabilities, model, vectors)
    data = []
    for index, row in enumerate(probabilities):
        best = np.argsort(-row, kind="stable")[: options.top_k]
        found = [{"label": model.classes[k], "probability": float(row[k])} for k in best]
        data.append({"object": "classification", "index": index, "predictions": found})
    content = _list_json(data, options.model)
    return Response(content, headers=timer.headers(), media_type="application/json")


async def _model(serving: Serving, model_id: str) -> Any:
    try:
        return await serving.model(model_id)
    except UnknownModelError:
        raise not_found("model", model_id, "/models") from None
    except ModelUnusableError as error:
        raise BrokenModelError(f"model {model_id!r} cannot be used: {error}") from error


async def _vectors(
    serving: Serving, model: Any, images: Sequence[str | bytes], timer: Timer
) -> Vectors:
    """Return the vectors [n, D] of encoded images, not normalised."""
    batcher = serving.batcher
    if len(images) > batcher.max_pending:
        raise TooLargeError(
            f"the request has {len(images)} images, more than the {batcher.max_pending} that may"
            " wait at once. Send fewer per request."
        )
    try:
        with batcher.reserve(len(images)):
            started_at = time.monotonic()
            items = await _decode(serving, model, images)
            timer.decode_s = time.monotonic() - started_at
            done: Done[Vectors] = await batcher.submit(model, items)
    except QueueFullError:
        raise OverloadedError(
            f"{batcher.pending} images wait already, {batcher.max_pending} may."
            " Try again in a second."
        ) from None
    except BatchFailedError as error:
        if isinstance(error.__cause__, EncoderError):
            cause = error.__cause__
            raise BrokenModelError(f"the model cannot be used: {cause}. {cause.hint}.") from error
        raise
    timer.queue_s, timer.inference_s = done.queue_s, done.inference_s
    return np.stack(done.rows)


async def _decode(serving: Serving, model: Any, images: Sequence[str | bytes]) -> list[Any]:
    """Decode all images; every one that cannot be used becomes a fault with its index.

    Raises:
        InvalidError: with all faults.
    """

    def prepare(index: int, image: str | bytes) -> Any:
        try:
            data = image_bytes(image)
            limit = serving.settings.max_image_bytes
            if len(data) > limit:
                said = f"it has {len(data)} bytes, more than the {limit} allowed"
                raise DataError(said, code="image_too_large")
            return serving.engine.prepare(model, data)
        except DataError as error:
            detail = f"image {index}: {error.message}."
            return Fault(pointer=f"/input/{index}", code=error.error_code, detail=detail)

    prepared = await asyncio.gather(
        *(serving.call(prepare, index, image) for index, image in enumerate(images))
    )
    faults = [found for found in prepared if isinstance(found, Fault)]
    if faults:
        raise InvalidError(faults)
    return list(prepared)


def shape_vectors(vectors: Vectors, *, dimensions: int | None, normalize: bool) -> Vectors:
    """Return vectors [n, D] truncated, then scaled to unit length; zeros stay zeros."""
    if dimensions is not None:
        vectors = vectors[:, :dimensions]
    if normalize:
        lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
        vectors = vectors / np.maximum(lengths, EPS)
    return vectors


def _parse_embed(body: bytes, content_type: str) -> Parsed[EmbedOptions]:
    return parse_body(body, content_type, options=EmbedOptions, whole=EmbedRequest)


def _parse_classify(body: bytes, content_type: str) -> Parsed[ClassifyOptions]:
    return parse_body(body, content_type, options=ClassifyOptions, whole=ClassifyRequest)


def _embeddings_json(vectors: Vectors, options: EmbedOptions) -> bytes:
    data = []
    for index, vector in enumerate(vectors):
        said: list[float] | str = vector.tolist()
        if options.encoding_format == "base64":
            said = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        data.append({"object": "embedding", "index": index, "embedding": said})
    return _list_json(data, options.model)


def _list_json(data: list[dict[str, Any]], model_id: str) -> bytes:
    usage = {"prompt_tokens": len(data), "total_tokens": len(data)}
    body = {"object": "list", "data": data, "model": model_id, "usage": usage}
    return json.dumps(body, allow_nan=False, separators=(",", ":")).encode()


async def _while_connected(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """Do the work unless the client leaves first; its images then wait no longer.

    Raises:
        ClientDisconnect: the client left.
    """

    async def leave() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working = asyncio.create_task(work)
    leaving = asyncio.create_task(leave())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
