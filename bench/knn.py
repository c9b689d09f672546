"""Seconds of a k-NN classification: ours against scikit-learn and a plain torch.cdist.

`ctune`: weighted k-NN in blocks, for one k and for three at once. `torch`: distances of all pairs
by torch.cdist, topk, bincount of the weighted votes; it holds the whole matrix, so it is left out
where that passes 4 GiB. `scikit-learn`: KNeighborsClassifier, brute force, cosine, same weights.

The sides alternate, so that a busy machine slows them alike; medians. Features are Gaussian
clusters of unit length, where all sides must agree.

    OMP_NUM_THREADS=1 python -m bench.knn
    python -m bench.knn --train 100000 --test 10000 --dim 768 --device cuda
"""

import argparse
import statistics
from collections.abc import Callable

import torch
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor
from torch.nn.functional import normalize

from bench.input_pipeline import describe_machine
from bench.linear_probe import Data, make_data, timed
from ctune.evaluate.knn import knn_scores

TEMPERATURE = 0.07
LARGEST_MATRIX_BYTES = 2**32


def ours(data: Data, ks: tuple[int, ...]) -> float:
    """Return the accuracy for the first k."""
    features = (data.train, data.train_labels, data.test, data.test_labels)
    return knn_scores(*features, ks=ks, temperature=TEMPERATURE)[ks[0]].top1


def plain_torch(data: Data, k: int) -> float:
    """Return the accuracy by the matrix of all distances."""
    distances, index = torch.cdist(data.test, data.train).topk(k, largest=False)
    votes = ((1 - distances.square() / 2) / TEMPERATURE).exp()
    scores = votes.new_zeros(len(votes), data.num_classes)
    scores.scatter_add_(1, data.train_labels[index], votes)
    return float((scores.argmax(1) == data.test_labels).double().mean())


def scikit_learn(data: Data, k: int) -> float:
    """Return the accuracy of scikit-learn on the CPU."""
    model = KNeighborsClassifier(
        k, weights=lambda d: 2.718281828459045 ** ((1 - d) / TEMPERATURE), metric="cosine",
        algorithm="brute",
    )  # fmt: skip
    model.fit(data.train.cpu().numpy(), data.train_labels.cpu().numpy())
    return float(model.score(data.test.cpu().numpy(), data.test_labels.cpu().numpy()))


def measure(data: Data, args: argparse.Namespace) -> None:
    """Time all sides and print a row each."""
    k = args.k
    sides: dict[str, Callable[[], float]] = {
        "ctune": lambda: ours(data, (k,)),
        "ctune, 3 k at once": lambda: ours(data, (k, 1, max(2, k // 2))),
        "scikit-learn": lambda: scikit_learn(data, k),
    }
    if 4 * args.train * args.test <= LARGEST_MATRIX_BYTES:
        sides["torch"] = lambda: plain_torch(data, k)
    for run in sides.values():
        run()
    rounds = [{name: timed(run) for name, run in sides.items()} for _ in range(args.rounds)]
    print("| side               | seconds | CPU s | times ours | top-1  |")
    for name in sides:
        wall_s = statistics.median(done[name].wall_s for done in rounds)
        cpu_s = statistics.median(done[name].cpu_s for done in rounds)
        ratio = statistics.median(done[name].wall_s / done["ctune"].wall_s for done in rounds)
        print(
            f"| {name:18} | {wall_s:7.3f} | {cpu_s:5.2f} | {ratio:10.2f} |"
            f" {rounds[-1][name].accuracy:.4f} |"
        )


def unit(data: Data) -> Data:
    """Return the data with rows of unit length."""
    train: Tensor = normalize(data.train)
    return Data(train, data.train_labels, normalize(data.test), data.test_labels, data.num_classes)


def main() -> None:
    """Read the arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--train", type=int, default=10_000, help="training samples")
    parser.add_argument("--test", type=int, default=2_000, help="test samples")
    parser.add_argument("--dim", type=int, default=384, help="of the features")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    args = parser.parse_args()
    print(describe_machine(torch.get_num_threads()))
    print(
        f"{args.train} train and {args.test} test samples, {args.dim} dimensions, k {args.k},"
        f" {args.device}"
    )
    measure(unit(make_data(args)), args)


if __name__ == "__main__":
    main()
