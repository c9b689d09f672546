"""SimCLR: what is special to it; that it trains, resumes and exports is in the contract."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

import ctune
from ctune.backbones import build_encoder
from ctune.config import RunConfig, check, resolve
from ctune.encoders import TimmEncoder
from ctune.manifest import DatasetSummary
from ctune.methods.contrastive import Images
from ctune.methods.simclr.advice import advise, start_warnings
from ctune.methods.simclr.config import SimCLRConfig
from ctune.methods.simclr.method import SimCLR, learning_rate, make_head, make_views
from ctune.seeding import seed_everything
from tests.ctune.methods.test_contract import Bench
from tests.squares import noisy_square, tiny_config


def settled(encoder: dict[str, Any], **values: Any) -> SimCLRConfig:
    method: Any = {"name": "simclr", **values}
    config = RunConfig(encoder={"source": "timm", **encoder}, method=method)
    method = resolve(config).method
    assert isinstance(method, SimCLRConfig)
    return method


@pytest.mark.parametrize(
    ("encoder", "values", "expected"),
    [
        ({"name": "resnet18"}, {}, ("sgd", 0.1, 1e-3, 0)),
        ({"name": "resnet18"}, {"preset": "paper"}, ("sgd", 0.1, 1e-3, 0)),
        ({"name": "vit_tiny_patch16_224"}, {}, ("adamw", 1e-3, 0.05, 2)),
        ({"name": "vit_tiny_patch16_224"}, {"preset": "paper"}, ("adamw", 5e-4, 0.05, 10)),
        ({"name": "vit_tiny_patch16_224"}, {"optimizer": "sgd", "lr": 0.3}, ("sgd", 0.3, 1e-3, 0)),
        ({"source": "model", "id": "mdl_1"}, {}, ("adamw", 1e-3, 0.05, 2)),
        ({"name": "resnet18"}, {"optimizer": "lars"}, ("lars", 0.4, 1e-4, 0)),
        (
            {"name": "vit_tiny_patch16_224"},
            {"lr_schedule": "exponential"},
            ("adamw", 1e-3, 0.05, 0),
        ),
    ],
)
def test_optimizer_and_rates_follow_the_encoder(
    encoder: dict[str, Any], values: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    method = settled(encoder, **values)
    assert (method.optimizer, method.lr, method.weight_decay, method.warmup_epochs) == expected


def test_the_paper_preset_is_the_published_setting() -> None:
    paper = SimCLRConfig(preset="paper")
    assert (paper.batch_size, paper.epochs, paper.temperature) == (1024, 1000, 0.2)
    assert (paper.momentum, paper.clip_grad_norm, paper.views) == (0.9, None, "simclr_cifar")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"batch_size": 1}, "greater than or equal to 2"),
        ({"temperature": 0.0}, "greater than or equal to 0.01"),
        ({"accumulate_steps": 8}, "grad_cache true, batch_size 1024 and micro_batch_size 128"),
        ({"accumulate_steps": 2, "batch_size": 64}, "batch_size 128 and micro_batch_size 64"),
        ({"accumulate_steps": 1}, "Extra inputs"),
        ({"grad_cache": True, "batch_size": 16}, r"micro_batch_size \(32\) exceeds"),
        ({"epochs": 2, "warmup_epochs": 2}, "must be smaller than epochs"),
        ({"lr_schedule": "exponential", "warmup_epochs": 1}, "has no warm-up"),
        ({"blur_sigma_px": [2.0, 1.0]}, "must rise"),
        ({"projection_head": "conv"}, "'mlp', 'linear' or 'none'"),
    ],
)
def test_values_that_cannot_be_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SimCLRConfig.model_validate(values)


def test_images_without_labels_are_enough_but_a_batch_must_be_full() -> None:
    config = RunConfig.model_validate(tiny_config("simclr"))

    def summary(images: int) -> DatasetSummary:
        return DatasetSummary(
            num_images=images,
            splits={"train": images},
            classes=[],
            class_counts={},
            width_px=(16, 16),
            height_px=(16, 16),
            split_origin="given",
        )

    assert check(config, summary(12)) == []
    (fault,) = check(config, summary(11))
    assert (fault.pointer, fault.code) == ("/method/batch_size", "batch_larger_than_data")


def test_the_rate_falls_to_0_along_a_cosine_per_epoch() -> None:
    config = SimCLRConfig(epochs=10, lr=0.1, warmup_epochs=0)
    rates = [learning_rate(config, 3)(step) for step in range(30)]
    expected = [0.05 * (1 + math.cos(math.pi * epoch / 10)) for epoch in range(10)]
    assert rates == pytest.approx([rate for rate in expected for _ in range(3)])
    constant = learning_rate(config.model_copy(update={"lr_schedule": "constant"}), 3)
    assert {constant(step) for step in range(30)} == {0.1}
    falling = learning_rate(config.model_copy(update={"lr_schedule": "exponential"}), 3)
    assert falling(29) == pytest.approx(0.1 * 0.99**9)


def encoder(name: str = "vit_tiny_patch16_224", **options: Any) -> Any:
    config = TimmEncoder(name=name, pretrained=False, image_size_px=32, options=options)
    return build_encoder(config, pool="auto", encoder_dir=None)


def test_views_are_those_of_the_recipe_with_single_values_changed() -> None:
    tiny = encoder(patch_size=8, embed_dim=24, depth=1, num_heads=2)
    small = make_views(SimCLRConfig(), tiny).config
    assert (small.scale, small.jitter, small.jitter_prob) == ((0.08, 1), (0.4, 0.4, 0.4, 0.1), 0.8)
    assert (small.blur_prob, small.rotation_prob, small.grayscale_prob) == (0, 0, 0.2)
    large = make_views(SimCLRConfig(views="simclr"), tiny).config
    assert (large.jitter, large.blur_prob) == ((0.8, 0.8, 0.8, 0.2), 0.5)
    own = SimCLRConfig(
        views="simclr",
        crop_scale_min=0.3,
        flip_prob=0,
        rotation_prob=0.5,
        rotation_degrees=20,
        blur_prob=0.1,
        blur_sigma_px=(0.2, 2.0),
    )
    changed = make_views(own, tiny).config
    assert (changed.scale, changed.flip_prob, changed.rotation_prob) == ((0.3, 1), 0, 0.5)
    assert (changed.rotation_degrees, changed.blur_prob) == (20, 0.1)
    assert changed.blur_sigma_px == (0.2, 2.0)
    assert (changed.size_px, changed.mean) == (32, tiny.mean)


def test_heads_have_the_two_published_forms() -> None:
    with_norm = make_head(SimCLRConfig(), 16)
    shapes = {key: tuple(v.shape) for key, v in with_norm.named_parameters()}
    assert shapes == {
        "mlp.0.weight": (16, 16),
        "mlp.1.weight": (16,),
        "mlp.1.bias": (16,),
        "mlp.3.weight": (128, 16),
        "mlp.4.weight": (128,),
        "mlp.4.bias": (128,),
    }
    without = make_head(SimCLRConfig(head_norm="none", head_hidden_dim=32, output_dim=8), 16)
    assert [tuple(p.shape) for p in without.parameters()] == [(32, 16), (32,), (8, 32), (8,)]


def stage_of(bench: Bench) -> Any:
    return bench.program.plans[0].start()


def test_the_head_gets_all_first_views_then_all_second(store: Path, tmp_path: Path) -> None:
    bench = Bench("simclr", store, tmp_path, {"grad_cache": True, "micro_batch_size": 5})
    stage = stage_of(bench)
    method = stage.method
    seen: list[torch.Tensor] = []
    method.head.register_forward_pre_hook(lambda head, given: seen.append(given[0]))
    batch = stage.source.fetch(stage.sampler.batches(0)[0])
    method.step(batch, torch.Generator().manual_seed(0))
    vectors = method.embed(batch, torch.Generator().manual_seed(0))
    assert len(seen) == 1, "once for the whole batch"
    expected = torch.cat([vectors[:, 0], vectors[:, 1]])
    torch.testing.assert_close(seen[0], expected)


def test_micro_batches_give_the_gradients_of_the_whole_batch(store: Path, tmp_path: Path) -> None:
    """With the head's batch norm too: it sees the whole batch."""
    results: list[tuple[torch.Tensor, ...]] = []
    for changes in ({}, {"grad_cache": True, "micro_batch_size": 5}):
        bench = Bench("simclr", store, tmp_path / str(len(results)), changes)
        stage = stage_of(bench)
        batch = stage.source.fetch(stage.sampler.batches(0)[0])
        output = stage.method.step(batch, torch.Generator().manual_seed(0))
        torch.autograd.backward(output.loss)
        modules = bench.program.modules
        grads = [p.grad.flatten() for p in modules.parameters() if p.grad is not None]
        running = modules.state_dict()["projection_head.mlp.1.running_mean"]
        results.append((output.loss, torch.cat(grads), running))
    (loss, gradients, running), (also, found, also_running) = results
    torch.testing.assert_close(also, loss, rtol=1e-5, atol=1e-5)
    assert (found - gradients).abs().max() <= 1e-5 * gradients.abs().max()
    torch.testing.assert_close(also_running, running)


