"""What models look like on the wire."""

from ctune.events import storable
from ctune.schema import JsonObject
from service.tables import Model

SHOWN_AT_TOP = ("architecture", "embed_dim", "image_size_px", "classes", "licence", "evaluation")


def model_object(model: Model) -> JsonObject:
    """Return a model; `info` is the `model.json` of its directory."""
    info = storable(model.info)
    return {
        "id": model.id,
        "object": "model",
        "name": model.name,
        "job": model.job_id,
        "created_at": int(model.created_at),
        "size_bytes": model.size_bytes,
        **{key: info.get(key) for key in SHOWN_AT_TOP},
        "info": info,
        "download": f"/models/{model.id}/download",
    }
