"""Images per second of the train loop: `ctune.train.fit` against a bare loop of the same model.

Both train the same encoder with LaCViT on two views per image, made on the fly, with the same loss
and optimizer, from images in memory. `bare` is what one would write by hand: take rows, make views,
forward, backward, clip, step; it keeps no metrics and no checkpoints and is not resumable.

The sides alternate within one process, so that a busy machine slows both; medians are printed, and
the ratio is the median of the rounds' ratios. The processor time per image says the same on a
machine that others use meanwhile. `MFU` is the share of the device's peak that the model's own
operations take (forward and backward, counted by torch).

    python -m bench.train_step
    python -m bench.train_step --device cuda --precision bf16 --encoder vit_small_patch16_224 \\
        --options '{}' --image-size-px 224 --batch-size 256
    python -m bench.train_step --device cuda --precision bf16 --encoder vit_small_patch16_224 \\
        --options '{}' --image-size-px 224 --batch-size 4096 --micro-batch-size 256
"""

import argparse
import copy
import datetime
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ctune.augment import ViewConfig, ViewPipeline
from ctune.backbones import Encoder, build_encoder
from ctune.child import StopRequest
from ctune.config import RunConfig, resolve
from ctune.data import ImageCache
from ctune.device import autocast_dtype
from ctune.losses.contrastive import supervised_contrastive_loss
from ctune.methods.base import RunContext, Stage
from ctune.methods.lacvit import method as lacvit
from ctune.methods.lacvit.config import LaCViTConfig
from ctune.optim import make_optimizer
from ctune.seeding import seed_everything
from ctune.train import Hooks, fit

TINY = {"patch_size": 8, "embed_dim": 128, "depth": 6, "num_heads": 4}
"""1.2 million parameters, 17 tokens at 32 px."""
PEAK_BF16_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}
"""Dense bfloat16 peak of the manufacturer's data sheets, by a word of the device's name."""
NUM_CLASSES = 10


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    config: LaCViTConfig
    device: torch.device
    steps: int
    rounds: int

    @property
    def batch_size(self) -> int:
        return self.config.contrastive.batch_size

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def run_config(options: argparse.Namespace) -> RunConfig:
    """Return the run: LaCViT's small preset with the sizes asked for, over very many steps."""
    contrastive = {
        "batch_size": options.batch_size,
        "batch_sampler": "random",
        "epochs": 10_000,
        "precision": options.precision,
    }
    if options.micro_batch_size:
        contrastive |= {"grad_cache": True, "micro_batch_size": options.micro_batch_size}
    encoder = {
        "source": "timm",
        "name": options.encoder,
        "pretrained": False,
        "image_size_px": options.image_size_px,
        "options": json.loads(options.options),
    }
    return resolve(
        RunConfig.model_validate(
            {
                "encoder": encoder,
                "method": {"name": "lacvit", "preset": "small", "contrastive": contrastive},
            }
        )
    )


def make_cache(folder: Path, *, count: int, side_px: int) -> ImageCache:
    """Return random images with labels; what is in them does not matter to the time."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, 3, side_px, side_px), dtype=np.uint8)
    sizes = torch.full((count, 2), side_px, dtype=torch.int64)
    labels = rng.integers(0, NUM_CLASSES, count)
    return ImageCache(folder, pixels, sizes_px=sizes, labels=labels)


def make_stage(setting: Setting, encoder: Encoder, cache: ImageCache) -> tuple[Stage, nn.Module]:
    """Return LaCViT's stage `contrastive` and its projection head."""
    context = RunContext(
        encoder=encoder,
        train_images=lambda: cache,
        encode_train=lambda: torch.empty(0),
        train_labels=cache.labels,
        classes=[str(n) for n in range(NUM_CLASSES)],
        seed=0,
        device=setting.device,
        from_scratch=True,
    )
    program = lacvit.build(setting.config, context)
    return program.plans[0].start(), program.modules["projection_head"]


