"""Memory and time of large contrastive batches: gradient caching against a small plain batch.

Each row is SimCLR's training step (views, encoder, head, NT-Xent, backward, SGD) in a process of
its own: the small batch as it is, and larger ones in micro-batches of its size. `peak` is the most
memory that the steps took: on a GPU what torch allocated, weights and gradients included; on the
CPU resident memory beyond that before the first step. There, freed memory goes back to the system
at once (`MALLOC_MMAP_THRESHOLD_`), else what the C library keeps for later would be counted too;
`--keep-freed` leaves that as it is in a run.

    OMP_NUM_THREADS=2 python -m bench.grad_cache
    python -m bench.grad_cache --device cuda --precision bf16 --encoder vit_small_patch16_224 \\
        --options '{}' --image-size-px 224 --batch-sizes 1024 4096
    python -m bench.grad_cache --device cuda --precision bf16 --encoder resnet50 --options '{}' \\
        --image-size-px 224 --batch-sizes 1024 4096
"""

import argparse
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.input_pipeline import describe_machine
from ctune.backbones import build_encoder
from ctune.device import autocast_dtype
from ctune.encoders import TimmEncoder
from ctune.methods.base import Batch
from ctune.methods.collapse import CollapseWatch, UniformLoss
from ctune.methods.contrastive import Embedding
from ctune.methods.simclr.config import SimCLRConfig
from ctune.methods.simclr.method import SimCLR, make_head, make_views
from ctune.optim import make_optimizer
from ctune.seeding import seed_everything

SMALL_VIT = {"patch_size": 4, "embed_dim": 192, "depth": 6, "num_heads": 3}
"""2.7 million parameters, 65 tokens at 32 px."""
MIB = 2**20


@dataclass(frozen=True)
class Setting:
    """One row."""

    batch_size: int
    micro_batch_size: int | None
    encoder: str
    options: dict[str, Any]
    image_size_px: int
    device: str
    precision: str
    steps: int


def make_method(setting: Setting) -> SimCLR:
    """Return SimCLR's stage for images made of noise."""
    config = TimmEncoder(
        name=setting.encoder,
        pretrained=False,
        image_size_px=setting.image_size_px,
        options=setting.options,
    )
    simclr = SimCLRConfig(views="simclr_cifar" if setting.image_size_px <= 64 else "simclr")
    encoder = build_encoder(config, pool="auto", encoder_dir=None)
    method = SimCLR(
        encoder,
        Embedding(make_views(simclr, encoder), micro_batch_size=setting.micro_batch_size),
        head=make_head(simclr, encoder.embed_dim),
        temperature=simclr.temperature,
        watch=CollapseWatch(uniform=UniformLoss(), steps_per_epoch=1000, warmup_epochs=0, hint=""),
    )
    return method.to(setting.device)


def make_batch(setting: Setting) -> Batch:
    """Return a batch of noise at the side that a cache for this size would have."""
    side_px = setting.image_size_px
    if side_px > 64:
        side_px = side_px * 8 // 7
    generator = torch.Generator().manual_seed(0)
    shape = (setting.batch_size, 3, side_px, side_px)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return Batch(
        inputs=pixels.to(setting.device),
        labels=torch.zeros(setting.batch_size, dtype=torch.int64, device=setting.device),
        positions=np.arange(setting.batch_size),
        sizes_px=torch.full((setting.batch_size, 2), side_px),
    )


def measure(setting: Setting) -> dict[str, float]:
    """Do the steps in this process and return peak MiB and seconds per step."""
    device = torch.device(setting.device)
    seed_everything(0)
    method, batch = make_method(setting), make_batch(setting)
    optimizer = make_optimizer("sgd", method.parameters(), lr=0.01)
    dtype = autocast_dtype("bf16" if setting.precision == "bf16" else "fp32", device)
    before = resident_bytes()
    times_s = []
    for step in range(setting.steps + 1):
        start = time.perf_counter()
        with torch.autocast(device.type, dtype) if dtype else nullcontext():
            output = method.step(batch, torch.Generator().manual_seed(step))
        torch.autograd.backward(output.loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times_s.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    return {"peak_mib": peak / MIB, "step_s": statistics.median(times_s[1:])}


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def measure_in_child(setting: Setting, *, keep_freed: bool) -> dict[str, float] | None:
    """Return what `measure` returns in a fresh process, None if memory does not suffice."""
    command = [sys.executable, "-m", "bench.grad_cache", "--child", json.dumps(asdict(setting))]
    env = os.environ | ({} if keep_freed else {"MALLOC_MMAP_THRESHOLD_": str(MIB)})
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode == 0:
        result: dict[str, float] = json.loads(done.stdout)
        return result
    if "OutOfMemoryError" in done.stderr or done.returncode == -9:
        return None
    raise SystemExit(done.stderr)


def print_row(setting: Setting, found: dict[str, float] | None, first: dict[str, float]) -> None:
    """Print one row of the table."""
    passes = setting.micro_batch_size or "-"
    head = f"| {setting.batch_size:>6} | {passes:>11} |"
    if found is None:
        print(f"{head} out of memory |")
        return
    share = found["peak_mib"] / first["peak_mib"]
    images_per_s = setting.batch_size / found["step_s"]
    print(
        f"{head} {found['peak_mib']:>8.0f} | {share:>8.2f} | {found['step_s']:>6.2f} |"
        f" {images_per_s:>8.1f} |",
        flush=True,
    )


def parse() -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--micro-batch-size", type=int, default=128)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1024])
    parser.add_argument("--plain", action="store_true", help="also the large batches as they are")
    parser.add_argument("--encoder", default="vit_tiny_patch16_224")
    parser.add_argument("--options", type=json.loads, default=SMALL_VIT)
    parser.add_argument("--image-size-px", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--steps", type=int, default=3, help="counted; one more warms up")
    parser.add_argument("--keep-freed", action="store_true", help="the C library's own ways")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure every setting in a process of its own and print the table."""
    args = parse()
    if args.child:
        print(json.dumps(measure(Setting(**json.loads(args.child)))))
        return
    small = args.micro_batch_size
    wanted: list[tuple[int, int | None]] = [(small, None)]
    wanted += [(batch_size, small) for batch_size in args.batch_sizes]
    wanted += [(batch_size, None) for batch_size in args.batch_sizes if args.plain]
    print(describe_machine(torch.get_num_threads()))
    print(f"{args.encoder} {args.options}, {args.image_size_px} px, {args.precision}, 2 views")
    print("|  batch | micro-batch | peak MiB | to first | s/step | images/s |")
    first: dict[str, float] = {}
    for batch_size, micro_batch_size in wanted:
        setting = Setting(
            batch_size,
            micro_batch_size,
            encoder=args.encoder,
            options=args.options,
            image_size_px=args.image_size_px,
            device=args.device,
            precision=args.precision,
            steps=args.steps,
        )
        found = measure_in_child(setting, keep_freed=args.keep_freed)
        first = first or found or {"peak_mib": math.nan}
        print_row(setting, found, first)


if __name__ == "__main__":
    main()
