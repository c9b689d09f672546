"""The recipes, as their specifications state them."""

import pytest

from ctune.augment import ViewConfig, ViewPipeline
from ctune.randaugment import RandAugment
from ctune.view_presets import MULTI_CROP_PRESETS, VIEW_PRESETS, dino, udi
from tests.ctune.pictures import MEAN, STD


def views(name: str, size_px: int = 32) -> tuple[ViewConfig, ...]:
    return VIEW_PRESETS[name](size_px, mean=MEAN, std=STD)


@pytest.mark.parametrize("name", VIEW_PRESETS)
def test_every_preset_makes_a_pipeline_of_its_size(name: str) -> None:
    pipeline = ViewPipeline(*views(name, 48))
    assert pipeline.config.size_px == 48
    for config in pipeline.configs:
        assert (config.mean, config.std, config.flip_prob) == (MEAN, STD, 0.5)
        assert config.ratio == (3 / 4, 4 / 3)


@pytest.mark.parametrize(
    ("name", "jitter", "blur_prob"),
    [("simclr_cifar", (0.4, 0.4, 0.4, 0.1), 0.0), ("simclr", (0.8, 0.8, 0.8, 0.2), 0.5)],
)
def test_simclr(name: str, jitter: tuple[float, ...], blur_prob: float) -> None:
    (config,) = views(name)
    assert (config.scale, config.interpolation) == ((0.08, 1.0), "bilinear")
    assert (config.jitter, config.jitter_prob, config.grayscale_prob) == (jitter, 0.8, 0.2)
    assert (config.blur_prob, config.blur_sigma_px) == (blur_prob, (0.1, 2.0))
    assert not config.blur_before_grayscale


def test_byol_differs_between_its_views() -> None:
    first, second = views("byol")
    assert (first.blur_prob, first.solarise_prob) == (1.0, 0.0)
    assert (second.blur_prob, second.solarise_prob) == (0.1, 0.2)
    for config in (first, second):
        assert (config.scale, config.interpolation) == ((0.08, 1.0), "bicubic")
        assert (config.jitter, config.jitter_prob) == ((0.4, 0.4, 0.2, 0.1), 0.8)
        assert (config.grayscale_prob, config.blur_before_grayscale) == (0.2, True)
        assert config.solarise_threshold == 128 / 255


def test_minimal_and_finetuning_views() -> None:
    (minimal,), (finetune,) = views("mae_minimal"), views("finetune")
    for config in (minimal, finetune):
        assert (config.scale, config.interpolation) == ((0.08, 1.0), "bicubic")
        assert config.jitter_prob == config.grayscale_prob == config.blur_prob == 0
    assert (minimal.rand_augment, minimal.erase_prob) == (None, 0.0)
    assert finetune.rand_augment == RandAugment(magnitude=9, magnitude_std=0.5, num_layers=2)
    assert finetune.erase_prob == 0.25


def test_multi_crops() -> None:
    assert {"dino": dino, "udi": udi} == MULTI_CROP_PRESETS
    crops = dino(224, mean=MEAN, std=STD, local_size_px=96)
    first, second = crops.global_views
    local = crops.local_view
    assert crops.num_local == 8
    assert (first.size_px, first.scale) == (second.size_px, second.scale) == (224, (0.4, 1.0))
    assert (local.size_px, local.scale) == (96, (0.05, 0.4))
    blur = [(c.blur_prob, c.solarise_prob) for c in (first, second, local)]
    assert blur == [(1.0, 0.0), (0.1, 0.2), (0.5, 0.0)]
    crops = udi(224, mean=MEAN, std=STD, local_size_px=96)
    assert crops.num_local == 10
    assert crops.global_views[0] == crops.global_views[1]
    assert (crops.global_views[0].scale, crops.local_view.scale) == ((0.25, 1.0), (0.05, 0.25))
    for config in (*crops.global_views, crops.local_view):
        mix = config.blur_solarise_mix
        assert sum(share for share, _, _ in mix) == 1
        assert mix == ((0.25, 0.5, 0.0), (0.25, 1.0, 0.0), (0.5, 0.1, 0.2))