def library_rounds(stage: Stage, setting: Setting) -> Callable[[int], None]:
    """Return what does one round of steps with `fit`, going on where the last one ended."""

    def do(number: int) -> None:
        end = (number + 1) * setting.steps
        hooks = Hooks(
            emit=lambda event: None,
            save=lambda step: None,
            report_progress=lambda step, rate: None,
            stop=StopRequest(),
            checkpoint_interval_s=1e9,
            ends_early=lambda step: step >= end,
        )
        fit(stage, name="contrastive", seed=0, start_step=end - setting.steps, hooks=hooks)

    return do


class BareLoop:
    """The loop that one would write by hand."""

    def __init__(
        self, setting: Setting, encoder: Encoder, head: nn.Module, cache: ImageCache
    ) -> None:
        stage = setting.config.contrastive
        self.setting, self.encoder, self.head, self.cache = setting, encoder, head, cache
        self.labels = torch.from_numpy(cache.labels).to(setting.device)
        views = ViewConfig(
            size_px=encoder.image_size_px,
            scale=(stage.crop_scale_min, 1.0),
            jitter=stage.color_jitter,
            jitter_prob=stage.color_jitter_prob,
            grayscale_prob=stage.grayscale_prob,
            mean=encoder.mean,
            std=encoder.std,
        )
        self.views = ViewPipeline(views)
        self.parameters = [*encoder.parameters(), *head.parameters()]
        decayed = [p for p in self.parameters if p.ndim > 1]
        rest = [p for p in self.parameters if p.ndim <= 1]
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": stage.weight_decay},
            {"params": rest},
        ]
        self.optimizer = make_optimizer(stage.optimizer, groups, lr=stage.lr)
        self.generator = torch.Generator()
        dtype = autocast_dtype(stage.precision, setting.device)
        device = setting.device.type
        self.autocast = torch.autocast(device, dtype=dtype) if dtype else nullcontext()

    def round(self, number: int) -> None:
        """Do one round of steps."""
        self.encoder.train()
        order = np.random.default_rng(number).permutation(len(self.cache))
        size = self.setting.batch_size
        for step in range(self.setting.steps):
            at = step * size % (len(order) - size + 1)
            self.step(order[at : at + size])

    def step(self, rows: np.ndarray) -> None:
        images = self.cache.batch(rows).to(self.setting.device, non_blocking=True)
        self.loss(images, self.cache.sizes(rows), self.labels[rows]).backward()  # type: ignore[no-untyped-call]
        limit = self.setting.config.contrastive.clip_grad_norm or float("inf")
        torch.nn.utils.clip_grad_norm_(self.parameters, limit)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def loss(self, images: Tensor, sizes: Tensor, labels: Tensor) -> Tensor:
        stage = self.setting.config.contrastive
        views = self.views.views(images, sizes, self.generator, num_views=stage.num_views)
        with self.autocast:
            z = self.head(self.encoder(views))
        features = z.float().view(stage.num_views, len(labels), -1).transpose(0, 1)
        return supervised_contrastive_loss(
            features,
            labels,
            temperature=stage.temperature,
            base_temperature=stage.base_temperature,
        )

    def flops_per_image(self) -> float:
        """Return floating-point operations of forward and backward per image, all views."""
        rows = np.arange(min(8, len(self.cache)))
        with FlopCounterMode(display=False) as counter:
            self.step(rows)
        return float(counter.get_total_flops()) / len(rows)


@dataclass
class Measured:
    """Rounds of one side."""

    wall_s: list[float] = field(default_factory=list)
    processor_s: list[float] = field(default_factory=list)
    """Of all threads."""
    peak_gib: float | None = None


