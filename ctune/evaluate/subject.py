"""What is evaluated: features of an encoder, their labels, and predictions made from them."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from ctune.config import EvaluationConfig
from ctune.evaluate.classification import Predictions
from ctune.evaluate.linear_probe import Augmented, LinearProbeResult, linear_probe
from ctune.evaluate.probe_protocol import recipe_protocol
from ctune.schema import JsonObject
from ctune.seeding import make_generator

ONE_SHOT_RATE = 0.1
"""Learning rate of the linear probe where every class has a single image (lacvit.md 2.2)."""


Histograms = Callable[[Tensor], Tensor]
"""Rows [n] of a split -> histograms [n, 3, K] of their images."""


@dataclass(frozen=True)
class LabelledFeatures:
    """Features h [N, D] of one split and labels [N] int64, -1 where an image has none."""

    features: Tensor
    labels: Tensor

    def labelled(self) -> "LabelledFeatures":
        """Return the rows that have a label."""
        return self.rows(self.labels >= 0)

    def sample(self, limit: int, seed: int) -> "LabelledFeatures":
        """Return at most `limit` rows, drawn with `seed`, in their order."""
        if len(self.labels) <= limit:
            return self
        return self.rows(sample_rows(len(self.labels), limit, seed))

    def rows(self, rows: Tensor) -> "LabelledFeatures":
        """Return some rows, [n] numbers in this order, or [N] whether to take them."""
        return LabelledFeatures(self.features[rows], self.labels[rows])


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An encoder under evaluation: what it says of the images, and what was asked.

    The linear probe is trained at most once, when a protocol first needs it.
    """

    train: LabelledFeatures
    heldout: LabelledFeatures
    config: EvaluationConfig
    num_classes: int
    seed: int
    classifier_logits: Tensor | None = None
    """[M, C] of the trained classifier for the labelled held-out images, in their order."""
    augmented: Augmented | None = None
    """Features of random crops of training images, for the probe's `full` protocol."""
    views: Augmented | None = None
    """Features of random views of held-out images."""
    histograms: tuple[Histograms, Histograms] | None = None
    """Colour histograms of training and of held-out images."""
    finetuned: Mapping[str, JsonObject] = field(default_factory=dict)
    """Scores of copies of the encoder that were fine-tuned on a share of the images, by name."""
    find_train: Callable[[Collection[str]], Mapping[str, int]] | None = None
    """Rows of the training images of some file names."""

    @cached_property
    def known(self) -> LabelledFeatures:
        """Training images with a label.

        Raises:
            ValueError: they have fewer than two classes.
        """
        data = self.train.labelled()
        if count_classes(data) < 2:
            raise ValueError("the training images have labels of fewer than two classes")
        return data

    @cached_property
    def asked(self) -> LabelledFeatures:
        """Held-out images with a label.

        Raises:
            ValueError: there are none.
        """
        data = self.heldout.labelled()
        if not len(data.labels):
            raise ValueError("the held-out images have no labels")
        return data

    @cached_property
    def sample(self) -> LabelledFeatures:
        """Held-out images, labelled or not, at most `max_images` of them."""
        return self.heldout.sample(self.config.max_images, self.seed)

    @cached_property
    def labelled_sample(self) -> LabelledFeatures:
        """Held-out images with a label, at most `max_images` of them.

        Raises:
            ValueError: they have fewer than two classes.
        """
        data = self.asked.sample(self.config.max_images, self.seed)
        if count_classes(data) < 2:
            raise ValueError("the held-out images have labels of fewer than two classes")
        return data

    @cached_property
    def probe(self) -> LinearProbeResult:
        """The linear probe.

        Raises:
            ValueError: labels are missing, or there are no crops for `full`.
            DivergedError: its head is not finite.
        """
        settings = self.config.linear_probe
        full = settings.protocol == "full"
        if full and self.augmented is None:
            raise ValueError("the protocol 'full' needs the training images, not only features")
        protocol = recipe_protocol(settings, seed=self.seed)
        most = int(torch.unique(self.known.labels, return_counts=True)[1].max())
        if most == 1 and len(protocol.learning_rates) > 1:
            # nothing can be held out to choose a rate
            protocol = replace(protocol, learning_rates=(ONE_SHOT_RATE,))
        return linear_probe(
            self.known.features,
            self.known.labels,
            self.asked.features,
            self.asked.labels,
            num_classes=self.num_classes,
            protocol=protocol,
            augmented=self._crops_of_known if full else None,
        )

    @property
    def named_splits(self) -> dict[str, list[LabelledFeatures]]:
        """Training images of the low-shot splits that are given by file names.

        Raises:
            ValueError: a file is not there, twice there, or has no label; or only features are.
        """
        lists = self.config.low_shot.splits
        if not lists:
            return {}
        if self.find_train is None:
            raise ValueError("splits by file name need the training images, not only features")
        rows = self.find_train({name for splits in lists.values() for s in splits for name in s})
        found = {
            name: [self.train.rows(torch.tensor([rows[file] for file in s])) for s in splits]
            for name, splits in lists.items()
        }
        for name, splits in found.items():
            if any(int(split.labels.min()) < 0 for split in splits):
                raise ValueError(f"the split {name!r} has images without a label")
        return found

    def predictions(self) -> dict[str, Predictions]:
        """Return what the trained classifier, if any, and the linear probe say of `asked`.

        Raises:
            ValueError: labels are missing.
            DivergedError: the probe's head is not finite.
        """
        labels, found = self.asked.labels, {}
        if self.classifier_logits is not None:
            found["classifier"] = Predictions(labels, self.classifier_logits)
        found["linear_probe"] = Predictions(labels, self.probe.logits(self.asked.features))
        return found

    def _crops_of_known(self, rows: Tensor, step: int) -> Tensor:
        assert self.augmented is not None
        return self.augmented((self.train.labels >= 0).nonzero()[:, 0][rows], step)


def sample_rows(count: int, limit: int, seed: int) -> Tensor:
    """Return at most `limit` of `count` rows, drawn with `seed`, in their order."""
    if count <= limit:
        return torch.arange(count)
    order = torch.randperm(count, generator=make_generator(seed, "evaluation sample"))
    return order[:limit].sort().values


def count_classes(data: LabelledFeatures) -> int:
    """Number of distinct labels."""
    return len(torch.unique(data.labels))


def has_pairs(data: LabelledFeatures) -> bool:
    """Whether there is a pair of one class and a pair of two."""
    counts = torch.unique(data.labels, return_counts=True)[1]
    return len(counts) >= 2 and int(counts.max()) >= 2
