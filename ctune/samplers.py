"""Batches of indices as a pure function of (seed, epoch), so that a run resumes inside an epoch.

Both samplers describe the *global* batch; with several processes each takes its contiguous
share (`ctune.distributed.World.share`).
They serve as ``batch_sampler`` of a torch DataLoader and open no image. Never imports torch.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Indices: TypeAlias = NDArray[np.int64]
ShortClass = Literal["oversample", "skip", "raise"]
BatchKind = Literal["auto", "random", "class_balanced"]

RANDOM_IS_ENOUGH = 0.95
"""Share of anchors with a positive from another image above which random batches will do (2.5)."""


class EpochBatches(ABC):
    """Base: epochs of batches, drawn from (seed, epoch) only and so alike in all processes."""

    def __init__(self, batch_size: int, *, seed: int) -> None:
        if batch_size < 1:
            raise ValueError(f"the batch size is {batch_size}; it must be at least 1")
        self.batch_size = batch_size
        """Images of one global batch."""
        self.seed = seed
        self.epoch = 0

    @abstractmethod
    def __len__(self) -> int:
        """Batches per epoch."""

    @abstractmethod
    def batches(self, epoch: int) -> list[Indices]:
        """All batches of an epoch, [batch size] each; slice them to resume inside the epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that iteration yields."""
        if epoch < 0:
            raise ValueError(f"epoch is {epoch}; epochs count from 0")
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches(self.epoch):
            yield batch.tolist()

    def _generator(self, epoch: int) -> np.random.Generator:
        if epoch < 0:
            raise ValueError(f"epoch is {epoch}; epochs count from 0")
        return np.random.default_rng([int(self.seed) % 2**64, epoch])


class RandomBatchSampler(EpochBatches):
    """A fresh permutation of the items per epoch, cut into batches.

    Args:
        num_items: items of the data set.
        batch_size: of the global batch.
        seed: any integer.
        drop_last: leave out the short last batch.

    Raises:
        ValueError: nothing to sample, or not one whole batch under ``drop_last``.
    """

    def __init__(
        self,
        num_items: int,
        batch_size: int,
        *,
        seed: int = 0,
        drop_last: bool = True,
    ) -> None:
        super().__init__(batch_size, seed=seed)
        if num_items < 1:
            raise ValueError(f"num_items is {num_items}; there is nothing to sample")
        if drop_last and num_items < batch_size:
            raise ValueError(
                f"{num_items} items make no batch of {batch_size}, so an epoch has none; lower "
                "the batch size"
            )
        self.num_items = num_items
        self.drop_last = drop_last

    def __len__(self) -> int:
        whole, rest = divmod(self.num_items, self.batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    def batches(self, epoch: int) -> list[Indices]:
        """See the base class."""
        order = self._generator(epoch).permutation(self.num_items).astype(np.int64)
        return [order[i * self.batch_size : (i + 1) * self.batch_size] for i in range(len(self))]


class ClassBalancedBatchSampler(EpochBatches):
    """Batches of P distinct classes, uniformly drawn, with K images each (LaCViT, section 2.5).

    Every class has a shuffled queue, refilled when exhausted, so that within an epoch all its
    images are seen before any is seen again; at the seam, images already in the batch wait in the
    new queue. Images of one class stand together in the batch, so the contiguous share of
    one of n processes holds whole classes when P divides by n.

    Args:
        labels: [N] integer class of every image.
        classes_per_batch: P.
        samples_per_class: K. A class with fewer images than K is treated as ``short_class`` says.
        short_class: "oversample" repeats images evenly (floor or ceil of K/n times each), "skip"
            leaves the class out, "raise" refuses.
        seed: any integer.
        batches_per_epoch: None: max(1, images of eligible classes // (P*K)).

    Raises:
        ValueError: labels not 1-D integers; P or K < 1; fewer eligible classes than P; a short
            class under "raise".
    """

    def __init__(
        self,
        labels: ArrayLike,
        classes_per_batch: int,
        samples_per_class: int,
        *,
        short_class: ShortClass = "oversample",
        seed: int = 0,
        batches_per_epoch: int | None = None,
    ) -> None:
        for name, value in (
            ("classes_per_batch", classes_per_batch),
            ("samples_per_class", samples_per_class),
            ("batches_per_epoch", 1 if batches_per_epoch is None else batches_per_epoch),
        ):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        batch_size = classes_per_batch * samples_per_class
        super().__init__(batch_size, seed=seed)
        self._members = _eligible_members(_label_array(labels), samples_per_class, short_class)
        if classes_per_batch > len(self._members):
            raise ValueError(
                f"classes_per_batch is {classes_per_batch}, but only {len(self._members)} classes "
                "are eligible; lower it or raise samples_per_class"
            )
        self.classes_per_batch = classes_per_batch
        self.samples_per_class = samples_per_class
        self.eligible_classes: list[int] = list(self._members)
        eligible_images = sum(len(members) for members in self._members.values())
        self._length = batches_per_epoch or max(1, eligible_images // batch_size)

    def __len__(self) -> int:
        return self._length

    def batches(self, epoch: int) -> list[Indices]:
        """See the base class; images of one class are neighbours."""
        rng = self._generator(epoch)
        queues = {label: rng.permutation(members) for label, members in self._members.items()}
        batches = []
        for _ in range(self._length):
            drawn = rng.choice(self.eligible_classes, self.classes_per_batch, replace=False)
            parts = []
            for label in drawn.tolist():
                part, queues[label] = self._draw(queues[label], self._members[label], rng)
                parts.append(part)
            batches.append(np.concatenate(parts))
        return batches

    def _draw(
        self, queue: Indices, members: Indices, rng: np.random.Generator
    ) -> tuple[Indices, Indices]:
        """Take K images of one class; return them and what is left of its queue."""
        copies, count = divmod(self.samples_per_class, len(members))
        whole = np.repeat(members, copies)
        taken, queue = queue[:count], queue[count:]
        if len(taken) < count:
            refill = rng.permutation(members)
            fresh = ~np.isin(refill, taken)
            more = refill[fresh][: count - len(taken)]
            queue = refill[~np.isin(refill, more)]
            taken = np.concatenate([taken, more])
        return np.concatenate([whole, taken]), queue


def contrastive_sampler(
    labels: ArrayLike,
    batch_size: int,
    *,
    kind: BatchKind,
    samples_per_class: int,
    seed: int = 0,
) -> EpochBatches:
    """Return batches for a contrastive loss with labels (LaCViT, section 2.5).

    `auto` takes random batches while `RANDOM_IS_ENOUGH` of the anchors find a positive in them, and
    where K does not divide the batch or there are fewer classes than a balanced batch needs.

    Raises:
        ValueError: see the samplers.
    """
    array = _label_array(labels)
    if kind == "auto":
        share = expected_cross_image_positive_fraction(array, batch_size)
        fits = batch_size % samples_per_class == 0
        classes_fit = batch_size // samples_per_class <= len(np.unique(array))
        kind = "class_balanced" if share < RANDOM_IS_ENOUGH and fits and classes_fit else "random"
    if kind == "random":
        return RandomBatchSampler(len(array), batch_size, seed=seed)
    return ClassBalancedBatchSampler(
        array,
        batch_size // samples_per_class,
        samples_per_class,
        seed=seed,
    )


def steps_per_epoch(sampler: EpochBatches, accumulate_steps: int) -> int:
    """Return optimizer steps per epoch; a short last group of micro-batches still steps."""
    return -(-len(sampler) // accumulate_steps)


def expected_cross_image_positive_fraction(labels: ArrayLike, batch_size: int) -> float:
    """Expected share of anchors with a positive from another image, in uniform random batches.

    (1/N) sum over classes of n_c [1 - C(N-n_c, B-1) / C(N-1, B-1)], batches of B drawn without
    replacement (LaCViT, section 10). The ratio is the product over j < B-1 of
    1 - (n_c-1)/(N-1-j), summed in logarithms: differences of log-gamma lose digits for large N.

    Args:
        labels: [N] integer class of every image.
        batch_size: B.

    Raises:
        ValueError: labels not 1-D integers; B outside [1, N].
    """
    array = _label_array(labels)
    N = len(array)
    if not 1 <= batch_size <= N:
        raise ValueError(f"batch_size is {batch_size}; it must be in [1, N = {N}]")
    sizes, how_many = np.unique(np.unique(array, return_counts=True)[1], return_counts=True)
    remaining = np.arange(N - 1, N - batch_size, -1, dtype=np.float64)
    total = 0.0
    for size, classes in zip(sizes.tolist(), how_many.tolist(), strict=True):
        certain = N - size < batch_size - 1
        log_none = -np.inf if certain else float(np.log1p(-(size - 1) / remaining).sum())
        total += classes * size * -float(np.expm1(log_none))
    return total / N


def _label_array(labels: ArrayLike) -> Indices:
    array = np.asarray(labels)
    if array.ndim != 1 or len(array) == 0 or array.dtype.kind not in "iu":
        raise ValueError(
            f"labels has shape {array.shape} and dtype {array.dtype}; it must be a 1-D array of "
            "integers, one class per image"
        )
    return array.astype(np.int64)


def _eligible_members(
    labels: Indices, samples_per_class: int, short_class: ShortClass
) -> dict[int, Indices]:
    """Indices of each class that may be drawn, classes ascending."""
    if short_class not in ("oversample", "skip", "raise"):
        raise ValueError(f"short_class is {short_class!r}; use 'oversample', 'skip' or 'raise'")
    classes, starts = np.unique(np.sort(labels), return_index=True)
    order = np.argsort(labels, kind="stable").astype(np.int64)
    parts: Sequence[Indices] = np.split(order, starts[1:])
    members = dict(zip(classes.tolist(), parts, strict=True))
    short = [label for label, part in members.items() if len(part) < samples_per_class]
    if short and short_class == "raise":
        raise ValueError(
            f"classes {short[:10]} have fewer than samples_per_class = {samples_per_class} images "
            "and short_class is 'raise'; lower samples_per_class or use 'oversample'"
        )
    if short_class == "skip":
        return {label: part for label, part in members.items() if label not in set(short)}
    return members
