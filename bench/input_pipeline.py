"""Images per second of the input pipeline: two views per image, ours against torchvision.

Views are those of a preset of `ctune.view_presets`, by default `simclr_cifar` up to 64 px and
`simclr`, which blurs, above.

`torchvision` is transforms v2 on uint8 tensors inside a DataLoader with one worker per core, as its
documentation recommends; `memory`: the decoded images are in memory, `files`: every image is
decoded from its JPEG each time. `ctune` is the decoded cache, a prefetching thread and batched
views, with as many threads as cores; its cache is built once, in the time told below the table.

The sides alternate within one process, so that a busy machine slows both; medians are printed. The
processor time per image, workers included, says the same on a machine that others use meanwhile.

    OMP_NUM_THREADS=2 python -m bench.input_pipeline
    python -m bench.input_pipeline --sizes 224 --preset byol --data path/to/images --device cuda
"""

import argparse
import datetime
import io
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ctune.augment import ViewConfig, ViewPipeline
from ctune.data import ImageCache, Indices, prefetch
from ctune.manifest import Split
from ctune.view_presets import VIEW_PRESETS

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CACHE_SIDE_PX = {32: 32, 224: 256}
FILE_SIZE_PX = {32: (32, 32), 224: (500, 375)}
"""(width, height) of generated files; in memory both sides hold images of the cache side."""
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


@dataclass(frozen=True)
class Setting:
    """One row group of the table."""

    preset: str
    size_px: int
    batch_size: int
    batches: int
    rounds: int
    workers: int
    device: torch.device

    @property
    def views(self) -> list[ViewConfig]:
        """What is done for each of the two views."""
        configs = VIEW_PRESETS[self.preset](self.size_px, mean=MEAN, std=STD)
        return [configs[0], configs[-1]]


class Images:
    """Encoded images in memory, as the packed store would hand them out."""

    def __init__(self, encoded: list[bytes]) -> None:
        self.encoded = encoded

    def __len__(self) -> int:
        return len(self.encoded)

    def image(self, n: int) -> Image.Image:
        return Image.open(io.BytesIO(self.encoded[n])).convert("RGB")

    def indices(self, split: Split) -> Indices:
        return np.arange(len(self) if split == "train" else 0, dtype=np.int64)

    def labels(self, split: Split) -> Indices:
        return np.zeros_like(self.indices(split))


class TwoViews(Dataset[tuple[Tensor, Tensor]]):
    """The usual map-style data set: two random views of image n."""

    def __init__(self, load: Callable[[int], Tensor], count: int, views: list[ViewConfig]) -> None:
        self.load, self.count = load, count
        self.transforms = [torchvision_transform(config) for config in views]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, n: int) -> tuple[Tensor, Tensor]:
        image = self.load(n)
        first, second = self.transforms
        return first(image), second(image)


def torchvision_transform(config: ViewConfig) -> v2.Compose:
    """Return the same random view in torchvision, on uint8 tensors for as long as possible."""
    if config.rand_augment or config.erase_prob or config.blur_solarise_mix:
        raise SystemExit("this bench knows no RandAugment, erasing or mixes: take another preset")
    kernel_px = config.size_px // 10 | 1  # a tenth of the side (SimCLR), odd
    interpolation = v2.InterpolationMode(config.interpolation)
    crop = v2.RandomResizedCrop(
        config.size_px, config.scale, config.ratio, interpolation, antialias=True
    )
    jitter = v2.RandomApply([v2.ColorJitter(*config.jitter)], p=config.jitter_prob)
    blur = v2.RandomApply([v2.GaussianBlur(kernel_px, config.blur_sigma_px)], p=config.blur_prob)
    steps = [
        (1.0, crop),
        (config.flip_prob, v2.RandomHorizontalFlip(config.flip_prob)),
        (config.jitter_prob, jitter),
        (config.grayscale_prob, v2.RandomGrayscale(config.grayscale_prob)),
        (config.blur_prob, blur),
        (config.solarise_prob, v2.RandomSolarize(128, config.solarise_prob)),
        (1.0, v2.ToDtype(torch.float32, scale=True)),
        (1.0, v2.Normalize(config.mean, config.std)),
    ]
    return v2.Compose([step for probability, step in steps if probability])


def generate(count: int, width: int, height: int) -> list[bytes]:
    """Return JPEGs that compress like photographs: smooth colours under some noise."""
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
        noisy = np.clip(smooth + rng.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(noisy).save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
    return encoded


def read_folder(folder: Path, count: int) -> list[bytes]:
    """Return the first images of a folder, in the order of their names."""
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)[:count]
    if not paths:
        raise SystemExit(f"no images in {folder}: give a folder with {sorted(IMAGE_SUFFIXES)}")
    return [path.read_bytes() for path in paths]


def torchvision_batches(load: Callable[[int], Tensor], count: int, s: Setting) -> Iterator[None]:
    """Do one round of batches after another; workers live on."""
    views = TwoViews(load, count, s.views)
    order = torch.randint(0, count, (s.batches * s.batch_size,)).tolist()
    loader = DataLoader(
        views,
        batch_size=s.batch_size,
        sampler=order,
        num_workers=s.workers,
        persistent_workers=True,
        pin_memory=s.device.type == "cuda",
    )
    while True:
        for first, second in loader:
            torch.cat((first, second)).to(s.device, non_blocking=True)
        yield


