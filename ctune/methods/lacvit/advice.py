"""Warnings at the start and at the end of a LaCViT run, with hints (lacvit.md 7)."""

from collections import Counter
from collections.abc import Mapping

from ctune.events import Warned
from ctune.methods.base import RunContext
from ctune.methods.contrastive import grad_cache_warnings
from ctune.methods.lacvit.config import LaCViTConfig
from ctune.schema import JsonObject

LONGEST_LIST = 20
COLLAPSE_HINTS: Mapping[str, str] = {
    "supcon": "lower the learning rate, raise the temperature, check the labels",
    "nt_xent": "lower the learning rate, raise the temperature, use stronger views",
    "n_pair": "lower the learning rate or l2_reg, check the labels",
}


def start_warnings(config: LaCViTConfig, context: RunContext) -> list[Warned]:
    """Return what the config, the encoder and the labels call for before the first step."""
    stage = config.contrastive
    found = []
    if stage.grad_cache:
        found += grad_cache_warnings(context.encoder, micro_batch_size=stage.micro_batch_size)
    if stage.accumulate_steps > 1:
        found.append(
            Warned(
                code="accumulated_contrast",
                message=f"each image meets the {stage.batch_size} of its own batch alone: the"
                f" {stage.accumulate_steps} accumulated batches, as published, enlarge the step,"
                " not the contrast",
                hint="set contrastive.grad_cache to true to contrast a large batch as a whole",
            )
        )
    if context.from_scratch:
        found.append(
            Warned(
                code="encoder_from_scratch",
                message="LaCViT is meant for a pretrained encoder; this one starts at random",
                hint="set encoder.pretrained, or name an earlier job's model",
            )
        )
    return found + (_single_image_warnings(context) if stage.uses_labels else [])


def _single_image_warnings(context: RunContext) -> list[Warned]:
    counts = Counter(context.train_labels.tolist())
    single = [context.classes[label] for label, n in sorted(counts.items()) if n == 1]
    if not single:
        return []
    return [
        Warned(
            code="class_with_one_sample",
            message=f"{len(single)} classes have a single training image: their positives come"
            " from its own views only",
            hint="add images to them",
            details={"classes": single[:LONGEST_LIST]},
        )
    ]


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
