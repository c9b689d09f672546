"""MAE-CT against its MAE start: `python -m bench.claims.mae_ct`."""

from typing import Any

from bench.claims.mae_start import encoder_of, mae_start
from bench.claims.runs import EVALUATION, SCORES, Bench, cost_row, parse, print_table, scores_row
from ctune.schema import JsonObject


def head_init(bench: Bench, seed: int) -> JsonObject:
    """Return the result of training the head on the frozen start."""
    settings = bench.size.head_init
    return _stage(
        bench, "head_init", settings, start=mae_start(bench), seed=seed, protocols=["knn"]
    )


def tuned(bench: Bench, seed: int, **changes: Any) -> JsonObject:
    """Return the result of the contrastive tuning from the start and its head."""
    settings = bench.size.tuning | changes
    return _stage(bench, "contrastive_tuning", settings, start=head_init(bench, seed), seed=seed)


def _stage(
    bench: Bench,
    stage: str,
    settings: JsonObject,
    *,
    start: JsonObject,
    seed: int,
    **evaluation: Any,
) -> JsonObject:
    return bench.run(
        f"{stage}-s{seed}",
        encoder=encoder_of(start),
        method={"name": "mae_ct", "stages": [stage], **bench.size.mae_ct, stage: settings},
        data=bench.images(bench.size.train_per_class),
        seed=seed,
        evaluation=EVALUATION | evaluation,
    )


def main(bench: Bench) -> None:
    """Print the scores of the start, of its heads and of the tuned encoders over the seeds."""
    runs = {
        "MAE": [mae_start(bench)],
        "`head_init`": [head_init(bench, seed) for seed in bench.seeds],
        "MAE-CT": [tuned(bench, seed) for seed in bench.seeds],
    }
    print_table(
        ["", *SCORES, "image passes", "minutes"],
        [[title, *scores_row(r, SCORES.values()), *cost_row(r)] for title, r in runs.items()],
    )


if __name__ == "__main__":
    main(parse(__doc__ or ""))
