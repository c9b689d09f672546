"""Adapters of the functions that say where views lie."""

import torch

from ctune.multi_crop import crop_box
from tests.conformance.convert import Adapter, Case


def _crop_box(inputs: Case, parameters: Case) -> Case:
    box = crop_box(
        torch.tensor([[inputs[name] for name in ("top", "left", "height", "width")]]),
        torch.tensor([[inputs["image_height"], inputs["image_width"]]]),
        flip=torch.tensor([parameters["flip_horizontal"]]),
        vflip=torch.tensor([parameters["flip_vertical"]]),
    )
    return {"box": box[0].tolist()}


ADAPTERS: dict[tuple[str, str], Adapter] = {("udi", "crop_box"): _crop_box}
