"""Bodies of the embedding process."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ctune.schema import JsonObject, Schema

MAX_TOP_K = 1000


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Images = Annotated[list[str], BeforeValidator(_as_list, json_schema_input_type=str | list[str])]


class EmbedOptions(Schema):
    """What POST /embed and POST /v1/embeddings take besides the images."""

    model: str
    """Model id, `mdl_…`."""
    encoding_format: Literal["float", "base64"] = "float"
    """`base64`: little-endian float32, a third of the size of JSON numbers."""
    dimensions: Annotated[int, Field(ge=1)] | None = None
    """Keep only the first so many dimensions, before scaling."""
    normalize: bool | None = None
    """Scale each vector to unit length. By default POST /embed does not, so that it gives what the
    downloaded model gives, and POST /v1/embeddings does, as OpenAI's clients expect."""
    modality: Literal["image"] = "image"
    """For clients that always send it."""
    user: str | None = None
    """For clients that always send it; not used."""


class EmbedRequest(EmbedOptions):
    """Body of POST /embed and POST /v1/embeddings in JSON."""

    input: Images
    """Images: data URIs, `data:image/png;base64,…`, or plain base64."""


class ClassifyOptions(Schema):
    """What POST /classify takes besides the images."""

    model: str
    """Model id, `mdl_…`, of a model with a classifier."""
    top_k: Annotated[int, Field(ge=1, le=MAX_TOP_K)] = 5
    """Classes per image, the most probable first."""


class ClassifyRequest(ClassifyOptions):
    """Body of POST /classify in JSON."""

    input: Images
    """Images: data URIs, `data:image/png;base64,…`, or plain base64."""


class Usage(Schema):
    """Images counted as OpenAI counts tokens."""

    prompt_tokens: int
    total_tokens: int


class Embedding(Schema):
    """The vector of one image."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str
    """Numbers, or base64 of little-endian float32."""


class Embeddings(Schema):
    """Answer of POST /embed and POST /v1/embeddings."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class Prediction(Schema):
    """One class of one image."""

    label: str
    probability: float


class Classification(Schema):
    """The classes of one image, the most probable first."""

    object: Literal["classification"] = "classification"
    index: int
    predictions: list[Prediction]


class Classifications(Schema):
    """Answer of POST /classify."""

    object: Literal["list"] = "list"
    data: list[Classification]
    model: str
    usage: Usage


class Health(Schema):
    """Answer of /healthz and /readyz."""

    status: Literal["ok"] = "ok"
    detail: JsonObject = {}