def test_labels_are_not_looked_at(store: Path, tmp_path: Path) -> None:
    stage = stage_of(Bench("simclr", store, tmp_path, {"head_norm": "none"}))
    batch = stage.source.fetch(stage.sampler.batches(0)[0])
    losses = []
    for labels in (batch.labels, torch.full_like(batch.labels, -1)):
        seed_everything(0)
        given = dataclasses.replace(batch, labels=labels)
        losses.append(stage.method.step(given, torch.Generator().manual_seed(0)).loss)
    assert torch.equal(*losses)


def test_vectors_that_are_all_alike_have_the_uniform_loss(store: Path, tmp_path: Path) -> None:
    method = stage_of(Bench("simclr", store, tmp_path, {"projection_head": "none"})).method
    assert isinstance(method, SimCLR)
    vectors = torch.ones(6, 2, 24)
    images = Images(torch.zeros(6), torch.arange(6))
    found = method.contrast(vectors, images, torch.Generator())
    assert float(found.loss) == pytest.approx(math.log(11))
    assert found.uniform_loss == pytest.approx(math.log(11))
    longer = method.contrast(vectors * torch.rand(6, 2, 1), images, torch.Generator())
    assert float(longer.loss) == pytest.approx(math.log(11)), "lengths do not matter"


def test_batch_norms_of_the_encoder_span_both_views(store: Path, tmp_path: Path) -> None:
    bench = Bench("simclr", store, tmp_path)
    stage = stage_of(bench)
    seen: list[int] = []
    stage.method.encoder.register_forward_pre_hook(lambda layer, x: seen.append(len(x[0])))
    batch = stage.source.fetch(stage.sampler.batches(0)[0])
    stage.method.step(batch, torch.Generator().manual_seed(0))
    assert seen == [24], "12 images, both views in one pass"


