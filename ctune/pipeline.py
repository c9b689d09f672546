"""A whole run: evaluate, train the stages, evaluate again, export. Resumes where a run ended."""

import hashlib
import importlib
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from ctune.backbones import Encoder, build_encoder
from ctune.checkpoint import (
    CheckpointManifest,
    checkpoint_name,
    find_checkpoints,
    load_checkpoint,
    optimizer_state,
    prune_checkpoints,
    save_checkpoint,
)
from ctune.child import StopRequest
from ctune.config import RunConfig, check, resolve
from ctune.device import choose_device
from ctune.encoders import TimmEncoder
from ctune.errors import CheckpointError, ConfigError, OutOfMemoryError
from ctune.evaluate.accuracy import topk_accuracy
from ctune.evaluate.protocols import evaluate
from ctune.events import (
    CheckpointSaved,
    Evaluated,
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
from ctune.manifest import Split
from ctune.methods.base import Program, RunContext, StagePlan
from ctune.rundir import RunDir
from ctune.schema import JsonObject, Schema
from ctune.seeding import seed_everything
from ctune.store import PackedStore
from ctune.train import Hooks, fit

REFERENCE_IMAGES = 4
KEPT_CHECKPOINTS = 2
EXPORTED_HEADS = ("classifier", "projection_head")
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


class Run:
    """One run in its directory.

    Steps of `execute`: start (or find the checkpoint to resume from), evaluate before, train the
    stages in order, evaluate after, export. Every step tells of itself through events.
    """

    def __init__(
        self, file: RunFile, run_dir: RunDir, *, events: EventWriter, stop: StopRequest
    ) -> None:
        self._file = file
        self._config = resolve(file.config)
        self._run_dir = run_dir
        self._events = events
        self._stop = stop
        self._store = PackedStore(file.data)
        self._summary = self._store.manifest.summary
        self._device = choose_device(self._config.resources.gpus)
        self._warnings: list[JsonObject] = []
        self._started_at = time.monotonic()
        self._earlier_s = 0.0
        self._images = RunImages(
            self._store,
            run_dir.cache,
            labelled_only="labels" in self._config.method.NEEDS,
            emit=self._emit,
            stop=stop,
        )

    def execute(self) -> JsonObject:
        """Do the run and return its result (`Finished.result`).

        Raises:
            CtuneError: the run cannot be done; the error says why and what to do.
            StopRequested: a stop was asked for; the last checkpoint is complete.
        """
        try:
            return self._execute()
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"the memory of the device does not hold the run: {error}",
                hint="lower batch_size or image_size_px, or use a larger GPU",
            ) from error

    def _execute(self) -> JsonObject:
        faults = check(self._config, self._summary)
        if faults:
            raise ConfigError("; ".join(f"{fault.pointer}: {fault.detail}" for fault in faults))
        seed_everything(self._config.seed, "encoder")
        self._encoder = self._build_encoder()
        resumed = self._find_checkpoint()
        self._emit(Started(message=self._describe_start(resumed), details=self._versions()))
        state: JsonObject = resumed[1] if resumed else {}
        self._warnings += state.get("warnings", [])
        self._earlier_s = state.get("elapsed_s", 0.0)
        if resumed is None and self._heldout is None:
            self._emit(NO_HELDOUT)
        before = state.get("before")
        if before is None and self._config.evaluation.before:
            before = self._evaluate("before")
        program = self._build_program()
        if resumed is None:
            for warning in program.warnings:
                self._emit(warning)
        self._train(program, before, resumed)
        after = self._evaluate("after", program.modules)
        for warning in program.advise(before, after):
            self._emit(warning)
        model = self._export(program.modules, before, after)
        shutil.rmtree(self._run_dir.cache, ignore_errors=True)
        return {
            "model": model,
            "evaluation": {"before": before, "after": after},
            "warnings": self._warnings,
            "image_passes": sum(plan.image_passes for plan in program.plans),
            "train_s": self._elapsed_s(),
        }

    # --- training ---

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
        )
        program: Program = module.build(method, context)
        return program

    def _train(
        self,
        program: Program,
        before: JsonObject | None,
        resumed: tuple[CheckpointManifest, JsonObject] | None,
    ) -> None:
        at = resumed[0].order if resumed else (0, 0)
        if resumed:
            program.modules.load_state_dict(resumed[1]["modules"])
        for index, plan in enumerate(program.plans):
            start_step = at[1] if index == at[0] else 0
            if index < at[0] or start_step >= plan.total_steps:
                continue
            self._emit(StageStarted(stage=plan.name, step=start_step, total_steps=plan.total_steps))
            stage = plan.start()
            if start_step and resumed:
                stage.optimizer.load_state_dict(optimizer_state(resumed[1]["optimizer"]))
            seed_everything(self._config.seed, plan.name, "start")
            hooks = Hooks(
                emit=self._emit,
                save=lambda step, index=index, plan=plan, stage=stage: self._save(  # type: ignore[misc]
                    program, before, stage.optimizer, index=index, plan=plan, step=step
                ),
                report_progress=lambda step, rate, index=index: self._report_progress(  # type: ignore[misc]
                    program.plans, index, step, rate
                ),
                stop=self._stop,
                checkpoint_interval_s=self._config.resources.checkpoint_interval_s,
            )
            fit(
                stage,
                name=plan.name,
                seed=self._config.seed,
                start_step=start_step,
                hooks=hooks,
            )
        end = program.plans[-1].total_steps
        self._report_progress(program.plans, len(program.plans) - 1, end, None)

    def _save(
        self,
        program: Program,
        before: JsonObject | None,
        optimizer: torch.optim.Optimizer,
        *,
        index: int,
        plan: StagePlan,
        step: int,
    ) -> None:
        state = {
            "fingerprint": self._fingerprint,
            "before": before,
            "warnings": self._warnings,
            "elapsed_s": self._elapsed_s(),
            "modules": program.modules.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        folder = self._run_dir.checkpoints
        manifest = save_checkpoint(folder, state, stage=plan.name, stage_index=index, step=step)
        newest = [path.name for path in find_checkpoints([folder])[:KEPT_CHECKPOINTS]]
        ends = [checkpoint_name(p.name, p.total_steps) for p in program.plans]
        kept = prune_checkpoints(folder, keep=[*newest, *ends])
        name = checkpoint_name(plan.name, step)
        self._emit(
            CheckpointSaved(name=name, stage=plan.name, step=step, files=manifest.files, kept=kept)
        )

    def _report_progress(
        self, plans: Sequence[StagePlan], index: int, step: int, steps_per_s: float | None
    ) -> None:
        plan = plans[index]
        passes = [p.image_passes for p in plans]
        here = step / plan.total_steps
        done = sum(passes[:index]) + here * passes[index]
        remaining_s = 0.0 if done == sum(passes) else None
        if steps_per_s:
            passes_per_s = steps_per_s * passes[index] / plan.total_steps
            remaining_s = (sum(passes) - done) / passes_per_s
        self._emit(
            Progress(
                stage=plan.name,
                step=step,
                total_steps=plan.total_steps,
                fraction=done / sum(passes),
                seconds_remaining=remaining_s,
            )
        )

    # --- resuming ---

    @cached_property
    def _fingerprint(self) -> str:
        """What a checkpoint must share with this run: everything that decides the outcome."""
        config = self._config.model_dump_json(exclude={"resources"})
        text = f"{config} {self._store.manifest.archive_sha256}"
        return hashlib.sha256(text.encode()).hexdigest()

    def _find_checkpoint(self) -> tuple[CheckpointManifest, JsonObject] | None:
        earlier = [RunDir(path).checkpoints for path in self._file.resume_from]
        for path in find_checkpoints([self._run_dir.checkpoints, *earlier]):
            try:
                manifest, state = load_checkpoint(path)
            except CheckpointError as error:
                self._emit(
                    Warned(
                        code="checkpoint_damaged",
                        message=f"{path.name} is left out: {error.message}",
                        hint="an earlier checkpoint is used, or the run starts again",
                    )
                )
                continue
            if state["fingerprint"] != self._fingerprint:
                raise ConfigError(
                    f"{path} was made with another configuration or data set",
                    hint="use a new run directory",
                )
            return manifest, state
        return None

    def _describe_start(self, resumed: tuple[CheckpointManifest, JsonObject] | None) -> str:
        method = self._config.method.name
        if resumed is None:
            return f"{method} on {self._device.type} starts"
        manifest = resumed[0]
        return f"{method} on {self._device.type} goes on from {manifest.stage} {manifest.step}"

    # --- encoder, images, features ---

    def _build_encoder(self) -> Encoder:
        method = self._config.method
        encoder = build_encoder(
            self._config.encoder,
            pool=method.encoder_pool,
            encoder_dir=self._file.encoder_dir,
            drop_path=method.encoder_drop_path,
        )
        if method.pixel_normalization == "dataset":
            cache = self._images.for_training(encoder.image_size_px)
            encoder.mean, encoder.std = cache.pixel_statistics()
        return encoder.to(self._device)

    @property
    def _heldout(self) -> Split | None:
        return self._summary.heldout_split

    # --- evaluation and export ---

    def _evaluate(
        self, when: Literal["before", "after"], modules: nn.ModuleDict | None = None
    ) -> JsonObject:
        if self._heldout is None:
            return {}
        for split in ("train", self._heldout):
            self._images.decoded(split, self._encoder.image_size_px)
        self._emit(StageStarted(stage="evaluating"))
        train = self._images.features(self._encoder, "train", self._device)
        heldout = self._images.features(self._encoder, self._heldout, self._device)
        results: JsonObject = evaluate(
            train,
            heldout,
            self._config.evaluation,
            num_classes=len(self._summary.classes),
            seed=self._config.seed,
            warn=self._emit,
        )
        labelled = heldout.labelled()
        if modules is not None and "classifier" in modules and len(labelled.labels):
            with torch.no_grad():
                logits = modules["classifier"](labelled.features)
            top1, top5 = topk_accuracy(logits, labelled.labels, (1, min(5, logits.shape[1])))
            results["classifier"] = {"top1": top1, "top5": top5}
        self._emit(Evaluated(when=when, results=results))
        return results

    def _export(
        self, modules: nn.ModuleDict, before: JsonObject | None, after: JsonObject
    ) -> JsonObject:
        self._emit(StageStarted(stage="exporting"))
        split = self._heldout or "train"
        return export_model(
            self._encoder,
            self._run_dir.model,
            **{name: modules[name] for name in EXPORTED_HEADS if name in modules},
            classes=self._summary.classes or None,
            provenance={
                "config": self._config.model_dump(mode="json"),
                "data_sha256": self._store.manifest.archive_sha256,
                "job_id": self._file.job_id,
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


def run_directory(
    run_dir: RunDir, events: EventWriter, stop: StopRequest, *, file: RunFile | None = None
) -> JsonObject:
    """Do what the `config.json` of a run directory says; see `Run.execute`."""
    if file is None:
        file = RunFile.model_validate_json(run_dir.config.read_bytes())
    return Run(file, run_dir.create(), events=events, stop=stop).execute()
