"""Looks at held-out images: the same ones under the same masks, and what their loss says."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ctune.child import StopRequest, StopRequested
from ctune.events import EventBase, Metrics, Warned
from ctune.figures_file import read_figures
from ctune.masked_autoencoder import MaskedAutoencoder
from ctune.methods.base import RunContext
from ctune.methods.mae_monitor import RISEN_LOOKS, HeldoutReconstruction
from ctune.patches import patchify
from ctune.preprocess import Preprocessing
from ctune.train import fit
from tests.ctune.methods.test_contract import Bench
from tests.ctune.methods.test_mae import encoder
from tests.ctune.test_early_end import run
from tests.ctune.test_pipeline import prepare, series
from tests.squares import tiny_config

SIDE, PATCH, IMAGES = 16, 4, 6
PREPROCESSING = Preprocessing(SIDE, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def autoencoder(*, norm_pix_loss: bool = True) -> MaskedAutoencoder:
    made = MaskedAutoencoder(
        encoder().backbone,
        16,
        decoder_depth=1,
        decoder_num_heads=2,
        norm_pix_loss=norm_pix_loss,
    )
    made.initialise_encoder()
    return made


def pixels() -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(256, (IMAGES, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)


def monitor(total_steps: int = 1000, **changes: Any) -> HeldoutReconstruction:
    noise = torch.rand(IMAGES, 16, generator=torch.Generator().manual_seed(5))
    settings: dict[str, Any] = {
        "preprocessing": PREPROCESSING,
        "mask_ratio": 0.75,
        "stage": "mae",
        "total_steps": total_steps,
        "autocast_dtype": None,
    }
    return HeldoutReconstruction(pixels(), noise, **settings | changes)


def losses(told: list[EventBase]) -> dict[int, float]:
    return {e.step: e.values["val_loss"] or 0 for e in told if isinstance(e, Metrics)}


@pytest.mark.parametrize(("total", "steps"), [(25, [9, 19, 24]), (1, [0]), (5001, [50, 101])])
def test_looks_are_a_hundred_at_most_and_the_last_is_at_the_end(
    total: int, steps: list[int]
) -> None:
    made, watched, told = autoencoder().train(), monitor(total), list[EventBase]()
    for step in range(min(total, 110)):
        told += watched.look(step, made, torch.tensor(1.0))
    assert list(losses(told)) == steps


def test_a_look_sees_the_same_each_time_and_changes_nothing() -> None:
    made, watched = autoencoder().train(), monitor()
    made.encoder.blocks[0].attn.proj_drop.p = 0.5  # type: ignore[union-attr]
    weights = {name: value.clone() for name, value in made.state_dict().items()}
    state = torch.get_rng_state()
    first = losses(watched.look(9, made, torch.tensor(1.0)))[9]
    assert torch.equal(state, torch.get_rng_state()), "no random number is used"
    assert losses(watched.look(19, made, torch.tensor(1.0)))[19] == first
    assert made.training and all(p.grad is None for p in made.parameters())
    assert all(torch.equal(value, weights[name]) for name, value in made.state_dict().items())
    with torch.no_grad():
        expected = made.eval()(PREPROCESSING.normalise(pixels()), 0.75, watched.noise)
    assert first == pytest.approx(float(expected.loss), rel=1e-6)


def warned(held_out: list[float], trained: list[float], *, resume_at: int = -1) -> list[int]:
    """Return the looks after which `overfitting` was told, for losses as they are given."""
    made, watched, found = autoencoder(), monitor(10_000), list[int]()
    for look, (loss, train_loss) in enumerate(zip(held_out, trained, strict=True)):
        if look == resume_at:
            kept, watched = watched, monitor(10_000)
            watched.load_state_dict(kept.state_dict())
        given = made(torch.randn(1, 3, SIDE, SIDE), 0.75)._replace(loss=torch.tensor(loss))
        watched._reconstruct = lambda _, given=given: given  # type: ignore[method-assign,misc]
        told = watched.look(100 * look + 99, made, torch.tensor(train_loss))
        found += [look for event in told if isinstance(event, Warned)]
        assert [e.code for e in told if isinstance(e, Warned)] in ([], ["overfitting"])
    return found


FALLING = [1 - look / 100 for look in range(30)]
RISING = [0.9, 0.8, 0.7, *[0.74 + look / 100 for look in range(27)]]
"""More than 5 % over its lowest from the fourth look on."""


@pytest.mark.parametrize("resume_at", [-1, 1, 8, 20])
def test_overfitting_is_told_once_at_the_tenth_look_above_the_lowest(resume_at: int) -> None:
    assert warned(RISING, FALLING, resume_at=resume_at) == [2 + RISEN_LOOKS]


@pytest.mark.parametrize(
    ("held_out", "trained"),
    [
        (FALLING, FALLING),
        (RISING, [0.5] * 30),
        (RISING, [0.5, 0.5, *[0.6] * 28]),
        ([0.7, *[0.73] * 29], FALLING),
        ([0.7, *[0.8, 0.8, 0.8, 0.8, 0.7] * 5, 0.7, 0.7, 0.7, 0.7], FALLING),
        ([0.7, *[math.nan] * 29], FALLING),
    ],
    ids=["falls", "train stays", "train rises", "under 5 %", "comes back", "not finite"],
)
def test_nothing_else_is_overfitting(held_out: list[float], trained: list[float]) -> None:
    assert warned(held_out, trained) == []


@pytest.mark.parametrize("norm", [True, False])
def test_pictures_are_the_image_what_was_seen_and_the_reconstruction(norm: bool) -> None:
    made, watched = autoencoder(norm_pix_loss=norm).train(), monitor()
    assert watched.pictures() == []
    watched.look(9, made, torch.tensor(1.0))
    (table,) = watched.pictures()
    assert table.images.shape == (4, 3, SIDE, SIDE, 3) and len(table.columns) == 3
    original, seen, whole = (
        torch.from_numpy(table.images[:, column].copy()).permute(0, 3, 1, 2) for column in range(3)
    )
    assert torch.equal(original, pixels()[:4])
    mask = watched.noise[:4].argsort(1).argsort(1) >= 4
    visible = patchify(pixels()[:4], PATCH)[~mask]
    assert torch.equal(patchify(seen, PATCH)[~mask], visible)
    assert torch.equal(patchify(whole, PATCH)[~mask], visible)
    mean = (torch.tensor(PREPROCESSING.mean) * 255).round().to(torch.uint8)
    assert bool((patchify(seen, PATCH)[mask].view(-1, 16, 3) == mean).all())
    with torch.no_grad():
        result = made.eval()(PREPROCESSING.normalise(pixels()), 0.75, watched.noise)
    pred = result.pred[:4]
    if norm:
        target = patchify(PREPROCESSING.normalise(pixels()), PATCH)[:4]
        variance, average = torch.var_mean(target, dim=2, keepdim=True)
        pred = pred * (variance + 1e-6).sqrt() + average
    wanted = pred[mask].view(-1, 16, 3) * torch.tensor(PREPROCESSING.std)
    wanted = ((wanted + torch.tensor(PREPROCESSING.mean)) * 255).clamp(0, 255)
    found = patchify(whole, PATCH)[mask].view(-1, 16, 3)
    assert float((found - wanted).abs().max()) <= 0.51


def test_half_precision_on_the_cpu_is_close() -> None:
    made = autoencoder().train()
    found = [
        losses(monitor(autocast_dtype=dtype).look(9, made, torch.tensor(1.0)))[9]
        for dtype in (None, torch.bfloat16)
    ]
    assert found[0] != found[1] and found[1] == pytest.approx(found[0], rel=0.02)


class Unseen(Bench):
    """A data set in which nothing is held out."""

    def context(self) -> RunContext:
        return replace(super().context(), heldout_images=None)


def test_without_held_out_images_the_weights_are_the_same(store: Path, tmp_path: Path) -> None:
    weights = []
    for bench in (Bench("mae", store, tmp_path / "a"), Unseen("mae", store, tmp_path / "b")):
        plan = bench.program.plans[0]
        fit(plan.start(), name="mae", seed=1, start_step=0, hooks=bench.hooks(lambda step: None))
        weights.append(bench.program.modules.state_dict())
    watched, alone = weights
    assert watched.keys() - alone.keys() == {
        f"mae_monitor.{name}" for name in ("best_loss", "train_loss_at_best", "risen", "shown")
    }
    assert all(torch.equal(watched[name], value) for name, value in alone.items())


def test_a_run_leaves_pictures_and_a_resumed_one_the_same(store: Path, tmp_path: Path) -> None:
    whole = prepare(tmp_path / "whole", store, tiny_config("mae"))
    run(whole)
    steps = [step for stage, name, step in series(whole) if (stage, name) == ("mae", "val_loss")]
    assert steps == [9, 11]
    figures = read_figures(whole.figures)
    assert figures is not None and figures.after is not None
    (table,) = figures.tables
    assert np.shape(table.rows) == (4, 3)

    def stop_midway(event: EventBase, stop: StopRequest) -> None:
        if isinstance(event, Metrics) and "loss" in event.values and event.step == 9:
            stop.request("asked to stop")

    first = prepare(tmp_path / "a1", store, tiny_config("mae"))
    with pytest.raises(StopRequested):
        run(first, stop_midway)
    second = prepare(tmp_path / "a2", store, tiny_config("mae"), (first.root,))
    run(second)
    assert series(first, second) == series(whole)
    assert second.figures.read_bytes() == whole.figures.read_bytes()
