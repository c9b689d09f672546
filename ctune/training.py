"""The stages of one run, one after the other: checkpoints, progress, looks, the best weights."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

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
from ctune.config import KEPT_CHECKPOINTS, RunConfig
from ctune.distributed import World
from ctune.early_end import EarlyEnd, EarlyState
from ctune.errors import CheckpointError
from ctune.events import CheckpointSaved, EventBase, Progress, StageStarted
from ctune.gradient_watch import GradientState, GradientWatch
from ctune.methods.base import Program, Stage, StagePlan
from ctune.online import OnlineEvaluation, OnlineState
from ctune.rundir import RunDir
from ctune.schema import JsonObject
from ctune.seeding import seed_everything
from ctune.train import Hooks, fit


@dataclass
class Training:
    """Trains the stages of a program, from the checkpoint that a run resumes from to the end."""

    program: Program
    config: RunConfig
    run_dir: RunDir
    earlier: list[Path]
    """Checkpoint directories of earlier attempts, newest first."""
    online: OnlineEvaluation
    emit: Callable[[EventBase], None]
    stop: StopRequest
    early_end: EarlyEnd
    run_state: Callable[[], JsonObject]
    """What a checkpoint must hold of the run beside its training."""
    world: World
    gradients: GradientWatch = field(default_factory=GradientWatch)
    selected: dict[str, int] = field(default_factory=dict)
    """Stage to the step whose weights it handed on, where these were not the last ones."""

    def run(self, resumed: tuple[CheckpointManifest, JsonObject] | None) -> None:
        """Train what is still to be trained.

        Raises:
            CtuneError: as `fit`; the best checkpoint cannot be read.
            StopRequested: a stop was asked for; the checkpoint is written.
        """
        plans = self.program.plans
        at = reached = resumed[0].order if resumed else (0, 0)
        state = resumed[1] if resumed else {}
        if resumed:
            self.program.modules.load_state_dict(state["modules"])
            self.online.state = OnlineState.model_validate(state["online"])
            self.selected = dict(state["selected"])
            self.early_end.state = EarlyState.model_validate(state["early_end"])
            self.gradients.resume(GradientState.model_validate(state["gradients"]))
        self.world.unite(self.program.modules)
        for index, plan in enumerate(plans):
            start_step = at[1] if index == at[0] else 0
            if index < at[0]:
                continue
            if start_step < plan.total_steps and not self.early_end.leaves_out(
                plan, start_step, is_first=index == 0
            ):
                optimizer = state["optimizer"] if start_step else None
                reached = index, self._train(index, start_step, optimizer)
            elif start_step:
                self._look_at_the_end(plan, start_step)
            self._select(plan, reached[1])
        self._report_end(plans[reached[0]], reached[1])

    def _train(self, index: int, start_step: int, optimizer: JsonObject | None) -> int:
        plan, seed = self.program.plans[index], self.config.seed
        self.emit(StageStarted(stage=plan.name, step=start_step, total_steps=plan.total_steps))
        stage = plan.start()
        if optimizer is not None:
            stage.optimizer.load_state_dict(optimizer_state(optimizer))
        seed_everything(seed, plan.name, "start")
        hooks = Hooks(
            emit=self.emit,
            save=lambda step: self._save(stage, index, step),
            report_progress=lambda step, rate: self._report_progress(index, step, rate),
            stop=self.stop,
            checkpoint_interval_s=self.config.resources.checkpoint_interval_s,
            ends_early=lambda step: self.early_end.ends(plan, step),
            look=lambda step: self.online.look(plan.name, step),
            look_interval_steps=self.online.interval_steps(plan),
            world=self.world,
            gradients=self.gradients,
        )
        return fit(stage, name=plan.name, seed=seed, start_step=start_step, hooks=hooks)

    def _look_at_the_end(self, plan: StagePlan, step: int) -> None:
        """Take the last look at a stage that has ended, where a stop cut it short."""
        if self.online.interval_steps(plan) is not None:
            self.online.look(plan.name, step)

    def _select(self, plan: StagePlan, reached: int) -> None:
        """Take over the weights of the stage's best look, if the run asks for them."""
        best = self.online.state.bests.get(plan.name)
        wanted = self.config.evaluation.online.select == "best"
        if not wanted or best is None or best.step == reached:
            return
        name = checkpoint_name(plan.name, best.step)
        found = [path for f in self._folders if (path := f / name).is_dir()]
        if not found:
            raise CheckpointError(f"the best checkpoint {name} is gone", hint="run the job again")
        self.program.modules.load_state_dict(load_checkpoint(found[0])[1]["modules"])
        self.selected[plan.name] = best.step

    @property
    def _folders(self) -> list[Path]:
        return [self.run_dir.checkpoints, *self.earlier]

    def _save(self, stage: Stage, index: int, step: int) -> None:
        if not self.world.is_main:
            return
        plans, folder = self.program.plans, self.run_dir.checkpoints
        plan = plans[index]
        state = self.run_state() | {
            "modules": self.program.modules.state_dict(),
            "optimizer": stage.optimizer.state_dict(),
            "online": self.online.state.model_dump(mode="json"),
            "selected": self.selected,
            "early_end": self.early_end.state.model_dump(),
            "gradients": self.gradients.state.model_dump(),
        }
        manifest = save_checkpoint(folder, state, stage=plan.name, stage_index=index, step=step)
        newest = [path.name for path in find_checkpoints([folder])[:KEPT_CHECKPOINTS]]
        ends = [checkpoint_name(p.name, p.total_steps) for p in plans]
        if early := self.early_end.state.ended:
            ends.append(checkpoint_name(early.stage, early.step))
        best = [checkpoint_name(n, look.step) for n, look in self.online.state.bests.items()]
        kept = prune_checkpoints(folder, keep=[*newest, *ends, *best])
        self.emit(
            CheckpointSaved(
                name=checkpoint_name(plan.name, step),
                stage=plan.name,
                step=step,
                files=manifest.files,
                kept=kept,
                best=best,
            )
        )

    def _report_end(self, plan: StagePlan, step: int) -> None:
        total_steps = plan.total_steps
        self.emit(
            Progress(
                stage=plan.name,
                step=step,
                total_steps=total_steps,
                fraction=1.0,
                seconds_remaining=0.0,
            )
        )

    def _report_progress(self, index: int, step: int, steps_per_s: float | None) -> None:
        plan = self.program.plans[index]
        passes = [p.image_passes for p in self.program.plans]
        here = step / plan.total_steps
        done = sum(passes[:index]) + here * passes[index]
        remaining_s = 0.0 if done == sum(passes) else None
        if steps_per_s:
            passes_per_s = steps_per_s * passes[index] / plan.total_steps
            remaining_s = (sum(passes) - done) / passes_per_s
        self.emit(
            Progress(
                stage=plan.name,
                step=step,
                total_steps=plan.total_steps,
                fraction=done / sum(passes),
                seconds_remaining=remaining_s,
            )
        )
