"""Write a tuned encoder as a directory that plain timm loads, and prove that it does.

Letters: n images, D dimensions, C classes.
"""

import copy
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from torch import Tensor, nn

from ctune import model_dir as names
from ctune.backbones import Encoder
from ctune.embed import load_model, read_reference_images
from ctune.errors import CtuneError
from ctune.model_card import model_card
from ctune.model_dir import FORMAT_VERSION, Head, ModelInfo, head_file, seal_file, seal_files
from ctune.rundir import fsync_directory, write_atomically
from ctune.schema import JsonObject
from ctune.weights import write_weights

TOLERANCE = 1e-5
REFERENCE_SIDE_PX = 512


class ExportError(CtuneError):
    """The exported directory does not give back what was exported."""

    code = "export_failed"


def export_model(
    encoder: Encoder,
    out_dir: Path,
    *,
    provenance: JsonObject,
    evaluation: JsonObject,
    reference_images: Sequence[Image.Image],
    classes: list[str] | None = None,
    heads: Mapping[str, nn.Module] | None = None,
) -> JsonObject:
    """Write the model directory, load it back with ctune and with plain timm, return `model.json`.

    The directory is made beside `out_dir` and renamed when it is proven, replacing an earlier one.
    The encoder stays as it is.

    Args:
        encoder: on any device.
        out_dir: the model directory to make.
        provenance: how it was made; of it `config` gives the method and the seed.
        evaluation: `{"before": …, "after": …}`.
        reference_images: RGB; kept with their vectors, at most 512 px on a side.
        classes: names in label order.
        heads: modules by their name in `model_dir.HEADS`; those without weights have no file. The
            classifier is an `nn.Linear` [C, D] on the encoder's vectors.

    Raises:
        ExportError: the directory gives other vectors than the encoder.
        ValueError: no reference image; a head of another name; a classifier that is not linear or
            does not fit `classes`.
    """
    heads = heads or {}
    _check_arguments(encoder, classes, heads, reference_images)
    classifier = heads.get(names.CLASSIFIER)
    settled = copy.deepcopy(encoder).cpu().float().eval()
    licence = encoder.licence
    folder = out_dir.with_name(f".{out_dir.name}.{os.getpid()}.tmp")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / names.REFERENCE).mkdir(parents=True)
    try:
        write_weights(folder / names.WEIGHTS, settled.backbone.state_dict(), licence=licence)
        _write_json(folder / names.CONFIG, timm_config(settled))
        for name, head in heads.items():
            if tensors := head.state_dict():
                write_weights(folder / head_file(name), tensors, licence=licence)
        vectors = _write_reference(folder, settled, classifier, reference_images)
        info = _describe(settled, classes, classifier, provenance, evaluation)
        info = info.model_copy(update={"files": seal_files(folder)})
        (folder / names.CARD).write_text(model_card(info), encoding="utf-8")
        info.files[names.CARD] = seal_file(folder / names.CARD)
        written = info.model_dump(mode="json")
        _write_json(folder / names.INFO, written)
        _prove(folder, vectors)
        if out_dir.exists():
            shutil.rmtree(out_dir)
        folder.rename(out_dir)
        fsync_directory(out_dir.parent)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return written


def timm_config(encoder: Encoder) -> JsonObject:
    """Return the `config.json` from which timm rebuilds the encoder and its preprocessing."""
    source: JsonObject = encoder.backbone.pretrained_cfg  # type: ignore[assignment]
    s = encoder.image_size_px
    pretrained_cfg = {
        "tag": "ctune",
        "input_size": [3, s, s],
        "fixed_input_size": bool(source.get("fixed_input_size")),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "mean": list(encoder.mean),
        "std": list(encoder.std),
        "num_classes": 0,
        "first_conv": source.get("first_conv"),
        "classifier": source.get("classifier"),
        "license": encoder.licence,
    }
    config: JsonObject = {
        "architecture": encoder.architecture,
        "num_classes": 0,
        "num_features": encoder.embed_dim,
        "model_args": encoder.model_args,
        "pretrained_cfg": pretrained_cfg,
    }
    pooling = getattr(encoder.backbone, "global_pool", None)
    pooling = getattr(pooling, "pool_type", pooling)
    if isinstance(pooling, str) and pooling:
        config["global_pool"] = pooling
    return config


