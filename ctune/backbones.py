"""From an encoder's configuration to a module that gives one vector per image.

Letters: B images, D dimensions, s side of the input in pixels.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import PretrainedCfg, get_pretrained_cfg, is_model, model_entrypoint
from torch import Tensor, nn

from ctune import mae_checkpoint
from ctune.encoders import (
    CONSENT,
    FileEncoder,
    ModelEncoder,
    TimmEncoder,
    is_noncommercial,
    option_faults,
)
from ctune.errors import EncoderError
from ctune.preprocess import Preprocessing
from ctune.schema import JsonObject
from ctune.weights import fetch_weights, load_weights, read_torch_file, read_weights, strip_prefix

Pool = Literal["mean", "mean_of_normed", "cls", "auto"]
Rgb = tuple[float, float, float]

GLOBAL_POOL: Mapping[Pool, str] = {"mean": "avg", "mean_of_normed": "avg", "cls": "token"}
TORCH_SUFFIXES = (".pth", ".pt")
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


@dataclass(frozen=True)
class _Source:
    """What to build and with which weights, before the pooling is settled."""

    architecture: str
    cfg: JsonObject
    """timm's pretrained_cfg: input size, mean, std, names of classifier and first convolution."""
    options: JsonObject
    licence: str | None = None
    weights: dict[str, Tensor] | None = None
    global_pool: str | None = None
    """As stored with the weights or derived from them; none for the architecture's own."""
    is_mae: bool = False
    """The weights are those of a published masked autoencoder, by their form or their tag."""

    def settled(self) -> JsonObject:
        """Return the arguments that have a place of their own: size and pooling."""
        args: JsonObject = {}
        if self.cfg.get("fixed_input_size"):
            args["img_size"] = self.cfg["input_size"][-1]
        if self.global_pool is not None:
            args["global_pool"] = self.global_pool
        return args

    def create(self, **kwargs: Any) -> nn.Module:
        """Build the module with random weights."""
        kwargs |= self.settled()
        module: nn.Module = timm.create_model(
            self.architecture, pretrained_cfg=self.cfg, num_classes=0, **self.options, **kwargs
        )
        return module

    def probe(self) -> nn.Module:
        """Build the module without memory for its weights; the random state stays as it is."""
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return self.create()


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
    source = _resolve(config, encoder_dir)
    if not allow_noncommercial_weights:
        _check_licence(source)
    if isinstance(config, TimmEncoder) and config.pretrained:
        published = fetch_weights(source.architecture, source.cfg.get("hf_hub_id"))
        source = replace(source, weights=published)
    size_px = config.image_size_px or int(source.cfg["input_size"][-1])
    source = replace(source, cfg={**source.cfg, "input_size": (3, size_px, size_px)})
    source, switched = _settle_pool(source, pool)
    _check_patches(_probe(source), size_px)
    backbone = source.create(**_drop_path_kwargs(source, drop_path))
    if (weights := source.weights) is not None:
        if source.is_mae:
            weights = mae_checkpoint.fit_encoder_state_dict(weights, backbone)
        load_weights(backbone, weights, cfg=source.cfg, pooling_switched=switched)
    return Encoder(
        backbone,
        architecture=source.architecture,
        model_args={**source.options, **source.settled()},
        preprocessing=Preprocessing(size_px, _rgb(source.cfg["mean"]), _rgb(source.cfg["std"])),
        licence=source.licence,
    )


def _resolve(config: TimmEncoder | FileEncoder | ModelEncoder, encoder_dir: Path | None) -> _Source:
    if isinstance(config, ModelEncoder):
        if encoder_dir is None:
            raise EncoderError(f"the files of model {config.id} are not given", code="no_model")
        return _from_directory(encoder_dir, {})
    _refuse_options(config.options)
    if isinstance(config, TimmEncoder):
        architecture, cfg = _registered(config.name)
        if not config.pretrained:
            return _Source(architecture, cfg, config.options)
        is_mae = config.name.startswith("vit_") and cfg.get("tag") == "mae"
        licence = cfg.get("license") or "unknown"
        return _Source(architecture, cfg, config.options, licence, is_mae=is_mae)
    path = Path(config.path)
    return _from_directory(path, config.options) if path.is_dir() else _from_file(path, config)


