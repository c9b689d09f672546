"""The baseline that reconstructs and contrasts at once."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ctune.encoders import KnownStart
from ctune.events import Metrics
from ctune.methods.base import Batch, Program, Stage, StepOutput
from ctune.methods.mae_config import MaePretrainConfig
from ctune.methods.mae_ct.combined import (
    CombinedPretraining,
    ShortcutWatch,
    combined_plan,
)
from ctune.methods.mae_ct.combined_config import CombinedConfig
from ctune.methods.mae_stage import mae_plan
from ctune.nnclr_head import NNCLRHead
from ctune.schema import JsonObject
from ctune.seeding import seed_everything
from ctune.train import fit
from ctune.unit_length import unit_length
from tests.ctune.methods.test_contract import Bench, same

TINY: JsonObject = {
    "epochs": 3,
    "batch_size": 12,
    "mask_ratio": 0.5,
    "decoder_embed_dim": 16,
    "decoder_depth": 1,
    "decoder_num_heads": 2,
    "precision": "fp32",
    "warmup_epochs": 1,
}


class CombinedBench(Bench):
    """A program of the one stage, on the tiny data set."""

    def __init__(self, store: Path, cache_dir: Path, *, pool: str = "cls", **changes: Any) -> None:
        super().__init__("mae", store, cache_dir, {"pool": pool})
        given = CombinedConfig(**TINY | changes)
        self.settings = given.model_copy(update=given.settled(KnownStart(pretrained=False)))
        seed_everything(1, "nnclr_head")
        self.head = NNCLRHead(
            self.encoder.embed_dim, proj_hidden_dim=16, pred_hidden_dim=16, out_dim=8, queue_size=24
        )
        plan, modules = combined_plan(self.settings, self.context(), self.head)
        everything = {"encoder": self.encoder, "nnclr_head": self.head, **modules}
        self.program = Program(nn.ModuleDict(everything), [plan])

    def step(self) -> tuple[Stage, StepOutput, Batch]:
        """Return the stage, and output of its first batch, whose gradients are there."""
        stage = self.program.plans[0].start()
        return stage, *one_step(stage)


def one_step(stage: Stage) -> tuple[StepOutput, Batch]:
    stage.method.train()
    batch = stage.source.fetch(stage.sampler.batches(0)[0])
    output = stage.method.step(batch, torch.Generator().manual_seed(3))
    torch.autograd.backward(output.loss)
    return output, batch


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}


def test_the_settings_are_those_of_mae_with_two_views() -> None:
    config, mae = CombinedConfig(), MaePretrainConfig(recipe="jku")
    start = KnownStart(pretrained=False)
    assert config.settled(start) == mae.settled(start)
    added = {"nnclr_weight", "detach_head"}
    differing = mae.settled(start).keys() | added
    assert config.model_dump(exclude=differing) == mae.model_dump(exclude=differing)
    assert (config.nnclr_weight, config.detach_head) == (1e-3, False)
    planned = CombinedConfig(batch_size=10, epochs=3).planned(48)
    assert (planned.name, planned.total_steps, planned.image_passes) == ("combined", 12, 240)


@pytest.mark.parametrize(
    "values",
    [{"num_views": 1}, {"num_views": 3}, {"accumulate_steps": 2}, {"batch_size": 1},
     {"nnclr_weight": 0}, {"mask_ratio": 0}],
)  # fmt: skip
def test_what_cannot_be_is_refused(values: JsonObject) -> None:
    with pytest.raises(ValidationError):
        CombinedConfig(**values)


def test_the_loss_is_the_sum_and_the_factor_scales_its_gradient(
    store: Path, tmp_path: Path
) -> None:
    small, large, alone = (
        CombinedBench(store, tmp_path / str(weight), nnclr_weight=weight)
        for weight in (0.25, 0.75, 0.5)
    )
    output = small.step()[1]
    parts = output.metrics
    torch.testing.assert_close(output.loss, parts["mae_loss"] + 0.25 * parts["nnclr_loss"])
    assert torch.equal(large.step()[1].metrics["nnclr_loss"], parts["nnclr_loss"])
    plan, modules = mae_plan(alone.settings, alone.context())
    mae, _ = one_step(plan.start())
    assert torch.equal(mae.loss, parts["mae_loss"])
    for name, gradient in gradients(alone.encoder).items():
        third, whole = gradients(small.encoder)[name], gradients(large.encoder)[name]
        torch.testing.assert_close(whole - gradient, 3 * (third - gradient), rtol=1e-3, atol=1e-6)
    for name, third in gradients(small.head).items():
        torch.testing.assert_close(gradients(large.head)[name], 3 * third, rtol=1e-4, atol=1e-7)
    assert modules.keys() < small.program.modules.keys()


def test_a_detached_head_learns_but_does_not_teach(store: Path, tmp_path: Path) -> None:
    taught, watched, alone = (
        CombinedBench(store, tmp_path / str(n), nnclr_weight=1.0, detach_head=n == 1)
        for n in range(3)
    )
    taught.step()
    watched.step()
    one_step(mae_plan(alone.settings, alone.context())[0].start())
    expected, found = gradients(alone.encoder), gradients(watched.encoder)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())
    differing = gradients(taught.encoder)
    assert not torch.equal(differing["backbone.norm.weight"], expected["backbone.norm.weight"])
    for name, gradient in gradients(taught.head).items():
        assert torch.equal(gradients(watched.head)[name], gradient)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_the_head_sees_the_pooled_visible_patches_of_each_view(
    pool: str, store: Path, tmp_path: Path
) -> None:
    bench = CombinedBench(store, tmp_path, pool=pool)
    projector = copy.deepcopy(bench.head.projector).train()
    stage, _, batch = bench.step()
    assert isinstance(stage.method, CombinedPretraining)
    _, latent = stage.method.masked.reconstruct(batch, torch.Generator().manual_seed(3))
    assert latent.shape == (24, 1 + 2, 24), "half of four patches, and the class token"
    first = latent[:12]
    pooled = first[:, 0] if pool == "cls" else first[:, 1:].mean(dim=1)
    torch.testing.assert_close(bench.head.queue.features[:12], unit_length(projector(pooled)))
    assert bench.head.queue.ids[:12].tolist() == batch.positions.tolist()
    assert bench.head.queue.labels[:12].tolist() == batch.labels.tolist()


def test_in_half_precision_both_losses_are_exact(store: Path, tmp_path: Path) -> None:
    exact = CombinedBench(store, tmp_path / "exact").step()[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = CombinedBench(store, tmp_path / "half").step()[1]
    for name in ("mae_loss", "nnclr_loss"):
        assert half.metrics[name].dtype == torch.float32
        torch.testing.assert_close(half.metrics[name], exact.metrics[name], rtol=0.05, atol=0)
        assert not torch.equal(half.metrics[name], exact.metrics[name]), "autocast was on"


def test_unlabelled_images_have_no_accuracy(store: Path, tmp_path: Path) -> None:
    bench = CombinedBench(store, tmp_path)
    assert "nn_accuracy" in bench.step()[1].metrics
    context = bench.context()
    unlabelled = replace(context, train_labels=context.train_labels * 0 - 1)
    plan, _ = combined_plan(bench.settings, unlabelled, bench.head)
    output, _ = one_step(plan.start())
    assert "nn_accuracy" not in output.metrics
    assert {"nn_agreement", "z_std", "drawn_share", "feature_spread"} <= output.metrics.keys()


def test_it_learns_and_goes_on_bit_for_bit(store: Path, tmp_path: Path) -> None:
    def bench(name: str) -> CombinedBench:
        return CombinedBench(store, tmp_path / name, nnclr_weight=0.5, base_lr=0.02)

    whole, again = bench("whole"), bench("again")
    start = {n: p.detach().clone() for n, p in whole.program.modules.named_parameters()}
    plan = whole.program.plans[0]
    stage = plan.start()
    kept: dict[str, Any] = {}

    def save(step: int) -> None:
        if step == 7:
            kept.update(
                copy.deepcopy(
                    {"m": whole.program.modules.state_dict(), "o": stage.optimizer.state_dict()}
                )
            )

    fit(stage, name=plan.name, seed=1, start_step=0, hooks=whole.hooks(save))
    again.program.modules.load_state_dict(kept["m"])
    resumed = again.program.plans[0].start()
    resumed.optimizer.load_state_dict(kept["o"])
    fit(resumed, name=plan.name, seed=1, start_step=7, hooks=again.hooks(lambda step: None))
    expected, found = whole.program.modules.state_dict(), again.program.modules.state_dict()
    for name, value in expected.items():
        assert same(value, found[name]), name
    still = {n for n, p in whole.program.modules.named_parameters() if torch.equal(p, start[n])}
    frozen = {"encoder.backbone.pos_embed", "mae_decoder.pos_embed"}
    assert {name for name in still if "target_projector" not in name} == frozen
    events = [event.values for event in whole.told if isinstance(event, Metrics)]
    told = [values for values in events if "mae_loss" in values]
    for loss in ("mae_loss", "nnclr_loss"):
        first, last = told[0][loss], told[-1][loss]
        assert first is not None and last is not None
        assert last < first, loss


def shortcuts(losses: list[float], total_steps: int) -> list[tuple[int, str]]:
    watch = ShortcutWatch(total_steps)
    found = []
    for step, loss in enumerate(losses):
        watch.observe(torch.tensor(loss))
        again = ShortcutWatch(total_steps)
        again.load_state_dict(watch.state_dict())
        watch = again
        found += [(step, warning.code) for warning in watch.warnings(step)]
    return found


def test_a_loss_that_falls_at_once_is_told() -> None:
    assert shortcuts([4.0] * 9 + [2.9] * 9, 100) == [(9, "shortcut_suspected")], (
        "ten steps at least"
    )
    assert shortcuts([4.0] * 9 + [3.1] * 9, 100) == []
    assert shortcuts([4.0] * 10 + [1.0] * 9, 100) == [], "later it may"
    assert shortcuts([4.0] * 30 + [2.9] * 10, 4000) == [(39, "shortcut_suspected")]
    noisy = [4.0, 2.0, 4.0, 2.0] * 10
    assert shortcuts(noisy, 4000) == [], "four steps are averaged at either end"
