from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

import ctune
from ctune.config import RunConfig, check, resolve
from ctune.encoders import KnownStart
from ctune.events import Metrics
from ctune.manifest import DatasetSummary
from ctune.methods.base import Stage
from ctune.methods.mae_ct.config import HEAD, MaeCTConfig
from ctune.methods.mae_ct.stages import HeadTraining, make_views
from ctune.schema import JsonObject
from ctune.store import PackedStore
from ctune.train import fit
from ctune.weights import read_weights
from tests.ctune.methods.test_contract import Bench
from tests.squares import tiny_config

WIDTHS = {"base": (768, 12), "large": (1024, 24), "huge": (1280, 32)}
COLUMNS: dict[tuple[str, str], tuple[Any, ...]] = {
    ("minimal", "base"): ("mean", 1024, 20, 0.15, 20, 0.99, 1e-4, 6),
    ("minimal", "large"): ("cls", 1024, 20, 0.2, 20, 0.99, 1e-4, 12),
    ("minimal", "huge"): ("cls", 512, 30, 0.3, 20, 0.995, 1e-4, 16),
    ("byol", "base"): ("mean", 1024, 80, 0.15, 10, 0.99, 5e-4, 6),
    ("byol", "large"): ("cls", 1024, 40, 0.15, 10, 0.99, 5e-4, 12),
    ("byol", "huge"): ("cls", 512, 40, 0.35, 20, 0.995, 5e-4, 16),
}
"""mae_ct.md 3: pooling, batch, epochs, temperature, top_k, target momentum, rate, frozen blocks."""
LAST: JsonObject = {"stages": ["contrastive_tuning"], "allow_random_head": True}
COMBINED = {
    "epochs": 2,
    "batch_size": 12,
    "decoder_embed_dim": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
}


def summary(images: int, classes: int = 10) -> DatasetSummary:
    counts = {str(n): images // classes for n in range(classes)}
    return DatasetSummary.model_validate(
        {
            "num_images": images,
            "splits": {"train": images},
            "classes": list(counts),
            "class_counts": {"train": counts},
            "width_px": (32, 32),
            "height_px": (32, 32),
            "split_origin": "given",
        }
    )


def settled(
    values: JsonObject, start: KnownStart, data: DatasetSummary | None = None
) -> MaeCTConfig:
    config = MaeCTConfig.model_validate(values)
    block = config.settled(start, data)
    return MaeCTConfig.model_validate(ctune.schema.merge_defaults(config.model_dump(), block))


@pytest.mark.parametrize(("augmentation", "size"), COLUMNS)
def test_published_settings_by_size(augmentation: str, size: str) -> None:
    width, depth = WIDTHS[size]
    start = KnownStart(pretrained=True, embed_dim=width, depth=depth)
    values = {"preset": "paper", "augmentation": augmentation}
    found = settled(values, start, summary(1_281_000, classes=1000))
    tuning, init = found.contrastive_tuning, found.head_init
    assert (
        found.pool,
        found.batch_size,
        tuning.epochs,
        tuning.temperature,
        tuning.top_k,
        tuning.target_momentum,
        tuning.head_base_lr,
        tuning.num_frozen_blocks,
    ) == COLUMNS[augmentation, size]
    assert (init.epochs, init.temperature, init.top_k, init.head_base_lr) == (20, 0.15, 1, 1e-4)
    assert found.head.queue_size == 65536
    assert (found.mae.num_views, MaeCTConfig().mae.recipe) == (2, "fb")
    assert tuning.ema_momentum == pytest.approx(0.9999, abs=3e-5)
    assert (tuning.base_lr, tuning.layer_decay) == (1e-4, 0.65)


def test_explicit_values_win_over_the_automatic_ones() -> None:
    given = {"contrastive_tuning": {"top_k": 3, "epochs": 7, "ema_momentum": 0.5}, "batch_size": 64}
    found = settled(given, KnownStart(pretrained=True, embed_dim=192, depth=6), summary(1000))
    tuning = found.contrastive_tuning
    assert (tuning.top_k, tuning.epochs, tuning.ema_momentum) == (3, 7, 0.5)
    assert (tuning.num_frozen_blocks, tuning.temperature, found.batch_size) == (3, 0.15, 64)


@pytest.mark.parametrize(
    ("images", "batch", "size"),
    [(100_000, 256, 4096), (3000, 256, 1280), (300, 256, 512), (1000, 100, 500)],
)
def test_the_queue_is_whole_batches_up_to_half_the_data(images: int, batch: int, size: int) -> None:
    found = settled({"batch_size": batch}, KnownStart(pretrained=True), summary(images))
    assert found.head.queue_size == size


def test_top_k_leaves_each_class_three_times_as_many_rows() -> None:
    few, many = (
        settled({}, KnownStart(pretrained=True), summary(3000, classes)).contrastive_tuning.top_k
        for classes in (10, 100)
    )
    assert (few, many) == (10, 4)  # 1280 rows


def test_the_average_forgets_its_start_in_a_short_run_too() -> None:
    given = {"contrastive_tuning": {"epochs": 10}}
    momentum = settled(given, KnownStart(pretrained=True), summary(2560)).contrastive_tuning
    assert momentum.ema_momentum == pytest.approx(1 - 2.5 / 100)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"stages": ["contrastive_tuning", "head_init"]}, "in the order"),
        ({"stages": ["mae", "mae"]}, "each once"),
        ({"stages": ["mae", "combined"]}, "combined"),
        ({"stages": []}, "at least 1"),
        ({"batch_size": 12, "head": {"queue_size": 30}}, "queue_size (30) must be a multiple of"),
        (
            {"batch_size": 12, "head": {"queue_size": 24}, "contrastive_tuning": {"top_k": 24}},
            "queue_size (24) must be above contrastive_tuning.top_k (24)",
        ),
        ({"batch_size": 32, "accumulate_steps": 4}, "batch_size 128 and micro_batch_size 32"),
        ({"grad_cache": True, "micro_batch_size": 64, "batch_size": 32}, "exceeds batch_size"),
        ({"head_init": {"variant": "nnclr_ema"}}, "'nnclr', 'no_queue' or 'oracle'"),
    ],
)
def test_what_does_not_fit_together_is_refused(values: JsonObject, said: str) -> None:
    with pytest.raises(ValidationError, match=said.replace("(", r"\(").replace(")", r"\)")):
        MaeCTConfig.model_validate(values)


