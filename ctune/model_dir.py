"""The only file that knows the names inside a model directory. Never imports torch.

MODEL_DIR/
    config.json                     timm's description; `timm.create_model("local-dir:MODEL_DIR")`
    model.safetensors               weights under timm's names
    model.json                      `ModelInfo`; written last
    <head>.safetensors              a module of `HEADS`, where the method has it; of the classifier
                                    `weight` [C, D] and `bias` [C]
    reference/000.png ...           images
    reference/vectors.safetensors   `vectors` [n, D] and, with a classifier, `probabilities` [n, C]
    README.md                       model card
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from pydantic import ValidationError, field_validator

from ctune.errors import EncoderError
from ctune.schema import JsonObject, PositiveInt, Schema

FORMAT_VERSION = 1
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INFO = "model.json"
CLASSIFIER = "classifier"
HEADS = {
    CLASSIFIER: "a linear layer on these vectors",
    "projection_head": "the head of the contrastive loss",
    "nnclr_head": "projector, predictor, target projector and queue of MAE-CT",
    "mae_decoder": "the decoder of the masked autoencoder",
}
"""Modules beside the encoder that are kept, by their name in a program, and what they are."""
REFERENCE = "reference"
VECTORS = "reference/vectors.safetensors"
CARD = "README.md"

Rgb = tuple[float, float, float]


class Head(Schema):
    """The classifier on top of the encoder's vectors."""

    kind: str
    """`linear`."""
    num_classes: PositiveInt


class ModelInfo(Schema):
    """`model.json`: what an exported encoder is, how it was made and what its files hash to."""

    format_version: int
    architecture: str
    """timm name without a weight tag."""
    model_args: JsonObject
    """Keyword arguments that rebuild the architecture."""
    embed_dim: PositiveInt
    image_size_px: PositiveInt
    mean: Rgb
    """Of pixels scaled to [0, 1], per channel."""
    std: Rgb
    interpolation: str
    classes: list[str] | None
    """Names in label order."""
    head: Head | None
    licence: str | None
    """Of the weights that training started from; `unknown`; null for a start from scratch."""
    seed: int | None
    method: JsonObject | None
    """The method's resolved configuration."""
    provenance: JsonObject
    """Run configuration, sha256 of the data set's archive, job, versions."""
    evaluation: JsonObject
    """Scores before and after."""
    files: dict[str, str]
    """sha256 per file, without `model.json` itself."""

    @field_validator("files")
    @classmethod
    def _stay_inside(cls, files: dict[str, str]) -> dict[str, str]:
        for name in files:
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or not path.parts:
                raise ValueError(f"{name!r} is not a name inside the model directory")
        return files


def read_info(model_dir: Path) -> ModelInfo:
    """Return `model.json`.

    Raises:
        EncoderError: ``model_damaged``: it is missing, unreadable or of another format.
    """
    try:
        info = ModelInfo.model_validate_json((model_dir / INFO).read_bytes())
    except (OSError, ValidationError) as error:
        raise _damaged(model_dir, f"{INFO} cannot be read: {error}") from error
    if info.format_version != FORMAT_VERSION:
        raise _damaged(
            model_dir,
            f"its format version is {info.format_version}, this ctune reads {FORMAT_VERSION}",
        )
    return info


def head_file(name: str) -> str:
    """Return the name of a head's file."""
    return f"{name}.safetensors"


def check_files(model_dir: Path, info: ModelInfo) -> None:
    """Compare every file with its sha256.

    Raises:
        EncoderError: ``model_damaged``, naming the files that differ or are missing.
    """
    if WEIGHTS not in info.files:
        raise _damaged(model_dir, f"{INFO} gives no sha256 of {WEIGHTS}")
    check_hashes(model_dir, info.files)


def check_hashes(model_dir: Path, files: Mapping[str, str]) -> None:
    """Compare files with their sha256.

    Raises:
        EncoderError: ``model_damaged``, naming the files that differ or are missing.
    """
    bad = []
    for name, wanted in files.items():
        try:
            found = hash_file(model_dir / name)
        except OSError:
            bad.append(f"{name} is missing or unreadable")
            continue
        if found != wanted:
            bad.append(f"{name} has sha256 {found[:12]}… instead of {wanted[:12]}…")
    if bad:
        raise _damaged(model_dir, "; ".join(bad))


def hash_file(path: Path) -> str:
    """Return the sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def seal_files(model_dir: Path) -> dict[str, str]:
    """Return the sha256 of every file below `model_dir`, each flushed to the disk."""
    paths = sorted(path for path in model_dir.rglob("*") if path.is_file())
    return {path.relative_to(model_dir).as_posix(): seal_file(path) for path in paths}


def seal_file(path: Path) -> str:
    """Return the sha256 of a file that is flushed to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return hash_file(path)


def _damaged(model_dir: Path, what: str) -> EncoderError:
    return EncoderError(
        f"the model in {model_dir} is damaged: {what}",
        hint="restore its files from a copy, or export the model again",
        code="model_damaged",
    )
