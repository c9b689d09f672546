"""Looks at the encoder while it trains: k-NN and RankMe of a sample, the best look, the alarms.

A falling loss does not say that an encoder gets better: vectors may collapse, and the accuracy of
the k-NN may fall again. RankMe: Garrido et al. 2023, arXiv 2210.02885. The spread of the vectors is
SimSiam's (arXiv 2011.10566, section 4.1): the standard deviation per dimension of unit vectors
times √D, 1 for vectors in all directions and 0 for vectors that are all alike.
"""

import math
from collections.abc import Callable

import numpy as np
import torch

from ctune.backbones import Encoder
from ctune.config import RunConfig
from ctune.evaluate.knn import knn_accuracy
from ctune.evaluate.rankme import feature_spread, rankme
from ctune.events import EventBase, Metrics, Warned
from ctune.features import RunImages
from ctune.manifest import DatasetSummary, Split
from ctune.methods.base import StagePlan
from ctune.samplers import Indices
from ctune.schema import Schema

KNN, RANKME, SPREAD = "online_knn_top1", "online_rankme", "online_feature_std"
COLLAPSED_SPREAD = 0.03
"""Unit vectors this close have a mean cosine above 0.999."""
COLLAPSED_RANK = 1.5
FALLING_LOOKS = 2
"""So many looks in a row must lie below the best before the alarm."""


class Look(Schema):
    """What was seen after `step` steps of a stage."""

    stage: str
    step: int
    values: dict[str, float]


class OnlineState(Schema):
    """What a resumed run must remember of its looks."""

    bests: dict[str, Look] = {}
    """Stage to its look with the highest k-NN accuracy, the earliest among equal ones."""
    first: Look | None = None
    """The first look at the present stage; what follows is of this stage too."""
    last_step: int = -1
    falling: int = 0
    """Looks in a row with a k-NN accuracy clearly below the best."""
    alarms: list[str] = []
    """Codes of the warnings that were given."""


class OnlineEvaluation:
    """The looks of one run at its encoder.

    The k-NN asks about images of `val`, if the data set has `val` beside `test`, with training
    images as neighbours; otherwise about one half of the sampled training images with the other
    half as neighbours. The split that the evaluation scores is never touched: the best look may
    choose the weights.
    """

    def __init__(
        self,
        config: RunConfig,
        encoder: Encoder,
        *,
        images: RunImages,
        summary: DatasetSummary,
        device: torch.device,
        emit: Callable[[EventBase], None],
    ) -> None:
        self.state = OnlineState()
        self._config = config
        self._encoder = encoder
        self._images = images
        self._device = device
        self._emit = emit
        asks_val = summary.heldout_split == "test" and summary.splits.get("val", 0) > 0
        limit = config.evaluation.online.max_images
        train = self._sample("train", limit if asks_val else 2 * limit)
        self._bank: tuple[Split, Indices] = ("train", train if asks_val else train[1::2])
        self._queries: tuple[Split, Indices] = ("train", train[::2])
        if asks_val:
            self._queries = ("val", self._sample("val", limit))

    def interval_steps(self, plan: StagePlan) -> int | None:
        """Return the steps between two looks at a stage, None for a stage without looks."""
        online = self._config.evaluation.online
        return online.interval_steps(plan.total_steps) if plan.trains_encoder else None

    def look(self, stage: str, step: int) -> bool:
        """Measure the encoder after `step` steps of a stage, once, and tell what was seen.

        Returns:
            Whether the k-NN accuracy is the highest of the stage so far.

        Raises:
            DivergedError: a feature is not finite.
            StopRequested: a stop was asked for; nothing was noted.
        """
        if self.has_looked(stage, step):
            return False
        seen = Look(stage=stage, step=step, values=self._measure())
        self._emit(Metrics(stage=stage, step=step, values=dict(seen.values)))
        if self.state.first is None or self.state.first.stage != stage:
            self.state = OnlineState(first=seen, bests=self.state.bests)
        found, self.state = alarms(self.state, seen, num_queries=len(self._queries[1]))
        for alarm in found:
            self._emit(alarm)
        best, now = self.state.bests.get(stage), seen.values.get(KNN)
        is_best = now is not None and (best is None or now > best.values[KNN])
        bests = self.state.bests | ({stage: seen} if is_best else {})
        self.state = self.state.model_copy(update={"last_step": step, "bests": bests})
        return is_best

    def has_looked(self, stage: str, step: int) -> bool:
        """Return whether a look after this step was taken, perhaps before a resume."""
        first = self.state.first
        return first is not None and first.stage == stage and self.state.last_step >= step

    def _measure(self) -> dict[str, float]:
        bank = self._encode(*self._bank)
        queries = self._encode(*self._queries)
        features = torch.cat([bank, queries])
        values = {SPREAD: feature_spread(features)}
        if bool(features.any()):
            values[RANKME] = rankme(features)
        bank_labels, query_labels = self._labels(*self._bank), self._labels(*self._queries)
        votes, asked = bank_labels >= 0, query_labels >= 0
        if len(torch.unique(bank_labels[votes])) >= 2 and bool(asked.any()):
            settings = self._config.evaluation
            values[KNN] = knn_accuracy(
                bank[votes],
                bank_labels[votes],
                queries[asked],
                query_labels[asked],
                k=min(settings.knn_k, int(votes.sum())),
                temperature=settings.knn_temperature,
            )
        return self._images.world.broadcast(values)  # what follows from them is decided alike

    def _encode(self, split: Split, positions: Indices) -> torch.Tensor:
        return self._images.encode(self._encoder, split, self._device, positions=positions)

    def _labels(self, split: Split, positions: Indices) -> torch.Tensor:
        return torch.from_numpy(self._images.labels(split)[positions]).to(self._device)

    def _sample(self, split: Split, limit: int) -> Indices:
        count = len(self._images.labels(split))
        order: Indices = np.random.default_rng(self._config.seed).permutation(count)
        return order[:limit]


