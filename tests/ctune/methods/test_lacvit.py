"""LaCViT: what is special to it; that it trains, resumes and exports is in the contract."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ctune.augment import ViewConfig, ViewPipeline
from ctune.config import RunConfig, check, resolve
from ctune.errors import ConfigError
from ctune.losses.contrastive import supervised_contrastive_loss
from ctune.manifest import DatasetSummary
from ctune.methods.base import Batch, RunContext
from ctune.methods.lacvit.advice import CollapseWatch, advise
from ctune.methods.lacvit.config import ContrastiveConfig, LaCViTConfig
from ctune.methods.lacvit.method import LaCViT, choose_sampler, loss_floor
from ctune.samplers import ClassBalancedBatchSampler, RandomBatchSampler
from tests.ctune.methods.test_contract import Bench
from tests.squares import tiny_config


def contrastive(**values: Any) -> ContrastiveConfig:
    config = LaCViTConfig.model_validate({"contrastive": values})
    return config.contrastive


def summary(per_class: int, classes: int) -> DatasetSummary:
    names = [f"class {n}" for n in range(classes)]
    return DatasetSummary(
        num_images=per_class * classes,
        splits={"train": per_class * classes},
        classes=names,
        class_counts={"train": dict.fromkeys(names, per_class)},
        width_px=(16, 16),
        height_px=(16, 16),
        split_origin="given",
    )


def test_presets_supply_defaults_and_explicit_values_win() -> None:
    paper = LaCViTConfig.model_validate({"preset": "paper"})
    assert (paper.contrastive.epochs, paper.contrastive.lr) == (500, 1e-3)
    assert (paper.contrastive.accumulate_steps, paper.probe.augment) == (32, "rrc_flip")
    small = LaCViTConfig.model_validate({"contrastive": {"epochs": 7}})
    assert (small.contrastive.epochs, small.contrastive.optimizer) == (7, "adamw")
    assert small.pool == "mean"


@pytest.mark.parametrize(("pretrained", "layer_decay"), [(True, 0.75), (False, 1.0)])
def test_layer_decay_follows_the_start(pretrained: bool, layer_decay: float) -> None:
    config = tiny_config()
    config["encoder"]["pretrained"] = pretrained
    method = resolve(RunConfig.model_validate(config)).method
    assert isinstance(method, LaCViTConfig)
    assert method.contrastive.layer_decay == layer_decay


@pytest.mark.parametrize(("epochs", "warmup"), [(1, 0), (5, 1), (30, 2)])
def test_the_warmup_fits_into_short_runs(epochs: int, warmup: int) -> None:
    config = tiny_config()
    config["method"]["contrastive"]["epochs"] = epochs
    method = resolve(RunConfig.model_validate(config)).method
    assert isinstance(method, LaCViTConfig)
    assert method.contrastive.warmup_epochs == warmup


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.1}, "greater than 0"),
        ({"temperature": float("nan")}, "finite"),
        ({"batch_size": 1}, "greater than or equal to 2"),
        ({"warmup_epochs": 3, "epochs": 3}, "must be smaller than epochs"),
        ({"num_views": 1}, "without positives"),
        ({"batch_sampler": "class_balanced", "samples_per_class": 7}, "must divide batch_size"),
        ({"tau": 0.1}, "Extra inputs"),
    ],
)
def test_values_that_cannot_be_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        contrastive(**values)


def test_data_faults_are_told_with_their_place() -> None:
    config = RunConfig.model_validate(tiny_config())
    one_class = check(config, summary(20, 1))
    assert [(f.pointer, f.code) for f in one_class] == [("/method/name", "labels_needed")]
    few = check(config, summary(2, 3))
    assert [(f.pointer, f.code) for f in few] == [
        ("/method/contrastive/batch_size", "batch_larger_than_data")
    ]
    balanced = tiny_config()
    balanced["method"]["contrastive"] |= {"batch_sampler": "class_balanced", "batch_size": 40}
    faults = check(RunConfig.model_validate(balanced), summary(20, 3))
    assert [f.code for f in faults] == ["too_few_classes"]
    assert "needs 10 classes; the training split has 3" in faults[0].detail


def context(labels: np.ndarray) -> RunContext:
    return RunContext(
        encoder=None,  # type: ignore[arg-type]
        train_images=None,  # type: ignore[arg-type]
        encode_train=None,  # type: ignore[arg-type]
        train_labels=labels,
        classes=[],
        seed=0,
        device=torch.device("cpu"),
        from_scratch=True,
    )


def test_auto_batches_are_balanced_only_where_random_ones_lack_positives() -> None:
    config = contrastive(batch_size=64, batch_sampler="auto", samples_per_class=4)
    common = choose_sampler(config, context(np.repeat(np.arange(4), 100)))
    assert isinstance(common, RandomBatchSampler)
    rare = choose_sampler(config, context(np.repeat(np.arange(200), 5)))
    assert isinstance(rare, ClassBalancedBatchSampler)
    with pytest.raises(ConfigError, match="exceeds the 30 training images"):
        choose_sampler(config, context(np.repeat(np.arange(3), 10)))


def test_the_floor_is_known_for_balanced_batches_only() -> None:
    config = contrastive(batch_size=8, batch_sampler="class_balanced", samples_per_class=2)
    balanced = choose_sampler(config, context(np.repeat(np.arange(5), 4)))
    floor = loss_floor(config, balanced)
    assert floor is not None
    assert 0 < floor < 0.1 / 0.07 * np.log(15)
    random = RandomBatchSampler(20, 8, seed=0, drop_last=True)
    assert loss_floor(config, random) is None


class MeanColour(nn.Module):
    """An encoder whose vector is the mean colour: it tells which image a view was made of."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean(dim=(2, 3))


