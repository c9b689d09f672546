"""Contract of the samplers: sizes, distinctness, coverage, reproducibility."""

import math
import re
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from ctune.distributed import World
from ctune.samplers import (
    ClassBalancedBatchSampler,
    EpochBatches,
    RandomBatchSampler,
    expected_cross_image_positive_fraction,
)

LABEL_LISTS = st.lists(st.integers(0, 5), min_size=1, max_size=60)
EXAMPLES = settings(deadline=None, max_examples=100)


@EXAMPLES
@given(
    labels=LABEL_LISTS,
    P=st.integers(1, 4),
    K=st.integers(1, 6),
    short_class=st.sampled_from(["oversample", "skip"]),
    seed=st.integers(-5, 10**12),
    epoch=st.integers(0, 20),
)
def test_balanced_contract(
    labels: list[int], P: int, K: int, short_class: Any, seed: int, epoch: int
) -> None:
    sizes = Counter(labels)
    eligible = [c for c in sorted(sizes) if short_class == "oversample" or sizes[c] >= K]
    assume(len(eligible) >= P)
    sampler = ClassBalancedBatchSampler(labels, P, K, short_class=short_class, seed=seed)
    batches = sampler.batches(epoch)
    assert sampler.eligible_classes == eligible
    assert len(sampler) == len(batches) == max(1, sum(sizes[c] for c in eligible) // (P * K))
    for batch in batches:
        assert batch.dtype == np.int64
        drawn = Counter(labels[i] for i in batch.tolist())
        assert len(drawn) == P
        assert set(drawn) <= set(eligible)
        assert set(drawn.values()) == {K}
        for index, count in Counter(batch.tolist()).items():
            n = sizes[labels[index]]
            assert count in ({1} if n >= K else {K // n, math.ceil(K / n)})


@EXAMPLES
@given(labels=LABEL_LISTS, K=st.integers(1, 6), seed=st.integers(0, 1000))
def test_all_images_of_a_class_are_seen_before_any_repeats(
    labels: list[int], K: int, seed: int
) -> None:
    classes = sorted(set(labels))
    sampler = ClassBalancedBatchSampler(labels, len(classes), K, seed=seed, batches_per_epoch=15)
    seen: Counter[int] = Counter()
    for batch in sampler.batches(0):
        seen.update(batch.tolist())
        for label in classes:
            counts = [seen[i] for i, other in enumerate(labels) if other == label]
            assert max(counts) - min(counts) <= 1 + (len(counts) % K != 0)


def test_a_class_is_covered_exactly_when_its_size_divides() -> None:
    labels = [0] * 12 + [1] * 12
    batches = ClassBalancedBatchSampler(labels, 2, 4, batches_per_epoch=3).batches(7)
    assert sorted(np.concatenate(batches).tolist()) == list(range(24))


def test_the_seam_keeps_a_batch_distinct_and_forgets_nothing() -> None:
    sampler = ClassBalancedBatchSampler([0] * 5, 1, 3, batches_per_epoch=50, seed=1)
    counts: Counter[int] = Counter()
    for batch in sampler.batches(0):
        assert len(set(batch.tolist())) == 3
        counts.update(batch.tolist())
    assert set(counts.values()) == {30}


def test_classes_are_drawn_uniformly() -> None:
    labels = [0] * 100 + [1] * 10 + [2] * 10 + [3] * 2
    sampler = ClassBalancedBatchSampler(labels, 2, 2, batches_per_epoch=2000)
    drawn = Counter(labels[i] for batch in sampler.batches(0) for i in set(batch.tolist()[::2]))
    assert all(abs(drawn[c] - 1000) < 100 for c in range(4))


@pytest.mark.parametrize(
    "build",
    [
        lambda seed: ClassBalancedBatchSampler([i % 7 for i in range(50)], 4, 3, seed=seed),
        lambda seed: RandomBatchSampler(50, 12, seed=seed),
    ],
)
def test_pure_function_of_seed_and_epoch(build: Any) -> None:
    whole: EpochBatches = build(3)
    expected = [batch.tolist() for batch in whole.batches(2)]
    whole.batches(5)
    assert [batch.tolist() for batch in whole.batches(2)] == expected
    assert [batch.tolist() for batch in whole.batches(1)] != expected
    assert [batch.tolist() for batch in build(4).batches(2)] != expected
    assert len(whole) == len(expected)
    whole.set_epoch(2)
    assert list(whole) == list(whole) == expected
    assert all(type(i) is int for batch in whole for i in batch)


def test_a_share_of_a_batch_holds_whole_classes() -> None:
    labels = [i % 6 for i in range(60)]
    for batch in ClassBalancedBatchSampler(labels, 4, 3).batches(0):
        for rank in range(2):
            share = batch[World(rank, 2).share(len(batch))]
            assert sorted(Counter(labels[i] for i in share.tolist()).values()) == [3, 3]


def test_serves_as_batch_sampler_of_a_loader() -> None:
    labels = [i % 3 for i in range(30)]
    sampler = ClassBalancedBatchSampler(labels, 3, 2, seed=9)
    loader: DataLoader[Any] = DataLoader(
        labels,  # type: ignore[arg-type]
        batch_sampler=sampler,
    )
    assert len(loader) == 5
    assert all(sorted(batch.tolist()) == [0, 0, 1, 1, 2, 2] for batch in loader)


@EXAMPLES
@given(N=st.integers(1, 60), B=st.integers(1, 70), drop_last=st.booleans(), seed=st.integers())
def test_random_contract(N: int, B: int, drop_last: bool, seed: int) -> None:
    assume(N >= B or not drop_last)
    sampler = RandomBatchSampler(N, B, seed=seed, drop_last=drop_last)
    batches = sampler.batches(0)
    assert len(batches) == len(sampler) == (N // B if drop_last else -(-N // B))
    assert all(len(batch) == B for batch in batches[: N // B])
    indices = np.concatenate(batches).tolist()
    assert len(set(indices)) == len(indices)
    assert len(indices) == (N // B * B if drop_last else N)
    assert set(indices) <= set(range(N))


@pytest.mark.parametrize(
    ("labels", "args", "options", "message"),
    [
        ([0, 0, 1, 1], (3, 2), {}, "classes_per_batch is 3, but only 2 classes"),
        ([0, 0, 1], (2, 2), {"short_class": "skip"}, "only 1 classes"),
        ([0, 0, 1], (2, 2), {"short_class": "raise"}, "classes [1] have fewer"),
        ([0, 0, 1], (2, 2), {"short_class": "pad"}, "short_class is 'pad'"),
        ([0, 0, 1], (0, 2), {}, "classes_per_batch is 0"),
        ([0, 0, 1], (2, 0), {}, "samples_per_class is 0"),
        ([0, 0, 1], (2, 2), {"batches_per_epoch": 0}, "batches_per_epoch is 0"),
        ([0.0, 1.0], (1, 1), {}, "dtype float64"),
        ([[0, 1]], (1, 1), {}, "shape (1, 2)"),
        ([], (1, 1), {}, "shape (0,)"),
    ],
)
def test_balanced_refuses(
    labels: Any, args: tuple[int, int], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        ClassBalancedBatchSampler(labels, *args, **options)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((0, 2), {"drop_last": False}, "nothing to sample"),
        ((5, 6), {}, "5 items make no batch of 6"),
        ((5, 0), {}, "the batch size is 0"),
    ],
)
def test_random_refuses(args: tuple[int, int], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RandomBatchSampler(*args, **options)


def test_epochs_count_from_zero() -> None:
    sampler = RandomBatchSampler(5, 2)
    for act in (sampler.set_epoch, sampler.batches):
        with pytest.raises(ValueError, match="epoch is -1"):
            act(-1)


@EXAMPLES
@given(labels=LABEL_LISTS, data=st.data())
def test_positive_fraction_is_the_exact_fraction(labels: list[int], data: st.DataObject) -> None:
    N = len(labels)
    B = data.draw(st.integers(1, N))
    exact = sum(
        Fraction(n, N) * (1 - Fraction(math.comb(N - n, B - 1), math.comb(N - 1, B - 1)))
        for n in Counter(labels).values()
    )
    fraction = expected_cross_image_positive_fraction(labels, B)
    assert fraction == pytest.approx(float(exact), rel=1e-12, abs=1e-15)


def test_positive_fraction_of_a_large_set_is_exact_to_ten_digits() -> None:
    N, n, B = 1_281_000, 1281, 256
    labels = np.arange(N) % (N // n)
    exact = 1 - Fraction(math.comb(N - n, B - 1), math.comb(N - 1, B - 1))
    fraction = expected_cross_image_positive_fraction(labels, B)
    assert fraction == pytest.approx(float(exact), rel=1e-12)


def test_positive_fraction_matches_drawn_batches() -> None:
    labels = np.array([0] * 30 + [1] * 5 + list(range(2, 40)))
    shares = []
    for epoch in range(300):
        for batch in RandomBatchSampler(len(labels), 16).batches(epoch):
            drawn = labels[batch]
            shares.append(np.mean([(drawn == label).sum() > 1 for label in drawn]))
    expected = expected_cross_image_positive_fraction(labels, 16)
    assert np.mean(shares) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize("batch_size", [0, 4])
def test_positive_fraction_refuses(batch_size: int) -> None:
    with pytest.raises(ValueError, match=re.escape("must be in [1, N = 3]")):
        expected_cross_image_positive_fraction([0, 0, 1], batch_size)
