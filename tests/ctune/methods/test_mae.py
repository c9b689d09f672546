from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from pydantic import ValidationError

from ctune.augment import Shard
from ctune.backbones import Encoder, build_encoder
from ctune.config import RunConfig, check, resolve
from ctune.encoders import KnownStart, TimmEncoder
from ctune.errors import ConfigError
from ctune.events import Metrics, Warned
from ctune.export import export_model
from ctune.manifest import DatasetSummary
from ctune.methods.base_config import EncoderPool
from ctune.methods.mae.config import MaeConfig
from ctune.methods.mae.method import build
from ctune.methods.mae_config import MaePretrainConfig
from ctune.methods.mae_stage import (
    ReconstructionWatch,
    feature_spread,
    mae_learning_rate,
    make_mae_views,
    masking_noise,
)
from ctune.train import fit
from tests.ctune.methods.test_contract import Bench
from tests.ctune.test_export import EVALUATION, PROVENANCE, images
from tests.squares import tiny_config


def settled(method: dict[str, Any] | None = None, **mae: Any) -> MaePretrainConfig:
    given = {"name": "mae", "mae": mae, **(method or {})}
    config = RunConfig.model_validate(tiny_config("mae") | {"method": given})
    resolved = resolve(config).method
    assert isinstance(resolved, MaeConfig)
    return resolved.mae


def test_presets_are_the_published_recipe_and_the_small_one() -> None:
    paper = MaeConfig(preset="paper").mae
    assert (paper.mask_ratio, paper.norm_pix_loss, paper.recipe) == (0.75, True, "fb")
    assert (paper.decoder_embed_dim, paper.decoder_depth, paper.decoder_num_heads) == (512, 8, 16)
    assert (paper.base_lr, paper.epochs, paper.crop_scale_min) == (1.5e-4, 800, 0.2)
    assert (paper.weight_decay, paper.betas, paper.min_lr) == (0.05, (0.9, 0.95), 0)
    small = MaeConfig().mae
    assert (small.decoder_embed_dim, small.decoder_depth, small.decoder_num_heads) == (96, 2, 3)
    batch = {"batch_size": 256, "accumulate_steps": 1, "num_views": 1}
    assert small.settled(KnownStart(False)) == {"lr": 1e-3, "warmup_epochs": 10, **batch}


B, L, H = "vit_base_patch16_224", "vit_large_patch16_224", "vit_huge_patch14_224"


@pytest.mark.parametrize(
    ("recipe", "name", "batch", "lr", "warmup"),
    [
        *(("fb", name, (1024, 4, 1), 2.4e-3, 40) for name in (B, L, H)),
        *(("jku", name, (1024, 1, 2), 1.2e-3, 20) for name in (B, L)),
        ("jku", H, (512, 1, 2), 6e-4, 20),
    ],
)
def test_the_recipes_have_their_batch_and_rate_for_each_size_of_encoder(
    recipe: str, name: str, batch: tuple[int, int, int], lr: float, warmup: float
) -> None:
    """The effective rates are those of mae.md 3."""
    given = {
        "encoder": {"source": "timm", "name": name, "pretrained": False},
        "method": {"name": "mae", "preset": "paper", "mae": {"recipe": recipe}},
    }
    method = resolve(RunConfig.model_validate(given)).method
    assert isinstance(method, MaeConfig)
    mae = method.mae
    assert (mae.batch_size, mae.accumulate_steps, mae.num_views) == batch
    assert mae.lr == pytest.approx(lr) and mae.warmup_epochs == warmup


def test_what_is_given_wins_and_smaller_batches_are_accumulated() -> None:
    paper = {"preset": "paper"}
    assert settled(paper, batch_size=512).accumulate_steps == 8
    assert settled(paper, batch_size=512, recipe="jku").accumulate_steps == 2
    mine = settled(paper, batch_size=512, accumulate_steps=1, num_views=3, warmup_epochs=7)
    assert (mine.accumulate_steps, mine.num_views, mine.warmup_epochs) == (1, 3, 7)
    assert mine.lr == pytest.approx(1.5e-4 * 6)
    assert settled(paper, epochs=100).warmup_epochs == 5
    assert settled(paper, epochs=100, recipe="jku").warmup_epochs == 2.5


