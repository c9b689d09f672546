"""LaCViT: what is special to it; that it trains, resumes and exports is in the contract."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from ctune.config import RunConfig, check, resolve
from ctune.errors import ConfigError
from ctune.events import Metrics
from ctune.manifest import DatasetSummary
from ctune.methods.base import RunContext
from ctune.methods.lacvit.advice import advise, start_warnings
from ctune.methods.lacvit.config import ContrastiveConfig, LaCViTConfig
from ctune.methods.lacvit.method import LaCViT, choose_sampler, loss_floor
from ctune.samplers import ClassBalancedBatchSampler, RandomBatchSampler
from ctune.seeding import seed_everything
from ctune.train import fit
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
        ({"loss": "triplet"}, "'supcon', 'nt_xent' or 'n_pair'"),
        ({"loss": "nt_xent", "num_views": 1}, "other views of the image; use num_views 2"),
        ({"loss": "nt_xent", "batch_sampler": "class_balanced"}, "pushes them all apart"),
        ({"loss": "n_pair", "samples_per_class": 1}, "samples_per_class must be at least 2"),
        ({"loss": "n_pair", "batch_size": 4}, "another class is the negative"),
        ({"grad_cache": True, "micro_batch_size": 65}, r"micro_batch_size \(65\) exceeds"),
        ({"accumulate_steps": 4}, "grad_cache true, batch_size 256 and micro_batch_size 64"),
        ({"accumulate_steps": 4, "grad_cache": True}, "does not enlarge a contrastive batch"),
    ],
)
def test_values_that_cannot_be_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        contrastive(**values)


def test_all_that_n_pair_cannot_have_is_told_at_once() -> None:
    given = {
        "loss": "n_pair",
        "num_views": 2,
        "projection_kind": "mlp",
        "batch_sampler": "random",
        "grad_cache": True,
        "micro_batch_size": 1000,
    }
    with pytest.raises(ValidationError) as caught:
        contrastive(**given)
    for words in (
        "num_views must be 1",
        "projection_kind must be 'none'",
        "batch_sampler must be 'class_balanced'",
        "micro_batch_size (1000) exceeds batch_size (64)",
    ):
        assert words in str(caught.value)


@pytest.mark.parametrize("preset", ["small", "paper"])
def test_n_pair_brings_its_own_defaults(preset: str) -> None:
    given = {"preset": preset, "contrastive": {"loss": "n_pair", "weight_decay": 0.1}}
    stage = LaCViTConfig.model_validate(given).contrastive
    assert (stage.num_views, stage.projection_kind, stage.optimizer) == (1, "none", "adam")
    assert (stage.batch_sampler, stage.accumulate_steps) == ("class_balanced", 1)
    assert stage.weight_decay == 0.1, "explicit values win"


def test_the_loss_of_simclr_has_one_name() -> None:
    assert contrastive(loss="simclr") == contrastive(loss="nt_xent")


def test_only_the_paper_accumulates() -> None:
    paper = LaCViTConfig.model_validate({"preset": "paper", "contrastive": {"accumulate_steps": 8}})
    assert paper.contrastive.accumulate_steps == 8
    whole = LaCViTConfig.model_validate({"preset": "paper", "contrastive": {"grad_cache": True}})
    stage = whole.contrastive
    assert (stage.batch_size, stage.micro_batch_size, stage.accumulate_steps) == (4096, 128, 1)
    with pytest.raises(ValidationError, match="Only preset 'paper' without grad_cache"):
        LaCViTConfig.model_validate(
            {"preset": "paper", "contrastive": {"grad_cache": True, "accumulate_steps": 2}}
        )


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


def train(bench: Bench) -> dict[str, float]:
    """Train stage 1 and return its last metrics."""
    plan = bench.program.plans[0]
    fit(plan.start(), name=plan.name, seed=1, start_step=0, hooks=bench.hooks(lambda step: None))
    (*_, last) = (event for event in bench.told if isinstance(event, Metrics))
    return {name: value for name, value in last.values.items() if value is not None}


@pytest.mark.parametrize(
    ("loss", "metrics"),
    [
        ("supcon", {"z_std", "positive_share", "loss_above_floor"}),
        ("nt_xent", {"z_std"}),
        ("n_pair", {"z_std", "positive_share", "squared_norm"}),
    ],
)
def test_every_loss_trains_alike_with_and_without_gradient_caching(
    loss: str, metrics: set[str], store: Path, tmp_path: Path
) -> None:
    stage = {"loss": loss, "epochs": 2, "lr": 1e-4}
    if loss == "supcon":
        stage["batch_sampler"] = "class_balanced"
    whole = Bench("lacvit", store, tmp_path / "whole", {"contrastive": stage})
    cached = Bench(
        "lacvit",
        store,
        tmp_path / "cached",
        {"contrastive": stage | {"grad_cache": True, "micro_batch_size": 5}},
    )
    last, also = train(whole), train(cached)
    assert metrics == last.keys() & {"z_std", "positive_share", "loss_above_floor", "squared_norm"}
    assert also["loss"] == pytest.approx(last["loss"], rel=1e-3)
    assert also["grad_norm"] == pytest.approx(last["grad_norm"], rel=1e-3)


def test_nt_xent_looks_at_no_label(store: Path, tmp_path: Path) -> None:
    bench = Bench("lacvit", store, tmp_path, {"contrastive": {"loss": "nt_xent"}})
    stage = bench.program.plans[0].start()
    batch = stage.source.fetch(stage.sampler.batches(0)[0])
    losses = []
    for labels in (batch.labels, torch.full_like(batch.labels, -1)):
        seed_everything(0)
        given = dataclasses.replace(batch, labels=labels)
        losses.append(stage.method.step(given, torch.Generator().manual_seed(0)).loss)
    assert torch.equal(*losses)


def test_n_pair_takes_raw_vectors_of_one_view(store: Path, tmp_path: Path) -> None:
    bench = Bench("lacvit", store, tmp_path, {"contrastive": {"loss": "n_pair"}})
    assert not bench.program.modules["projection_head"].state_dict()
    plan = bench.program.plans[0]
    assert plan.image_passes == plan.total_steps * 12
    stage = plan.start()
    batch = stage.source.fetch(stage.sampler.batches(0)[0])
    output = stage.method.step(batch, torch.Generator().manual_seed(0))
    assert isinstance(stage.method, LaCViT)
    vectors = stage.method.embed(batch, torch.Generator().manual_seed(0))
    assert vectors.shape == (12, 1, 24)
    assert not torch.allclose(vectors.norm(dim=2), torch.ones(12, 1), atol=0.1)
    assert float(output.loss.detach()) > float(output.metrics["squared_norm"]) * 0.02 > 0


def start_codes(labels: np.ndarray, **values: Any) -> set[str]:
    config = LaCViTConfig.model_validate(values)
    start = context(labels)
    start.classes, start.encoder = ["a", "b", "c"], nn.Linear(1, 1)  # type: ignore[assignment]
    return {warning.code for warning in start_warnings(config, start)}


def test_the_start_tells_what_config_and_labels_call_for() -> None:
    labels = np.array([0, 0, 1, 1, 2])
    scratch = "encoder_from_scratch"
    assert start_codes(labels) == {scratch, "class_with_one_sample"}
    assert start_codes(labels[:4], preset="paper") == {scratch, "accumulated_contrast"}
    assert start_codes(labels, contrastive={"loss": "nt_xent"}) == {scratch}


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
