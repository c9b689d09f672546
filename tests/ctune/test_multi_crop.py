"""Multi-crop: order and shapes of the crops, and where each pixel of a crop comes from."""

from dataclasses import replace

import pytest
import torch

from ctune.augment import Shard, ViewConfig
from ctune.multi_crop import MultiCrop, MultiCropConfig, crop_box, view_box
from ctune.view_presets import dino
from tests.ctune.pictures import MEAN, STD, assert_near, generator, random_images

CROPS = MultiCrop(dino(32, mean=MEAN, std=STD, local_size_px=16, num_local=3))
SIZES = torch.full((4, 2), 48)


def test_crops_are_crop_major_and_have_boxes() -> None:
    images = random_images(4, 48, 48)
    params = CROPS.draw(SIZES, generator())
    global_crops, local_crops = CROPS.render(images, params)
    assert global_crops.shape == (2 * 4, 3, 32, 32)
    assert local_crops.shape == (3 * 4, 3, 16, 16)
    assert params.boxes().shape == (5, 4, 4)
    second = CROPS.local_pipeline.render(images, params.local_crops[1])
    assert torch.equal(local_crops[4:8], second)
    assert torch.equal(params.boxes()[3], view_box(params.local_crops[1]))


def test_shards_and_selected_rows_are_those_of_the_whole_batch() -> None:
    whole = CROPS.draw(SIZES, generator(1))
    part = CROPS.draw(SIZES[1:3], generator(1), shard=Shard(1, 4))
    assert torch.equal(part.boxes(), whole.boxes()[:, 1:3])
    images = random_images(4, 48, 48)
    for mine, expected in zip(
        CROPS.render(images[1:3], whole.select(slice(1, 3))),
        CROPS.render(images, whole),
        strict=True,
    ):
        rows = torch.arange(len(expected)).view(-1, 4)[:, 1:3].flatten()
        assert_near(mine, expected[rows], 1e-5)


def test_without_local_crops_none_are_rendered() -> None:
    crops = MultiCrop(replace(CROPS.config, num_local=0))
    params = crops.draw(SIZES, generator())
    global_crops, local_crops = crops.render(random_images(4, 48, 48), params)
    assert global_crops.shape == (8, 3, 32, 32)
    assert local_crops.shape == (0, 3, 16, 16)
    assert params.boxes().shape == (2, 4, 4)


def test_a_box_says_where_the_pixels_of_a_view_come_from() -> None:
    """Views of an image whose colours are its coordinates, in shares of the side."""
    side, size = 240, 24
    down = torch.arange(side).float()[:, None].expand(side, side) / (side - 1)
    image = torch.stack((down, down.T, torch.zeros_like(down)))[None].repeat(20, 1, 1, 1)
    config = ViewConfig(size_px=size, scale=(0.3, 0.6), vflip_prob=0.5)
    crops = MultiCrop(MultiCropConfig(global_views=(config,), local_view=config, num_local=0))
    params = crops.draw(torch.full((20, 2), side), generator()).global_crops[0]
    views = crops.global_pipeline.render(image, params)
    top, left, bottom, right = view_box(params)[:, :, None].float().unbind(1)
    place = (torch.arange(size) + 0.5) / size
    assert_near(views[:, 0, :, 0], top + (bottom - top) * place, 0.006)
    assert_near(views[:, 1, 0, :], left + (right - left) * place, 0.006)


@pytest.mark.parametrize("side", [1, 2])
def test_boxes_of_tiny_images_are_finite(side: int) -> None:
    whole, no = torch.tensor([[0, 0, side, side]]), torch.tensor([False])
    box = crop_box(whole, torch.tensor([[side, side]]), flip=no, vflip=no)
    assert box.tolist() == [[0.0, 0.0, side - 1.0, side - 1.0]]