def test_views_of_one_image_stay_together() -> None:
    """Colours survive crop and flip, so the loss must be that of the colours themselves."""
    config = contrastive(batch_size=4, num_views=3)
    colours = torch.randint(0, 255, (4, 3), generator=torch.Generator().manual_seed(0))
    pixels = colours.to(torch.uint8)[:, :, None, None].expand(4, 3, 8, 8).contiguous()
    labels = torch.tensor([0, 1, 0, 2])
    method = LaCViT(
        MeanColour(),  # type: ignore[arg-type]
        nn.Identity(),
        config=config,
        views=ViewPipeline(ViewConfig(size_px=8)),
        watch=CollapseWatch(config, total_steps=10, steps_per_epoch=5),
        loss_floor=None,
    )
    method.watch.remember = lambda encoder: None  # type: ignore[method-assign]
    batch = Batch(
        inputs=pixels, labels=labels, positions=np.arange(4), sizes_px=torch.full((4, 2), 8)
    )
    loss = method.step(batch, torch.Generator().manual_seed(1)).loss
    features = (colours / 255)[:, None, :].expand(4, 3, 3)
    expected = supervised_contrastive_loss(
        features, labels, temperature=config.temperature, base_temperature=config.base_temperature
    )
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)


def test_the_probe_stage_leaves_the_encoder_alone(store: Path, tmp_path: Path) -> None:
    bench = Bench("lacvit", store, tmp_path)
    before = {name: value.clone() for name, value in bench.encoder.state_dict().items()}
    stage = bench.program.plans[1].start()
    for positions in stage.sampler.batches(0):
        output = stage.method.step(stage.source.fetch(positions), torch.Generator())
        torch.autograd.backward(output.loss)
        stage.optimizer.step()
    assert not bench.encoder.training
    assert all(parameter.grad is None for parameter in bench.encoder.parameters())
    after = bench.encoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def watch(**values: Any) -> CollapseWatch:
    return CollapseWatch(contrastive(**values), total_steps=100, steps_per_epoch=10)


def test_collapsed_vectors_are_told_once_after_fifty_steps() -> None:
    watcher, encoder = watch(), nn.Linear(2, 2)
    z = torch.nn.functional.normalize(torch.ones(4, 2, 8), dim=-1)
    labels = torch.tensor([0, 0, 1, 1])
    codes = []
    for step in range(80):
        watcher.observe(z, labels, torch.tensor(9.0))
        codes += [(step, w.code) for w in watcher.warnings(step, encoder)]
    assert codes == [(49, "collapse")]


def test_a_loss_at_its_uniform_value_is_a_collapse() -> None:
    watcher, encoder = watch(temperature=0.1, base_temperature=0.07), nn.Linear(2, 2)
    z = torch.randn(4, 2, 8, generator=torch.Generator().manual_seed(0))
    uniform = torch.tensor(0.1 / 0.07 * np.log(7))
    watcher.observe(z, torch.tensor([0, 0, 1, 1]), uniform)
    assert watcher.warnings(11, encoder) == []
    assert [w.code for w in watcher.warnings(55, encoder)] == ["collapse"]


def test_few_positives_and_an_encoder_that_stands_still_are_told_after_epoch_one() -> None:
    watcher, encoder = watch(), nn.Linear(2, 2)
    watcher.remember(encoder)
    z = torch.randn(4, 2, 8, generator=torch.Generator().manual_seed(0))
    for _ in range(10):
        watcher.observe(z, torch.tensor([0, 1, 2, 3]), torch.tensor(1.0))
    resumed = watch()
    resumed.load_state_dict(watcher.state_dict())
    assert {w.code for w in resumed.warnings(9, encoder)} == {"few_positives", "no_update"}
    with torch.no_grad():
        encoder.weight.add_(0.1)
    watcher.observe(z, torch.tensor([0, 0, 1, 1]), torch.tensor(1.0))
    assert {w.code for w in watcher.warnings(9, encoder)} == {"few_positives"}
    assert watcher.warnings(19, encoder) == []


def test_advice_compares_before_and_after() -> None:
    before = {
        "isotropy": {"gap": 0.2, "mean_cosine_similarity": 0.1},
        "linear_probe": {"top1": 0.8},
    }
    worse = {
        "isotropy": {"gap": 0.1, "train_gap": 0.9, "mean_cosine_similarity": 0.3},
        "classifier": {"top1": 0.7},
    }
    codes = {warning.code for warning in advise(before, worse)}
    assert codes == {"overfit", "not_separating", "isotropy_drop", "worse_than_probe"}
    better = {
        "isotropy": {"gap": 0.5, "train_gap": 0.6, "mean_cosine_similarity": 0.0},
        "classifier": {"top1": 0.9},
    }
    assert advise(before, better) == []
    assert advise(None, better) == []
