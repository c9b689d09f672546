"""Whole runs in real child processes: results, resuming after every kind of end, failures."""

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform

from ctune.child import StopRequest
from ctune.config import RunConfig
from ctune.errors import EncoderError
from ctune.events import (
    CheckpointSaved,
    Evaluated,
    EventBase,
    EventWriter,
    Failed,
    Finished,
    Metrics,
    Stopped,
    Warned,
    read_events,
)
from ctune.figures_file import read_figures
from ctune.methods.base import Program, RunContext
from ctune.methods.linear_probe import method as linear_probe
from ctune.methods.linear_probe.config import LinearProbeConfig
from ctune.pipeline import Run, RunFile
from ctune.rundir import RunDir
from ctune.store import PackedStore
from tests.squares import CLASSES, tiny_config

TENSORS = "tensors.safetensors"


def prepare(
    root: Path, store: Path, config: dict[str, Any], resume_from: tuple[Path, ...] = ()
) -> RunDir:
    run_dir = RunDir(root).create()
    file = {"config": config, "data": str(store), "resume_from": [str(p) for p in resume_from]}
    run_dir.config.write_text(json.dumps(file))
    return run_dir


def start(run_dir: RunDir, module: str = "ctune.run") -> subprocess.Popen[bytes]:
    with run_dir.log.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", module, str(run_dir.root)],
            stdout=log,
            stderr=log,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )


def events(run_dir: RunDir) -> list[EventBase]:
    return [event for event, _ in read_events(run_dir.events)]


def finish(run_dir: RunDir, module: str = "ctune.run") -> Finished:
    assert start(run_dir, module).wait(120) == 0, run_dir.log.read_text()
    last = events(run_dir)[-1]
    assert isinstance(last, Finished)
    return last


def end_when(
    run_dir: RunDir, ready: Callable[[EventBase], bool], with_signal: signal.Signals
) -> None:
    """Start the child and send it a signal as soon as an event satisfies `ready`."""
    child = start(run_dir)
    deadline = time.monotonic() + 60
    while not any(ready(event) for event in events(run_dir)):
        assert child.poll() is None, run_dir.log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    child.send_signal(with_signal)
    child.wait(60)


def saved(stage: str, step: int) -> Callable[[EventBase], bool]:
    return lambda event: (
        isinstance(event, CheckpointSaved) and event.stage == stage and event.step >= step
    )


def series(*run_dirs: RunDir) -> dict[tuple[str, str, int], float | None]:
    """Return (stage, name, step) -> value over the attempts; a later attempt overwrites."""
    return {
        (event.stage, name, event.step): value
        for run_dir in run_dirs
        for event in events(run_dir)
        if isinstance(event, Metrics)
        for name, value in event.values.items()
        if name not in ("images_per_s", "data_wait")
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory, store: Path) -> tuple[RunDir, Finished]:
    run_dir = prepare(tmp_path_factory.mktemp("run") / "a1", store, tiny_config())
    return run_dir, finish(run_dir)


def assert_same_outcome(reference: tuple[RunDir, Finished], *attempts: RunDir) -> None:
    """The last attempt ends like the uninterrupted run, bit for bit, pictures included."""
    run_dir, finished = reference
    result = finish(attempts[-1]).result
    assert result["evaluation"] == finished.result["evaluation"]
    expected = load_file(run_dir.model / "model.safetensors")
    tensors = load_file(attempts[-1].model / "model.safetensors")
    assert expected.keys() == tensors.keys()
    assert all(torch.equal(expected[name], tensors[name]) for name in expected)
    assert series(*attempts) == series(run_dir)
    assert attempts[-1].figures.read_bytes() == run_dir.figures.read_bytes()