def measure(sides: dict[str, Callable[[int], None]], setting: Setting) -> dict[str, Measured]:
    """Return what the rounds of each side took."""
    found = {name: Measured() for name in sides}
    on_gpu = setting.device.type == "cuda"
    for number in range(setting.rounds + 1):  # the first one warms up
        for name, work in sides.items():
            setting.synchronise()
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            wall, processor = time.perf_counter(), time.process_time()
            work(number)
            setting.synchronise()
            if number:
                found[name].wall_s.append(time.perf_counter() - wall)
                found[name].processor_s.append(time.process_time() - processor)
            if on_gpu:
                found[name].peak_gib = torch.cuda.max_memory_allocated() / 2**30
    return found


def peak_flops(options: argparse.Namespace) -> float | None:
    """Return the peak given, or the device's own where it is known; None: no MFU."""
    if options.peak_tflops:
        return float(options.peak_tflops) * 1e12
    if options.device != "cuda" or options.precision != "bf16":
        return None
    name = torch.cuda.get_device_name()
    return next((flops for word, flops in PEAK_BF16_FLOPS.items() if word in name), None)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--encoder", default="vit_tiny_patch16_224", help="a timm architecture")
    parser.add_argument("--options", default=json.dumps(TINY), help="of the architecture, as JSON")
    parser.add_argument("--image-size-px", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument(
        "--micro-batch-size", type=int, help="with gradient caching, which has no bare side"
    )
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--images", type=int, default=2048, help="in memory")
    parser.add_argument("--steps", type=int, default=20, help="per round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peak-tflops", type=float, help="of the device, for the MFU")
    return parser.parse_args()


def main() -> None:
    """Print hardware, versions and the table."""
    options = parse()
    config = run_config(options)
    assert isinstance(config.method, LaCViTConfig)
    setting = Setting(config.method, torch.device(options.device), options.steps, options.rounds)
    seed_everything(0)
    encoder = build_encoder(config.encoder, pool="mean", encoder_dir=None).to(setting.device)
    cache_px = options.image_size_px * 8 // 7 if options.image_size_px > 32 else 32
    with tempfile.TemporaryDirectory() as folder:
        count = max(options.images, 2 * options.batch_size)
        cache = make_cache(Path(folder), count=count, side_px=cache_px)
        bare_encoder = copy.deepcopy(encoder)
        stage, head = make_stage(setting, encoder, cache)
        bare = BareLoop(setting, bare_encoder, copy.deepcopy(head), cache)
        flops = bare.flops_per_image()
        sides = {"ctune": library_rounds(stage, setting)}
        if not options.micro_batch_size:
            sides["bare"] = bare.round
        found = measure(sides, setting)
    on = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    parameters = sum(p.numel() for p in encoder.parameters()) / 1e6
    print(
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d} {on}, {os.cpu_count()} cores, torch"
        f" {torch.__version__} with {torch.get_num_threads()} threads"
    )
    print(
        f"{options.encoder} ({parameters:.1f} M parameters, {flops / 1e9:.2f} GFLOP per image) at"
        f" {options.image_size_px} px, batch {options.batch_size}"
        + (f" in micro-batches of {options.micro_batch_size}" if options.micro_batch_size else "")
        + f", two views, {options.precision}"
    )
    peak, images = peak_flops(options), options.steps * options.batch_size
    print("| loop | images/s | MFU | peak memory | processor ms per image |\n|---|---|---|---|---|")
    for name, side in found.items():
        rate = images / statistics.median(side.wall_s)
        mfu = f"{rate * flops / peak:.1%}" if peak else "–"
        memory = f"{side.peak_gib:.2f} GiB" if side.peak_gib else "–"
        processor = 1000 * statistics.median(side.processor_s) / images
        print(f"| {name} | {rate:,.0f} | {mfu} | {memory} | {processor:.3f} |")
    if "bare" in found:
        for what in ("wall_s", "processor_s"):
            mine, bare_times = getattr(found["ctune"], what), getattr(found["bare"], what)
            ratios = [b / c for b, c in zip(bare_times, mine, strict=True)]
            shown = ", ".join(f"{ratio:.3f}" for ratio in ratios)
            print(f"ctune / bare by {what}: {statistics.median(ratios):.3f} (rounds: {shown})")


if __name__ == "__main__":
    main()
