"""Atomic checkpoints: safetensors and JSON, verified before they are trusted, never pickled.

A checkpoint is a directory `<stage>-<step>` with

    state.json            the nested state; tensors are named in it by ``{"tensor": name}``
    tensors.safetensors   the tensors by name
    manifest.json         stage, step, sha256 and size of both files; written last

It is written under a name with a leading dot, synced, then renamed.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ctune.errors import CheckpointError
from ctune.rundir import fsync_directory, fsync_file, write_atomically
from ctune.schema import JsonObject, Schema

FORMAT_VERSION = 1
TENSOR = "tensor"


class CheckpointManifest(Schema):
    """`manifest.json` of a checkpoint."""

    format_version: int
    stage: str
    stage_index: int
    step: int
    files: dict[str, JsonObject]
    """File name to ``{"sha256": str, "size_bytes": int}``."""

    @property
    def order(self) -> tuple[int, int]:
        """Position in the run: a later checkpoint compares greater."""
        return self.stage_index, self.step


def save_checkpoint(
    folder: Path, state: JsonObject, *, stage: str, stage_index: int, step: int
) -> CheckpointManifest:
    """Write `state` (nested dicts and lists of tensors and JSON values) as one checkpoint.

    Raises:
        OSError: the disk is full or fails; earlier checkpoints are untouched.
    """
    name = checkpoint_name(stage, step)
    temporary = folder / f".{name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        tensors: dict[str, torch.Tensor] = {}
        skeleton = _split(state, "", tensors)
        save_file(tensors, temporary / "tensors.safetensors")
        fsync_file(temporary / "tensors.safetensors")
        write_atomically(temporary / "state.json", json.dumps(skeleton).encode())
        names = ("state.json", "tensors.safetensors")
        manifest = CheckpointManifest(
            format_version=FORMAT_VERSION,
            stage=stage,
            stage_index=stage_index,
            step=step,
            files={file: _describe(temporary / file) for file in names},
        )
        write_atomically(temporary / "manifest.json", manifest.model_dump_json().encode())
        shutil.rmtree(folder / name, ignore_errors=True)
        temporary.rename(folder / name)
        fsync_directory(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return manifest


def load_checkpoint(path: Path) -> tuple[CheckpointManifest, JsonObject]:
    """Return manifest and state of a checkpoint after checking every byte.

    Raises:
        CheckpointError: a file is missing, damaged, or of another format version.
    """
    try:
        manifest = CheckpointManifest.model_validate_json((path / "manifest.json").read_bytes())
        for name, expected in manifest.files.items():
            if _describe(path / name) != expected:
                raise CheckpointError(f"{path / name} does not match its checksum")
        skeleton = json.loads((path / "state.json").read_bytes())
        tensors = load_file(path / "tensors.safetensors")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if manifest.format_version != FORMAT_VERSION:
        raise CheckpointError(f"{path} has format {manifest.format_version}, not {FORMAT_VERSION}")
    return manifest, _join(skeleton, tensors)


def find_checkpoints(folders: Iterable[Path]) -> list[Path]:
    """Return the checkpoints in `folders`, the furthest in the run first; unreadable ones last."""
    found = [path for folder in folders for path in folder.glob("[!.]*-*") if path.is_dir()]
    return sorted(found, key=_order, reverse=True)


def prune_checkpoints(folder: Path, *, keep: Iterable[str]) -> list[str]:
    """Delete the checkpoints in `folder` that are not in `keep`; return the names that remain."""
    kept = set(keep)
    for path in folder.glob("[!.]*-*"):
        if path.name not in kept:
            shutil.rmtree(path)
    return sorted(path.name for path in folder.glob("[!.]*-*"))


def checkpoint_name(stage: str, step: int) -> str:
    """Return the directory name of a checkpoint."""
    return f"{stage}-{step:08d}"


def optimizer_state(saved: JsonObject) -> JsonObject:
    """Return an optimizer's state dict with the integer keys that JSON turned into strings."""
    return saved | {"state": {int(key): value for key, value in saved["state"].items()}}


def _order(path: Path) -> tuple[int, int]:
    try:
        text = (path / "manifest.json").read_bytes()
        return CheckpointManifest.model_validate_json(text).order
    except (OSError, ValueError):
        return -1, -1


def _describe(path: Path) -> JsonObject:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"sha256": digest, "size_bytes": path.stat().st_size}


def _split(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Return `value` with its tensors moved into `tensors` and named in their place."""
    if isinstance(value, torch.Tensor):
        # A copy: safetensors refuses tensors that share memory (tied weights, views).
        tensors[name] = value.detach().cpu().clone().contiguous()
        return {TENSOR: name}
    if isinstance(value, dict):
        return {key: _split(item, f"{name}/{key}", tensors) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_split(item, f"{name}/{index}", tensors) for index, item in enumerate(value)]
    return value


def _join(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {TENSOR}:
            return tensors[value[TENSOR]]
        return {key: _join(item, tensors) for key, item in value.items()}
    if isinstance(value, list):
        return [_join(item, tensors) for item in value]
    return value