def faults(method: JsonObject, data: DatasetSummary, info: JsonObject | None = None) -> list[str]:
    encoder = {"source": "model", "id": "mdl_1"} if info else tiny_config()["encoder"]
    config = tiny_config("mae_ct", encoder=encoder)
    config["method"] = ctune.schema.merge_defaults(config["method"], method)
    resolved = resolve(RunConfig.model_validate(config), data, info)
    return [f"{fault.pointer} {fault.code}" for fault in check(resolved, data, info)]


def test_faults_of_the_data_are_told_at_once() -> None:
    oracle = {"contrastive_tuning": {"variant": "oracle", "top_k": 20}}
    assert faults(oracle, summary(10, classes=1)) == [
        "/method/mae/batch_size batch_larger_than_data",
        "/method/batch_size batch_larger_than_data",
        "/method/contrastive_tuning/top_k top_k_exceeds_data",
        "/method/contrastive_tuning/variant labels_needed",
    ]
    assert faults({}, summary(100)) == []


def test_parts_of_a_request_are_checked_before_what_is_automatic_is_known() -> None:
    config = MaeCTConfig.model_validate({"preset": "paper"})
    assert (config.mae.batch_size, config.check_data(summary(100))) == ("auto", [])


def model_info(**method: Any) -> JsonObject:
    head = {"proj_hidden_dim": 24, "pred_hidden_dim": 32, "out_dim": 16, "queue_size": 24}
    return {
        "architecture": "vit_tiny_patch16_224",
        "model_args": {"patch_size": 8, "depth": 2, "embed_dim": 24},
        "image_size_px": 16,
        "method": {
            "name": "mae_ct",
            "pool": "mean",
            "head": head | {"queue_init": "random"},
            **method,
        },
        "files": {"model.safetensors": "", f"{HEAD}.safetensors": ""},
    }


def test_a_job_that_goes_on_with_a_head_takes_over_its_sizes() -> None:
    config = tiny_config("mae_ct", encoder={"source": "model", "id": "mdl_1"})
    config["method"] |= {"stages": ["contrastive_tuning"], "head": {}}
    info = model_info(pool="cls")
    found = resolve(RunConfig.model_validate(config), summary(1000), info).method
    assert isinstance(found, MaeCTConfig)
    assert (found.pool, found.head.out_dim, found.head.queue_size) == ("cls", 16, 24)
    assert found.contrastive_tuning.num_frozen_blocks == 1


def test_a_head_that_is_missing_or_another_one_is_refused() -> None:
    data, last = summary(100), {"stages": ["contrastive_tuning"]}
    assert faults(last, data) == ["/method/stages head_missing"]
    assert faults(last | {"allow_random_head": True}, data) == []
    headless = model_info() | {"files": {"model.safetensors": ""}}
    assert faults(last, data, headless) == ["/method/stages head_missing"]
    assert faults(last, data, model_info()) == []
    other = last | {"pool": "cls", "head": {"out_dim": 8}}
    assert faults(other, data, model_info()) == [
        "/method/pool head_mismatch",
        "/method/head/out_dim head_mismatch",
    ]
    assert faults({"pool": "cls"}, data, model_info()) == [], "a new head has what it is given"


