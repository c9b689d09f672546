import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data.transforms_factory import create_transform

from ctune.preprocess import Preprocessing

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def noise(width_px: int, height_px: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(width_px).integers(0, 256, (height_px, width_px, 3))
    return Image.fromarray(pixels.astype(np.uint8)).convert(mode)


@pytest.mark.parametrize("size_px", [32, 37, 224])
@pytest.mark.parametrize("shape", [(32, 32), (1, 1), (5, 3), (33, 91), (640, 481), (2000, 17)])
def test_equals_timm(size_px: int, shape: tuple[int, int]) -> None:
    transform = create_transform(
        input_size=(3, size_px, size_px),
        interpolation="bilinear",
        crop_pct=1.0,
        crop_mode="squash",
        mean=MEAN,
        std=STD,
    )
    image = noise(*shape)
    preprocessing = Preprocessing(size_px, MEAN, STD)
    pixels = preprocessing.to_uint8(image)
    assert pixels.dtype == torch.uint8 and pixels.is_contiguous()
    found = preprocessing.normalise(pixels[None])[0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, transform(image), rtol=0, atol=1e-6)


def test_batch_equals_single_images_and_stays_as_it_was() -> None:
    preprocessing = Preprocessing(16, MEAN, STD)
    batch = torch.stack([preprocessing.to_uint8(noise(20 + n, 30)) for n in range(5)])
    before = batch.clone()
    together = preprocessing.normalise(batch)
    assert torch.equal(batch, before)
    for one, found in zip(batch, together, strict=True):
        assert torch.equal(preprocessing.normalise(one[None])[0], found)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK"])
def test_other_modes_are_refused(mode: str) -> None:
    with pytest.raises(ValueError, match=f"mode '{mode}'.*decode_rgb"):
        Preprocessing(16, MEAN, STD).to_uint8(noise(4, 4, mode))


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(2, 3, 16, 16),
        torch.zeros(3, 16, 16, dtype=torch.uint8),
        torch.zeros(2, 3, 16, 17, dtype=torch.uint8),
        torch.zeros(2, 1, 16, 16, dtype=torch.uint8),
    ],
)
def test_other_batches_are_refused(batch: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"must be uint8 \[B, 3, 16, 16\]"):
        Preprocessing(16, MEAN, STD).normalise(batch)


def test_timm_reads_the_same_from_a_model() -> None:
    """The transform that timm derives from a pretrained_cfg as export writes it."""
    model = timm.create_model(
        "vit_tiny_patch16_224",
        depth=1,
        embed_dim=12,
        img_size=32,
        patch_size=8,
        pretrained_cfg_overlay={
            "input_size": (3, 32, 32),
            "interpolation": "bilinear",
            "crop_pct": 1.0,
            "crop_mode": "squash",
            "mean": MEAN,
            "std": STD,
        },
    )
    config = timm.data.config.resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    image = noise(50, 41)
    preprocessing = Preprocessing(32, MEAN, STD)
    found = preprocessing.normalise(preprocessing.to_uint8(image)[None])[0]
    torch.testing.assert_close(found, create_transform(**config)(image), rtol=0, atol=1e-6)
