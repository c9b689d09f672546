"""A data set that is learned in seconds, and a run that takes one, for tests of whole paths."""

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SIDE_PX = 16
CLASSES = ("blue", "green", "red")


def noisy_square(channel: int, rng: np.random.Generator) -> bytes:
    """Return a PNG: noise with a bright square in one colour channel at a random place."""
    pixels = rng.integers(0, 96, (SIDE_PX, SIDE_PX, 3), dtype=np.uint8)
    top, left = rng.integers(0, SIDE_PX - 8, 2)
    pixels[top : top + 8, left : left + 8, channel] = 255
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_archive(
    path: Path,
    *,
    train_per_class: int = 16,
    test_per_class: int = 6,
    others: Mapping[str, bytes] | None = None,
) -> Path:
    """Write a zip of `train/<class>/` and `test/<class>/` folders, `others` beside them."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for split, count in (("train", train_per_class), ("test", test_per_class)):
            for channel, name in enumerate(reversed(CLASSES)):
                for n in range(count):
                    data = noisy_square(channel, rng)
                    archive.writestr(f"{split}/{name}/{n:03}.png", data)
        for name, data in (others or {}).items():
            archive.writestr(name, data)
    return path


def tiny_config(method: str = "lacvit", **changes: Any) -> dict[str, Any]:
    """Return the body of a run that takes a second: a two-block ViT on 16 px images."""
    methods: dict[str, Any] = {
        "lacvit": {
            "contrastive": {"epochs": 3, "batch_size": 12, "samples_per_class": 4},
            "probe": {"epochs": 3, "batch_size": 16},
        },
        "linear_probe": {"probe": {"epochs": 3, "batch_size": 16}},
        "simclr": {"epochs": 3, "batch_size": 12, "output_dim": 16},
        "mae": {
            "mae": {
                "epochs": 3,
                "batch_size": 12,
                "decoder_embed_dim": 16,
                "decoder_depth": 1,
                "decoder_num_heads": 2,
            }
        },
        "mae_ct": {
            "mae": {
                "epochs": 2,
                "batch_size": 12,
                "decoder_embed_dim": 16,
                "decoder_depth": 1,
                "decoder_num_heads": 2,
            },
            "batch_size": 12,
            "head": {"proj_hidden_dim": 24, "pred_hidden_dim": 32, "out_dim": 16},
            "head_init": {"epochs": 2},
            "contrastive_tuning": {"epochs": 2, "top_k": 3},
        },
        "finetune": {"tune": {"epochs": 3, "batch_size": 12}},
    }
    return {
        "encoder": {
            "source": "timm",
            "name": "vit_tiny_patch16_224",
            "pretrained": False,
            "image_size_px": SIDE_PX,
            "options": {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2},
        },
        "method": {"name": method, "preset": "small", **methods[method]},
        "evaluation": {"knn_k": 5},
        "seed": 1,
        "resources": {"gpus": 0, "checkpoint_interval_s": 0},
        **changes,
    }
