"""What every method keeps, run over the union: a new method is tested before its author begins."""

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from pydantic import BaseModel

from ctune.backbones import build_encoder
from ctune.child import StopRequest
from ctune.config import RunConfig, resolve
from ctune.data import ImageCache
from ctune.events import EventBase
from ctune.methods import METHOD_CONFIGS, MethodConfig
from ctune.methods.base import Program, RunContext
from ctune.methods.base_config import PlannedStage
from ctune.schema import JsonObject, merge_defaults
from ctune.seeding import seed_everything
from ctune.store import PackedStore
from ctune.train import Hooks, fit
from tests.squares import tiny_config

ROOT = Path(__file__).parents[3]
EVERY_METHOD = pytest.mark.parametrize("name", METHOD_CONFIGS)


def test_the_union_and_the_folders_name_the_same_methods() -> None:
    union = {config.model_fields["name"].default for config in get_args(get_args(MethodConfig)[0])}
    folders = {path.parent.name for path in (ROOT / "ctune" / "methods").glob("*/config.py")}
    assert union == set(METHOD_CONFIGS) == folders


@EVERY_METHOD
def test_every_field_is_described(name: str) -> None:
    def undescribed(model: type[BaseModel], path: str) -> list[str]:
        found = []
        for field, info in model.model_fields.items():
            if not info.description and field != "name":
                found.append(f"{path}.{field}")
            for kind in (info.annotation, *get_args(info.annotation)):
                if isinstance(kind, type) and issubclass(kind, BaseModel):
                    found += undescribed(kind, f"{path}.{field}")
        return found

    assert undescribed(METHOD_CONFIGS[name], name) == []
    assert METHOD_CONFIGS[name].DESCRIPTION


@EVERY_METHOD
def test_it_has_a_page(name: str) -> None:
    assert (ROOT / "docs" / "methods" / f"{name}.md").is_file()


def test_configs_import_without_torch() -> None:
    code = "import sys, ctune.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@EVERY_METHOD
def test_resolved_configs_have_no_automatic_values_left_for_the_config(name: str) -> None:
    resolved = resolve(RunConfig.model_validate(tiny_config(name)))
    assert resolve(resolved) == resolved
    again = RunConfig.model_validate_json(resolved.model_dump_json())
    assert again == resolved, "what is stored with a job reads back as the same run"


class Bench:
    """A method on the tiny data set, built afresh; its checkpoints are kept in memory."""

    def __init__(
        self, name: str, store: Path, cache_dir: Path, method: JsonObject | None = None
    ) -> None:
        """`method` is laid over the method's tiny config."""
        config = merge_defaults(tiny_config(name), {"method": method or {}})
        self.store = PackedStore(store)
        self.config = resolve(RunConfig.model_validate(config), self.store.manifest.summary)
        self.told: list[EventBase] = []
        seed_everything(self.config.seed, "encoder")
        self.encoder = build_encoder(
            self.config.encoder, pool=self.config.method.encoder_pool, encoder_dir=None
        )
        self.cache = ImageCache.build(
            self.store, self.store.indices("train"), 16, cache_dir, stop=StopRequest()
        )
        module = importlib.import_module(f"ctune.methods.{name}.method")
        self.program: Program = module.build(self.config.method, self.context())

    def context(self) -> RunContext:
        return RunContext(
            encoder=self.encoder,
            train_images=lambda: self.cache,
            encode_train=self.encode,
            train_labels=self.store.labels("train"),
            classes=self.store.manifest.summary.classes,
            seed=self.config.seed,
            device=torch.device("cpu"),
            from_scratch=True,
            heldout_images=lambda count: self.cache.batch(np.arange(min(count, len(self.cache)))),
        )

    def encode(self) -> torch.Tensor:
        self.encoder.eval()
        pixels = self.cache.batch(np.arange(len(self.cache)))
        with torch.no_grad():
            features: torch.Tensor = self.encoder(self.encoder.preprocessing.normalise(pixels))
        return features

    def hooks(self, save: Any) -> Hooks:
        return Hooks(
            emit=self.told.append,
            save=save,
            report_progress=lambda step, rate: None,
            stop=StopRequest(),
            checkpoint_interval_s=0,
        )


def same(expected: torch.Tensor, found: torch.Tensor) -> bool:
    """Return whether two tensors are equal bit for bit; NaN stands for what is not known yet."""
    return torch.allclose(expected, found, rtol=0, atol=0, equal_nan=True)


@EVERY_METHOD
def test_two_steps_are_finite_and_reach_every_trainable_parameter(
    name: str, store: Path, tmp_path: Path
) -> None:
    bench = Bench(name, store, tmp_path)
    for plan in bench.program.plans:
        stage = plan.start()
        trainable = [p for group in stage.optimizer.param_groups for p in group["params"]]
        for step in range(2):
            batch = stage.source.fetch(stage.sampler.batches(0)[step])
            output = stage.method.step(batch, torch.Generator().manual_seed(step))
            assert torch.isfinite(output.loss), plan.name
            output.loss.backward()  # type: ignore[no-untyped-call]
            missing = [p.shape for p in trainable if p.grad is None]
            assert not missing, (plan.name, missing)
            stage.optimizer.step()
            stage.optimizer.zero_grad()


@EVERY_METHOD
def test_the_config_plans_the_stages_that_are_built(name: str, store: Path, tmp_path: Path) -> None:
    bench = Bench(name, store, tmp_path)
    planned = bench.config.method.plan(bench.store.manifest.summary)
    built = [
        PlannedStage(plan.name, plan.total_steps, plan.image_passes) for plan in bench.program.plans
    ]
    assert planned == built


@EVERY_METHOD
def test_every_stage_takes_the_steps_it_plans(name: str, store: Path, tmp_path: Path) -> None:
    bench = Bench(name, store, tmp_path)
    for plan in bench.program.plans:
        saves: list[int] = []
        fit(plan.start(), name=plan.name, seed=1, start_step=0, hooks=bench.hooks(saves.append))
        assert saves == list(range(1, plan.total_steps + 1))


@EVERY_METHOD
def test_resuming_anywhere_gives_the_next_step_bit_for_bit(
    name: str, store: Path, tmp_path: Path
) -> None:
    """Train stage by stage; from the middle of each, go on in a new program: same tensors."""
    whole = Bench(name, store, tmp_path / "whole")
    for index, plan in enumerate(whole.program.plans):
        middle = plan.total_steps // 2
        kept: dict[str, Any] = {}
        stage = plan.start()

        def save(step: int, stage: Any = stage, kept: dict[str, Any] = kept) -> None:
            if step == middle:  # noqa: B023 (called within this round)
                kept["modules"] = {
                    k: v.clone() for k, v in whole.program.modules.state_dict().items()
                }
                state = stage.optimizer.state_dict()
                kept["optimizer"] = torch.utils._pytree.tree_map(
                    lambda v: v.clone() if isinstance(v, torch.Tensor) else v, state
                )

        fit(stage, name=plan.name, seed=1, start_step=0, hooks=whole.hooks(save))
        again = Bench(name, store, tmp_path / f"again-{index}")
        again.program.modules.load_state_dict(kept["modules"])
        resumed = again.program.plans[index].start()
        resumed.optimizer.load_state_dict(kept["optimizer"])
        fit(
            resumed,
            name=plan.name,
            seed=1,
            start_step=middle,
            hooks=again.hooks(lambda step: None),
        )
        expected, found = whole.program.modules.state_dict(), again.program.modules.state_dict()
        differing = [key for key in expected if not same(expected[key], found[key])]
        assert differing == [], plan.name
