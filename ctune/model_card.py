"""The model card, `README.md` of a model directory. Never imports torch."""

import json

from ctune.model_dir import CLASSIFIER, HEADS, ModelInfo, head_file
from ctune.schema import JsonObject
from ctune.scores import score_rows

LOAD_SNIPPET = """\
import timm, torch
from PIL import Image

model = timm.create_model("local-dir:.", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
image = Image.open("reference/000.png").convert("RGB")
with torch.inference_mode():
    vector = model(transform(image)[None])
"""


def model_card(info: ModelInfo) -> str:
    """Return the card: what, how to load it, scores, data, method, licence."""
    method = (info.method or {}).get("name", "unknown")
    parts = [
        _front_matter(info),
        f"# {info.architecture} tuned with {method}",
        f"An image encoder: an image becomes a vector of {info.embed_dim} numbers. Images are"
        f" resized to exactly {info.image_size_px} x {info.image_size_px} pixels (bilinear, the"
        f" aspect ratio is not kept), scaled to [0, 1] and normalised with mean"
        f" {_numbers(info.mean)} and standard deviation {_numbers(info.std)}.",
        _heads(info),
        "## Load it\n\nIn this directory:\n\n```python\n" + LOAD_SNIPPET + "```\n\n"
        "`reference/vectors.safetensors` holds the vectors that the images beside it must give.",
        _scores(info.evaluation),
        _origin(info),
        _licence(info.licence),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(info: ModelInfo) -> str:
    lines = ["library_name: timm", "tags: [image-feature-extraction, ctune]"]
    if info.licence and info.licence != "unknown":
        lines.insert(0, f"license: {json.dumps(info.licence)}")
    return "\n".join(["---", *lines, "---"])


def _numbers(values: tuple[float, ...]) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"


def _heads(info: ModelInfo) -> str:
    said = []
    for name, what in HEADS.items():
        if head_file(name) not in info.files:
            continue
        use = "kept to train further"
        if name == CLASSIFIER and info.classes:
            use = f"for {len(info.classes)} classes, which `model.json` names in order"
        said.append(f"`{head_file(name)}` is {what}, {use}.")
    return "\n".join(said)


def _scores(evaluation: JsonObject) -> str:
    before = dict(score_rows(evaluation.get("before") or {}))
    after = dict(score_rows(evaluation.get("after") or {}))
    if not before and not after:
        return ""
    rows = [
        f"| {'.'.join(name)} | {_score(before.get(name))} | {_score(after.get(name))} |"
        for name in dict.fromkeys([*after, *before])
    ]
    table = ["| score | before | after |", "|---|---|---|", *rows]
    return "## Scores on held-out images\n\n" + "\n".join(table)


def _score(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _origin(info: ModelInfo) -> str:
    provenance = info.provenance
    config = provenance.get("config") or {}
    facts = {
        "encoder it started from": json.dumps(config["encoder"]) if "encoder" in config else None,
        "weights it started from (sha256)": (provenance.get("parent") or {}).get("weights_sha256"),
        "data (sha256 of the archive)": provenance.get("data_sha256"),
        "job": provenance.get("job_id"),
        "seed": info.seed,
        "made with": _versions(provenance.get("versions") or {}),
    }
    lines = [f"- {name}: {value}" for name, value in facts.items() if value not in (None, "")]
    text = "## How it was made\n\n" + "\n".join(lines)
    if info.method is not None:
        text += "\n\nMethod:\n\n```json\n" + json.dumps(info.method, indent=2) + "\n```"
    return text


def _versions(versions: JsonObject) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _licence(licence: str | None) -> str:
    if licence is None:
        said = "Trained from random weights: no licence of earlier weights applies."
    elif licence == "unknown":
        said = "The weights it started from came without a stated licence."
    else:
        said = f"The weights it started from are under {licence}; its terms apply to these too."
    return f"## Licence\n\n{said}"