def bench(store: Path, folder: Path, **method: Any) -> Bench:
    return Bench("mae_ct", store, folder, {"stages": ["head_init", "contrastive_tuning"], **method})


def modules(run: Bench) -> Any:
    return run.program.modules


def train(bench: Bench, index: int) -> Stage:
    plan = bench.program.plans[index]
    stage = plan.start()
    fit(stage, name=plan.name, seed=1, start_step=0, hooks=bench.hooks(lambda step: None))
    return stage


def copies(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before: dict[str, torch.Tensor], module: torch.nn.Module) -> set[str]:
    return {n for n, value in module.state_dict().items() if not torch.equal(before[n], value)}


def test_head_init_leaves_the_encoder_as_it_is(store: Path, tmp_path: Path) -> None:
    run = bench(store, tmp_path)
    before, head = copies(run.encoder), copies(modules(run)[HEAD])
    stage = train(run, 0)
    assert changed(before, run.encoder) == set()
    assert all(p.grad is None for p in run.encoder.parameters())
    assert not run.encoder.training, "frozen modules are in eval mode"
    moved = changed(head, modules(run)[HEAD])
    assert {"projector.0.weight", "predictor.3.weight", "queue.features"} <= moved
    assert not {name for name in moved if name.startswith("target_projector")}
    assert isinstance(stage.method, HeadTraining)
    assert set(modules(run)[HEAD].queue.ids.tolist()) <= set(range(48))


def test_tuning_trains_the_upper_blocks_and_averages(store: Path, tmp_path: Path) -> None:
    run = bench(store, tmp_path)
    train(run, 0)
    start, head = copies(run.encoder), modules(run)[HEAD]
    stage = run.program.plans[1].start()
    for name, value in head.projector.state_dict().items():
        assert torch.equal(value, head.target_projector.state_dict()[name]), "it starts as a copy"
    fit(stage, name="contrastive_tuning", seed=1, start_step=0, hooks=run.hooks(lambda step: None))
    online = modules(run)["online_encoder"]
    for encoder in (online, run.encoder):
        moved = changed(start, encoder)
        assert moved and all(
            name.startswith(("backbone.blocks.1.", "backbone.norm.")) for name in moved
        )
    assert changed(copies(online), run.encoder), "the result is an average, not the last weights"
    blocks: Any = online.backbone
    assert not blocks.blocks[0].training
    assert not blocks.patch_embed.training


def test_the_encoder_average_has_the_formula(store: Path, tmp_path: Path) -> None:
    tuning = {"ema_momentum": 0.75, "epochs": 1, "num_frozen_blocks": 0}
    run = bench(store, tmp_path, contrastive_tuning=tuning, **LAST)
    start = copies(run.encoder)
    stage = run.program.plans[0].start()
    seen: list[dict[str, torch.Tensor]] = []
    online = modules(run)["online_encoder"]
    hooks = run.hooks(lambda step: seen.append(copies(online)))
    fit(stage, name="contrastive_tuning", seed=1, start_step=0, hooks=hooks)
    name = "backbone.blocks.0.attn.qkv.weight"
    expected = start[name]
    for state in seen:
        expected = 0.75 * expected + 0.25 * state[name]
    torch.testing.assert_close(run.encoder.state_dict()[name], expected, rtol=0, atol=1e-7)


def test_rates_of_the_groups(store: Path, tmp_path: Path) -> None:
    tuning = {"base_lr": 1e-3, "head_base_lr": 4e-3, "layer_decay": 0.5, "num_frozen_blocks": 0}
    run = bench(store, tmp_path, contrastive_tuning=tuning, **LAST)
    stage = run.program.plans[0].start()
    scales = {
        name: group["lr_scale"]
        for group in stage.optimizer.param_groups
        for name, p in stage.method.named_parameters()
        if any(p is q for q in group["params"])
    }
    assert scales["encoder.backbone.norm.weight"] == 1
    assert scales["encoder.backbone.blocks.1.mlp.fc1.weight"] == 0.5
    assert scales["encoder.backbone.cls_token"] == 0.125
    assert scales["head.predictor.0.weight"] == 4
    assert "encoder.backbone.pos_embed" not in scales
    peak = max(stage.lr_at(step) for step in range(8))
    assert peak == pytest.approx(1e-3 * 2 * 12 / 256)


def step_of(run: Bench, stage: Stage) -> tuple[torch.Tensor, list[torch.Tensor]]:
    ctune.seeding.seed_everything(0)
    batch = stage.source.fetch(stage.sampler.batches(0)[0])
    loss = stage.method.step(batch, torch.Generator().manual_seed(0)).loss
    torch.autograd.backward(loss)
    parameters = [p for group in stage.optimizer.param_groups for p in group["params"]]
    return loss.detach(), [p.grad.clone() for p in parameters if p.grad is not None]


