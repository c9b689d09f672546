"""From an encoder's configuration to what is to be built: architecture, options and weights."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

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
from ctune.schema import JsonObject
from ctune.weights import read_licence, read_torch_file, read_weights, strip_prefix

TORCH_SUFFIXES = (".pth", ".pt")


@dataclass(frozen=True)
class EncoderSource:
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


def resolve_source(
    config: TimmEncoder | FileEncoder | ModelEncoder, encoder_dir: Path | None
) -> EncoderSource:
    """Return what to build for `config`, before its image size and its pooling are settled.

    Published weights of timm are not among it yet.

    Args:
        config: which encoder.
        encoder_dir: model directory of a ModelEncoder.

    Raises:
        EncoderError: unknown architecture or option; weights that cannot be read.
    """
    if isinstance(config, ModelEncoder):
        if encoder_dir is None:
            raise EncoderError(f"the files of model {config.id} are not given", code="no_model")
        return _from_directory(encoder_dir, {})
    _refuse_options(config.options)
    if isinstance(config, TimmEncoder):
        architecture, cfg = registered(config.name)
        if not config.pretrained:
            return EncoderSource(architecture, cfg, config.options)
        is_mae = config.name.startswith("vit_") and cfg.get("tag") == "mae"
        licence = cfg.get("license") or "unknown"
        return EncoderSource(architecture, cfg, config.options, licence, is_mae=is_mae)
    path = Path(config.path)
    return _from_directory(path, config.options) if path.is_dir() else _from_file(path, config)


def check_consent(source: EncoderSource) -> None:
    """Refuse weights that need the operator's consent.

    Raises:
        EncoderError: ``noncommercial_weights``.
    """
    if source.is_mae or is_noncommercial(source.licence):
        form = ", those of a published masked autoencoder," if source.is_mae else ""
        raise EncoderError(
            f"the weights{form} are under licence {source.licence}, which is not allowed here",
            hint=f"{CONSENT} Or use other weights.",
            code="noncommercial_weights",
        )


def _from_file(path: Path, config: FileEncoder) -> EncoderSource:
    if config.name is None:
        raise EncoderError(
            f"{path} holds weights but not their architecture",
            hint="set name to a timm architecture, or give a directory exported by ctune",
            code="unknown_encoder",
        )
    architecture, cfg = registered(config.name)
    if path.suffix in TORCH_SUFFIXES:
        return _from_mae(architecture, cfg, config.options, read_torch_file(path))
    weights = strip_prefix(read_weights(path))
    licence = read_licence(path)
    if licence == "unknown" and mae_checkpoint.is_published_state_dict(weights):
        return _from_mae(architecture, cfg, config.options, {"model": weights})
    options = config.options
    if model_entrypoint(architecture).__module__ == "timm.models.beit":
        options = {**_position_flags(weights), **options}
    pool = "avg" if "fc_norm.weight" in weights else None
    if pool is None and {"norm.weight", "cls_token"} <= weights.keys():
        pool = "token"
    return EncoderSource(architecture, cfg, options, licence, weights, pool)


def _from_mae(
    architecture: str, cfg: JsonObject, options: JsonObject, checkpoint: Mapping[str, Any]
) -> EncoderSource:
    weights = mae_checkpoint.convert_encoder_state_dict(checkpoint)
    licence = mae_checkpoint.checkpoint_licence(checkpoint)
    cfg |= {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
    return EncoderSource(architecture, cfg, options, licence, weights, "token", is_mae=True)


def _from_directory(path: Path, options: JsonObject) -> EncoderSource:
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
    return EncoderSource(architecture, cfg, {**stored, **options}, licence, weights, pool)


def registered(name: str) -> tuple[str, JsonObject]:
    """Return architecture and pretrained_cfg of a timm name with or without a weight tag.

    Raises:
        EncoderError: ``unknown_encoder``, ``unknown_weights``.
    """
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
