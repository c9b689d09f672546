"""MAE, then MAE-CT, against both losses at once: `python -m bench.claims.combined`.

Both make as many encoder passes: every view of an image is one, masked or not.
"""

from bench.claims.mae_ct import head_init, tuned
from bench.claims.mae_start import mae_start
from bench.claims.runs import SCORES, Bench, cost_row, parse, print_table, scores_row
from ctune.schema import JsonObject


def combined(bench: Bench, seed: int) -> JsonObject:
    """Return the result of the combined pre-training from random weights."""
    return bench.run(
        f"combined-s{seed}",
        encoder=bench.size.encoder,
        method={"name": "mae_ct", "stages": ["combined"], "combined": bench.size.combined},
        data=bench.images(bench.size.train_per_class),
        seed=seed,
    )


def sequence(bench: Bench, seed: int) -> JsonObject:
    """Return the result of the last of three stages, with the passes and seconds of all."""
    stages = [mae_start(bench), head_init(bench, seed), tuned(bench, seed)]
    costs = {name: sum(stage[name] for stage in stages) for name in ("image_passes", "train_s")}
    return stages[-1] | costs


def main(bench: Bench) -> None:
    """Print the scores of the start alone, of the sequence and of the combination."""
    runs = {
        "MAE": [mae_start(bench)],
        "MAE, then MAE-CT": [sequence(bench, seed) for seed in bench.seeds],
        "combined": [combined(bench, seed) for seed in bench.seeds],
    }
    print_table(
        ["", *SCORES, "image passes", "minutes"],
        [[title, *scores_row(r, SCORES.values()), *cost_row(r)] for title, r in runs.items()],
    )


if __name__ == "__main__":
    main(parse(__doc__ or "", seeds=[0]))
