"""Fine-tuning: its recipes; that it trains, resumes and exports is in the contract."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn
from torch.nn import functional as F

import ctune
from ctune.config import RunConfig, resolve
from ctune.embed import load_model
from ctune.methods.finetune.config import FinetuneConfig, TuneConfig
from ctune.methods.finetune.method import Finetune, make_schedule, make_views
from ctune.methods.probe_stage import LinearProbe
from ctune.rundir import RunDir
from ctune.store import PackedStore
from ctune.train import fit
from tests.ctune.methods.test_contract import Bench
from tests.squares import SIDE_PX, tiny_config

RECIPES: dict[str, dict[str, Any]] = {
    "ce_sgd": {"recipe": "ce_sgd"},
    "ce_mae": {"recipe": "ce_mae", "tune": {"accumulate_steps": 2}},
    "linear": {"recipe": "linear", "tune": None, "probe": {"epochs": 2, "batch_size": 16}},
}
EVERY_RECIPE = pytest.mark.parametrize("recipe", RECIPES)


def made(**values: Any) -> FinetuneConfig:
    return FinetuneConfig.model_validate(values)


def settled(encoder: dict[str, Any], **values: Any) -> TuneConfig:
    """Return the stage `tune` of a run on this encoder."""
    config = {"encoder": {"source": "timm", **encoder}, "method": {"name": "finetune", **values}}
    method = resolve(RunConfig.model_validate(config)).method
    assert isinstance(method, FinetuneConfig)
    assert method.tune is not None
    return method.tune


def test_the_recipe_lies_under_the_preset_and_both_under_what_is_given() -> None:
    paper = made(preset="paper", recipe="ce_mae")
    assert paper.tune is not None
    assert (paper.pool, paper.tune.batch_size, paper.tune.mixup_alpha) == ("mean", 1024, 0.8)
    small = made(recipe="ce_mae", tune={"mixup_alpha": 0.1, "lr": 3e-4})
    assert small.tune is not None
    assert (small.tune.batch_size, small.tune.mixup_alpha, small.tune.lr) == (64, 0.1, 3e-4)
    assert (small.tune.optimizer, small.tune.label_smoothing) == ("adamw", 0.1)
    assert made().recipe == "ce_sgd"
    assert made().tune == TuneConfig(batch_size=64, epochs=30, drop_path=0.0)
    assert made(preset="paper").tune == TuneConfig()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"recipe": "linear", "tune": {"epochs": 3}}, "recipe 'linear' takes probe, not tune"),
        ({"recipe": "ce_mae", "probe": {}}, "recipe 'ce_mae' takes tune, not probe"),
        ({"tune": None}, "recipe 'ce_sgd' takes tune, not probe"),
        ({"recipe": "sgd"}, "Input should be 'ce_sgd', 'ce_mae' or 'linear'"),
        ({"recipe": ["ce_sgd"]}, "Input should be 'ce_sgd', 'ce_mae' or 'linear'"),
        ({"tune": {"warmup_epochs": 5, "epochs": 5}}, "warmup_epochs (5) must be smaller"),
        ({"tune": {"min_lr": 0.1}}, "min_lr (0.1) must not exceed lr (0.01)"),
        (
            {"tune": {"warmup_epochs": 5, "epochs": 5, "min_lr": 0.1}},
            "smaller than epochs (5); min_lr (0.1) must",
        ),
        ({"tune": {"rate": 1}}, "Extra inputs"),
    ],
)
def test_config_refuses(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        made(**values)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("encoder", "layer_decay", "epochs"),
    [
        ({"name": "vit_base_patch16_224"}, 0.65, 100),
        ({"name": "vit_large_patch16_224"}, 0.75, 50),
        ({"name": "vit_base_patch16_224", "options": {"depth": 32}}, 0.75, 50),
        ({"name": "vit_large_patch16_224", "pretrained": False}, 1.0, 50),
        ({"source": "model", "id": "mdl_1"}, 0.65, 100),
    ],
)
def test_what_is_automatic_follows_the_encoder(
    encoder: dict[str, Any], layer_decay: float, epochs: int
) -> None:
    tune = settled(encoder, preset="paper", recipe="ce_mae")
    assert (tune.layer_decay, tune.epochs, tune.warmup_epochs) == (layer_decay, epochs, 5)
    assert tune.lr == pytest.approx(2e-3)


def test_the_rate_grows_with_the_effective_batch() -> None:
    tune = {"batch_size": 128, "accumulate_steps": 4, "blr": 1e-3}
    assert settled({"name": "vit_base_patch16_224"}, recipe="ce_mae", tune=tune).lr == 2e-3


def test_schedules_are_those_of_the_recipes() -> None:
    encoder = {"name": "vit_base_patch16_224"}
    sgd = make_schedule(settled(encoder, preset="paper"), 10)
    assert sgd(0) == sgd(9) == 0.01 > sgd(10)
    assert sgd.end == pytest.approx(0.008 * 0.01)
    mae = make_schedule(settled(encoder, preset="paper", recipe="ce_mae"), 10)
    assert (mae(0), mae(25), mae(50)) == pytest.approx((0, 1e-3, 2e-3))
    assert mae(51) < mae(50)
    assert mae(1000) == pytest.approx(1e-6)


@EVERY_RECIPE
def test_a_resumed_stage_ends_as_the_whole_one(recipe: str, store: Path, tmp_path: Path) -> None:
    """Stop after two steps; a new program with the saved tensors goes on, bit for bit."""
    whole = Bench("finetune", store, tmp_path / "whole", RECIPES[recipe])
    kept: dict[str, Any] = {}
    (plan,) = whole.program.plans
    stage = plan.start()

    def save(step: int) -> None:
        if step == 2:
            kept["modules"] = copy.deepcopy(whole.program.modules.state_dict())
            kept["optimizer"] = copy.deepcopy(stage.optimizer.state_dict())

    steps = fit(stage, name=plan.name, seed=1, start_step=0, hooks=whole.hooks(save))
    assert steps == plan.total_steps > 2
    again = Bench("finetune", store, tmp_path / "again", RECIPES[recipe])
    again.program.modules.load_state_dict(kept["modules"])
    resumed = again.program.plans[0].start()
    resumed.optimizer.load_state_dict(kept["optimizer"])
    hooks = again.hooks(lambda step: None)
    fit(resumed, name=plan.name, seed=1, start_step=2, hooks=hooks)
    expected, found = whole.program.modules.state_dict(), again.program.modules.state_dict()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


def test_the_loss_is_cross_entropy_of_the_classifier_on_the_encoders_vectors(
    store: Path, tmp_path: Path
) -> None:
    bench = Bench("finetune", store, tmp_path)
    stage = bench.program.plans[0].start()
    batch = stage.source.fetch(np.arange(6))
    output = stage.method.step(batch, torch.Generator().manual_seed(0))
    assert isinstance(stage.method, Finetune)
    views = stage.method._views(batch.inputs, batch.sizes_px, torch.Generator().manual_seed(0))
    logits = bench.program.modules["classifier"](bench.encoder(views))
    torch.testing.assert_close(output.loss, F.cross_entropy(logits, batch.labels))
    accuracy = (logits.argmax(dim=1) == batch.labels).float().mean()
    assert float(output.metrics["train_top1"]) == float(accuracy)


def test_views_and_heads_of_the_recipes(store: Path, tmp_path: Path) -> None:
    sgd = Bench("finetune", store, tmp_path / "sgd", RECIPES["ce_sgd"])
    mae = Bench("finetune", store, tmp_path / "mae", RECIPES["ce_mae"])
    views = []
    for bench in (sgd, mae):
        method = bench.config.method
        assert isinstance(method, FinetuneConfig)
        assert method.tune is not None
        views.append(make_views(method.tune, bench.encoder))
    light, strong = views
    assert (light.scale, light.interpolation, light.erase_prob) == ((0.2, 1.0), "bilinear", 0.0)
    assert (strong.scale, strong.interpolation, strong.erase_prob) == ((0.08, 1), "bicubic", 0.25)
    assert light.rand_augment is None and strong.rand_augment is not None
    heads = [bench.program.modules["classifier"].state_dict() for bench in (sgd, mae)]
    assert 0.2 < float(heads[0]["weight"].abs().max()) <= (6 / (24 + 3)) ** 0.5
    assert 0 < float(heads[1]["weight"].std()) < 3e-5
    assert all((head["bias"] == 0).all() for head in heads)


def test_groups_of_the_recipes(store: Path, tmp_path: Path) -> None:
    """SGD decays everything alike; AdamW leaves out vectors and tokens, and scales by layer."""
    sgd = Bench("finetune", store, tmp_path / "sgd", RECIPES["ce_sgd"])
    groups = sgd.program.plans[0].start().optimizer.param_groups
    assert [(g["weight_decay"], g["lr_scale"]) for g in groups] == [(1e-4, 1.0)]
    changes = {"recipe": "ce_mae", "tune": {"layer_decay": 0.5}}
    mae = Bench("finetune", store, tmp_path / "mae", changes)
    groups = mae.program.plans[0].start().optimizer.param_groups
    assert {g["weight_decay"] for g in groups} == {0.0, 0.05}
    assert {g["lr_scale"] for g in groups} == {0.5**3, 0.5**2, 0.5, 1.0}


def test_mean_pooling_has_its_norm_in_the_encoder(store: Path, tmp_path: Path) -> None:
    bench = Bench("finetune", store, tmp_path, RECIPES["ce_mae"])
    assert isinstance(bench.encoder.backbone.fc_norm, nn.LayerNorm)
    stage = bench.program.plans[0].start()
    trained = {id(p) for group in stage.optimizer.param_groups for p in group["params"]}
    assert id(bench.encoder.backbone.fc_norm.weight) in trained


def test_linear_leaves_the_encoder_as_it_is(store: Path, tmp_path: Path) -> None:
    bench = Bench("finetune", store, tmp_path, RECIPES["linear"])
    before = {name: value.clone() for name, value in bench.encoder.state_dict().items()}
    (plan,) = bench.program.plans
    stage = plan.start()
    assert isinstance(stage.method, LinearProbe)
    fit(stage, name=plan.name, seed=1, start_step=0, hooks=bench.hooks(lambda step: None))
    after = bench.encoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not any(p.grad is not None for p in bench.encoder.parameters())


def test_a_run_learns_and_its_model_classifies_the_same(
    archive: Path, store: Path, tmp_path: Path
) -> None:
    """Three classes, 18 test images: chance is 1/3; the model directory gives the run's score."""
    config = tiny_config("finetune", evaluation={"protocols": ["knn"], "knn_k": 5})
    config["method"]["tune"] = {"epochs": 20, "batch_size": 12, "lr": 0.03}
    config["resources"] = {"gpus": 0}
    result = ctune.run(config, archive, tmp_path / "out")
    scores = result["evaluation"]["after"]["classifier"]
    assert scores["top1"] >= 0.7
    assert result["image_passes"] == 20 * 48
    held_out = PackedStore(store)
    images = [held_out.image(int(n)) for n in held_out.indices("test")]
    assert images[0].size == (SIDE_PX, SIDE_PX)
    model = load_model(RunDir(tmp_path / "out").model)
    found = model.classify(images).argmax(dim=1).numpy()
    assert float((found == held_out.labels("test")).mean()) == pytest.approx(scores["top1"])
