"""The views that the methods' specifications name, one function per recipe.

Each returns what `ViewPipeline(*views)` takes: one config for all views, or one per view. All but
`finetune` are those of the method's published code (transformer_head.md 2.1, mae_ct.md 2.2, mae.md
2.2, udi.md 2.2); `finetune` is MAE's (lacvit.md 2.3, column `ce_mae`), whose mixing of images is
`ctune.mixing`. The multi-crop recipes return a `MultiCropConfig`.
"""

from collections.abc import Callable
from dataclasses import replace

from ctune.multi_crop import MultiCropConfig
from ctune.randaugment import RandAugment
from ctune.view_sampling import ViewConfig

Triple = tuple[float, float, float]
Views = tuple[ViewConfig, ...]

_UDI_LOCAL_CROPS = 10
_DINO_LOCAL_CROPS = 8


def simclr_cifar(size_px: int, *, mean: Triple, std: Triple) -> Views:
    """SimCLR on small images: crop, flip, colour changes of strength 0.5, grey; no blur."""
    return (
        ViewConfig(
            size_px=size_px,
            scale=(0.08, 1.0),
            jitter=(0.4, 0.4, 0.4, 0.1),
            jitter_prob=0.8,
            grayscale_prob=0.2,
            mean=mean,
            std=std,
        ),
    )


def simclr(size_px: int, *, mean: Triple, std: Triple) -> Views:
    """SimCLR on ImageNet (arXiv 2002.05709): colour changes of strength 1 and blur."""
    (small,) = simclr_cifar(size_px, mean=mean, std=std)
    return (replace(small, jitter=(0.8, 0.8, 0.8, 0.2), blur_prob=0.5),)


def byol(size_px: int, *, mean: Triple, std: Triple) -> Views:
    """MAE-CT-aug's pair: view 0 always blurred, view 1 rarely, but sometimes solarised.

    Blur comes before grey, as in that method's code; BYOL's paper (arXiv 2006.07733) swaps them.
    """
    (minimal,) = mae_minimal(size_px, mean=mean, std=std)
    first = replace(
        minimal,
        jitter=(0.4, 0.4, 0.2, 0.1),
        jitter_prob=0.8,
        grayscale_prob=0.2,
        blur_prob=1.0,
        blur_before_grayscale=True,
    )
    return first, replace(first, blur_prob=0.1, solarise_prob=0.2)


def mae_minimal(size_px: int, *, mean: Triple, std: Triple) -> Views:
    """Bicubic crop and flip alone: MAE-CT's views; MAE itself uses `scale` (0.2, 1)."""
    return (
        ViewConfig(size_px=size_px, scale=(0.08, 1.0), interpolation="bicubic", mean=mean, std=std),
    )


def finetune(size_px: int, *, mean: Triple, std: Triple) -> Views:
    """MAE's fine-tuning: bicubic crop, flip, RandAugment m9 mstd0.5 inc1, random erasing 0.25."""
    (minimal,) = mae_minimal(size_px, mean=mean, std=std)
    return (replace(minimal, rand_augment=RandAugment(), erase_prob=0.25),)


def dino(
    size_px: int,
    *,
    mean: Triple,
    std: Triple,
    local_size_px: int,
    num_local: int = _DINO_LOCAL_CROPS,
) -> MultiCropConfig:
    """DINO (arXiv 2104.14294): two large crops, blurred and solarised differently, and small ones.

    Args:
        size_px: side of the two global crops.
        mean: of the encoder.
        std: of the encoder.
        local_size_px: side of the local crops.
        num_local: how many of them.
    """
    (minimal,) = mae_minimal(size_px, mean=mean, std=std)
    crop = replace(
        minimal,
        scale=(0.4, 1.0),
        jitter=(0.4, 0.4, 0.2, 0.1),
        jitter_prob=0.8,
        grayscale_prob=0.2,
    )
    return MultiCropConfig(
        global_views=(
            replace(crop, blur_prob=1.0),
            replace(crop, blur_prob=0.1, solarise_prob=0.2),
        ),
        local_view=replace(crop, size_px=local_size_px, scale=(0.05, 0.4), blur_prob=0.5),
        num_local=num_local,
    )


def udi(
    size_px: int,
    *,
    mean: Triple,
    std: Triple,
    local_size_px: int,
    num_local: int = _UDI_LOCAL_CROPS,
) -> MultiCropConfig:
    """UDI's crops before they are moved toward each other: all of one kind but for their sizes.

    Args:
        size_px: side of the two global crops.
        mean: of the encoder.
        std: of the encoder.
        local_size_px: side of the local crops.
        num_local: how many of them.
    """
    like_dino = dino(size_px, mean=mean, std=std, local_size_px=local_size_px, num_local=num_local)
    crop = replace(
        like_dino.global_views[0],
        scale=(0.25, 1.0),
        blur_solarise_mix=((0.25, 0.5, 0.0), (0.25, 1.0, 0.0), (0.5, 0.1, 0.2)),
    )
    return MultiCropConfig(
        global_views=(crop, crop),
        local_view=replace(crop, size_px=local_size_px, scale=(0.05, 0.25)),
        num_local=num_local,
    )


VIEW_PRESETS: dict[str, Callable[..., Views]] = {
    "simclr_cifar": simclr_cifar,
    "simclr": simclr,
    "byol": byol,
    "mae_minimal": mae_minimal,
    "finetune": finetune,
}
MULTI_CROP_PRESETS: dict[str, Callable[..., MultiCropConfig]] = {"dino": dino, "udi": udi}