def _check_arguments(
    encoder: Encoder,
    classes: list[str] | None,
    heads: Mapping[str, nn.Module],
    reference_images: Sequence[Image.Image],
) -> None:
    if not reference_images:
        raise ValueError("reference_images is empty; give at least one image")
    if unknown := heads.keys() - names.HEADS.keys():
        raise ValueError(f"heads {sorted(unknown)} are unknown; there are {list(names.HEADS)}")
    classifier = heads.get(names.CLASSIFIER)
    if classifier is None:
        return
    if not isinstance(classifier, nn.Linear) or classifier.bias is None:
        raise ValueError("the classifier must be an nn.Linear with a bias")
    if classifier.in_features != encoder.embed_dim:
        raise ValueError(
            f"the classifier takes {classifier.in_features} dimensions, the encoder gives"
            f" {encoder.embed_dim}"
        )
    if classes is None or len(classes) != classifier.out_features:
        raise ValueError(
            f"the classifier has {classifier.out_features} outputs; classes must name each"
        )


def _describe(
    encoder: Encoder,
    classes: list[str] | None,
    classifier: nn.Module | None,
    provenance: JsonObject,
    evaluation: JsonObject,
) -> ModelInfo:
    config = provenance.get("config") or {}
    head = None
    if isinstance(classifier, nn.Linear):
        head = Head(kind="linear", num_classes=classifier.out_features)
    return ModelInfo(
        format_version=FORMAT_VERSION,
        architecture=encoder.architecture,
        model_args=encoder.model_args,
        embed_dim=encoder.embed_dim,
        image_size_px=encoder.image_size_px,
        mean=encoder.mean,
        std=encoder.std,
        interpolation="bilinear",
        classes=classes,
        head=head,
        licence=encoder.licence,
        seed=config.get("seed"),
        method=config.get("method"),
        provenance=provenance,
        evaluation=evaluation,
        files={},
    )


def _write_reference(
    folder: Path,
    encoder: Encoder,
    classifier: nn.Module | None,
    images: Sequence[Image.Image],
) -> Tensor:
    """Write images and the vectors that the encoder in memory gives; return the vectors [n, D]."""
    for number, image in enumerate(images):
        kept = image.copy()
        kept.thumbnail((REFERENCE_SIDE_PX, REFERENCE_SIDE_PX))
        kept.save(folder / names.REFERENCE / f"{number:03}.png")
    preprocessing = encoder.preprocessing
    pixels = torch.stack([preprocessing.to_uint8(image) for image in read_reference_images(folder)])
    with torch.inference_mode():
        vectors: Tensor = encoder(preprocessing.normalise(pixels))
        written = {"vectors": vectors}
        if classifier is not None:
            head = copy.deepcopy(classifier).cpu().float()
            written["probabilities"] = head(vectors).softmax(dim=1)
    write_weights(folder / names.VECTORS, written, licence=encoder.licence)
    return vectors


def _prove(folder: Path, vectors: Tensor) -> None:
    """Load the directory with ctune and with plain timm and compare with `vectors` [n, D]."""
    images = read_reference_images(folder)
    found = {"ctune": load_model(folder).embed(images)}
    plain = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    data: Any = timm.data
    transform = data.create_transform(**data.resolve_model_data_config(plain))
    with torch.inference_mode():
        found["timm"] = plain(torch.stack([transform(image) for image in images]))
    limit = TOLERANCE * max(1.0, vectors.abs().max().item())
    for name, loaded in found.items():
        if loaded.shape != vectors.shape:
            difference = f"shape {list(loaded.shape)} instead of {list(vectors.shape)}"
        elif not (loaded - vectors).abs().max().item() <= limit:
            difference = f"a difference of {(loaded - vectors).abs().max().item():.3g}"
        else:
            continue
        raise ExportError(
            f"the exported model does not give the encoder's vectors when {name} loads it:"
            f" {difference}, where {limit:.3g} is allowed",
            hint="this is a fault of ctune for this architecture; report its name",
        )


def _write_json(path: Path, value: JsonObject) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(path, (text + "\n").encode())
