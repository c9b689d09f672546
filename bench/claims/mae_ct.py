"""MAE-CT against its MAE start: `python -m bench.claims.mae_ct`."""

from typing import Any

from bench.claims.mae_start import encoder_of, mae_start
from bench.claims.runs import EVALUATION, SCORES, Bench, cost_row, parse, print_table, scores_row
from ctune.schema import JsonObject

AUG: JsonObject = {"augmentation": "byol"}
"""What makes MAE-CT to MAE-CT-aug."""


def head_init(bench: Bench, seed: int, method: JsonObject) -> JsonObject:
    """Return the result of training the head on the frozen start."""
    settings = {"stages": ["head_init"], "head_init": bench.size.head_init}
    return _run(bench, seed, method | settings, start=mae_start(bench), protocols=["knn"])


def tuned(bench: Bench, seed: int, method: JsonObject, **changes: Any) -> JsonObject:
    """Return the result of the contrastive tuning from the start and its head."""
    stage = "contrastive_tuning"
    settings = {"stages": [stage], stage: bench.size.tuning | changes}
    return _run(bench, seed, method | settings, start=head_init(bench, seed, method))


def _run(
    bench: Bench, seed: int, method: JsonObject, *, start: JsonObject, **evaluation: Any
) -> JsonObject:
    return bench.run(
        f"{method['stages'][0]}-s{seed}",
        encoder=encoder_of(start),
        method={"name": "mae_ct", **bench.size.mae_ct, **method},
        data=bench.images(bench.size.train_per_class),
        seed=seed,
        evaluation=EVALUATION | evaluation,
    )


def main(bench: Bench) -> None:
    """Print the scores of the start, of its heads and of the tuned encoders over the seeds."""
    runs = {"MAE": [mae_start(bench)]}
    for suffix, method in (("", {}), ("-aug", AUG)):
        runs[f"`head_init`{suffix}"] = [head_init(bench, seed, method) for seed in bench.seeds]
        runs[f"MAE-CT{suffix}"] = [tuned(bench, seed, method) for seed in bench.seeds]
    print_table(
        ["", *SCORES, "image passes", "minutes"],
        [[title, *scores_row(r, SCORES.values()), *cost_row(r)] for title, r in runs.items()],
    )


if __name__ == "__main__":
    main(parse(__doc__ or ""))
