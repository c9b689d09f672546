"""Seconds of a masked autoencoder's encoder, forward and backward, against the masking ratio.

Removed patches never enter the encoder, so at 75 % it should take about a quarter of the time at
0 % (class token and patch embedding stay): at most 0.40 times is asked for. The ratios alternate
within a run; medians of wall-clock time.

    OMP_NUM_THREADS=2 python -m bench.masked_encoder
    python -m bench.masked_encoder --device cuda --model vit_base_patch16_224 --image-size-px 224
"""

import argparse
import statistics
import time
from typing import Any

import timm
import torch

from bench.input_pipeline import describe_machine
from ctune.masked_autoencoder import MaskedAutoencoder

SMALL_VIT: dict[str, Any] = {"patch_size": 4, "embed_dim": 192, "depth": 6, "num_heads": 3}
MASK_RATIOS = (0.0, 0.5, 0.75, 0.9)


def encoder_s(model: MaskedAutoencoder, images: torch.Tensor, mask_ratio: float) -> float:
    """Return the seconds of one forward and backward pass of the encoder."""
    started = time.perf_counter()
    tokens = model.encode(images, mask_ratio).visible
    torch.autograd.backward(tokens.square().mean())
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="a timm ViT; else a 6-block one on 4 px patches")
    parser.add_argument("--image-size-px", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args()
    name = args.model or "vit_tiny_patch16_224"
    options = {} if args.model else SMALL_VIT
    encoder = timm.create_model(name, num_classes=0, img_size=args.image_size_px, **options)
    model = MaskedAutoencoder(encoder, 96, decoder_depth=1, decoder_num_heads=3).to(args.device)
    images = torch.randn(args.batch_size, 3, args.image_size_px, args.image_size_px)
    images = images.to(args.device)
    for mask_ratio in MASK_RATIOS:  # warm up
        encoder_s(model, images, mask_ratio)
    rounds = [{r: encoder_s(model, images, r) for r in MASK_RATIOS} for _ in range(args.rounds)]
    print(describe_machine(torch.get_num_threads()))
    print(f"{name} {options}, {args.image_size_px} px, batch {args.batch_size}, {args.device}")
    print("| masked | seconds | times 0 % |")
    print("|---|---|---|")
    for mask_ratio in MASK_RATIOS:
        seconds = statistics.median(done[mask_ratio] for done in rounds)
        ratio = statistics.median(done[mask_ratio] / done[0.0] for done in rounds)
        print(f"| {mask_ratio:.0%} | {seconds:.3f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
