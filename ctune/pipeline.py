"""A whole run: evaluate, train the stages, evaluate again, export. Resumes where a run ended."""

import importlib
import platform
import shutil
import sys
import time
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ctune.acceleration import accelerate
from ctune.backbones import Encoder, build_encoder
from ctune.checkpoint import CheckpointManifest
from ctune.child import StopRequest
from ctune.config import RunConfig, check, resolve
from ctune.device import choose_device
from ctune.distributed import World
from ctune.early_end import EarlyEnd
from ctune.encoders import FileEncoder, ModelEncoder, TimmEncoder
from ctune.errors import ConfigError, OutOfMemoryError
from ctune.events import (
    EventBase,
    EventWriter,
    Progress,
    StageStarted,
    Started,
    Warned,
    describe,
)
from ctune.export import export_model
from ctune.features import RunImages
from ctune.figures_file import FiguresWriter
from ctune.manifest import Split
from ctune.methods.base import Program, RunContext
from ctune.model_dir import HEADS, WEIGHTS, check_hashes, read_info
from ctune.online import OnlineEvaluation
from ctune.resume import newest_checkpoint, run_fingerprint
from ctune.rundir import RunDir
from ctune.schema import JsonObject, Schema
from ctune.scoring import Scoring
from ctune.seeding import seed_everything
from ctune.store import PackedStore
from ctune.training import Training
from ctune.weights import read_head

REFERENCE_IMAGES = 4
NO_HELDOUT = Warned(
    code="no_heldout_images",
    message="the data set has neither test nor val images: nothing is evaluated",
    hint="upload a data set with a test split, or let ingestion make one",
)


class RunFile(Schema):
    """`config.json` of a run directory."""

    config: RunConfig
    data: Path
    """The packed store."""
    resume_from: list[Path] = []
    """Run directories of earlier attempts, newest first."""
    encoder_dir: Path | None = None
    """Directory of the model that `encoder.source: model` names."""
    job_id: str | None = None
    finish: bool = False
    """The wish to finish early came during an earlier attempt."""
    allow_noncommercial_weights: bool = False
    """The operator's consent to weights whose licence forbids commercial use."""

    @property
    def start_dir(self) -> Path | None:
        """Model directory that the encoder comes from, None where it is another source."""
        encoder = self.config.encoder
        if isinstance(encoder, FileEncoder) and (path := Path(encoder.path)).is_dir():
            return path
        return self.encoder_dir


def _kept_heads(modules: nn.ModuleDict) -> dict[str, nn.Module]:
    """Return the heads for the model directory: none that an early end left as it was made."""
    found = {name: modules[name] for name in HEADS if name in modules}
    return {name: head for name, head in found.items() if getattr(head, "is_trained", True)}


