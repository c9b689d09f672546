"""What a run measures of its encoder: the evaluations before and after."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import nn

from ctune.backbones import Encoder
from ctune.config import RunConfig
from ctune.errors import DivergedError
from ctune.evaluate.accuracy import topk_accuracy
from ctune.evaluate.figures import Numbers, make_figures
from ctune.evaluate.linear_probe import Augmented
from ctune.evaluate.low_shot import sample_low_shot
from ctune.evaluate.protocols import evaluate
from ctune.evaluate.queue_scores import queue_scores
from ctune.evaluate.subject import Subject
from ctune.evaluation_config import tuned_share_name
from ctune.events import Evaluated, EventBase, StageStarted, Warned
from ctune.features import RunImages
from ctune.figures_file import FiguresWriter
from ctune.low_shot_tuning import fine_tune
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
        """Score the encoder on the held-out images, and the heads of `modules` that have a score.

        `classifier` gives logits of features; `nnclr_head` classifies by its queue.

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
        subject = Subject(
            train=train,
            heldout=heldout,
            config=self._config.evaluation,
            num_classes=len(self._summary.classes),
            seed=self._config.seed,
            find_train=lambda names: self._images.find("train", names),
            finetuned=self._fine_tuned(heldout_split),
            **self._from_images(heldout_split),
        )
        return self._images.world.on_main(lambda: self._measure(when, subject, modules))

    def _fine_tuned(self, heldout_split: Split) -> dict[str, JsonObject]:
        """Return the scores of copies of the encoder, each tuned on a share of the images.

        A share that cannot be drawn, or that the training diverges on, is left out with a warning.
        """
        settings, found = self._config.evaluation.low_shot, dict[str, JsonObject]()
        if "low_shot" not in self._config.evaluation.protocols:
            return found
        for share in settings.finetune_shares:
            name = tuned_share_name(share)
            try:
                found[name] = {"top1": self._tuned_top1(share, heldout_split)}
            except (ValueError, DivergedError) as error:
                message = f"low_shot, {name} could not be measured: {error}"
                hint = "look at the labels of the training images"
                self._warn_once(Warned(code="not_scored", message=message, hint=hint))
        return found

    def _tuned_top1(self, share: float, heldout_split: Split) -> float:
        labels = torch.from_numpy(self._images.labels("train"))
        known, num_classes = (labels >= 0).nonzero()[:, 0], len(self._summary.classes)
        drawn = sample_low_shot(labels[known], num_classes=num_classes, shots=float(share), seed=0)
        tuned = fine_tune(
            self._encoder,
            self._images,
            known[drawn].numpy(),
            num_classes=num_classes,
            epochs=self._config.evaluation.low_shot.finetune_epochs,
            seed=self._config.seed,
            device=self._device,
        )
        asked = self._images.features(tuned.encoder, heldout_split, self._device).labelled()
        with torch.no_grad():
            logits = tuned.classifier(asked.features)
        return topk_accuracy(logits, asked.labels, (1,))[0]

    def _from_images(self, heldout_split: Split) -> dict[str, Any]:
        """Return what the protocols that are asked for need beside features."""
        evaluation, images, encoder = self._config.evaluation, self._images, self._encoder
        found: dict[str, Any] = {}

        def random_views(**options: Any) -> Augmented:
            return images.random_views(encoder, self._device, seed=self._config.seed, **options)

        if evaluation.crop_epochs:
            found["augmented"] = random_views()
        if "augmentation_invariance" in evaluation.protocols:
            wanted = evaluation.augmentation_invariance.views
            preset = "mae_minimal" if wanted == "minimal" else wanted
            found["views"] = random_views(split=heldout_split, preset=preset)
        if "color_histogram" in evaluation.protocols:
            splits: tuple[Split, Split] = ("train", heldout_split)
            size_px = encoder.image_size_px
            found["histograms"] = tuple(images.histograms(split, size_px) for split in splits)
        return found

    def _measure(
        self,
        when: Literal["before", "after"],
        subject: Subject,
        modules: nn.ModuleDict | None,
    ) -> JsonObject:
        labelled, heads = subject.heldout.labelled(), modules or nn.ModuleDict()
        logits = None
        if "classifier" in heads and len(labelled.labels):
            with torch.no_grad():
                logits = heads["classifier"](labelled.features)
            subject = replace(subject, classifier_logits=logits)
        results: JsonObject = evaluate(subject, warn=self._warn_once)
        if logits is not None:
            top1, top5 = topk_accuracy(logits, labelled.labels, (1, min(5, logits.shape[1])))
            results["classifier"] = {"top1": top1, "top5": top5}
        if "nnclr_head" in heads:
            results |= queue_scores(heads["nnclr_head"], labelled)
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
