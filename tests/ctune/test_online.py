"""Looks at the encoder during training: what is asked about, the best look, the alarms."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctune.backbones import Encoder, build_encoder
from ctune.child import StopRequest
from ctune.config import RunConfig, resolve
from ctune.events import EventBase, Metrics, Warned
from ctune.features import RunImages
from ctune.ingest import ingest
from ctune.methods.base import StagePlan
from ctune.online import Look, OnlineEvaluation, OnlineState, alarms
from ctune.store import PackedStore
from tests.squares import noisy_square, tiny_config, write_archive


def look(step: int, knn: float, *, spread: float = 0.5, rank: float = 8.0) -> Look:
    values = {"online_knn_top1": knn, "online_feature_std": spread, "online_rankme": rank}
    return Look(stage="s", step=step, values=values)


def codes(*looks: Look, num_queries: int = 10_000) -> list[list[str]]:
    """Return the codes of the warnings after each look."""
    state, told = OnlineState(first=looks[0]), []
    for seen in looks:
        found, state = alarms(state, seen, num_queries=num_queries)
        told.append([warning.code for warning in found])
        best = state.bests.get("s")
        if best is None or seen.values["online_knn_top1"] > best.values["online_knn_top1"]:
            state = state.model_copy(update={"bests": {"s": seen}})
    return told


def test_a_falling_knn_is_told_once_after_two_looks() -> None:
    assert codes(look(0, 0.3), look(1, 0.8), look(2, 0.7), look(3, 0.6), look(4, 0.5)) == [
        [], [], [], ["knn_falling"], [],
    ]  # fmt: skip


def test_a_dip_is_no_alarm_and_neither_is_noise() -> None:
    assert codes(look(0, 0.8), look(1, 0.7), look(2, 0.79), look(3, 0.7)) == [[], [], [], []]
    # With 20 questions two standard errors are 0.18.
    falling = (look(0, 0.8), look(1, 0.7), look(2, 0.65), look(3, 0.7))
    assert codes(*falling, num_queries=20) == [[], [], [], []]


@pytest.mark.parametrize("end", [{"spread": 0.01}, {"rank": 1.1}])
def test_a_collapse_is_told_once(end: dict[str, float]) -> None:
    told = codes(look(0, 0.3), look(1, 0.3), look(2, 0.3, **end), look(3, 0.3, **end))
    assert told == [[], [], ["collapse"], []]


def test_vectors_that_were_alike_from_the_start_are_no_collapse() -> None:
    start = {"spread": 0.02, "rank": 1.2}
    assert codes(look(0, 0.3, **start), look(1, 0.3, **start)) == [[], []]


class Bench:
    def __init__(self, store: Path, cache_dir: Path, **online: object) -> None:
        settings = {"knn_k": 3, "online": online}
        config = resolve(RunConfig.model_validate(tiny_config(evaluation=settings)))
        packed = PackedStore(store)
        self.told: list[EventBase] = []
        self.encoder: Encoder = build_encoder(config.encoder, pool="auto", encoder_dir=None)
        self.images = RunImages(
            packed, cache_dir, labelled_only=False, emit=self.told.append, stop=StopRequest()
        )
        self.online = OnlineEvaluation(
            config,
            self.encoder,
            images=self.images,
            summary=packed.manifest.summary,
            device=torch.device("cpu"),
            emit=self.told.append,
        )


def test_each_step_is_looked_at_once_and_the_best_is_kept(store: Path, tmp_path: Path) -> None:
    bench = Bench(store, tmp_path)
    assert bench.online.look("contrastive", 0), "the first look is the best so far"
    assert not bench.online.look("contrastive", 0)
    assert not bench.online.look("contrastive", 4), "equal: the earlier one stays"
    told = [event for event in bench.told if isinstance(event, Metrics)]
    assert [event.step for event in told] == [0, 4]
    assert set(told[0].values) == {"online_knn_top1", "online_rankme", "online_feature_std"}
    assert told[0].values == told[1].values
    assert bench.online.state.bests["contrastive"].step == 0


def test_an_encoder_that_collapses_is_told(store: Path, tmp_path: Path) -> None:
    bench = Bench(store, tmp_path)
    bench.online.look("contrastive", 0)
    with torch.no_grad():
        for parameter in bench.encoder.parameters():
            parameter.zero_()
        bench.encoder.backbone.norm.bias.fill_(1)  # type: ignore[operator, union-attr]
    bench.online.look("contrastive", 1)
    assert [event.code for event in bench.told if isinstance(event, Warned)] == ["collapse"]


def test_the_scored_split_is_never_asked_about(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    val = {f"val/{name}/v{n}.png": noisy_square(c, rng)
           for c, name in enumerate(("red", "green", "blue")) for n in range(2)}  # fmt: skip
    for name, others, asked in (("without", {}, "train"), ("with", val, "val")):
        archive = write_archive(tmp_path / f"{name}.zip", others=others)
        ingest(archive, tmp_path / name)
        bench = Bench(tmp_path / name, tmp_path / f"{name}-cache")
        bench.online.look("contrastive", 0)
        made = {path.name for path in (tmp_path / f"{name}-cache").iterdir()}
        assert made == {f"{split}-16" for split in ("train", asked)}


def test_no_image_votes_on_itself(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, asked = Bench(store, tmp_path), []
    encode = bench.images.encode

    def noted(*args: Any, positions: Any, **kwargs: Any) -> torch.Tensor:
        asked.append(set(positions.tolist()))
        return encode(*args, positions=positions, **kwargs)

    monkeypatch.setattr(bench.images, "encode", noted)
    bench.online.look("contrastive", 0)
    assert len(asked) == 2 and not set.intersection(*asked)
    assert len(set.union(*asked)) == len(bench.images.labels("train"))


def test_stages_without_looks(store: Path, tmp_path: Path) -> None:
    def plan(*, trains_encoder: bool) -> StagePlan:
        return StagePlan("s", 100, 100, lambda: None, trains_encoder=trains_encoder)  # type: ignore[arg-type, return-value]

    bench = Bench(store, tmp_path)
    assert bench.online.interval_steps(plan(trains_encoder=True)) == 10
    assert bench.online.interval_steps(plan(trains_encoder=False)) is None
    bench = Bench(store, tmp_path, every_steps=7)
    assert bench.online.interval_steps(plan(trains_encoder=True)) == 7
    bench = Bench(store, tmp_path, every_steps=None)
    assert bench.online.interval_steps(plan(trains_encoder=True)) is None
