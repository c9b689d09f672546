"""`plain_timm.py MODEL_DIR OUT.npy IMAGE …`: vectors by timm alone, as its users make them."""

import sys

import numpy as np
import timm
import torch
from PIL import Image
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform

if __name__ == "__main__":
    folder, out, *paths = sys.argv[1:]
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    transform = create_transform(**config, is_training=False)
    with torch.no_grad():
        batch = torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])
        np.save(out, model(batch).numpy())