def _check_licence(source: _Source) -> None:
    if source.is_mae or is_noncommercial(source.licence):
        form = ", those of a published masked autoencoder," if source.is_mae else ""
        raise EncoderError(
            f"the weights{form} are under licence {source.licence}, which is not allowed here",
            hint=f"{CONSENT} Or use other weights.",
            code="noncommercial_weights",
        )


def _from_file(path: Path, config: FileEncoder) -> _Source:
    if config.name is None:
        raise EncoderError(
            f"{path} holds weights but not their architecture",
            hint="set name to a timm architecture, or give a directory exported by ctune",
            code="unknown_encoder",
        )
    architecture, cfg = _registered(config.name)
    if path.suffix in TORCH_SUFFIXES:
        return _from_mae(architecture, cfg, config.options, read_torch_file(path))
    weights = strip_prefix(read_weights(path))
    if mae_checkpoint.is_pretraining_state_dict(weights):
        return _from_mae(architecture, cfg, config.options, {"model": weights})
    options = config.options
    if model_entrypoint(architecture).__module__ == "timm.models.beit":
        options = {**_position_flags(weights), **options}
    pool = "avg" if "fc_norm.weight" in weights else None
    if pool is None and {"norm.weight", "cls_token"} <= weights.keys():
        pool = "token"
    return _Source(architecture, cfg, options, "unknown", weights, pool)


def _from_mae(
    architecture: str, cfg: JsonObject, options: JsonObject, checkpoint: Mapping[str, Any]
) -> _Source:
    weights = mae_checkpoint.convert_encoder_state_dict(checkpoint)
    licence = mae_checkpoint.checkpoint_licence(checkpoint)
    cfg |= {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    return _Source(architecture, cfg, options, licence, weights, "token", is_mae=True)


def _from_directory(path: Path, options: JsonObject) -> _Source:
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        licence = json.loads((path / "model.json").read_text(encoding="utf-8"))["licence"]
        architecture, cfg = config["architecture"], config["pretrained_cfg"]
        stored = dict(config.get("model_args", {}))
        for name in ("input_size", "mean", "std"):
            cfg[name] = tuple(cfg[name])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise EncoderError(
            f"{path} is not a directory exported by ctune: {error}",
            hint="it must hold config.json, model.json and model.safetensors",
            code="weights_unreadable",
        ) from error
    _known(architecture)
    stored.pop("img_size", None)
    pool = stored.pop("global_pool", None)
    _refuse_options(stored)
    weights = read_weights(path / "model.safetensors")
    cfg["architecture"] = architecture
    return _Source(architecture, cfg, {**stored, **options}, licence, weights, pool)


def _registered(name: str) -> tuple[str, JsonObject]:
    """Return architecture and pretrained_cfg of a timm name with or without a weight tag."""
    architecture, _, tag = name.partition(".")
    _known(architecture)
    try:
        cfg = get_pretrained_cfg(name)
    except RuntimeError as error:
        raise EncoderError(
            f"timm knows no weights {tag!r} of {architecture!r}",
            hint=f"timm.list_pretrained('{architecture}*') lists those it knows",
            code="unknown_weights",
        ) from error
    return architecture, asdict(cfg or PretrainedCfg(architecture=architecture))


def _known(architecture: str) -> None:
    if not is_model(architecture):
        raise EncoderError(
            f"timm has no architecture {architecture!r}",
            hint=f"timm {timm.__version__} is installed; timm.list_models() lists what it has",
            code="unknown_encoder",
        )


def _refuse_options(options: JsonObject) -> None:
    """Keep out what has a place of its own and what would make timm load other files."""
    faults = option_faults(options)
    if faults:
        raise EncoderError(
            " ".join(fault.detail for fault in faults),
            hint="options are the architecture's own keyword arguments",
            code="unknown_option",
        )


def _position_flags(weights: Mapping[str, Tensor]) -> JsonObject:
    """Return the kinds of position information that the weights of a BEiT hold."""
    return {
        "use_abs_pos_emb": "pos_embed" in weights,
        "use_rel_pos_bias": "blocks.0.attn.relative_position_bias_table" in weights,
        "use_shared_rel_pos_bias": any(key.startswith("rel_pos_bias.") for key in weights),
    }


def _probe(source: _Source) -> nn.Module:
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


def _settle_pool(source: _Source, pool: Pool) -> tuple[_Source, bool]:
    """Return the source with its pooling, and whether that is another than it had."""
    plain = _probe(_Source(*_registered(source.architecture), options={}))
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


def _drop_path_kwargs(source: _Source, drop_path: float) -> JsonObject:
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