def alarms(state: OnlineState, seen: Look, *, num_queries: int) -> tuple[list[Warned], OnlineState]:
    """Return the warnings that a look calls for, each once per stage, and the state after it.

    `collapse`: the vectors are all alike, or lie on a line, and did not at the first look.
    `knn_falling`: twice in a row the k-NN accuracy lies more than two standard errors, and more
    than 0.02, below the best one.
    """
    first = state.first.values if state.first is not None else {}
    found = []
    for name, limit in ((SPREAD, COLLAPSED_SPREAD), (RANKME, COLLAPSED_RANK)):
        now, then = seen.values.get(name), first.get(name)
        if now is not None and then is not None and now < limit and now < then / 2:
            found.append(_collapse(name, now, then, seen))
    falling, best = 0, state.bests.get(seen.stage)
    if best is not None and KNN in seen.values:
        top = best.values[KNN]
        error = math.sqrt(max(top * (1 - top), 0.0) / num_queries)
        fell = top - seen.values[KNN] > max(0.02, 2 * error)
        falling = state.falling + 1 if fell else 0
        if falling >= FALLING_LOOKS:
            found.append(_falling(best, seen))
    new = {warning.code: warning for warning in reversed(found) if warning.code not in state.alarms}
    told = [*state.alarms, *new]
    return list(new.values()), state.model_copy(update={"falling": falling, "alarms": told})


def _collapse(name: str, now: float, first: float, seen: Look) -> Warned:
    return Warned(
        code="collapse",
        message=f"{seen.stage}, step {seen.step}: the encoder gives nearly the same vector to"
        f" every image ({name} {now:.3g}, {first:.3g} at the start)",
        hint="lower the learning rate, lengthen the warm-up, or raise batch size or temperature",
        details=dict(seen.values),
    )


def _falling(best: Look, seen: Look) -> Warned:
    return Warned(
        code="knn_falling",
        message=f"{seen.stage}, step {seen.step}: the k-NN accuracy fell to {seen.values[KNN]:.3f}"
        f" from {best.values[KNN]:.3f} at step {best.step}",
        hint="train fewer epochs or lower the learning rate; `evaluation.online.select: best` keeps"
        " the weights of the best look",
        details={"best_step": best.step, **seen.values},
    )
