"""Write `encoders.json` from the installed timm: `make encoders` after a timm upgrade."""

import json
import re
from pathlib import Path

import timm
import torch
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg
from torch import nn

from ctune.encoders import is_noncommercial
from ctune.schema import JsonObject

PATCH_IN_NAME = re.compile(r"(?:^|_)patch(\d+)(?:_|$)")


def describe_encoders() -> dict[str, JsonObject]:
    """Return architecture name -> image size, patch size (from the name), weight tags, size."""
    described: dict[str, JsonObject] = {}
    for name in timm.list_models():
        weights = get_arch_pretrained_cfgs(name)
        first = next(iter(weights.values()), None)
        patch = PATCH_IN_NAME.search(name)
        described[name] = {
            "image_size_px": first.input_size[-1] if first else 224,
            "patch_size_px": int(patch.group(1)) if patch else None,
            "tags": sorted(cfg.tag for cfg in weights.values() if cfg.has_weights and cfg.tag),
        }
        if patch:
            described[name] |= _size(name)
        default = get_pretrained_cfg(name)
        licences = {cfg.tag or "": cfg.license for cfg in weights.values() if cfg.has_weights}
        licences[""] = default.license if default else None
        refused = {tag: licence for tag, licence in licences.items() if is_noncommercial(licence)}
        if refused:
            described[name]["noncommercial"] = dict(sorted(refused.items()))
    return described


def _size(name: str) -> JsonObject:
    """Return width and depth of a transformer of equal blocks, nothing for other families."""
    with torch.device("meta"):
        module = timm.create_model(name)
    blocks, width = getattr(module, "blocks", None), getattr(module, "embed_dim", None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList) or not isinstance(width, int):
        return {}
    return {"embed_dim": width, "depth": len(blocks)}


def main() -> None:
    """Write the catalogue beside this file, one architecture per line so that changes read well."""
    lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(describe_encoders().items())]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    Path(__file__).with_name("encoders.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
