"""From an image to an encoder's input, the same in training, evaluation, export and serving.

Letters: B images, s side in pixels.
"""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Preprocessing:
    """Resize to exactly (s, s), scale to [0, 1], normalise per channel.

    Equals timm's evaluation transform with ``crop_mode="squash"``, ``crop_pct=1.0`` and
    ``interpolation="bilinear"``.
    """

    image_size_px: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def to_uint8(self, image: Image.Image) -> Tensor:
        """Return an RGB image as uint8 [3, s, s]; the aspect ratio is not kept.

        Raises:
            ValueError: the image is not RGB.
        """
        if image.mode != "RGB":
            raise ValueError(
                f"the image has mode {image.mode!r}; convert it with ctune.images.decode_rgb"
            )
        size = (self.image_size_px, self.image_size_px)
        resized = image.resize(size, Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()

    def normalise(self, batch: Tensor) -> Tensor:
        """Return uint8 [B, 3, s, s] as float32 of the same shape, on the same device.

        Raises:
            ValueError: the batch is not uint8 [B, 3, s, s].
        """
        s = self.image_size_px
        if batch.dtype != torch.uint8 or batch.ndim != 4 or batch.shape[1:] != (3, s, s):
            raise ValueError(
                f"the batch is {batch.dtype} {list(batch.shape)}; it must be uint8 [B, 3, {s}, {s}]"
            )
        mean = torch.tensor(self.mean, device=batch.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=batch.device).view(3, 1, 1)
        return batch.to(torch.float32).div_(255).sub_(mean).div_(std)

    def to_pixels(self, images: Tensor) -> Tensor:
        """Return the uint8 images [B, 3, H, W] that `images`, normalised, are nearest to."""
        mean = torch.tensor(self.mean, device=images.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(3, 1, 1)
        return (images * std + mean).mul(255).round().clamp(0, 255).to(torch.uint8)
