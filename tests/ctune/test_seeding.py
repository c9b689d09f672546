"""Seeding: the same parts, the same draws of every generator."""

import random

import numpy as np
import torch

from ctune.seeding import derive_seed, make_generator, seed_everything


def draws() -> tuple[float, ...]:
    return float(torch.rand(())), float(torch.randn(())), float(np.random.rand()), random.random()


def test_all_global_generators_follow_the_parts() -> None:
    seed_everything(1, "stage", 3)
    first = draws()
    seed_everything(1, "stage", 4)
    other = draws()
    seed_everything(1, "stage", 3)
    assert draws() == first
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_torch_draws_what_manual_seed_gives() -> None:
    seed_everything(7)
    mine = torch.rand(3)
    torch.manual_seed(derive_seed(7))
    assert torch.equal(mine, torch.rand(3))


def test_a_generator_depends_on_the_order_of_its_parts() -> None:
    assert make_generator(1, "a").initial_seed() == make_generator(1, "a").initial_seed()
    assert make_generator(1, "a").initial_seed() != make_generator("a", 1).initial_seed()
