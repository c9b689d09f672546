"""What a run measures: the protocols it asks for, with what they need."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ctune.backbones import build_encoder
from ctune.child import StopRequest
from ctune.config import RunConfig
from ctune.errors import DivergedError
from ctune.events import EventBase, Warned
from ctune.features import RunImages
from ctune.figures_file import FiguresWriter
from ctune.nnclr_head import NNCLRHead
from ctune.rundir import RunDir
from ctune.schema import JsonObject
from ctune.scoring import Scoring
from ctune.store import PackedStore
from tests.squares import tiny_config

SPLIT = ["train/blue/000.png", "train/green/003.png", "train/red/015.png"]


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


def test_protocols_that_look_at_images(store: Path, tmp_path: Path) -> None:
    told: list[EventBase] = []
    asked = {
        "protocols": ["augmentation_invariance", "color_histogram", "low_shot"],
        "augmentation_invariance": {"views": "byol", "num_views": 2, "num_images": 7},
        "low_shot": {"shots": [1], "shares": [], "splits": {"msn": [SPLIT]}},
    }
    results = scoring(store, tmp_path, told, **asked).score("before")
    assert not [event for event in told if isinstance(event, Warned)]
    invariance = results["augmentation_invariance"]
    assert invariance["settings"] == {"views": "byol", "num_views": 2, "num_images": 7}
    assert 0 < invariance["unnormalized"] <= 1
    colours = results["color_histogram"]
    assert colours["settings"] == {"num_bins": 64, "num_images": 18}
    packed = PackedStore(store)
    uniform = [
        abs(np.histogram(channel, range(0, 257, 4))[0] / channel.size - 1 / 64)
        for n in packed.indices("test")
        for channel in np.moveaxis(np.asarray(packed.image(int(n))), 2, 0)
    ]
    assert colours["uniform_l1"] == pytest.approx(np.mean(uniform))
    assert results["low_shot"]["settings"]["num_images"] == {"1_shot": 3, "msn": 3}


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ([*SPLIT, "train/red/999.png"], "no train image is called 'train/red/999.png'"),
        (["000.png"], "more than one train image is called '000.png'"),
        (["test/red/000.png"], "no train image is called 'test/red/000.png'"),
    ],
)
def test_a_split_that_does_not_fit_the_data_is_told(
    store: Path, tmp_path: Path, split: list[str], message: str
) -> None:
    told: list[EventBase] = []
    asked = {"shots": [], "shares": [], "splits": {"msn": [split]}}
    results = scoring(store, tmp_path, told, protocols=["low_shot"], low_shot=asked).score("before")
    assert results == {}
    assert message in next(event for event in told if isinstance(event, Warned)).message


def test_an_encoder_is_fine_tuned_on_a_share(store: Path, tmp_path: Path) -> None:
    told: list[EventBase] = []
    asked = {"shots": [], "shares": [0.5], "finetune_shares": [0.5], "finetune_epochs": 2}
    scores = scoring(store, tmp_path, told, protocols=["low_shot"], low_shot=asked, map=[])
    results = scores.score("before")
    assert not [event for event in told if isinstance(event, Warned)]
    assert set(results["low_shot"]) == {"50_percent", "50_percent_finetuned", "settings"}
    assert 0 <= results["low_shot"]["50_percent_finetuned"]["top1"] <= 1
    assert results["low_shot"]["settings"]["finetune_epochs"] == 2
    assert scores.score("after") == results, "the encoder itself is not touched"


def test_a_fine_tuning_that_fails_is_told(
    store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(*args: object, **options: object) -> None:
        raise DivergedError("the loss is not finite")

    monkeypatch.setattr("ctune.scoring.fine_tune", diverge)
    told: list[EventBase] = []
    asked = {"shots": [1], "shares": [], "finetune_shares": [0.5]}
    scores = scoring(store, tmp_path, told, protocols=["low_shot"], low_shot=asked, map=[])
    assert set(scores.score("before")["low_shot"]) == {"1_shot", "settings"}
    (message,) = [event.message for event in told if isinstance(event, Warned)]
    assert message == "low_shot, 50_percent_finetuned could not be measured: the loss is not finite"


def test_the_head_of_neighbours_is_scored_with_its_queue(store: Path, tmp_path: Path) -> None:
    """A queue that holds the projections of the held-out images themselves knows all of them."""
    told: list[EventBase] = []
    scores = scoring(store, tmp_path, told, protocols=[], map=[])
    head = NNCLRHead(24, proj_hidden_dim=8, pred_hidden_dim=8, out_dim=16, queue_size=24)
    modules = nn.ModuleDict({"nnclr_head": head})
    assert "nnclr_head" not in scores.score("after", modules), "a queue without any label"
    heldout = scores._images.features(scores._encoder, "test", torch.device("cpu"))
    head.eval()
    z = nn.functional.normalize(head.projector(heldout.features))
    head.train()
    wrong = heldout.labels.clone()
    wrong[:9] = (wrong[:9] + 1) % 3
    for labels, share in ((heldout.labels, 1.0), (wrong, 0.5)):
        with torch.no_grad():
            head.queue.features[:18], head.queue.labels[:18] = z, labels
        found = scores.score("after", modules)["nnclr_head"]
        assert found == {"knn_top1": share, "settings": {"k": 1, "queue_size": 24}}
    assert head.training, "as it was before"
