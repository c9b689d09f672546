"""Fine-tuning on few labels: what is trained, what is left as it was, what is scored."""

from pathlib import Path

import numpy as np
import pytest
import torch
from timm.layers.drop import DropPath

from ctune.backbones import Encoder, build_encoder
from ctune.child import StopRequest, StopRequested
from ctune.config import RunConfig
from ctune.features import RunImages
from ctune.low_shot_tuning import fine_tune, recipe
from ctune.store import PackedStore
from tests.squares import tiny_config

CPU = torch.device("cpu")


@pytest.fixture
def images(store: Path, tmp_path: Path) -> RunImages:
    return RunImages(
        PackedStore(store), tmp_path, labelled_only=False, emit=lambda event: None,
        stop=StopRequest(),
    )  # fmt: skip


def make_encoder(depth: int) -> Encoder:
    wanted = tiny_config()
    wanted["encoder"]["options"]["depth"] = depth
    torch.manual_seed(0)
    return build_encoder(
        RunConfig.model_validate(wanted).encoder, pool="auto", encoder_dir=None, drop_path=0.5
    )


def test_a_copy_is_trained_above_its_first_quarter(images: RunImages) -> None:
    encoder = make_encoder(4)
    start = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    random = torch.get_rng_state()
    tuned = fine_tune(
        encoder, images, np.arange(0, 48, 3), num_classes=3, epochs=2, seed=0, device=CPU
    )
    assert torch.equal(torch.get_rng_state(), random), "what follows is as without it"
    assert all(torch.equal(encoder.state_dict()[name], old) for name, old in start.items())
    assert all(parameter.requires_grad for parameter in encoder.parameters())
    after = tuned.encoder.backbone.state_dict()
    same = {name for name in after if torch.equal(after[name], start[f"backbone.{name}"])}
    frozen = ("patch_embed.", "cls_token", "pos_embed", "blocks.0.")
    assert same == {name for name in after if name.startswith(frozen)}
    assert torch.count_nonzero(tuned.classifier.weight) > 0
    rates = [
        block.drop_path1.drop_prob
        for block in tuned.encoder.backbone.blocks  # type: ignore[union-attr]
        if isinstance(block.drop_path1, DropPath)
    ]
    assert rates == pytest.approx([0, 0.2 / 3, 0.4 / 3, 0.2])


def test_it_trains_on_the_rows_and_labels_that_it_is_given(images: RunImages) -> None:
    """Squares of one colour each: what it learned of three images it says of all of them."""
    rows = np.array([0, 1, 16, 17, 32, 33])
    tuned = fine_tune(make_encoder(2), images, rows, num_classes=3, epochs=150, seed=0, device=CPU)
    features = images.features(tuned.encoder, "test", CPU)
    with torch.no_grad():
        found = tuned.classifier(features.features).argmax(1)
    assert float((found == features.labels).float().mean()) > 0.6


def test_a_stop_ends_it(images: RunImages) -> None:
    images.for_training(16)
    images.stop.request("enough")
    with pytest.raises(StopRequested):
        fine_tune(
            make_encoder(2), images, np.arange(6), num_classes=3, epochs=9, seed=0, device=CPU
        )


@pytest.mark.parametrize(("num_images", "lr"), [(10_000, 1e-3), (64, 2.5e-4)])
def test_a_smaller_batch_has_a_lower_rate(num_images: int, lr: float) -> None:
    found = recipe(num_images, epochs=50)
    assert found.lr == pytest.approx(lr)
    assert found.warmup_epochs == 5
    assert recipe(num_images, epochs=3).warmup_epochs == 0