class Run:
    """One run in its directory.

    Steps of `execute`: start (or find the checkpoint to resume from), evaluate before, train the
    stages in order, evaluate after, export. Every step tells of itself through events. With several
    processes each takes these steps; rank 0 alone tells, saves, measures and exports.
    """

    def __init__(
        self,
        file: RunFile,
        run_dir: RunDir,
        *,
        events: EventWriter,
        stop: StopRequest,
        world: World | None = None,
    ) -> None:
        self._world = world = world or World()
        self._file = file
        self._run_dir = run_dir
        self._events = events
        self._stop = stop
        self._store = PackedStore(file.data)
        self._summary = self._store.manifest.summary
        start_dir = file.start_dir
        self._start = None if start_dir is None else read_info(start_dir).model_dump(mode="json")
        try:
            self._config = resolve(file.config, self._summary, self._start)
        except ValidationError as error:
            raise ConfigError(
                f"what is automatic does not fit the rest of the config: {error}",
                hint="change one of the values that it names",
            ) from error
        self._device = choose_device(self._config.resources.gpus, world.local_rank)
        self._warnings: list[JsonObject] = []
        self._started_at = time.monotonic()
        self._earlier_s = 0.0
        if file.finish or run_dir.finish.exists():
            stop.finish_requested = True
        self._early_end = EarlyEnd(lambda: world.any(stop.finish_requested), emit=self._emit)
        self._images = RunImages(
            self._store,
            run_dir.cache,
            labelled_only="labels" in self._config.method.NEEDS,
            emit=self._emit,
            stop=stop,
            world=world,
        )

    def execute(self) -> JsonObject:
        """Do the run and return its result (`Finished.result`), on ranks other than 0 nothing.

        Raises:
            CtuneError: the run cannot be done; the error says why and what to do.
            StopRequested: a stop was asked for; the last checkpoint is complete.
        """
        try:
            return self._execute()
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"the memory of the device does not hold the run: {error}",
                hint="lower batch_size or image_size_px, set the method's grad_cache where it has"
                " one, or resources.gradient_checkpointing, or use a larger GPU",
            ) from error

    def _execute(self) -> JsonObject:
        faults = check(self._config, self._summary, self._start)
        if faults:
            raise ConfigError("; ".join(f"{fault.pointer}: {fault.detail}" for fault in faults))
        seed_everything(self._config.seed, "encoder")
        self._encoder = self._build_encoder()
        figures = FiguresWriter(self._run_dir, self._file.resume_from, self._store)
        scoring = Scoring(self._config, self._encoder, figures=figures, **self._measured)
        online = OnlineEvaluation(self._config, self._encoder, **self._measured)
        resumed = self._find_checkpoint()
        self._emit(Started(message=self._describe_start(resumed), details=self._versions()))
        state: JsonObject = resumed[1] if resumed else {}
        self._warnings += state.get("warnings", [])
        scoring.told.update(warning["message"] for warning in self._warnings)
        self._earlier_s = state.get("elapsed_s", 0.0)
        if resumed is None and self._summary.heldout_split is None:
            self._emit(NO_HELDOUT)
        before = state.get("before")
        if before is None and self._config.evaluation.before:
            before = scoring.score("before")
        program = self._build_program()
        if resumed is None:
            for warning in (*self._encoder_warnings, *program.warnings):
                self._emit(warning)
        training = Training(
            program=program,
            config=self._config,
            run_dir=self._run_dir,
            earlier=self._earlier_checkpoints,
            online=online,
            emit=self._emit,
            stop=self._stop,
            early_end=self._early_end,
            run_state=lambda: {
                "fingerprint": self._fingerprint,
                "before": before,
                "warnings": self._warnings,
                "elapsed_s": self._elapsed_s(),
            },
            world=self._world,
        )
        training.run(resumed)
        if self._world.is_main:
            figures.add_tables(program.pictures)
        after = scoring.score("after", program.modules)
        if not self._world.is_main:
            return {}
        for warning in program.advise(before, after):
            self._emit(warning)
        model = self._export(program.modules, before, after)
        shutil.rmtree(self._run_dir.cache, ignore_errors=True)
        return {
            "model": model,
            "evaluation": {"before": before, "after": after},
            "warnings": self._warnings,
            "selected": training.selected,
            "image_passes": self._early_end.image_passes(program.plans),
            "stopped_early": self._early_end.ended,
            "train_s": self._elapsed_s(),
        }

    # --- the method ---

    def _build_program(self) -> Program:
        method = self._config.method
        module = importlib.import_module(f"ctune.methods.{method.name}.method")
        encoder = self._config.encoder
        context = RunContext(
            encoder=self._encoder,
            train_images=lambda: self._images.for_training(self._encoder.image_size_px),
            encode_train=lambda: self._images.encode(self._encoder, "train", self._device),
            train_labels=self._images.labels("train"),
            classes=self._summary.classes,
            seed=self._config.seed,
            device=self._device,
            from_scratch=isinstance(encoder, TimmEncoder) and not encoder.pretrained,
            world=self._world,
            heldout_images=self._heldout_images if self._summary.heldout_split else None,
            encoder_is_mae=self._encoder.is_mae or self._starts_from in ("mae", "mae_ct"),
            has_start_data=self._data_identity.items()
            <= (self._start or {}).get("provenance", {}).items(),
            start_head=self._start_head,
        )
        program: Program = module.build(method, context)
        return program

    def _heldout_images(self, count: int) -> Tensor:
        split: Split = "val" if self._summary.splits.get("val") else "test"
        images = self._images.decoded(split, self._encoder.image_size_px)
        order = np.random.default_rng(self._config.seed).permutation(len(images))
        return images.batch(order[:count])

    @property
    def _data_identity(self) -> JsonObject:
        """What tells the images and their order in a split."""
        manifest = self._store.manifest
        return {"data_sha256": manifest.archive_sha256, "data_options": manifest.options}

    @property
    def _starts_from(self) -> str | None:
        """The method that made the encoder, None where no job made it."""
        method = (self._start or {}).get("method") or {}
        return method.get("name")

    def _start_head(self, name: str) -> dict[str, Tensor] | None:
        directory = self._file.start_dir
        return None if directory is None else read_head(directory, name)

    # --- resuming ---

    @cached_property
    def _fingerprint(self) -> str:
        return run_fingerprint(self._config, self._store.manifest.archive_sha256)

    @property
    def _earlier_checkpoints(self) -> list[Path]:
        return [RunDir(path).checkpoints for path in self._file.resume_from]

    def _find_checkpoint(self) -> tuple[CheckpointManifest, JsonObject] | None:
        return newest_checkpoint(
            self._run_dir.checkpoints,
            self._earlier_checkpoints,
            fingerprint=self._fingerprint,
            warn=self._emit,
        )

    def _describe_start(self, resumed: tuple[CheckpointManifest, JsonObject] | None) -> str:
        method = self._config.method.name
        if resumed is None:
            return f"{method} on {self._device.type} starts"
        manifest = resumed[0]
        return f"{method} on {self._device.type} goes on from {manifest.stage} {manifest.step}"

    @property
    def _measured(self) -> dict[str, Any]:
        """What everything that measures the encoder works on."""
        return {
            "images": self._images,
            "summary": self._summary,
            "device": self._device,
            "emit": self._emit,
        }

    # --- encoder, images, features ---

    def _build_encoder(self) -> Encoder:
        self._parent = self._verified_parent()
        method = self._config.method
        encoder = build_encoder(
            self._config.encoder,
            pool=method.encoder_pool,
            encoder_dir=self._file.encoder_dir,
            drop_path=method.encoder_drop_path,
            allow_noncommercial_weights=self._file.allow_noncommercial_weights,
        )
        if method.pixel_normalization == "dataset":
            cache = self._images.for_training(encoder.image_size_px)
            encoder.mean, encoder.std = cache.pixel_statistics()
        encoder = encoder.to(self._device)
        resources = self._config.resources
        self._encoder_warnings = accelerate(
            encoder,
            self._device,
            compile=resources.compile,
            gradient_checkpointing=resources.gradient_checkpointing,
        )
        return encoder

    def _verified_parent(self) -> JsonObject | None:
        """Return which model the encoder comes from; its weights must be those it was made with."""
        directory = self._file.start_dir
        if directory is None or self._start is None:
            return None
        sha256 = self._start["files"].get(WEIGHTS, "")
        check_hashes(directory, {WEIGHTS: sha256})
        encoder = self._config.encoder
        model_id = encoder.id if isinstance(encoder, ModelEncoder) else None
        return {"model_id": model_id, "weights_sha256": sha256}

    # --- export ---

    def _export(
        self, modules: nn.ModuleDict, before: JsonObject | None, after: JsonObject
    ) -> JsonObject:
        self._emit(StageStarted(stage="exporting"))
        split = self._summary.heldout_split or "train"
        return export_model(
            self._encoder,
            self._run_dir.model,
            heads=_kept_heads(modules),
            classes=self._summary.classes or None,
            provenance={
                "config": self._config.model_dump(mode="json"),
                **self._data_identity,
                "job_id": self._file.job_id,
                "parent": self._parent,
                "stopped_early": self._early_end.ended,
                "versions": self._versions(),
            },
            evaluation={"before": before, "after": after},
            reference_images=[
                self._store.image(int(n)) for n in self._store.indices(split)[:REFERENCE_IMAGES]
            ],
        )

    # --- small things ---

    def _elapsed_s(self) -> float:
        """Return how long the run took, up to the checkpoints that it resumed from included."""
        return self._earlier_s + time.monotonic() - self._started_at

    def _emit(self, event: EventBase) -> None:
        if not self._world.is_main:
            return
        if isinstance(event, Warned):
            self._warnings.append(event.model_dump(include={"code", "message", "hint"}))
        if not isinstance(event, Progress):  # for the log; stdout belongs to whoever runs us
            print(time.strftime("%H:%M:%S"), describe(event), file=sys.stderr, flush=True)
        self._events.write(event)

    def _versions(self) -> JsonObject:
        names = ("ctune", "torch", "timm", "numpy", "pillow")
        versions: JsonObject = {name: version(name) for name in names}
        device = self._device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        return versions | {"python": platform.python_version(), "device": f"{device.type} {name}"}