def ctune_batches(cache: ImageCache, s: Setting) -> Iterator[None]:
    """Do one round of batches after another."""
    first, second = s.views
    pipeline = ViewPipeline(first) if first == second else ViewPipeline(first, second)
    generator = torch.Generator().manual_seed(0)
    order = np.random.default_rng(0).integers(0, len(cache), (s.batches, s.batch_size))

    def fetch(positions: Indices) -> tuple[Tensor, Tensor]:
        images = cache.batch(positions).to(s.device, non_blocking=True)
        return images, cache.sizes(positions)

    while True:
        with prefetch(list(order), fetch) as fetched:
            for images, sizes in fetched:
                pipeline.views(images, sizes, generator, num_views=2)
        yield


def timed_round(rounds: Iterator[None], s: Setting) -> tuple[float, float]:
    """Do a round; return images per second and processor milliseconds per image."""
    cpu_start, start = processor_s(), time.perf_counter()
    next(rounds)
    if s.device.type == "cuda":
        torch.cuda.synchronize(s.device)
    elapsed_s, used_s = time.perf_counter() - start, processor_s() - cpu_start
    images = s.batches * s.batch_size
    return images / elapsed_s, 1000 * used_s / images


def processor_s() -> float:
    """Return the processor time of this process and of its living children."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[1]) == os.getpid():
            ticks += int(fields[11]) + int(fields[12])
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")


def measure(encoded: list[bytes], s: Setting) -> None:
    """Run all sides in turn and print their rows."""
    store = Images(encoded)
    side = CACHE_SIDE_PX.get(s.size_px, s.size_px * 8 // 7)
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        cache = ImageCache.build(store, range(len(store)), side, Path(folder) / "cache")
        build_s = time.perf_counter() - start
        # As pil_to_tensor leaves them: channels last, for which torchvision's resize is fastest.
        held = [image.permute(1, 2, 0).contiguous() for image in cache.batch(range(len(cache)))]
        sides = {
            "ctune": ctune_batches(cache, s),
            "torchvision memory": torchvision_batches(
                lambda n: held[n].permute(2, 0, 1), len(store), s
            ),
            "torchvision files": torchvision_batches(
                lambda n: F.pil_to_tensor(store.image(n)), len(store), s
            ),
        }
        results: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
        for round_number in range(s.rounds + 1):
            for name, rounds in sides.items():
                result = timed_round(rounds, s)
                if round_number:  # the first warms up
                    results[name].append(result)
    print_rows(results, s)
    print(f"  cache of {len(store)} images at {side} px built in {build_s:.2f} s")


def print_rows(results: dict[str, list[tuple[float, float]]], s: Setting) -> None:
    """Print medians and how many times faster, and cheaper, ctune is."""
    medians = {
        name: tuple(statistics.median(column) for column in zip(*values, strict=True))
        for name, values in results.items()
    }
    our_speed, our_cost = medians["ctune"]
    for name, (speed, cost) in medians.items():
        speeds = [speed for speed, _ in results[name]]
        print(
            f"| {s.size_px:>4} | {s.preset:<12} | {s.device.type:<4} | {name:<18} | {speed:>8.0f} |"
            f" {min(speeds):>6.0f} - {max(speeds):<6.0f} | {our_speed / speed:>6.2f} |"
            f" {cost:>12.3f} | {cost / our_cost:>7.2f} |"
        )


def describe_machine(threads: int) -> str:
    """Return one line: when, where, with what."""
    names = ("torch", "torchvision", "numpy", "pillow")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    gpu = f", {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else ""
    today = datetime.datetime.now(datetime.UTC).date()
    return (
        f"{today}, {processor_name()}, {len(os.sched_getaffinity(0))} cores{gpu},"
        f" {threads} torch threads, python {platform.python_version()}, {versions}"
    )


def processor_name() -> str:
    """Return what the kernel calls the processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 224], help="view sides, px")
    parser.add_argument("--preset", choices=VIEW_PRESETS, help="else by size, see above")
    parser.add_argument("--data", type=Path, help="folder of images; else they are generated")
    parser.add_argument("--images", type=int, default=512, help="how many images")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, help="per round; else 40 at 32 px, 8 above")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default=None, help="cpu or cuda; else the CPU and any GPU")
    args = parser.parse_args()
    workers = len(os.sched_getaffinity(0))
    found = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    print(describe_machine(torch.get_num_threads()))
    print(
        "|   px | views        | on   | pipeline           | images/s |    min - max    | faster |"
        " CPU ms/image | cheaper |"
    )
    for size_px in args.sizes:
        width, height = FILE_SIZE_PX.get(size_px, (2 * size_px, 3 * size_px // 2))
        if args.data:
            encoded = read_folder(args.data, args.images)
        else:
            encoded = generate(args.images, width, height)
        for device in [args.device] if args.device else found:
            setting = Setting(
                preset=args.preset or ("simclr_cifar" if size_px <= 64 else "simclr"),
                size_px=size_px,
                batch_size=args.batch_size,
                batches=args.batches or (40 if size_px <= 64 else 8),
                rounds=args.rounds,
                workers=workers,
                device=torch.device(device),
            )
            measure(encoded, setting)


if __name__ == "__main__":
    main()
