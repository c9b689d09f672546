"""Which encoder to tune, and what is known of it without torch. Never imports torch."""

import difflib
import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Annotated, Any, Literal

from pydantic import Field

from ctune.schema import Fault, JsonObject, Schema

RESERVED_OPTIONS = {
    "img_size": "set image_size_px instead",
    "global_pool": "set the method's pool instead",
    "num_classes": "an encoder has no classifier",
    "in_chans": "images have 3 channels",
    "drop_path_rate": "set the method's drop_path instead",
    "features_only": "an encoder gives one vector per image",
    "pretrained": "set it beside options",
    "pruned": "choose the pruned architecture by its name",
}
"""Options with a place of their own."""
LOADER_OPTIONS = frozenset(
    {"checkpoint_path", "cache_dir", "device", "dtype", "exportable", "no_jit", "scriptable"}
)
"""Options of timm's loader, not of an architecture; so is every one that starts `pretrained_`."""

CONSENT = "Only the operator may allow them: setting allow_noncommercial_weights."

ImageSize = Annotated[int, Field(ge=8, le=4096)]
PositionResize = Annotated[
    Literal["interpolate", "recompute"],
    Field(
        description="Positions of trained weights at another size. `recompute`: the sines and"
        " cosines of that size, where the weights' are such a table, as a masked autoencoder's are."
    ),
]


class TimmEncoder(Schema):
    """An encoder of timm, pretrained or from scratch."""

    source: Literal["timm"] = "timm"
    name: str
    """timm model name, with or without a weight tag: `vit_small_patch16_224.augreg_in21k`."""
    pretrained: bool = True
    """Load the published weights; false starts from random weights."""
    image_size_px: ImageSize | None = None
    """Side of the square input; null for the encoder's own."""
    pos_embed_resize: PositionResize = "interpolate"
    options: JsonObject = {}
    """The architecture's keyword arguments: `{"patch_size": 4, "depth": 6}`."""


class FileEncoder(Schema):
    """A timm architecture with weights from a file on the machine that trains."""

    source: Literal["file"] = "file"
    path: str
    """Path of a `.safetensors` file, of a masked autoencoder's `.pth` as its authors publish it, or
    of a directory exported by ctune."""
    name: str | None = None
    """timm architecture of the weights; not needed for a directory exported by ctune."""
    image_size_px: ImageSize | None = None
    """Side of the square input; null for the encoder's own."""
    pos_embed_resize: PositionResize = "interpolate"
    options: JsonObject = {}
    """The architecture's keyword arguments."""


class ModelEncoder(Schema):
    """The result of an earlier job."""

    source: Literal["model"] = "model"
    id: str
    """Model id, `mdl_…`."""
    image_size_px: ImageSize | None = None
    """Side of the square input; null for the model's own."""
    pos_embed_resize: PositionResize = "interpolate"


EncoderConfig = Annotated[TimmEncoder | FileEncoder | ModelEncoder, Field(discriminator="source")]


class KnownEncoder(Schema):
    """What the catalogue says of one timm architecture."""

    image_size_px: int
    patch_size_px: int | None = None
    """Patch side of a vision transformer; null for other families."""
    embed_dim: int | None = None
    """Width of a transformer of equal blocks; null for other families."""
    depth: int | None = None
    """Its blocks."""
    tags: list[str] = []
    """Published weights."""
    noncommercial: dict[str, str] = {}
    """Licences of the weights that forbid commercial use; the tag is empty for the default ones."""


@cache
def catalogue() -> dict[str, KnownEncoder]:
    """Return the timm architectures by name, from `encoders.json` (made by `make encoders`)."""
    known = json.loads(files("ctune").joinpath("encoders.json").read_text(encoding="utf-8"))
    return {name: KnownEncoder(**fields) for name, fields in known.items()}


def image_size_px(encoder: EncoderConfig, model_info: JsonObject | None = None) -> int | None:
    """Return the side of the encoder's input, None where only its files tell.

    Args:
        model_info: `model.json` of the model that a `ModelEncoder` names.
    """
    if encoder.image_size_px is not None:
        return encoder.image_size_px
    if isinstance(encoder, ModelEncoder):
        return model_info["image_size_px"] if model_info else None
    known = catalogue().get(encoder.name.partition(".")[0]) if encoder.name else None
    return known.image_size_px if known else None


@dataclass(frozen=True)
class KnownStart:
    """What is known without torch of the encoder that a run starts from; None: not known."""

    pretrained: bool
    """Whether training starts from trained weights."""
    patch_based: bool | None = None
    """Whether it cuts images into patches, as transformers do."""
    embed_dim: int | None = None
    """Width of a transformer of equal blocks."""
    depth: int | None = None
    """Its blocks."""
    method: JsonObject | None = None
    """The resolved method of the ctune job that made it."""
    heads: frozenset[str] | None = None
    """Names of the heads that the job left beside it; empty where no job made it."""