def test_result_and_events(uninterrupted: tuple[RunDir, Finished]) -> None:
    run_dir, finished = uninterrupted
    evaluation = finished.result["evaluation"]
    for when in ("before", "after"):
        assert set(evaluation[when]) >= {"knn", "linear_probe", "isotropy"}
        assert 0 <= evaluation[when]["knn"]["top1"] <= 1
    assert evaluation["after"]["classifier"]["top1"] >= 0.9, "colours are easy"
    told = events(run_dir)
    assert [event.seq for event in told] == list(range(len(told)))
    assert [e.when for e in told if isinstance(e, Evaluated)] == ["before", "after"]
    assert {stage for stage, name, _ in series(run_dir) if name == "loss"} == {
        "contrastive",
        "probe",
    }
    # 48 images, batches of 12, 2 views, 3 epochs; the probe sees each image once, cached.
    assert finished.result["image_passes"] == 48 * 2 * 3 + 48
    assert not run_dir.cache.exists()
    check_figures(run_dir)
    warned = {event.code for event in told if isinstance(event, Warned)}
    assert "encoder_from_scratch" in warned


def check_figures(run_dir: RunDir) -> None:
    """The pictures of a run on 18 held-out squares of three colours."""
    found = read_figures(run_dir.figures)
    assert found is not None and found.before is not None and found.after is not None
    assert found.classes == dict(enumerate(CLASSES))
    for figures in (found.before, found.after):
        assert figures.cosines is not None and sum(figures.cosines.intra) == 3 * 15
        assert {one.num_images for one in figures.predictions.values()} == {18}
        assert [len(plane.points) for plane in figures.maps] == [18]
        numbers = {query.image for query in figures.gallery}
        numbers |= {near.image for query in figures.gallery for near in query.neighbours}
        assert numbers <= found.thumbnails.keys()
    assert set(found.before.predictions) == {"linear_probe"}
    assert set(found.after.predictions) == {"linear_probe", "classifier"}


def test_it_looks_at_the_encoder_and_keeps_the_best_checkpoint(
    uninterrupted: tuple[RunDir, Finished],
) -> None:
    run_dir, finished = uninterrupted
    seen = {
        (stage, step): value
        for (stage, name, step), value in series(run_dir).items()
        if name == "online_knn_top1" and value is not None
    }
    assert set(seen) == {("contrastive", step) for step in range(13)}, "the probe changes nothing"
    best = max(seen, key=lambda at: (seen[at], -at[1]))[1]
    last = [event for event in events(run_dir) if isinstance(event, CheckpointSaved)][-1]
    assert last.best == [f"contrastive-{best:08d}"]
    assert set(last.best) <= set(last.kept)
    assert (run_dir.checkpoints / last.best[0]).is_dir()
    assert finished.result["selected"] == {}, "the last weights are handed on unless asked"


def test_the_best_weights_are_handed_on_where_asked(tmp_path: Path, store: Path) -> None:
    config = tiny_config(evaluation={"knn_k": 5, "online": {"select": "best"}})
    # Fine at first; then the rate rises until the weights are ruined.
    config["method"]["contrastive"] |= {
        "lr": 3.0,
        "epochs": 6,
        "warmup_epochs": 5,
        "optimizer": "sgd",
        "momentum": 0.0,
    }
    first = prepare(tmp_path / "a1", store, config)
    end_when(first, saved("probe", 2), signal.SIGKILL)
    second = prepare(tmp_path / "a2", store, config, (first.root,))
    selected = finish(second).result["selected"]
    seen = {
        step: value
        for (_, name, step), value in series(first, second).items()
        if name == "online_knn_top1" and value is not None
    }
    assert selected == {"contrastive": max(seen, key=lambda step: (seen[step], -step))}
    best = load_file(first.checkpoints / f"contrastive-{selected['contrastive']:08d}" / TENSORS)
    exported = load_file(second.model / "model.safetensors")
    weight = "blocks.0.attn.qkv.weight"
    assert torch.equal(best[f"/modules/encoder.backbone.{weight}"], exported[weight])


