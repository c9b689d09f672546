"""Checkpoints of masked autoencoders as their authors publish them, as timm state dicts.

Three forms: an encoder ``{"model": ...}``, a whole pre-training ``{"model": ...}`` with decoder and
mask token (both of facebookresearch/mae), and ``{"state_dict": ...}`` without a position of the
class token (ml-jku/MAE-CT). Letters: D width, L = g x g patches.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ctune.errors import CheckpointFormatError, EncoderError
from ctune.position_embedding import is_fixed_table, recompute_pos_embed, resize_pos_embed
from ctune.weights import FIRST_LAYER

NESTS = ("model", "state_dict")
DROPPED = ("mask_token", "decoder_", "head.", "fc_norm.")
"""How keys begin that are no part of a timm encoder as it was pre-trained."""
OFFICIAL_LICENCE = "cc-by-nc-4.0"
"""Of the weights of facebookresearch/mae; those of MAE-CT came without one."""
PUBLISHED_SIZES = frozenset({(768, 12, 16), (1024, 24, 16), (1280, 32, 16), (1280, 32, 14)})
"""Width, depth and patch side of the encoders of both authors."""
CHECK_NAME = "check the architecture's name and options against the checkpoint"
INTERPOLATE = "leave the encoder's pos_embed_resize at 'interpolate'"
BLOCK = re.compile(r"blocks\.(\d+)\.")


def is_published_state_dict(weights: Mapping[str, Tensor]) -> bool:
    """Return whether flat weights look like those of a published masked autoencoder.

    They have its decoder, or one of its sizes and its positions, which are a fixed table: an
    encoder whose positions were trained has others.
    """
    if any(key.startswith("decoder_") for key in weights):
        return {"mask_token", "cls_token"} <= weights.keys()
    if not {FIRST_LAYER, "cls_token", "pos_embed", "norm.weight"} <= weights.keys():
        return False
    kernels, positions = weights[FIRST_LAYER], weights["pos_embed"]
    if (len(kernels), _depth(weights), kernels.shape[-1]) not in PUBLISHED_SIZES:
        return False
    return _is_square(positions.shape[1] - 1) and is_fixed_table(positions)


def checkpoint_licence(checkpoint: Mapping[str, Any]) -> str:
    """Return the licence of published weights, by the form of their checkpoint."""
    return OFFICIAL_LICENCE if "model" in checkpoint else "unknown"


def convert_encoder_state_dict(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the encoder of a checkpoint as a timm state dict; nothing is resized.

    Decoder, mask token and what belongs to a classifier are dropped. A position table of L rows
    gets a first row of zeros for the class token; one of 1 + L rows stays as it is.

    Raises:
        CheckpointFormatError: no mapping under ``model`` or ``state_dict``, no patch embedding in
            it, or a position table whose rows are neither L nor 1 + L.
    """
    inner = next((checkpoint[nest] for nest in NESTS if nest in checkpoint), None)
    if not isinstance(inner, Mapping) or FIRST_LAYER not in inner or "pos_embed" not in inner:
        found = f"the top level of the checkpoint holds {_listed(checkpoint)}"
        if isinstance(inner, Mapping):
            found += f", and below it {_listed(inner)}"
        raise CheckpointFormatError(
            f"not a checkpoint of a masked autoencoder: {found}",
            hint=f"it must hold {FIRST_LAYER} and pos_embed under 'model' or 'state_dict'; save"
            " other weights as safetensors with timm's keys",
        )
    state = {key: value for key, value in inner.items() if not key.startswith(DROPPED)}
    return state | {"pos_embed": _with_class_row(state["pos_embed"])}


def fit_encoder_state_dict(weights: Mapping[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """Return a converted state dict with its positions [1, 1 + L, D] resized for a timm ViT.

    Resized as the official code does it: bicubic without antialiasing, which timm would apply.

    Raises:
        EncoderError: ``weights_mismatch``: another patch size, width or depth, or an encoder
            that has no class token with a position.
    """
    wanted = {key: tuple(value.shape) for key, value in backbone.state_dict().items()}
    if FIRST_LAYER not in wanted or not {"cls_token", "pos_embed"} <= wanted.keys():
        raise _mismatch("the encoder is not a vision transformer with class token and positions")
    theirs, ours = tuple(weights[FIRST_LAYER].shape), wanted[FIRST_LAYER]
    for what, a, b in (
        ("patch size", theirs[2:], ours[2:]),
        ("channels", theirs[1], ours[1]),
        ("width", theirs[0], ours[0]),
        ("depth", _depth(weights), _depth(wanted)),
    ):
        if a != b:
            raise _mismatch(f"{what} {_shown(a)} in the checkpoint, {_shown(b)} in the encoder")
    grid = math.isqrt(wanted["pos_embed"][1] - 1)
    if wanted["pos_embed"][1] != 1 + grid * grid:
        raise _mismatch("the encoder's positions are not those of a class token and a square")
    return {**weights, "pos_embed": resize_pos_embed(weights["pos_embed"], grid)}


def recompute_positions(weights: Mapping[str, Tensor], backbone: nn.Module) -> dict[str, Tensor]:
    """Return weights whose fixed position table is that of the grid of a timm ViT.

    Raises:
        EncoderError: ``weights_mismatch``: no square table, here or there, or a trained one.
    """
    wanted, found = backbone.state_dict().get("pos_embed"), weights.get("pos_embed")
    if wanted is None or found is None:
        raise _mismatch("pos_embed_resize 'recompute' needs a table of positions", INTERPOLATE)
    grid = math.isqrt(wanted.shape[1])
    num_prefix_tokens = wanted.shape[1] - grid * grid
    try:
        table = recompute_pos_embed(found, grid, num_prefix_tokens=num_prefix_tokens)
    except ValueError as error:
        raise _mismatch(str(error), INTERPOLATE) from error
    return {**weights, "pos_embed": table}


def _with_class_row(positions: Tensor) -> Tensor:
    rows = positions.shape[1]
    with_class, without = _is_square(rows - 1), _is_square(rows)
    if with_class == without:
        raise CheckpointFormatError(
            f"the position table has {rows} rows: neither a square number nor one more",
            hint="give a checkpoint of square images",
        )
    if with_class:
        return positions
    return torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)


def _is_square(number: int) -> bool:
    return math.isqrt(number) ** 2 == number


def _depth(keys: Mapping[str, Any]) -> int:
    return len({found[1] for key in keys if (found := BLOCK.match(key))})


def _shown(value: int | tuple[int, ...]) -> str:
    return " x ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _listed(mapping: Mapping[str, Any], most: int = 20) -> str:
    names = [str(name) for name in mapping]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "nothing") + more


def _mismatch(said: str, hint: str = CHECK_NAME) -> EncoderError:
    return EncoderError(f"the weights do not fit: {said}", hint=hint, code="weights_mismatch")
