"""What a run measures: the protocols it asks for, with what they need."""

from pathlib import Path

import torch

from ctune.backbones import build_encoder
from ctune.child import StopRequest
from ctune.config import RunConfig
from ctune.events import EventBase, Warned
from ctune.features import RunImages
from ctune.figures_file import FiguresWriter
from ctune.rundir import RunDir
from ctune.schema import JsonObject
from ctune.scoring import Scoring
from ctune.store import PackedStore
from tests.squares import tiny_config


def scoring(store: Path, tmp_path: Path, told: list[EventBase], **evaluation: object) -> Scoring:
    config = RunConfig.model_validate(tiny_config(evaluation={"knn_k": 5, **evaluation}))
    packed = PackedStore(store)
    torch.manual_seed(0)
    return Scoring(
        config,
        build_encoder(config.encoder, pool="auto", encoder_dir=None),
        images=RunImages(
            packed, tmp_path / "cache", labelled_only=False, emit=told.append, stop=StopRequest()
        ),
        summary=packed.manifest.summary,
        device=torch.device("cpu"),
        emit=told.append,
        figures=FiguresWriter(RunDir(tmp_path / "run").create(), [], packed),
    )


def test_the_full_probe_trains_on_crops_of_the_images(store: Path, tmp_path: Path) -> None:
    told: list[EventBase] = []
    wanted = {"protocol": "full", "recipe": "mae_ct"}
    results: JsonObject = scoring(
        store, tmp_path, told, protocols=["linear_probe"], linear_probe=wanted
    ).score("before")
    probe = results["linear_probe"]
    assert not [event for event in told if isinstance(event, Warned)]
    assert probe["settings"]["protocol"] == "full"
    assert 0 <= probe["top1"] <= probe["top1_max_on_test"] <= 1


def test_a_warning_is_given_once_for_both_evaluations(store: Path, tmp_path: Path) -> None:
    told: list[EventBase] = []
    scores = scoring(store, tmp_path, told, protocols=["knn", "isotropy"], map=[])
    with torch.no_grad():
        for parameter in scores._encoder.parameters():
            parameter.zero_()
    assert set(scores.score("before")) == set(scores.score("after")) == {"knn"}
    codes = [event.code for event in told if isinstance(event, Warned)]
    assert [code for code in codes if code in ("zero_vectors", "not_scored")] == [
        "zero_vectors",
        "not_scored",
    ]