def test_plain_timm_gives_the_same_vectors(
    uninterrupted: tuple[RunDir, Finished], store: Path
) -> None:
    folder = uninterrupted[0].model
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    config = resolve_model_data_config(model)  # type: ignore[no-untyped-call]
    transform = create_transform(**config, is_training=False)
    packed = PackedStore(store)
    images = [packed.image(int(n)) for n in packed.indices("test")[:4]]
    with torch.no_grad():
        vectors = model(torch.stack([transform(image) for image in images]))
    reference = load_file(folder / "reference" / "vectors.safetensors")
    torch.testing.assert_close(vectors, reference["vectors"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("stage", "step"), [("contrastive", 5), ("probe", 4)])
def test_killed_in_a_stage_it_ends_like_an_uninterrupted_run(
    tmp_path: Path, store: Path, uninterrupted: tuple[RunDir, Finished], stage: str, step: int
) -> None:
    first = prepare(tmp_path / "a1", store, tiny_config())
    end_when(first, saved(stage, step), signal.SIGKILL)
    second = prepare(tmp_path / "a2", store, tiny_config(), (first.root,))
    assert_same_outcome(uninterrupted, first, second)
    assert not any(isinstance(e, Evaluated) and e.when == "before" for e in events(second))


def test_asked_to_stop_it_saves_and_resumes_in_the_same_directory(
    tmp_path: Path, store: Path, uninterrupted: tuple[RunDir, Finished]
) -> None:
    run_dir = prepare(tmp_path / "run", store, tiny_config())
    end_when(run_dir, saved("contrastive", 3), signal.SIGTERM)
    assert isinstance(events(run_dir)[-1], Stopped)
    assert_same_outcome(uninterrupted, run_dir)


def test_a_damaged_checkpoint_is_told_and_the_one_before_is_used(
    tmp_path: Path, store: Path, uninterrupted: tuple[RunDir, Finished]
) -> None:
    first = prepare(tmp_path / "a1", store, tiny_config())
    end_when(first, saved("contrastive", 5), signal.SIGKILL)
    newest = max(first.checkpoints.glob("contrastive-*"))
    with (newest / "tensors.safetensors").open("r+b") as file:
        file.truncate(100)
    second = prepare(tmp_path / "a2", store, tiny_config(), (first.root,))
    assert_same_outcome(uninterrupted, first, second)
    assert "checkpoint_damaged" in {e.code for e in events(second) if isinstance(e, Warned)}


@pytest.mark.slow
def test_another_configuration_does_not_resume(tmp_path: Path, store: Path) -> None:
    run_dir = prepare(tmp_path / "run", store, tiny_config())
    end_when(run_dir, saved("contrastive", 1), signal.SIGTERM)
    prepare(run_dir.root, store, tiny_config(seed=2))
    assert start(run_dir).wait(60) == 1
    last = events(run_dir)[-1]
    assert isinstance(last, Failed)
    assert "another configuration" in last.message
    assert last.fault == "user"


def test_a_diverging_run_fails_with_advice(tmp_path: Path, store: Path) -> None:
    config = tiny_config()
    config["method"]["contrastive"] |= {"lr": 1e30, "clip_grad_norm": None, "optimizer": "sgd"}
    run_dir = prepare(tmp_path / "run", store, config)
    assert start(run_dir).wait(60) == 1
    last = events(run_dir)[-1]
    assert isinstance(last, Failed)
    assert (last.code, last.fault, last.retryable) == ("diverged", "user", False)
    assert "learning rate" in last.hint
    assert not run_dir.model.exists()


def test_all_faults_of_a_config_are_told_at_once(tmp_path: Path, store: Path) -> None:
    config = tiny_config()
    config["encoder"]["image_size_px"] = 17
    config["method"]["contrastive"]["batch_size"] = 1000
    run_dir = prepare(tmp_path / "run", store, config)
    assert start(run_dir).wait(60) == 1
    last = events(run_dir)[-1]
    assert isinstance(last, Failed)
    assert "/encoder/image_size_px" in last.message
    assert "/method/contrastive/batch_size" in last.message


def run_library(config: dict[str, Any], data: Path, out_dir: Path) -> str:
    """Run `ctune.run` in a process of its own and return what it printed."""
    script = (
        "import sys, ctune\n"
        "assert 'torch' not in sys.modules\n"
        "from ctune.errors import CtuneError\n"
        f"try:\n    result = ctune.run({config!r}, {str(data)!r}, {str(out_dir)!r})\n"
        "except CtuneError as error:\n    sys.exit(f'{error.error_code}: {error.message}')\n"
        "print(result['evaluation']['after']['classifier']['top1'])\n"
        "import ctune.run\n"
        "assert callable(ctune.run), 'the module hides the function'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    return done.stdout if done.returncode == 0 else done.stderr


def test_the_library_runs_without_a_service(tmp_path: Path, archive: Path) -> None:
    out_dir, config = tmp_path / "out", tiny_config("linear_probe")
    assert float(run_library(config, archive, out_dir)) >= 0.5
    assert isinstance(events(RunDir(out_dir))[-1], Finished)
    folder = tmp_path / "images"
    with zipfile.ZipFile(archive) as packed:
        packed.extractall(folder)
    said = run_library(config, folder, out_dir)
    assert said.startswith("invalid_config") and "other images" in said
    assert isinstance(events(RunDir(out_dir))[-1], Failed)
    of_folder = tmp_path / "of folder"
    first = run_library(config, folder, of_folder)
    assert float(first) >= 0.5
    assert run_library(config, folder, of_folder) == first, "the same folder resumes"
    assert list(of_folder.glob("*.zip")) == []


@pytest.mark.parametrize("source", ["model", "file"])
def test_a_run_reads_the_heads_of_the_model_it_starts_from(
    tmp_path: Path, store: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = RunDir(tmp_path / "a").create()
    made = execute(RunFile(config=RunConfig(**tiny_config("mae")), data=store), first)
    assert made["provenance"]["parent"] is None
    encoder = {"source": "file", "path": str(first.model)}
    if source == "model":
        encoder = {"source": "model", "id": "mdl_1"}
    file = RunFile(
        config=RunConfig(**tiny_config("linear_probe", encoder=encoder)),
        data=store,
        encoder_dir=first.model if source == "model" else None,
    )
    read: dict[str, dict[str, torch.Tensor] | None] = {}

    def build(config: LinearProbeConfig, context: RunContext) -> Program:
        read.update({name: context.start_head(name) for name in ("mae_decoder", "nnclr_head")})
        return build_probe(config, context)

    build_probe = linear_probe.build
    monkeypatch.setattr(linear_probe, "build", build)
    second = RunDir(tmp_path / "b").create()
    info = execute(file, second)
    wanted = load_file(first.model / "mae_decoder.safetensors")
    found = read["mae_decoder"]
    assert found is not None and found.keys() == wanted.keys()
    assert all(torch.equal(found[key], value) for key, value in wanted.items())
    assert read["nnclr_head"] is None
    sha256 = made["files"]["model.safetensors"]
    model_id = "mdl_1" if source == "model" else None
    assert info["provenance"]["parent"] == {"model_id": model_id, "weights_sha256": sha256}
    assert sha256 in (second.model / "README.md").read_text(encoding="utf-8")
    assert "mae_decoder.safetensors" not in info["files"], "this run has no decoder"


def test_a_run_does_not_start_from_damaged_weights(tmp_path: Path, store: Path) -> None:
    first = RunDir(tmp_path / "a").create()
    execute(RunFile(config=RunConfig(**tiny_config("linear_probe")), data=store), first)
    weights = first.model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    config = tiny_config("linear_probe", encoder={"source": "file", "path": str(first.model)})
    with pytest.raises(EncoderError, match=r"model\.safetensors has sha256"):
        execute(RunFile(config=RunConfig(**config), data=store), RunDir(tmp_path / "b").create())


def execute(file: RunFile, run_dir: RunDir) -> dict[str, Any]:
    """Do a run in this process and return its `model.json`."""
    with closing(EventWriter(run_dir.events)) as events:
        result = Run(file, run_dir, events=events, stop=StopRequest()).execute()
    return dict(result["model"])