def test_gradient_caching_changes_nothing(store: Path, tmp_path: Path) -> None:
    only = LAST
    whole = bench(store, tmp_path / "a", **only)
    cached = bench(store, tmp_path / "b", **only, grad_cache=True, micro_batch_size=5)
    loss, gradients = step_of(whole, whole.program.plans[0].start())
    other, others = step_of(cached, cached.program.plans[0].start())
    torch.testing.assert_close(loss, other)
    for one, two in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", ["nnclr_ema", "nnclr", "no_queue", "oracle"])
def test_every_variant_trains(variant: str, store: Path, tmp_path: Path) -> None:
    run = bench(store, tmp_path, contrastive_tuning={"variant": variant, "epochs": 1})
    train(run, 1)
    metrics: list[Any] = [e.values for e in run.told if isinstance(e, Metrics)]
    assert all(0 <= m["nn_accuracy"] <= 1 for m in metrics)
    assert all(m["loss"] > 0 for m in metrics)


def test_hidden_patches_never_reach_the_blocks(store: Path, tmp_path: Path) -> None:
    run = bench(store, tmp_path, **LAST, contrastive_tuning={"mask_ratio": 0.5})
    stage = run.program.plans[0].start()
    lengths: list[int] = []
    backbone: Any = modules(run)["online_encoder"].backbone
    backbone.blocks[0].register_forward_hook(lambda m, x, y: lengths.append(x[0].shape[1]))
    step_of(run, stage)
    assert lengths == [1 + 2], "class token and half of the 4 patches"


def test_a_prefilled_queue_has_images_before_the_first_step(store: Path, tmp_path: Path) -> None:
    run = bench(store, tmp_path, head={"queue_init": "prefill"})
    head = modules(run)[HEAD]
    assert set(head.queue.ids.tolist()) == {-1}
    run.program.plans[0].start()
    assert min(head.queue.ids.tolist()) >= 0
    before = copies(head.queue)
    run.program.plans[0].start()
    assert changed(before, head.queue) == set(), "a resumed run leaves it as it is"


def test_views_of_both_augmentations(store: Path, tmp_path: Path) -> None:
    minimal = make_views(MaeCTConfig(crop_scale_min=0.3), bench(store, tmp_path).encoder)
    assert (minimal.config.scale, minimal.config.interpolation) == ((0.3, 1.0), "bicubic")
    assert minimal.config.jitter_prob == 0
    strong = make_views(MaeCTConfig(augmentation="byol"), bench(store, tmp_path).encoder)
    assert (strong.config.jitter_prob, strong.config.blur_prob) == (0.8, 1.0)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return read_weights(run / "model" / "model.safetensors")


def test_one_job_and_one_per_stage_give_the_same_encoder(store: Path, tmp_path: Path) -> None:
    config = tiny_config("mae_ct", evaluation={"protocols": ["knn"], "knn_k": 5})
    whole = ctune.run(config, store, tmp_path / "whole")
    codes = {warning["code"] for warning in whole["warnings"]}
    assert "encoder_not_mae" not in codes
    for place, stage in enumerate(("mae", "head_init", "contrastive_tuning")):
        part = tiny_config("mae_ct", evaluation={"protocols": ["knn"], "knn_k": 5})
        part["method"]["stages"] = [stage]
        if place:
            part["encoder"] = {"source": "file", "path": str(tmp_path / f"{place - 1}" / "model")}
        result = ctune.run(part, store, tmp_path / str(place))
        assert "encoder_not_mae" not in {warning["code"] for warning in result["warnings"]}
    one, many = weights(tmp_path / "whole"), weights(tmp_path / "2")
    assert [name for name in one if not torch.equal(one[name], many[name])] == []
    assert 0 <= result["evaluation"]["after"]["nnclr_head"]["knn_top1"] <= 1
    folders = (tmp_path / run / "model" for run in ("whole", "2"))
    first, second = (read_weights(folder / f"{HEAD}.safetensors") for folder in folders)
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def test_the_baseline_that_does_both_at_once(store: Path, tmp_path: Path) -> None:
    config = tiny_config("mae_ct", evaluation={"protocols": ["knn"], "knn_k": 5})
    config["method"] |= {"stages": ["combined"], "combined": COMBINED}
    result = ctune.run(config, store, tmp_path)
    assert result["image_passes"] == 2 * 2 * 48
    assert (tmp_path / "model" / f"{HEAD}.safetensors").exists()
    assert PackedStore(store).manifest.summary.splits["train"] == 48