def known_start(encoder: EncoderConfig, model_info: JsonObject | None = None) -> KnownStart:
    """Return what config, catalogue and the model's files say of an encoder.

    Args:
        encoder: the encoder.
        model_info: `model.json` of the directory that it comes from, where there is one.
    """
    info = model_info or {}
    name = info.get("architecture") if info else getattr(encoder, "name", None)
    known = catalogue().get(name.partition(".")[0]) if name else None
    unread = not info and not isinstance(encoder, TimmEncoder)
    heads = None if unread else info.get("files", {})
    options = info["model_args"] if info else getattr(encoder, "options", {})
    width = options.get("embed_dim", known and known.embed_dim)
    depth = options.get("depth", known and known.depth)
    return KnownStart(
        pretrained=not isinstance(encoder, TimmEncoder) or encoder.pretrained,
        patch_based=None if known is None else known.patch_size_px is not None,
        embed_dim=width if isinstance(width, int) else None,
        depth=depth if isinstance(depth, int) else None,
        method=info.get("method"),
        heads=None if heads is None else frozenset(n.removesuffix(".safetensors") for n in heads),
    )


def check_encoder(encoder: TimmEncoder | FileEncoder | ModelEncoder) -> list[Fault]:
    """Return what is wrong with an encoder as far as it shows without torch.

    Unknown names get the closest known ones as advice; the image size must be a multiple of the
    patch size. Pointers start inside the encoder block.
    """
    if isinstance(encoder, ModelEncoder) or encoder.name is None:
        return []
    name, _, tag = encoder.name.partition(".")
    known = catalogue().get(name)
    if known is None:
        close = difflib.get_close_matches(name, catalogue(), n=3)
        advice = f" Close names: {', '.join(close)}." if close else ""
        detail = f"timm has no architecture {name!r}.{advice}"
        return [Fault(pointer="/name", code="unknown_encoder", detail=detail)]
    faults = []
    if tag and tag not in known.tags:
        detail = f"{name!r} has no weights {tag!r}. It has: {', '.join(known.tags) or 'none'}."
        faults.append(Fault(pointer="/name", code="unknown_weights", detail=detail))
    if isinstance(encoder, TimmEncoder) and encoder.pretrained and not known.tags:
        detail = f"{name!r} has no published weights. Set pretrained to false."
        faults.append(Fault(pointer="/pretrained", code="no_weights", detail=detail))
    size_px = encoder.image_size_px or known.image_size_px
    patch_size_px = encoder.options.get("patch_size", known.patch_size_px)
    return faults + option_faults(encoder.options) + _size_faults(size_px, patch_size_px)


def check_model_encoder(encoder: ModelEncoder, model_info: JsonObject) -> list[Fault]:
    """Return what is wrong with tuning an earlier model further, given its `model.json`.

    Pointers start inside the encoder block.
    """
    known = catalogue().get(model_info["architecture"])
    patch_size_px = model_info["model_args"].get("patch_size", known and known.patch_size_px)
    return _size_faults(encoder.image_size_px or model_info["image_size_px"], patch_size_px)


def is_noncommercial(licence: str | None) -> bool:
    """Return whether a licence, as timm writes it, forbids commercial use."""
    return licence is not None and ("-nc" in licence or "noncommercial" in licence)


def check_licence(
    encoder: TimmEncoder | FileEncoder | ModelEncoder, model_info: JsonObject | None = None
) -> list[Fault]:
    """Return a fault for weights known to forbid commercial use, where that is not allowed.

    Pointers start inside the encoder block.

    Args:
        encoder: the encoder.
        model_info: `model.json` of the model that a `ModelEncoder` names.
    """
    licence = None
    if isinstance(encoder, ModelEncoder):
        licence = (model_info or {}).get("licence")
    elif isinstance(encoder, TimmEncoder) and encoder.pretrained:
        name, _, tag = encoder.name.partition(".")
        known = catalogue().get(name)
        licence = known.noncommercial.get(tag) if known else None
    if licence is None or not is_noncommercial(licence):
        return []
    pointer = "/id" if isinstance(encoder, ModelEncoder) else "/name"
    detail = f"the weights are under {licence}, which forbids commercial use. {CONSENT}"
    return [Fault(pointer=pointer, code="noncommercial_weights", detail=detail)]


def option_faults(options: JsonObject) -> list[Fault]:
    """Return a fault for every option that is not the architecture's own."""
    faults = []
    for name in options:
        if name in RESERVED_OPTIONS:
            detail = f"{name} is not an option of an architecture: {RESERVED_OPTIONS[name]}."
        elif name in LOADER_OPTIONS or name.startswith("pretrained_"):
            detail = f"{name} is not an option of an architecture; leave it out."
        else:
            continue
        pointer = f"/options/{name.replace('~', '~0').replace('/', '~1')}"
        faults.append(Fault(pointer=pointer, code="unknown_option", detail=detail))
    return faults


def _size_faults(size_px: int, patch_size_px: Any) -> list[Fault]:
    if not isinstance(patch_size_px, int) or isinstance(patch_size_px, bool):
        if patch_size_px is None:
            return []
        detail = f"patch_size must be a whole number of pixels, not {patch_size_px!r}."
        return [Fault(pointer="/options/patch_size", code="invalid_type", detail=detail)]
    if patch_size_px >= 1 and size_px % patch_size_px == 0:
        return []
    detail = (
        f"image_size_px {size_px} is not a multiple of the patch size {patch_size_px}."
        f" Use {max(1, size_px // max(patch_size_px, 1)) * patch_size_px} or another patch_size."
    )
    return [Fault(pointer="/image_size_px", code="size_not_multiple_of_patch", detail=detail)]
