"""The masked autoencoder that every claim starts from: `python -m bench.claims.mae_start`."""

from pathlib import Path

from bench.claims.runs import SCORES, Bench, cost_row, parse, print_table, scores_row
from ctune.schema import JsonObject

SEED = 0
"""One start for all: the seeds of a claim are those of the tuning."""


def mae_start(bench: Bench) -> JsonObject:
    """Return the result of the pre-training, made once per work directory."""
    return bench.run(
        "mae",
        encoder=bench.size.encoder,
        method={"name": "mae", "pool": "mean", "mae": bench.size.mae},
        data=bench.images(bench.size.train_per_class),
        seed=SEED,
    )


def encoder_of(run: JsonObject) -> JsonObject:
    """Return the encoder config that starts from the model of a run."""
    return {"source": "file", "path": str(Path(run["out_dir"]) / "model")}


def main(bench: Bench) -> None:
    """Print the start's scores."""
    start = mae_start(bench)
    print_table(
        ["", *SCORES, "image passes", "minutes"],
        [["MAE", *scores_row([start], SCORES.values()), *cost_row([start])]],
    )


if __name__ == "__main__":
    main(parse(__doc__ or "", seeds=[SEED]))
