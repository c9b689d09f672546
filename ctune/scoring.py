"""What a run measures of its encoder: the evaluations before and after."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn

from ctune.backbones import Encoder
from ctune.config import RunConfig
from ctune.evaluate.accuracy import topk_accuracy
from ctune.evaluate.figures import Numbers, make_figures
from ctune.evaluate.linear_probe import Augmented
from ctune.evaluate.protocols import evaluate
from ctune.evaluate.subject import LabelledFeatures, Subject
from ctune.events import Evaluated, EventBase, StageStarted, Warned
from ctune.features import RunImages
from ctune.figures_file import FiguresWriter
from ctune.manifest import DatasetSummary, Split
from ctune.schema import JsonObject


class Scoring:
    """The evaluations of one run, on the splits of its data set."""

    def __init__(
        self,
        config: RunConfig,
        encoder: Encoder,
        *,
        images: RunImages,
        summary: DatasetSummary,
        device: torch.device,
        emit: Callable[[EventBase], None],
        figures: FiguresWriter,
    ) -> None:
        self._config = config
        self._encoder = encoder
        self._images = images
        self._summary = summary
        self._device = device
        self._emit = emit
        self._figures = figures
        self.told: set[str] = set()
        """Messages of warnings that were given, in an earlier attempt perhaps."""

    def score(
        self, when: Literal["before", "after"], modules: nn.ModuleDict | None = None
    ) -> JsonObject:
        """Score the encoder on the held-out images, and the classifier where `modules` has one.

        Returns:
            protocol -> metric -> value; empty where nothing is held out.

        Raises:
            DivergedError: a feature is not finite.
            StopRequested: a stop was asked for.
        """
        heldout_split = self._summary.heldout_split
        if heldout_split is None:
            return {}
        for split in ("train", heldout_split):
            self._images.decoded(split, self._encoder.image_size_px)
        self._emit(StageStarted(stage="evaluating"))
        train = self._images.features(self._encoder, "train", self._device)
        heldout = self._images.features(self._encoder, heldout_split, self._device)
        crops = self._random_crops()
        return self._images.world.on_main(
            lambda: self._measure(when, train, heldout, crops=crops, modules=modules)
        )

    def _random_crops(self) -> Augmented | None:
        """Return what the linear probe trains on, where that is not the features."""
        if not self._config.evaluation.crop_epochs:
            return None
        return self._images.random_crops(self._encoder, self._device, seed=self._config.seed)

    def _measure(
        self,
        when: Literal["before", "after"],
        train: LabelledFeatures,
        heldout: LabelledFeatures,
        *,
        crops: Augmented | None,
        modules: nn.ModuleDict | None,
    ) -> JsonObject:
        labelled = heldout.labelled()
        logits = None
        if modules is not None and "classifier" in modules and len(labelled.labels):
            with torch.no_grad():
                logits = modules["classifier"](labelled.features)
        subject = Subject(
            train=train,
            heldout=heldout,
            config=self._config.evaluation,
            num_classes=len(self._summary.classes),
            seed=self._config.seed,
            classifier_logits=logits,
            augmented=crops,
        )
        results: JsonObject = evaluate(subject, warn=self._warn_once)
        if logits is not None:
            top1, top5 = topk_accuracy(logits, labelled.labels, (1, min(5, logits.shape[1])))
            results["classifier"] = {"top1": top1, "top5": top5}
        splits: list[Split] = ["train", self._summary.heldout_split or "train"]
        numbers = Numbers(*(self._images.numbers(split) for split in splits))
        self._figures.add(when, make_figures(subject, results, numbers=numbers, warn=self._emit))
        self._emit(Evaluated(when=when, results=results))
        return results

    def _warn_once(self, warning: Warned) -> None:
        """Pass on a warning, unless the evaluation before gave the same."""
        if warning.message not in self.told:
            self.told.add(warning.message)
            self._emit(warning)
