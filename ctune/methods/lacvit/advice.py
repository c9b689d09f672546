"""Run-time detectors of LaCViT, each with a named warning and a hint (lacvit.md 7)."""

import math
from collections import Counter

import torch
from torch import Tensor, nn

from ctune.events import Warned
from ctune.methods.base import RunContext
from ctune.methods.lacvit.config import ContrastiveConfig
from ctune.schema import JsonObject

COLLAPSE_STEPS = 50
LONGEST_LIST = 20


class CollapseWatch(nn.Module):
    """Watches the projected vectors; its state is in buffers, so that it survives a resume."""

    low_std_steps: Tensor
    positives: Tensor
    anchors: Tensor
    initial_norm: Tensor
    told: Tensor

    def __init__(self, config: ContrastiveConfig, *, total_steps: int, steps_per_epoch: int):
        super().__init__()
        self._config = config
        self._total_steps = total_steps
        self._steps_per_epoch = steps_per_epoch
        # The first step of a warm-up has a rate of 0: with one step per epoch it is all of epoch 1.
        self._first_moving_epoch = 2 if config.warmup_epochs and steps_per_epoch == 1 else 1
        self._uniform_loss = math.inf
        self._loss = torch.tensor(math.nan)
        self.register_buffer("low_std_steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("positives", torch.zeros((), dtype=torch.float64))
        self.register_buffer("anchors", torch.zeros((), dtype=torch.float64))
        self.register_buffer("initial_norm", torch.full((), math.nan, dtype=torch.float64))
        self.register_buffer("told", torch.zeros((), dtype=torch.bool))

    def remember(self, encoder: nn.Module) -> None:
        """Note the encoder's size before its first update."""
        if bool(self.initial_norm.isnan()):
            self.initial_norm.copy_(squared_norm(encoder))

    def observe(self, z: Tensor, labels: Tensor, loss: Tensor) -> dict[str, Tensor]:
        """Take in one micro-batch: z [B, V, d] detached, labels [B]; return its metrics."""
        num_images, num_views, dim = z.shape
        std = z.reshape(-1, dim).std(dim=0).mean()
        self.low_std_steps.copy_(torch.where(std < 0.1 / math.sqrt(dim), self.low_std_steps + 1, 0))
        counts = torch.unique(labels, return_counts=True)[1]
        share = counts[counts > 1].sum() / num_images
        self.positives += share
        self.anchors += 1
        tau, base = self._config.temperature, self._config.base_temperature
        factor = 1.0 if base is None else tau / base
        self._uniform_loss = factor * math.log(num_views * num_images - 1)
        self._loss = loss
        return {"z_std": std, "positive_share": share}

    def warnings(self, step: int, encoder: nn.Module) -> list[Warned]:
        """Return what the state after optimizer step `step` (from 0) calls for."""
        found = []
        if not bool(self.told) and self._collapsed(step):
            self.told.fill_(True)
            found.append(
                Warned(
                    code="collapse",
                    message=f"step {step}: the projected vectors hardly differ from each other",
                    hint="lower the learning rate, raise the temperature, check the labels",
                )
            )
        if (step + 1) % self._steps_per_epoch == 0:
            found += self._epoch_warnings((step + 1) // self._steps_per_epoch, encoder)
            self.positives.zero_()
            self.anchors.zero_()
        return found

    def _collapsed(self, step: int) -> bool:
        if int(self.low_std_steps) >= COLLAPSE_STEPS:
            return True
        late = step >= 0.2 * self._total_steps and step >= COLLAPSE_STEPS
        return late and abs(float(self._loss) - self._uniform_loss) < 0.01 * self._uniform_loss

    def _epoch_warnings(self, epoch: int, encoder: nn.Module) -> list[Warned]:
        found = []
        share = float(self.positives / self.anchors)
        if epoch == 1 and share < 0.5:
            found.append(
                Warned(
                    code="few_positives",
                    message=f"only {share:.0%} of the anchors met another image of their class",
                    hint="set contrastive.batch_sampler to class_balanced",
                )
            )
        unmoved = epoch <= 2 and float(squared_norm(encoder)) == float(self.initial_norm)
        if epoch == self._first_moving_epoch and unmoved:
            found.append(
                Warned(
                    code="no_update",
                    message=f"the encoder did not change up to epoch {epoch}",
                    hint="check contrastive.lr and contrastive.accumulate_steps",
                )
            )
        return found


def squared_norm(module: nn.Module) -> Tensor:
    """Return the squared norm of all parameters in float64: changes whenever one of them does."""
    return torch.stack([p.detach().double().square().sum() for p in module.parameters()]).sum()


def start_warnings(context: RunContext) -> list[Warned]:
    """Return what the encoder and the labels call for before the first step."""
    found = []
    if context.from_scratch:
        found.append(
            Warned(
                code="encoder_from_scratch",
                message="LaCViT is meant for a pretrained encoder; this one starts at random",
                hint="set encoder.pretrained, or name an earlier job's model",
            )
        )
    counts = Counter(context.train_labels.tolist())
    single = [context.classes[label] for label, n in sorted(counts.items()) if n == 1]
    if single:
        found.append(
            Warned(
                code="class_with_one_sample",
                message=f"{len(single)} classes have a single training image: their positives come"
                " from its own views only",
                hint="add images to them",
                details={"classes": single[:LONGEST_LIST]},
            )
        )
    return found


def advise(before: JsonObject | None, after: JsonObject) -> list[Warned]:
    """Return what the scores before and after tuning call for."""
    found = []
    isotropy = after.get("isotropy", {})
    if isotropy.get("train_gap", 0.0) - isotropy.get("gap", 1.0) > 0.5:
        found.append(
            Warned(
                code="overfit",
                message="classes are far better separated on training than on held-out images",
                hint="fewer epochs, stronger views",
            )
        )
    if before is None:
        return found
    was = before.get("isotropy", {})
    if "gap" in isotropy and "gap" in was and isotropy["gap"] <= was["gap"]:
        found.append(
            Warned(
                code="not_separating",
                message=f"same-class and other-class images are no further apart than before"
                f" (gap {isotropy['gap']:.3f}, before {was['gap']:.3f})",
                hint="change temperature, epochs or lr",
            )
        )
    if isotropy.get("mean_cosine_similarity", 0.0) > was.get("mean_cosine_similarity", 1.0):
        found.append(
            Warned(
                code="isotropy_drop",
                message="the vectors point in more similar directions than before",
                hint="raise the temperature, lower the learning rate",
            )
        )
    tuned = after.get("classifier", {}).get("top1")
    probe = before.get("linear_probe", {}).get("top1")
    if tuned is not None and probe is not None and tuned < probe:
        found.append(
            Warned(
                code="worse_than_probe",
                message=f"top-1 {tuned:.3f} is below the untuned encoder's probe ({probe:.3f})",
                hint="keep the original encoder, or tune longer",
            )
        )
    return found
