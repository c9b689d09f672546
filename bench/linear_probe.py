"""Seconds of a linear probe on cached features: a grid of rates in one training against others.

`one rate, torch`: what one would write by hand, nn.Linear with cross-entropy and torch's SGD on the
same batches. `ctune, one rate` and `ctune, grid`: our training of one head and of all heads.
`ctune, probe`: the whole protocol, which holds a tenth out, trains the grid on the rest, chooses a
rate and trains a head with it on everything. `scikit-learn`: LogisticRegression (L-BFGS, C 1).

With --images a small ViT encodes so many 32 px images: `images` once, then the protocol `cached` on
the features, which is what a job does; `crops` in every epoch anew, random crops, the protocol
`full`. Both with one rate and with ten.

The sides alternate, so that a busy machine slows them alike; medians of wall-clock and of processor
time. Features are Gaussian clusters; the accuracy is that of the test set.

    OMP_NUM_THREADS=1 python -m bench.linear_probe
    python -m bench.linear_probe --dim 768 --classes 100 --train 50000 --device cuda
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from bench.input_pipeline import describe_machine
from ctune.augment import ViewPipeline
from ctune.backbones import build_encoder
from ctune.encoders import TimmEncoder
from ctune.evaluate.accuracy import topk_accuracy
from ctune.evaluate.head_training import Heads, cached_source, epoch_batches, train_heads
from ctune.evaluate.linear_probe import linear_probe
from ctune.evaluate.probe_protocol import ProbeProtocol
from ctune.seeding import make_generator
from ctune.view_presets import mae_minimal

SMALL_VIT = {"patch_size": 4, "depth": 6}
RATES = (0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
ONE_RATE = (0.1,)


@dataclass(frozen=True)
class Data:
    """Features and labels of both splits, on the device."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor
    num_classes: int