def test_every_view_counts_in_the_learning_rate() -> None:
    assert settled(batch_size=128, num_views=2, accumulate_steps=3).lr == pytest.approx(3e-3)
    assert settled(lr=0.5, num_views=2).lr == 0.5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"mask_ratio": 0.0}, "greater than 0"),
        ({"mask_ratio": 1.0}, "less than 1"),
        ({"epochs": 2, "warmup_epochs": 3}, "must not exceed epochs"),
        ({"lr": 0.1, "min_lr": 0.2}, "must not exceed lr"),
        ({"base_lr": 1e-4, "batch_size": 256, "min_lr": 2e-4}, r"must not exceed lr \(0.0001\)"),
        ({"decoder_embed_dim": 96, "decoder_num_heads": 5}, "a multiple of decoder_num_heads"),
        ({"decoder_embed_dim": 90}, "multiple of 4"),
    ],
)
def test_values_that_cannot_be_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MaeConfig.model_validate({"mae": values})


def test_fewer_images_than_a_batch_are_refused() -> None:
    summary = DatasetSummary(
        num_images=11,
        splits={"train": 11},
        classes=[],
        class_counts={},
        width_px=(16, 16),
        height_px=(16, 16),
        split_origin="given",
    )
    with pytest.raises(ValueError, match="12"):
        settled(batch_size=12).planned(11)
    (fault,) = check(RunConfig.model_validate(tiny_config("mae")), summary)
    assert (fault.pointer, fault.code) == ("/method/mae/batch_size", "batch_larger_than_data")
    assert MaeConfig(preset="paper").check_data(summary) == [], "what is automatic is not known yet"


def test_the_first_step_is_0_only_with_inclusive_endpoints() -> None:
    rate = mae_learning_rate(settled(lr=1.0, epochs=10, warmup_epochs=2), 100)
    assert [rate(0), rate(19), rate(20)] == pytest.approx([1 / 21, 20 / 21, 1])
    assert 0 < rate(99) < 1e-3
    ends = settled(lr=1.0, min_lr=0.1, epochs=10, warmup_epochs=2, schedule_endpoints="inclusive")
    rate = mae_learning_rate(ends, 100)
    assert [rate(0), rate(19), rate(99)] == pytest.approx([0, 1, 0.1])


def test_shares_of_a_batch_are_masked_as_the_whole_is() -> None:
    def drawn(count: int, shard: Shard) -> torch.Tensor:
        generator = torch.Generator().manual_seed(3)
        return masking_noise((2, 3), generator, num_images=count, shard=shard, num_views=2)

    whole = drawn(5, Shard(0, 5)).view(2, 5, 6)
    assert torch.equal(drawn(2, Shard(3, 5)).view(2, 2, 6), whole[:, 3:])
    assert len(set(whole.flatten().tolist())) == 60


def test_blocks_of_patches_share_their_noise() -> None:
    noise = masking_noise(
        (4, 5), torch.Generator().manual_seed(0), num_images=2, shard=Shard(0, 2), block=2
    ).view(2, 4, 5)
    assert [len(set(image.flatten().tolist())) for image in noise] == [6, 6]
    assert torch.equal(noise[:, 0, :4:2], noise[:, 1, 1:4:2])


def encoder(pool: EncoderPool = "cls", name: str = "vit_tiny_patch16_224", **more: Any) -> Encoder:
    torch.manual_seed(0)
    tiny = {"patch_size": 4, "embed_dim": 24, "depth": 2, "num_heads": 2}
    options = {**tiny, **more} if name.startswith("vit") else more
    config = TimmEncoder(name=name, pretrained=False, image_size_px=16, options=options)
    return build_encoder(config, pool=pool, encoder_dir=None)


def test_views_crop_and_flip_alone() -> None:
    view = make_mae_views(settled(), encoder()).config
    assert (view.scale, view.interpolation, view.pad_px) == ((0.5, 1), "bicubic", None)
    assert (view.jitter_prob, view.blur_prob, view.flip_prob) == (0, 0, 0.5)
    moved = make_mae_views(settled(augment="pad_flip", flip_prob=0.0), encoder()).config
    assert (moved.pad_px, moved.flip_prob) == (4, 0)


def bench(store: Path, cache_dir: Path, **mae: Any) -> Bench:
    return Bench("mae", store, cache_dir, {"mae": mae})


def test_accumulated_batches_have_the_gradient_of_one(store: Path, tmp_path: Path) -> None:
    made = bench(store, tmp_path)
    stage = made.program.plans[0].start()
    batch = stage.source.fetch(stage.sampler.batches(0)[0])

    def gradients(parts: int) -> list[torch.Tensor]:
        stage.optimizer.zero_grad()
        rows = 12 // parts
        for start in range(0, 12, rows):
            part = slice(start, start + rows)
            share = replace(
                batch,
                inputs=batch.inputs[part],
                labels=batch.labels[part],
                sizes_px=batch.sizes_px[part],
                shard=Shard(start, 12),
            )
            output = stage.method.step(share, torch.Generator().manual_seed(5))
            torch.autograd.backward(output.loss / parts)
        groups = stage.optimizer.param_groups
        return [p.grad.clone() for g in groups for p in g["params"] if p.grad is not None]

    torch.testing.assert_close(gradients(3), gradients(1), rtol=1e-4, atol=1e-6)


