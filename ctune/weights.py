"""Get an encoder's published or stored weights and load them without leaving anything out silently.

Files are safetensors, or torch files of tensors and plain values: no code of a pickle ever runs.
"""

import argparse
import pickle
import sys
from collections.abc import Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from timm.models import load_pretrained
from torch import Tensor, nn

from ctune.errors import EncoderError
from ctune.model_dir import check_hashes, head_file, read_info
from ctune.schema import JsonObject

WRAPPERS = frozenset({"module", "encoder", "backbone"})
"""Attributes under which training code keeps an encoder."""
FIRST_LAYER = "patch_embed.proj.weight"
UNUSED = ("head.*", "head_dist.*", "mask_token", "decoder*", "*relative_position_index")
"""Keys of a file that an encoder does not need."""
COMPUTED = ("*relative_position_index",)
"""Keys of a module that a file need not have."""
LICENCE = "licence"
NO_LICENCE = "none"
POOLING = ("norm.*", "fc_norm.*", "attn_pool.*")
"""Keys that come and go with the pooling of a vision transformer."""


def fetch_weights(architecture: str, hub_id: str | None) -> dict[str, Tensor]:
    """Return the published weights of a timm model, from the local cache or the hub.

    Raises:
        EncoderError: ``weights_unavailable``: none are published as safetensors, or the hub cannot
            be reached; ``weights_unreadable``: the file is damaged.
    """
    if not hub_id:
        raise EncoderError(
            f"{architecture} has no published weights in safetensors form",
            hint="choose another weight tag, a file, or set pretrained to false",
            code="weights_unavailable",
        )
    try:
        path = hf_hub_download(hub_id, "model.safetensors")
    except (OSError, EntryNotFoundError) as error:
        raise EncoderError(
            f"the weights {hub_id} cannot be downloaded: {error}",
            hint="check the network of the machine that trains; or download model.safetensors"
            " yourself and use an encoder with source 'file'; or set pretrained to false",
            code="weights_unavailable",
        ) from error
    return read_weights(Path(path))


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        EncoderError: ``weights_unreadable``: missing, damaged or of another format.
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise EncoderError(
            f"the weights {path} cannot be read: {error}",
            hint="give a .safetensors file",
            code="weights_unreadable",
        ) from error


def write_weights(path: Path, tensors: Mapping[str, Tensor], *, licence: str | None) -> None:
    """Write a safetensors file that says itself which licence its weights are under.

    Args:
        path: of the file.
        tensors: on any device.
        licence: as `read_licence` returns it.
    """
    on_cpu = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    # One entry only: several would be written in any order, and equal runs export equal bytes.
    save_file(on_cpu, path, metadata={LICENCE: licence or NO_LICENCE})


def read_licence(path: Path) -> str | None:
    """Return the licence that a file of `write_weights` names, else ``unknown``.

    None: no licence of earlier weights applies.
    """
    with safe_open(path, framework="pt") as file:
        said = (file.metadata() or {}).get(LICENCE, "unknown")
    return None if said == NO_LICENCE else said


def read_head(model_dir: Path, name: str) -> dict[str, Tensor] | None:
    """Return the tensors of a head that an exported model holds, None where it has none.

    Args:
        model_dir: exported by ctune.
        name: one of `model_dir.HEADS`.

    Raises:
        EncoderError: ``model_damaged``: its file is missing or changed, or `model.json` unreadable.
    """
    file = head_file(name)
    sha256 = read_info(model_dir).files.get(file)
    if sha256 is None:
        return None
    check_hashes(model_dir, {file: sha256})
    return read_weights(model_dir / file)


def read_torch_file(path: Path) -> dict[str, Any]:
    """Return what a file of ``torch.save`` holds: tensors, plain values, training arguments.

    Raises:
        EncoderError: ``weights_unreadable``: missing, damaged, or with objects of other kinds.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise EncoderError(
            f"the weights {path} cannot be read: {error}",
            hint="give a .safetensors file, or a torch file of tensors and plain values",
            code="weights_unreadable",
        ) from error
    if not isinstance(content, dict):
        raise EncoderError(
            f"the weights {path} cannot be read: they are a {type(content).__name__}",
            hint="give a checkpoint with named tensors",
            code="weights_unreadable",
        )
    return content


def strip_prefix(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights without what training code puts before a vision transformer's keys."""
    found = next((key for key in weights if key.endswith(f".{FIRST_LAYER}")), "")
    prefix = found.removesuffix(FIRST_LAYER)
    if not prefix or not WRAPPERS.issuperset(prefix[:-1].split(".")):
        return weights
    return {key.removeprefix(prefix): value for key, value in weights.items()}


def load_weights(
    backbone: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    cfg: JsonObject,
    pooling_switched: bool,
) -> None:
    """Load weights into a timm module; position embeddings and patch kernels are resampled to fit.

    Left out are the classifier and the keys of ``UNUSED``; with ``pooling_switched`` also those of
    ``POOLING``, which then start fresh.

    Raises:
        EncoderError: ``weights_mismatch``: any other key is missing or left over, or a shape does
            not fit; the message lists the keys.
    """
    found: list[tuple[list[str], list[str]]] = []

    def record(_module: nn.Module, keys: Any) -> None:
        found.append((list(keys.missing_keys), list(keys.unexpected_keys)))

    untyped: Any = backbone
    handle = untyped.register_load_state_dict_post_hook(record)
    classifier = _classifier_keys(cfg)
    kept = {key: weights[key] for key in _others(list(weights), classifier)}
    try:
        load_pretrained(
            backbone,
            {**cfg, "state_dict": kept, "source": "", "classifier": None},
            num_classes=cfg.get("num_classes", 0),
            filter_fn=getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None),
            strict=False,
        )
    except RuntimeError as error:
        raise EncoderError(
            f"the weights do not fit {cfg.get('architecture')}: {error}",
            hint="check the architecture's name and options against the file",
            code="weights_mismatch",
        ) from error
    finally:
        handle.remove()
    pooling = POOLING if pooling_switched else ()
    missing = _others(found[0][0], COMPUTED + pooling)
    left_over = _others(found[0][1], UNUSED + pooling)
    if missing or left_over:
        raise EncoderError(
            f"the weights do not fit {cfg.get('architecture')}: missing {missing}, left over"
            f" {left_over}",
            hint="check the architecture's name and options against the file",
            code="weights_mismatch",
        )


def _others(keys: list[str], tolerated: tuple[str, ...]) -> list[str]:
    return [key for key in keys if not any(fnmatchcase(key, pattern) for pattern in tolerated)]


def _classifier_keys(cfg: JsonObject) -> tuple[str, ...]:
    names = cfg.get("classifier") or ()
    return tuple(f"{name}.*" for name in ([names] if isinstance(names, str) else names))