def test_sgd_decays_everything_in_one_group(store: Path, tmp_path: Path) -> None:
    bench = Bench("simclr", store, tmp_path, {"optimizer": "sgd"})
    (group,) = stage_of(bench).optimizer.param_groups
    trained = [*bench.encoder.parameters(), *bench.program.modules["projection_head"].parameters()]
    assert (group["weight_decay"], len(group["params"])) == (1e-3, len(trained))
    adamw = stage_of(Bench("simclr", store, tmp_path / "2", {"optimizer": "adamw"})).optimizer
    assert {g["weight_decay"] for g in adamw.param_groups} == {0.05, 0.0}
    undecayed = next(g for g in adamw.param_groups if g["weight_decay"] == 0)
    norms = [m for m in bench.program.modules.modules() if isinstance(m, nn.LayerNorm)]
    assert len(undecayed["params"]) > 2 * len(norms) > 0


def test_a_worse_encoder_is_told_of() -> None:
    was, better, worse = ({"knn": {"top1": value}} for value in (0.5, 0.6, 0.4))
    assert [w.code for w in advise(was, worse)] == ["worse_than_before"]
    assert advise(was, better) == advise(None, worse) == advise(was, {}) == []


def test_the_start_tells_what_the_config_calls_for(store: Path, tmp_path: Path) -> None:
    bench = Bench("simclr", store, tmp_path)
    assert [warning.code for warning in bench.program.warnings] == ["small_batch"]
    config = SimCLRConfig(grad_cache=True, batch_size=64, micro_batch_size=16)
    context = dataclasses.replace(bench.context(), encoder=encoder("resnet18"))
    codes = [warning.code for warning in start_warnings(config, context)]
    assert codes == ["batch_norm_per_micro_batch"]


def test_a_run_on_images_without_labels(tmp_path: Path) -> None:
    folder, rng = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    for n in range(24):
        (folder / f"{n:02}.png").write_bytes(noisy_square(n % 3, rng))
    config = tiny_config("simclr", evaluation={"protocols": ["knn", "isotropy"]})
    result = ctune.run(config, folder, tmp_path / "out")
    assert list(result["evaluation"]["after"]) == ["isotropy"]
    files = {path.name for path in (tmp_path / "out" / "model").iterdir()}
    assert "projection_head.safetensors" in files
    assert "classifier.safetensors" not in files
    assert result["model"]["head"] is None