def test_position_tables_are_not_trained_and_the_loss_falls(store: Path, tmp_path: Path) -> None:
    made = bench(store, tmp_path, epochs=30, lr=5e-3, warmup_epochs=1)
    positions = made.encoder.get_parameter("backbone.pos_embed")
    before = positions.clone()
    plan = made.program.plans[0]
    fit(plan.start(), name="mae", seed=1, start_step=0, hooks=made.hooks(lambda step: None))
    assert torch.equal(positions, before)
    values = [told.values for told in made.told if isinstance(told, Metrics)]
    losses = [one["loss"] for one in values if "loss" in one]
    assert losses[0] is not None and losses[-1] is not None
    assert losses[-1] < 0.9 * losses[0]


def test_only_an_encoder_from_scratch_is_started_anew(store: Path, tmp_path: Path) -> None:
    made = bench(store, tmp_path)
    assert isinstance(made.config.method, MaeConfig)
    given = {k: v.clone() for k, v in made.encoder.state_dict().items()}
    build(made.config.method, replace(made.context(), from_scratch=False))
    assert all(torch.equal(v, given[k]) for k, v in made.encoder.state_dict().items())
    with torch.no_grad():
        made.encoder.get_parameter("backbone.pos_embed").zero_()
    build(made.config.method, made.context())
    assert all(torch.equal(v, given[k]) for k, v in made.encoder.state_dict().items())


def test_a_mask_that_hides_nothing_is_named(store: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="hides none of 4") as caught:
        bench(store, tmp_path, mask_ratio=1e-12)
    assert "mask_ratio" in caught.value.hint


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: encoder("auto", name="resnet18"), "ResNet is no plain vision transformer"),
        (lambda: encoder(reg_tokens=1), "no register tokens"),
        (lambda: encoder(embed_dim=26), "multiple of 4"),
        (lambda: encoder("mean"), "must normalise its tokens"),
        (lambda: encoder(patch_size=16), "leaves none of 1 patches"),
    ],
)
def test_encoders_that_do_not_fit_are_named(
    made: Any, message: str, store: Path, tmp_path: Path
) -> None:
    whole = bench(store, tmp_path)
    assert isinstance(whole.config.method, MaeConfig)
    with pytest.raises(ConfigError, match=message):
        build(whole.config.method, replace(whole.context(), encoder=made()))


@pytest.mark.filterwarnings("ignore:.*:UserWarning:timm")
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_plain_timm_gives_the_same_vectors_after_the_trained_norm(
    pool: Any, tmp_path: Path
) -> None:
    made = encoder(MaeConfig(pool=pool).encoder_pool).eval()
    torch.nn.init.normal_(made.get_parameter("backbone.norm.weight"))
    export_model(
        made,
        tmp_path / "model",
        provenance=PROVENANCE,
        evaluation=EVALUATION,
        reference_images=images(),
    )
    plain = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        tokens = made.backbone.forward_features(pixels)  # type: ignore[operator]
        expected = tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(dim=1)
        torch.testing.assert_close(plain(pixels), expected, rtol=0, atol=1e-5)


def test_a_loss_of_predicting_nothing_is_told_once() -> None:
    watch = ReconstructionWatch(unlearned_loss=0.99, total_steps=2000)
    told: list[Warned] = []
    for step in range(200):
        watch.observe(torch.tensor(0.98), torch.tensor(0.5))
        told += watch.warnings(step)
    assert [warning.code for warning in told] == ["not_learning"]
    learning = ReconstructionWatch(unlearned_loss=0.99, total_steps=1000)
    for step in range(200):
        learning.observe(torch.tensor(0.9), torch.tensor(0.5))
        assert learning.warnings(step) == []


def test_features_that_are_alike_are_told_once_and_after_a_resume_too() -> None:
    alike = feature_spread(torch.ones(4, 3) + 1e-6 * torch.randn(4, 3))
    assert alike < 1e-4 < feature_spread(torch.randn(4, 3))
    assert feature_spread(torch.ones(1, 3)) == 1
    watch = ReconstructionWatch(unlearned_loss=None, total_steps=1000)
    for step in range(40):
        watch.observe(torch.tensor(0.5), alike)
        assert watch.warnings(step) == []
    resumed = ReconstructionWatch(unlearned_loss=None, total_steps=1000)
    resumed.load_state_dict(watch.state_dict())
    told: list[Warned] = []
    for step in range(40, 100):
        resumed.observe(torch.tensor(0.5), alike)
        told += resumed.warnings(step)
    assert [warning.code for warning in told] == ["feature_collapse"]
