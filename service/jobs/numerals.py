"""Numbers, times and scores as people read them."""

import re
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple

MINUS = "−"
UNITS = (("d", 86_400), ("h", 3600), ("min", 60))


class Meaning(NamedTuple):
    """What kind of value a score is, and which direction is good."""

    is_fraction: bool
    better: Literal["higher", "lower"] | None


# Decided by the words of a metric's name; the first row that has one of them. Scores that are
# neither good nor bad by themselves (IsoScore falls when classes come apart, a spread, the mean
# cosine within classes) are in none.
_MEANINGS: tuple[tuple[str, Meaning], ...] = (
    (r"std|count|isoscore|intra|inter", Meaning(False, None)),
    (r"ece|error", Meaning(True, "lower")),
    (r"top\d+|accuracy|purity|recall|precision|f1", Meaning(True, "higher")),
    (r"nmi|ami|ari|rand|silhouette|rankme|rank|isotropy|gap|normalized", Meaning(False, "higher")),
    (r"davies|overlap|uniformity|alignment|cosine|brier|nll|loss", Meaning(False, "lower")),
)
_WORDS = {
    "knn": "k-NN",
    "linear_probe": "linear probe",
    "classifier": "the model's classifier",
    "low_shot": "few labelled images",
    "classification": "predictions in detail",
    "nearest_neighbor": "nearest neighbour",
    "alignment_uniformity": "alignment and uniformity",
    "mean": "mean over runs",
    "purity": "neighbours of the right class",
    "standardized": "standardised features",
    "feature_std": "spread of features",
    "class_alignment": "alignment of classes",
    "top1_max_on_test": "top-1 accuracy, rate and epoch chosen on the held-out images (too high)",
    "nnclr_head": "the head's queue of neighbours",
    "knn_top1": "top-1 accuracy of the nearest row",
    "augmentation_invariance": "invariance to random views",
    "normalized": "cosine of an image's views over that of two images",
    "unnormalized": "mean cosine of an image's views",
    "norm": "mean cosine of two images",
    "color_histogram": "colours read from the features",
    "l1": "L1 of the linear layer's histograms",
    "uniform_l1": "L1 of the uniform histogram",
    "mean_l1": "L1 of the training images' mean histogram",
    "num_views": "views",
    "queue_size": "rows of the queue",
    "finetune_epochs": "epochs of fine-tuning",
    "worst_class_accuracy": "accuracy of the worst class",
    "num_rates": "rates",
    "num_bins": "bins",
    "num_splits": "splits",
    "num_runs": "runs",
    "num_clusters": "clusters",
    "rankme": "RankMe",
    "nmi": "NMI",
    "ami": "AMI",
    "ari": "ARI",
    "ece": "calibration error (ECE)",
    "calibration_error": "calibration error (ECE)",
    "top1_std": "spread of the top-1 accuracy",
    "isoscore": "IsoScore",
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "lr": "learning rate",
    "davies_bouldin": "Davies-Bouldin index",
    "gap": "cosine gap between pairs of one and of two classes",
    "train_gap": "cosine gap on training images",
    "mean_cosine_similarity": "mean cosine of all pairs",
    "intra_mean": "mean cosine within classes",
    "inter_mean": "mean cosine across classes",
    "intra_std": "spread of cosines within classes",
    "inter_std": "spread of cosines across classes",
    "overlap": "overlap of the two cosine histograms",
    "online_knn_top1": "k-NN, top-1 accuracy",
    "online_rankme": "RankMe",
    "online_feature_std": "spread of features",
    "train_top1": "top-1 accuracy on training batches",
    "grad_norm": "gradient norm",
    "val_loss": "loss on held-out images",
    "images_per_s": "images per second",
    "data_wait": "share of time waiting for data",
    "z_std": "spread of projections",
    "num_images": "images",
    "intra_count": "pairs of one class",
    "inter_count": "pairs of two classes",
    "positive_share": "share of images with a positive",
    "nn_accuracy": "drawn neighbours of the right class",
    "nn_accuracy_top1": "nearest neighbours of the right class",
    "nn_similarity": "cosine with the nearest neighbour",
    "nn_agreement": "share of images whose two views have one neighbour",
    "drawn_share": "share of the queue that is drawn",
    "mae_loss": "loss of the hidden patches",
    "nnclr_loss": "loss of the neighbours",
}
_FIRST = (
    "knn",
    "linear_probe",
    "classifier",
    "nnclr_head",
    "nearest_neighbor",
    "low_shot",
    "classification",
)
_PATTERNS = (
    (r"k(\d+)", "k = {}"),
    (r"1_shot", "1 image per class"),
    (r"(\d+)_shot", "{} images per class"),
    (r"([\d.]+)_percent", "{} % of the images"),
    (r"([\d.]+)_percent_finetuned", "{} % of the images, encoder fine-tuned"),
)


