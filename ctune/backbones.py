"""From an encoder's configuration to a module that gives one vector per image.

Letters: B images, D dimensions, s side of the input in pixels.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from ctune import mae_checkpoint
from ctune.encoder_source import EncoderSource, check_consent, registered, resolve_source
from ctune.encoders import FileEncoder, ModelEncoder, TimmEncoder
from ctune.errors import EncoderError
from ctune.preprocess import Preprocessing
from ctune.schema import JsonObject
from ctune.weights import fetch_weights, load_weights

Pool = Literal["mean", "mean_of_normed", "cls", "auto"]
Rgb = tuple[float, float, float]

GLOBAL_POOL: Mapping[Pool, str] = {"mean": "avg", "mean_of_normed": "avg", "cls": "token"}
UNKNOWN_OPTION = re.compile(r"unexpected keyword argument '(\w+)'")
BUILD_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What timm raises for options that do not fit together."""


class Encoder(nn.Module):
    """A timm module without classifier, and what is needed to describe and rebuild it.

    ``backbone`` is the plain timm module: its parameter names are timm's. ``mean`` and ``std`` may
    be replaced (normalisation by the data set's statistics); export writes those in force.
    """

    def __init__(
        self,
        backbone: nn.Module,
        *,
        architecture: str,
        model_args: JsonObject,
        preprocessing: Preprocessing,
        licence: str | None,
        is_mae: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.architecture = architecture
        """timm name without a weight tag."""
        self.model_args = model_args
        """Keyword arguments for ``timm.create_model`` that rebuild the module."""
        self.image_size_px = preprocessing.image_size_px
        self.mean: Rgb = preprocessing.mean
        self.std: Rgb = preprocessing.std
        self.licence = licence
        """Licence of the weights it started from; ``unknown``; none for a start from scratch."""
        self.is_mae = is_mae
        """Whether its weights are those of a published masked autoencoder."""
        width = getattr(backbone, "head_hidden_size", None) or backbone.num_features
        self.embed_dim = int(width)  # type: ignore[arg-type]
        blocks = getattr(backbone, "blocks", None) if hasattr(backbone, "patch_embed") else None
        self.num_blocks = len(blocks) if isinstance(blocks, nn.Sequential | nn.ModuleList) else 0
        """Transformer blocks ``blocks.k``, for layer decay; 0 where parameters have other names."""

    @property
    def preprocessing(self) -> Preprocessing:
        """The preprocessing in force."""
        return Preprocessing(self.image_size_px, self.mean, self.std)

    @property
    def no_weight_decay(self) -> set[str]:
        """Names of backbone parameters that timm keeps out of weight decay."""
        listed = getattr(self.backbone, "no_weight_decay", None)
        return set(listed()) if callable(listed) else set()

    def forward(self, images: Tensor) -> Tensor:
        """Return pooled features h [B, D] of normalised images [B, 3, s, s]."""
        features: Tensor = self.backbone(images)
        return features


def build_encoder(
    config: TimmEncoder | FileEncoder | ModelEncoder,
    *,
    pool: Pool,
    encoder_dir: Path | None,
    drop_path: float = 0.0,
    allow_noncommercial_weights: bool = False,
) -> Encoder:
    """Return the encoder that `config` names, on the CPU, in training mode.

    Weights from scratch follow torch's global generator: seed it first. ``mean`` averages a vision
    transformer's patch tokens and then normalises them, by a fresh norm where the weights were
    pooled otherwise; ``mean_of_normed`` normalises them first, by the norm that its training saw
    (mae.md 2.8); ``cls`` takes its class token; ``auto`` leaves it as the weights or the
    architecture have it. Other families keep their own pooling.

    Args:
        config: which encoder.
        pool: see above.
        encoder_dir: model directory of a ModelEncoder.
        drop_path: stochastic depth rate in training mode.
        allow_noncommercial_weights: weights under a licence that forbids commercial use may be
            used, and published masked autoencoders from a file.

    Raises:
        EncoderError: unknown architecture or option, a pooling or size that does not fit it;
            weights that cannot be had (``weights_unavailable``), read (``weights_unreadable``,
            ``checkpoint_format``), used (``noncommercial_weights``) or that do not fit
            (``weights_mismatch``, with the keys).
    """
    source = resolve_source(config, encoder_dir)
    if not allow_noncommercial_weights:
        check_consent(source)
    if isinstance(config, TimmEncoder) and config.pretrained:
        published = fetch_weights(source.architecture, source.cfg.get("hf_hub_id"))
        source = replace(source, weights=published)
    size_px = config.image_size_px or int(source.cfg["input_size"][-1])
    source = replace(source, cfg={**source.cfg, "input_size": (3, size_px, size_px)})
    source, switched = _settle_pool(source, pool)
    _check_patches(_probe(source), size_px)
    backbone = source.create(**_drop_path_kwargs(source, drop_path))
    if (weights := source.weights) is not None:
        if config.pos_embed_resize == "recompute":
            weights = mae_checkpoint.recompute_positions(weights, backbone)
        if source.is_mae:
            weights = mae_checkpoint.fit_encoder_state_dict(weights, backbone)
        load_weights(backbone, weights, cfg=source.cfg, pooling_switched=switched)
    return Encoder(
        backbone,
        architecture=source.architecture,
        model_args={**source.options, **source.settled()},
        preprocessing=Preprocessing(size_px, _rgb(source.cfg["mean"]), _rgb(source.cfg["std"])),
        licence=source.licence,
        is_mae=source.is_mae,
    )


def _probe(source: EncoderSource) -> nn.Module:
    """Build without memory; name every unknown option at once."""
    unknown: list[str] = []
    attempt = source
    while True:
        try:
            probe = attempt.probe()
        except BUILD_ERRORS as error:
            found = UNKNOWN_OPTION.search(str(error)) if isinstance(error, TypeError) else None
            if found is None or found[1] not in attempt.options:
                raise EncoderError(
                    f"{source.architecture} cannot be built with"
                    f" {source.options | source.settled()}: {error}",
                    hint="check the values against the architecture's keyword arguments",
                    code="invalid_options",
                ) from error
            unknown.append(found[1])
            options = {k: v for k, v in attempt.options.items() if k != found[1]}
            attempt = replace(attempt, options=options)
            continue
        if unknown:
            raise EncoderError(
                f"{source.architecture} has no options {', '.join(unknown)}",
                hint="options are the architecture's own keyword arguments",
                code="unknown_option",
            )
        return probe


def _settle_pool(source: EncoderSource, pool: Pool) -> tuple[EncoderSource, bool]:
    """Return the source with its pooling, and whether that is another than it had."""
    plain = _probe(EncoderSource(*registered(source.architecture), options={}))
    own = getattr(plain, "global_pool", None)
    is_transformer = isinstance(own, str) and hasattr(plain, "num_prefix_tokens")
    if pool == "auto" or not is_transformer:
        return source, False
    has_class_token = getattr(plain, "cls_token", None) is not None
    if pool == "cls" and not source.options.get("class_token", has_class_token):
        raise EncoderError(
            f"{source.architecture} has no class token to pool by",
            hint="set pool to 'mean' or 'auto'",
            code="no_class_token",
        )
    wanted = GLOBAL_POOL[pool]
    if pool == "mean_of_normed":  # else timm puts an untrained norm in place of theirs
        source = replace(source, options={"fc_norm": False, **source.options})
    if source.options.get("fc_norm") is False:
        switched = source.weights is not None and "norm.weight" not in source.weights
    else:
        switched = wanted != (source.global_pool or own)
    return replace(source, global_pool=wanted), switched


def _check_patches(probe: nn.Module, size_px: int) -> None:
    patch = getattr(getattr(probe, "patch_embed", None), "patch_size", None)
    sides = set(patch) if isinstance(patch, tuple) else set()
    if any(size_px % side for side in sides):
        raise EncoderError(
            f"image_size_px {size_px} is not a multiple of the patch size {max(sides)}",
            hint="change image_size_px or options.patch_size",
            code="size_not_multiple_of_patch",
        )


def _drop_path_kwargs(source: EncoderSource, drop_path: float) -> JsonObject:
    if not drop_path:
        return {}
    kwargs = {"drop_path_rate": drop_path}
    try:
        replace(source, options={**source.options, **kwargs}).probe()
    except TypeError as error:
        raise EncoderError(
            f"{source.architecture} has no stochastic depth",
            hint="set drop_path to 0",
            code="no_drop_path",
        ) from error
    return kwargs


def _rgb(values: Any) -> Rgb:
    red, green, blue = (float(value) for value in values)
    return red, green, blue
