"""MAE-CT with neighbours drawn from the k nearest: `python -m bench.claims.top_k`."""

from bench.claims.mae_ct import tuned
from bench.claims.mae_start import mae_start
from bench.claims.runs import SCORES, Bench, cost_row, parse, print_table, scores_row

KS = (1, 5, 10, 20)


def main(bench: Bench) -> None:
    """Print one row per k, and one of the start."""
    runs = {"MAE": [mae_start(bench)]}
    for k in KS:
        runs[f"k {k}"] = [tuned(bench, seed, top_k=k) for seed in bench.seeds]
    print_table(
        ["", *SCORES, "image passes", "minutes"],
        [[title, *scores_row(r, SCORES.values()), *cost_row(r)] for title, r in runs.items()],
    )


if __name__ == "__main__":
    main(parse(__doc__ or "", seeds=[0]))