def make_data(args: argparse.Namespace) -> Data:
    """Return Gaussian clusters, float32; a linear classifier gets most of them right."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(args.classes, args.dim, generator=generator) * (6 / args.dim) ** 0.5

    def draw(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(0, args.classes, (count,), generator=generator)
        noise = torch.randn(count, args.dim, generator=generator)
        return (centres[labels] + noise).to(args.device), labels.to(args.device)

    return Data(*draw(args.train), *draw(args.test), args.classes)


def by_hand(data: Data, protocol: ProbeProtocol, rates: tuple[float, ...]) -> float:
    """Train one head after the other with torch's layers; return the last one's accuracy."""
    rows = torch.arange(len(data.train))
    for lr in rates:
        head = nn.Linear(data.train.shape[1], data.num_classes, device=data.train.device)
        optimizer = torch.optim.SGD(head.parameters(), lr=lr, momentum=protocol.momentum)
        batches = epoch_batches(rows, protocol)
        for epoch in range(protocol.epochs):
            for batch in batches(epoch):
                chosen = torch.from_numpy(batch).to(data.train.device)
                optimizer.zero_grad()
                logits = head(data.train[chosen])
                loss = nn.functional.cross_entropy(logits, data.train_labels[chosen])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    with torch.no_grad():
        return topk_accuracy(head(data.test), data.test_labels, (1,))[0]


def heads(data: Data, protocol: ProbeProtocol) -> float | None:
    """Train the heads of all rates of the protocol together."""
    start = torch.zeros(data.num_classes, data.train.shape[1]).to(data.train)
    grid = Heads(
        [(start, start.new_zeros(data.num_classes))],
        protocol.learning_rates,
        momentum=protocol.momentum,
        weight_decay=protocol.weight_decay,
    )
    train_heads(
        grid,
        cached_source(data.train, None),
        labels=data.train_labels,
        batches=epoch_batches(torch.arange(len(data.train)), protocol),
        protocol=protocol,
    )
    if len(grid) > 1:
        return None
    ((weight, bias),) = grid.layers(0)
    return topk_accuracy(data.test @ weight.T + bias, data.test_labels, (1,))[0]


def scikit_learn(data: Data) -> float:
    """Fit LogisticRegression on the CPU; return its accuracy."""
    model = LogisticRegression(max_iter=1000)
    model.fit(data.train.cpu().numpy(), data.train_labels.cpu().numpy())
    score = model.score(data.test.cpu().numpy(), data.test_labels.cpu().numpy())
    return float(score)


@dataclass(frozen=True)
class Timed:
    """One run of one side."""

    wall_s: float
    cpu_s: float
    accuracy: float | None


def image_sides(args: argparse.Namespace) -> dict[str, Callable[[], float | None]]:
    """Return the protocols from images on: `cached`, and `full` for 2 epochs; random images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (args.images, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = (torch.arange(args.images) % args.classes).to(args.device)
    config = TimmEncoder(
        name="vit_tiny_patch16_224", pretrained=False, image_size_px=32, options=SMALL_VIT
    )
    encoder = build_encoder(config, pool="auto", encoder_dir=None).to(args.device).eval()
    views = ViewPipeline(*mae_minimal(32, mean=encoder.mean, std=encoder.std))

    def augmented(rows: Tensor, step: int) -> Tensor:
        pixels = images[rows.cpu()].to(args.device)
        sizes = torch.full((len(rows), 2), 32)
        features: Tensor = encoder(views(pixels, sizes, make_generator(step)))
        return features

    def encode() -> Tensor:
        with torch.no_grad():
            starts = range(0, args.images, 256)
            parts = [images[start : start + 256].to(args.device) for start in starts]
            return torch.cat([encoder(encoder.preprocessing.normalise(part)) for part in parts])

    features = encode()

    def cached(rates: tuple[float, ...]) -> float:
        protocol = ProbeProtocol(
            learning_rates=rates, epochs=args.epochs, batch_size=args.batch_size
        )
        found = encode()
        return linear_probe(
            found, labels, found, labels, num_classes=args.classes, protocol=protocol
        ).top1

    def probe(rates: tuple[float, ...]) -> float:
        protocol = ProbeProtocol(learning_rates=rates, epochs=2, batch_size=args.batch_size)
        return linear_probe(
            features,
            labels,
            features,
            labels,
            num_classes=args.classes,
            protocol=protocol,
            augmented=augmented,
        ).top1

    return {
        "images, one rate": lambda: cached(ONE_RATE),
        "images, grid of 10": lambda: cached(RATES),
        "crops, one rate": lambda: probe(ONE_RATE),
        "crops, grid of 10": lambda: probe(RATES),
    }


def timed(run: Callable[[], float | None]) -> Timed:
    """Run one side, to the end of what the device does."""
    wall_s, processor_s = time.perf_counter(), time.process_time()
    accuracy = run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return Timed(time.perf_counter() - wall_s, time.process_time() - processor_s, accuracy)


def measure(data: Data, args: argparse.Namespace) -> None:
    """Time all sides and print a row each."""
    one = ProbeProtocol(learning_rates=ONE_RATE, epochs=args.epochs, batch_size=args.batch_size)
    grid = ProbeProtocol(learning_rates=RATES, epochs=args.epochs, batch_size=args.batch_size)
    features = (data.train, data.train_labels, data.test, data.test_labels)
    sides: dict[str, Callable[[], float | None]] = {
        "one rate, torch": lambda: by_hand(data, one, ONE_RATE),
        "ctune, one rate": lambda: heads(data, one),
        "ctune, grid of 10": lambda: heads(data, grid),
        "ten runs, torch": lambda: by_hand(data, one, RATES),
        "ctune, probe of 10": lambda: (
            linear_probe(*features, num_classes=data.num_classes, protocol=grid).top1
        ),
        "scikit-learn": lambda: scikit_learn(data),
    }
    if args.images:
        sides |= image_sides(args)
    for name, run in sides.items():  # warm up
        if name != "ten runs, torch":
            run()
    rounds = [{name: timed(run) for name, run in sides.items()} for _ in range(args.rounds)]
    print("| side               | seconds | CPU s | x torch's one | x ctune's one | top-1  |")
    for name in sides:
        wall_s = statistics.median(done[name].wall_s for done in rounds)
        cpu_s = statistics.median(done[name].cpu_s for done in rounds)
        ratios = [
            statistics.median(done[name].wall_s / done[other].wall_s for done in rounds)
            for other in ("one rate, torch", "ctune, one rate")
        ]
        accuracy = rounds[-1][name].accuracy
        shown = "      " if accuracy is None else f"{accuracy:.4f}"
        print(
            f"| {name:18} | {wall_s:7.3f} | {cpu_s:5.2f} | {ratios[0]:13.2f} | {ratios[1]:13.2f} |"
            f" {shown} |"
        )


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--train", type=int, default=10_000, help="training samples")
    parser.add_argument("--test", type=int, default=2_000, help="test samples")
    parser.add_argument("--dim", type=int, default=192, help="of the features")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--images", type=int, default=0, help="encoded by a ViT")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args()
    print(describe_machine(torch.get_num_threads()))
    print(
        f"{args.train} samples, {args.dim} dimensions, {args.classes} classes, batch"
        f" {args.batch_size}, {args.epochs} epochs, {args.device}"
    )
    measure(make_data(args), args)


if __name__ == "__main__":
    main()
