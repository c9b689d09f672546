"""Randomness as a pure function of what is done: resuming needs no generator state."""

import hashlib
import random

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """Return a 63-bit seed that depends on every part and on their order."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def make_generator(*parts: int | str) -> torch.Generator:
    """Return a CPU generator seeded from `parts`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def seed_everything(*parts: int | str) -> None:
    """Seed the global generators of torch (CPU, GPUs in use), numpy and python from `parts`."""
    seed = derive_seed(*parts)
    torch.default_generator.manual_seed(seed)
    # Not torch.manual_seed: where CUDA is not in use, that formats a stack trace each time.
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)