def meaning(metric: str) -> Meaning:
    """Return what a metric such as `top1` or `k20.top1` is."""
    parts = metric.rpartition(".")[2].split("_")
    if len(parts) > 1 and parts[-1] == "std":  # in the unit of what it is the spread of
        return Meaning(meaning("_".join(parts[:-1])).is_fraction, None)
    for pattern, found in _MEANINGS:
        if any(re.fullmatch(pattern, part) for part in parts):
            return found
    return Meaning(False, None)


def words(name: str) -> str:
    """Return the name of a metric, protocol or stage as people say it."""
    return ", ".join(_said(part) for part in name.split("."))


def _said(part: str) -> str:
    for pattern, said in _PATTERNS:
        if found := re.fullmatch(pattern, part):
            return said.format(*found.groups())
    return _WORDS.get(part, part.replace("_", " "))


def score_order(protocol: str, metric: str) -> tuple[Any, ...]:
    """Return a key that puts well-known protocols first, and a protocol's own scores before finer
    ones; numbers in names count as numbers."""
    place = _FIRST.index(protocol) if protocol in _FIRST else len(_FIRST)
    pieces = re.split(r"(\d+)", metric)
    natural = tuple((0, int(p), "") if p.isdecimal() else (1, 0, p) for p in pieces if p)
    return place, protocol, metric.count("."), metric != "top1", natural


def number(value: float | None) -> str:
    """Return a value with four significant digits; a dash for none."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e6:
        text = f"{value:,.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    else:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        text = f"{float(mantissa):g}e{int(exponent)}"
    return text.replace("-", MINUS)


def percent(value: float | None) -> str:
    """Return a fraction as percent with one decimal."""
    return "–" if value is None else f"{100 * value:.1f} %".replace("-", MINUS)


def score(value: float | None, metric: str) -> str:
    """Return a score in its unit."""
    return percent(value) if meaning(metric).is_fraction else number(value)


def difference(value: float | None, metric: str) -> str:
    """Return a difference of two scores with its sign; of fractions in percentage points."""
    if value is None:
        return "–"
    if value == 0:
        return "0"
    text = f"{100 * value:+.1f}" if meaning(metric).is_fraction else f"{value:+.3g}"
    return text.replace("-", MINUS)


def verdict(value: float | None, metric: str) -> Literal["better", "worse", "same"] | None:
    """Return whether a difference is for the better; None where that has no meaning."""
    better = meaning(metric).better
    if value is None or better is None:
        return None
    if value == 0:
        return "same"
    return "better" if (value > 0) == (better == "higher") else "worse"


def duration(seconds: float | None) -> str:
    """Return a time span: `2 h 5 min`."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    parts, rest = [], round(seconds)
    for unit, size in (*UNITS, ("s", 1)):
        if rest >= size:
            parts.append(f"{rest // size} {unit}")
            rest %= size
    return " ".join(parts[:2])


def moment(time_s: float | None) -> str:
    """Return a time in UTC."""
    if time_s is None:
        return "–"
    return datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%d %H:%M UTC")


def size(size_bytes: float | None) -> str:
    """Return a size in decimal units."""
    if size_bytes is None:
        return "–"
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 1000:
            return f"{size_bytes:.3g} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.3g} TB"
