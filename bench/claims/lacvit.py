"""LaCViT against cross-entropy from one MAE encoder: `python -m bench.claims.lacvit`.

All runs see as many images (two views of an image count as two) and have the same labelled ones.
"""

from bench.claims.mae_start import encoder_of, mae_start
from bench.claims.runs import Bench, cost_row, parse, print_table, scores_row
from ctune.schema import JsonObject

EVALUATION: JsonObject = {
    "protocols": ["knn", "isotropy"],
    "before": False,
    "online": {"every_steps": None},
}
SCORES = {
    "classifier": "classifier.top1",
    "k-NN": "knn.top1",
    "isotropy score": "isotropy.isotropy_score",
    "mean cosine": "isotropy.mean_cosine_similarity",
    "isoscore": "isotropy.isoscore",
    "same-class minus other-class cosine": "isotropy.gap",
}


def methods(epochs: int) -> dict[str, JsonObject]:
    """Return name -> method, each with as many image passes as `epochs` of one view."""
    return {
        "LaCViT": {"name": "lacvit", "contrastive": {"epochs": epochs // 2}},
        "`ce_sgd`": {"name": "finetune", "recipe": "ce_sgd", "tune": {"epochs": epochs}},
        "`ce_mae`": {"name": "finetune", "recipe": "ce_mae", "tune": {"epochs": epochs}},
    }


def main(bench: Bench) -> None:
    """Print one row per way of fine-tuning, and one of the encoder as it was."""
    encoder = encoder_of(mae_start(bench))
    data = bench.images(bench.size.labelled_per_class)

    def tuned(name: str, method: JsonObject, seed: int) -> JsonObject:
        return bench.run(
            name,
            encoder=encoder,
            method=method,
            data=data,
            seed=seed,
            evaluation=EVALUATION,
        )

    frozen = {"name": "finetune", "recipe": "linear"}
    runs = {"MAE, frozen, linear classifier": [tuned("linear", frozen, seed=0)]}
    for seed in bench.seeds:
        for title, method in methods(bench.size.supervised_epochs).items():
            name = f"{method.get('recipe', method['name'])}-s{seed}"
            runs.setdefault(title, []).append(tuned(name, method, seed))
    print_table(
        ["", *SCORES, "image passes", "minutes"],
        [[title, *scores_row(r, SCORES.values()), *cost_row(r)] for title, r in runs.items()],
    )


if __name__ == "__main__":
    main(parse(__doc__ or ""))
