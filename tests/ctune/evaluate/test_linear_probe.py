"""The linear probe: against torch's own training and scikit-learn, the rate, guards."""

import re
from typing import Any

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from ctune.errors import DivergedError
from ctune.evaluate.accuracy import topk_accuracy
from ctune.evaluate.linear_probe import ProbeProtocol, linear_probe
from ctune.optim import cosine_decay_lr
from ctune.samplers import RandomBatchSampler


def samples(N: int, seed: int, *, D: int = 8, C: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(N) % C
    centres = torch.randn(C, D, generator=torch.Generator().manual_seed(99))
    noise = torch.randn(N, D, generator=generator)
    return (centres[labels] + noise).double(), labels


TRAIN, TRAIN_LABELS = samples(300, 0)
TEST, TEST_LABELS = samples(200, 1)
DATA = (TRAIN, TRAIN_LABELS, TEST, TEST_LABELS)


def trained_alone(lr: float, protocol: ProbeProtocol) -> nn.Linear:
    """The same training of one head by torch's own layers, autograd and optimiser."""
    head = nn.Linear(8, 6, dtype=torch.float64)
    generator = torch.Generator().manual_seed(protocol.seed)
    start = nn.init.trunc_normal_(torch.empty(6, 8), std=0.02, generator=generator)
    with torch.no_grad():
        head.weight.copy_(start)
        head.bias.zero_()
    optimizer = torch.optim.SGD(
        head.parameters(),
        lr=lr,
        momentum=protocol.momentum,
        weight_decay=protocol.weight_decay,
    )
    sampler = RandomBatchSampler(300, protocol.batch_size, seed=protocol.seed, drop_last=False)
    for epoch in range(protocol.epochs):
        for group in optimizer.param_groups:
            group["lr"] = cosine_decay_lr(
                epoch, base_lr=lr, epochs=protocol.epochs, lr_decay_rate=protocol.lr_decay_rate
            )
        for batch in sampler.batches(epoch):
            rows = torch.from_numpy(batch)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(head(TRAIN[rows]), TRAIN_LABELS[rows])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return head


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
def test_heads_of_a_grid_train_as_they_would_alone(weight_decay: float) -> None:
    protocol = ProbeProtocol(
        learning_rates=(0.01, 0.1, 0.5), epochs=5, weight_decay=weight_decay, seed=3
    )
    result = linear_probe(*DATA, num_classes=6, protocol=protocol)
    for rate in result.rates:
        head = trained_alone(rate.lr, protocol)
        with torch.no_grad():
            expected = topk_accuracy(head(TEST), TEST_LABELS, (1, 5))
        assert [rate.top1, rate.top5] == expected
        if rate is result.best:
            torch.testing.assert_close(result.weight, head.weight.detach())
            torch.testing.assert_close(result.bias, head.bias.detach())


def test_comes_close_to_logistic_regression() -> None:
    (x, y), (test_x, test_y) = samples(3000, 0), samples(2000, 1)
    model = LogisticRegression(C=1e3, max_iter=2000).fit(x.numpy(), y.numpy())
    expected = model.score(test_x.numpy(), test_y.numpy())
    protocol = ProbeProtocol(learning_rates=(0.001, 0.01, 0.1), epochs=20)
    result = linear_probe(x, y, test_x, test_y, num_classes=6, protocol=protocol)
    assert result.best.top1 == pytest.approx(expected, abs=0.01)
    assert result.best.top5 > 0.99
    logits = test_x @ result.weight.T + result.bias
    assert topk_accuracy(logits, test_y, (1,)) == [result.best.top1]


def test_rate_is_chosen_on_the_held_out_share_and_not_on_the_test_set() -> None:
    protocol = ProbeProtocol(learning_rates=(1e-6, 0.1), epochs=10)
    honest = linear_probe(*DATA, num_classes=6, protocol=protocol)
    misleading = linear_probe(
        TRAIN, TRAIN_LABELS, TEST, (TEST_LABELS + 1) % 6, num_classes=6, protocol=protocol
    )
    assert honest.best.lr == misleading.best.lr == 0.1
    assert [r.holdout_top1 for r in honest.rates] == [r.holdout_top1 for r in misleading.rates]
    assert torch.equal(honest.weight, misleading.weight)


def test_equal_rates_go_to_the_smaller() -> None:
    x = torch.tensor([[10.0, 0], [0, 10.0]]).repeat(20, 1)
    y = torch.tensor([0, 1]).repeat(20)
    result = linear_probe(
        x, y, x, y, num_classes=2, protocol=ProbeProtocol(learning_rates=(0.2, 0.1), epochs=3)
    )
    assert [rate.holdout_top1 for rate in result.rates] == [1, 1]
    assert result.best.lr == 0.1


def test_a_single_rate_holds_nothing_out() -> None:
    result = linear_probe(
        *DATA, num_classes=6, protocol=ProbeProtocol(learning_rates=(0.1,), epochs=2)
    )
    assert result.best.holdout_top1 is None
    assert result.rates == (result.best,)


def test_deterministic_given_the_seed_and_inputs_unchanged() -> None:
    before = [tensor.clone() for tensor in DATA]
    first, second, other = (
        linear_probe(*DATA, num_classes=6, protocol=ProbeProtocol(epochs=3, seed=seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(first.weight, second.weight)
    assert first.rates == second.rates
    assert not torch.equal(first.weight, other.weight)
    assert all(torch.equal(now, then) for now, then in zip(DATA, before, strict=True))


def test_standardised_training_does_not_depend_on_shift_and_scale() -> None:
    scale = torch.logspace(-2, 2, 8, dtype=torch.float64)
    protocol = ProbeProtocol(learning_rates=(0.1,), epochs=10, standardize=True)
    plain = linear_probe(*DATA, num_classes=6, protocol=protocol)
    odd = linear_probe(
        TRAIN * scale + 50, TRAIN_LABELS, TEST * scale + 50, TEST_LABELS,
        num_classes=6, protocol=protocol,
    )  # fmt: skip
    assert odd.best.top1 == pytest.approx(plain.best.top1, abs=0.02)
    logits = (TEST * scale + 50) @ odd.weight.T + odd.bias
    assert topk_accuracy(logits, TEST_LABELS, (1,)) == [odd.best.top1]


def test_a_rate_that_diverges_is_marked_and_not_chosen() -> None:
    data = (TRAIN.float() * 1e18, TRAIN_LABELS, TEST.float() * 1e18, TEST_LABELS)
    protocol = ProbeProtocol(learning_rates=(1e-36, 1e6), epochs=3)
    result = linear_probe(*data, num_classes=6, protocol=protocol)
    assert [rate.diverged for rate in result.rates] == [False, True]
    assert (result.rates[1].top1, result.best.lr) == (0, 1e-36)
    with pytest.raises(DivergedError, match="not finite"):
        linear_probe(*data, num_classes=6, protocol=ProbeProtocol(learning_rates=(1e6,), epochs=3))


def test_few_classes_and_half_precision_features() -> None:
    result = linear_probe(
        TRAIN.bfloat16(), TRAIN_LABELS % 2, TEST.bfloat16(), TEST_LABELS % 2,
        num_classes=2, protocol=ProbeProtocol(epochs=2),
    )  # fmt: skip
    assert result.best.top5 == 1
    assert result.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_features": TRAIN[0]}, "train_features has shape [8]"),
        ({"test_features": TEST * torch.nan}, "must be finite"),
        ({"test_features": TEST[:, :3]}, "test_features has 3 dimensions"),
        ({"train_labels": TRAIN_LABELS[:5]}, "train_labels has shape [5]"),
        ({"test_labels": TEST_LABELS.double()}, "dtype torch.float64"),
        ({"num_classes": 5}, "lies in [0, 5] with num_classes 5"),
        ({"train_labels": TRAIN_LABELS - 1}, "lies in [-1, 4]"),
        (
            {"train_features": TRAIN[:6], "train_labels": TRAIN_LABELS[:6]},
            "no class of the 6 train samples",
        ),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    names = ("train_features", "train_labels", "test_features", "test_labels")
    options = {**dict(zip(names, DATA, strict=True)), "num_classes": 6, **changes}
    with pytest.raises(ValueError, match=re.escape(message)):
        linear_probe(**options)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rates", ()),
        ("learning_rates", (0.1, 0.0)),
        ("epochs", 0),
        ("batch_size", 0),
        ("momentum", 1.0),
        ("weight_decay", -0.1),
        ("lr_decay_rate", 1.1),
        ("holdout_fraction", 0.0),
    ],
)
def test_protocol_refuses(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field} is"):
        ProbeProtocol(**{field: value})
