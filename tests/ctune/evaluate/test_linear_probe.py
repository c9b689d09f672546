"""The linear probe: against torch's own training and scikit-learn, the rate, guards."""

import math
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn

from ctune.errors import DivergedError
from ctune.evaluate.accuracy import topk_accuracy
from ctune.evaluate.head_training import (
    Heads,
    LarsHeads,
    cached_source,
    epoch_batches,
    train_heads,
    with_ones,
)
from ctune.evaluate.linear_probe import LinearProbeHead, _held_out, linear_probe
from ctune.evaluate.probe_protocol import ProbeProtocol, mae_ct_protocol, mae_protocol
from ctune.optim import LARS
from ctune.samplers import RandomBatchSampler
from ctune.schedules import cosine_to_cube


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
            group["lr"] = cosine_to_cube(
                lr=lr, lr_decay_rate=protocol.lr_decay_rate, epochs=protocol.epochs
            )(epoch)
        for batch in sampler.batches(epoch):
            rows = torch.from_numpy(batch)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(head(TRAIN[rows]), TRAIN_LABELS[rows])
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return head


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize("lr", [0.1, 0.5])
def test_the_chosen_head_is_trained_on_everything_as_torch_would(
    weight_decay: float, lr: float
) -> None:
    protocol = ProbeProtocol(learning_rates=(1e-6, lr), epochs=5, weight_decay=weight_decay, seed=3)
    result = linear_probe(*DATA, num_classes=6, protocol=protocol)
    head = trained_alone(lr, protocol)
    with torch.no_grad():
        expected = topk_accuracy(head(TEST), TEST_LABELS, (1, 5))
    assert (result.lr, result.protocol, result.top1_max_on_test) == (lr, "cached", None)
    assert [result.top1, result.top5] == expected
    torch.testing.assert_close(result.weight, head.weight.detach())
    torch.testing.assert_close(result.bias, head.bias.detach())


@pytest.mark.parametrize("normalization", ["none", "standardize", "batch_norm"])
def test_comes_close_to_logistic_regression(normalization: Any) -> None:
    (x, y), (test_x, test_y) = samples(1500, 0), samples(1000, 1)
    model = LogisticRegression(C=1e3, max_iter=2000).fit(x.numpy(), y.numpy())
    expected = model.score(test_x.numpy(), test_y.numpy())
    protocol = ProbeProtocol(
        learning_rates=(0.01, 0.1, 0.3), epochs=40, normalization=normalization
    )
    result = linear_probe(x, y, test_x, test_y, num_classes=6, protocol=protocol)
    assert result.top1 == pytest.approx(expected, abs=0.015)
    assert result.top5 > 0.99
    assert topk_accuracy(result.logits(test_x), test_y, (1,)) == [result.top1]


def test_mae_ct_recipe_comes_close_to_logistic_regression() -> None:
    model = LogisticRegression(C=1e3, max_iter=2000).fit(TRAIN.numpy(), TRAIN_LABELS.numpy())
    protocol = mae_ct_protocol()
    assert len(protocol.learning_rates) == 13
    assert protocol.learning_rates[-1] == pytest.approx(0.4)
    result = linear_probe(*DATA, num_classes=6, protocol=protocol)
    assert result.top1 == pytest.approx(model.score(TEST.numpy(), TEST_LABELS.numpy()), abs=0.05)


def test_lars_trains_as_the_optimizer_does() -> None:
    """One head by torch's own layers, autograd and the method's optimizer, on the same batches."""
    protocol = ProbeProtocol(
        learning_rates=(2.0,), epochs=4, batch_size=64, drop_last=True, optimizer="lars",
        schedule="mae_cosine", warmup_fraction=0.25,
    )  # fmt: skip
    head = nn.Linear(8, 6, dtype=torch.float64)
    generator = torch.Generator().manual_seed(protocol.seed)
    with torch.no_grad():
        start = nn.init.trunc_normal_(torch.empty(6, 8), std=0.02, generator=generator)
        head.weight.copy_(start)
        head.bias.zero_()
    optimizer = LARS(head.parameters(), 0.0, momentum=0.9)
    batches = [b for e in range(4) for b in epoch_batches(torch.arange(300), protocol)(e)]
    for step, batch in enumerate(batches):
        rising, falling = step / 4, (1 + math.cos(math.pi * (step - 4) / 12)) / 2
        optimizer.param_groups[0]["lr"] = 2.0 * (rising if step < 4 else falling)
        optimizer.zero_grad()
        rows = torch.from_numpy(batch)
        nn.functional.cross_entropy(head(TRAIN[rows]), TRAIN_LABELS[rows]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    result = linear_probe(*DATA, num_classes=6, protocol=protocol)
    torch.testing.assert_close(result.weight, head.weight.detach())
    torch.testing.assert_close(result.bias, head.bias.detach())


def test_heads_under_lars_do_not_see_each_other() -> None:
    """Of two heads at two rates each is what it is alone, and held-out rows have no weight."""
    protocol = ProbeProtocol(epochs=3, batch_size=100, optimizer="lars")
    layer = (torch.ones(6, 8).double(), torch.zeros(6).double())
    held = torch.arange(300) % 10 == 0

    def trained(rates: tuple[float, ...], held: Tensor | None) -> list[Tensor]:
        heads = LarsHeads(layer, rates, momentum=0.9, weight_decay=0.0)
        train_heads(
            heads, cached_source(TRAIN, None), labels=TRAIN_LABELS, protocol=protocol,
            batches=epoch_batches(torch.arange(300), protocol), held=held,
        )  # fmt: skip
        return [heads.layers(i)[0][0] for i in range(len(heads))]

    every, kept = trained((2.0, 2.0), held)
    (alone,) = trained((2.0,), None)
    torch.testing.assert_close(every, alone)
    assert not torch.allclose(every, kept)
    fast, slow = trained((2.0, 1.0), None)
    assert not torch.allclose(fast, slow)


def test_mae_recipe_comes_close_to_logistic_regression() -> None:
    protocol = mae_protocol()
    assert list(protocol.learning_rates) == pytest.approx([6.4])
    assert protocol.warmup_fraction * 90 == pytest.approx(10)
    assert mae_protocol(epochs=50).warmup_fraction * 50 == pytest.approx(10)
    assert mae_protocol(epochs=3).warmup_fraction == 0
    result = linear_probe(*DATA, num_classes=6, protocol=protocol)
    model = LogisticRegression(C=1e3, max_iter=2000).fit(TRAIN.numpy(), TRAIN_LABELS.numpy())
    assert result.top1 == pytest.approx(model.score(TEST.numpy(), TEST_LABELS.numpy()), abs=0.07)
    assert result.top1_max_on_test is not None and result.top1_max_on_test >= result.top1


def test_the_best_on_the_test_set_is_over_all_rates_and_epochs() -> None:
    """The test labels are what an untrained head says: a rate of nearly 0 gets them right."""
    generator = torch.Generator().manual_seed(0)
    start = nn.init.trunc_normal_(torch.empty(6, 8), std=0.02, generator=generator)
    labels = (TEST @ start.double().T).argmax(1)
    protocol = ProbeProtocol(learning_rates=(1e-9, 0.1), epochs=5, tests_all_rates=True)
    result = linear_probe(TRAIN, TRAIN_LABELS, TEST, labels, num_classes=6, protocol=protocol)
    plain = replace(protocol, tests_all_rates=False)
    without = linear_probe(TRAIN, TRAIN_LABELS, TEST, labels, num_classes=6, protocol=plain)
    assert without.top1_max_on_test is None
    assert (without.lr, without.top1) == (result.lr, result.top1) == (0.1, result.top1)
    torch.testing.assert_close(without.weight, result.weight)
    one = replace(protocol, learning_rates=(0.1,))
    alone = linear_probe(TRAIN, TRAIN_LABELS, TEST, labels, num_classes=6, protocol=one)
    assert alone.top1_max_on_test is not None and alone.top1 <= alone.top1_max_on_test < 0.5
    assert result.top1_max_on_test == pytest.approx(1, abs=0.01)


def test_rate_is_chosen_on_the_held_out_share_and_not_on_the_test_set() -> None:
    protocol = ProbeProtocol(learning_rates=(1e-6, 0.1), epochs=10)
    honest = linear_probe(*DATA, num_classes=6, protocol=protocol)
    misleading = linear_probe(
        TRAIN, TRAIN_LABELS, TEST, (TEST_LABELS + 1) % 6, num_classes=6, protocol=protocol
    )
    assert honest.lr == misleading.lr == 0.1
    assert honest.rates == misleading.rates
    assert torch.equal(honest.weight, misleading.weight)


def test_equal_rates_go_to_the_smaller() -> None:
    x = torch.tensor([[10.0, 0], [0, 10.0]]).repeat(20, 1)
    y = torch.tensor([0, 1]).repeat(20)
    result = linear_probe(
        x, y, x, y, num_classes=2, protocol=ProbeProtocol(learning_rates=(0.2, 0.1), epochs=3)
    )
    assert [rate.holdout_top1 for rate in result.rates] == [1, 1]
    assert result.lr == 0.1


def test_a_single_rate_holds_nothing_out() -> None:
    result = linear_probe(
        *DATA, num_classes=6, protocol=ProbeProtocol(learning_rates=(0.1,), epochs=2)
    )
    assert [rate.holdout_top1 for rate in result.rates] == [None]


def test_crops_that_change_nothing_give_the_cached_probe() -> None:
    """Heads for the choice and for the test share batches, without seeing each other's rows."""
    protocol = ProbeProtocol(learning_rates=(0.1,), epochs=4, normalization="batch_norm")
    cached = linear_probe(*DATA, num_classes=6, protocol=protocol)
    grid = replace(protocol, learning_rates=(1e-6, 0.1))
    full = linear_probe(
        *DATA, num_classes=6, protocol=grid, augmented=lambda rows, step: TRAIN[rows]
    )
    assert (full.protocol, full.lr, full.top1) == ("full", 0.1, cached.top1)
    torch.testing.assert_close(full.weight, cached.weight)
    assert full.top1_max_on_test is not None and full.top1_max_on_test >= full.top1


def test_held_out_rows_do_not_train_the_heads_that_choose() -> None:
    """The labels of the held-out tenth are turned round: only the heads that are tested see it."""
    protocol = ProbeProtocol(learning_rates=(0.05, 0.1), epochs=4)
    held = _held_out(TRAIN_LABELS, protocol)
    turned = torch.where(held, (TRAIN_LABELS + 1) % 6, TRAIN_LABELS)

    def source(rows: Tensor, step: int) -> Tensor:
        return with_ones(TRAIN[rows])

    trained = []
    for labels in (TRAIN_LABELS, turned):
        heads = Heads(
            [(torch.zeros_like(TRAIN[:6]), torch.zeros(6).double())], (0.1, 0.1), momentum=0.9,
            weight_decay=0.0,
        )  # fmt: skip
        batches = epoch_batches(torch.arange(300), protocol)
        train_heads(heads, source, labels=labels, batches=batches, protocol=protocol, held=held)
        trained.append([heads.layers(i)[0][0] for i in range(2)])
    assert torch.equal(trained[0][1], trained[1][1])
    assert not torch.allclose(trained[0][0], trained[1][0])


def test_every_step_of_the_full_protocol_asks_for_new_crops() -> None:
    asked: list[tuple[int, list[int]]] = []

    def augmented(rows: Tensor, step: int) -> Tensor:
        asked.append((step, rows.tolist()))
        return TRAIN[rows]

    protocol = ProbeProtocol(epochs=2, batch_size=100)
    linear_probe(*DATA, num_classes=6, protocol=protocol, augmented=augmented)
    assert [step for step, _ in asked] == list(range(6))
    for epoch in (asked[:3], asked[3:]):
        assert sorted(row for _, rows in epoch for row in rows) == list(range(300))


def test_published_head() -> None:
    torch.manual_seed(0)
    head = LinearProbeHead(8, 6)
    assert {name for name, _ in head.named_parameters()} == {"linear.weight", "linear.bias"}
    assert float(head.linear.weight.detach().std()) == pytest.approx(0.01, rel=0.5)
    x = 3 * TRAIN.float() + 5
    torch.testing.assert_close(head(x).mean(0), torch.zeros(6), atol=1e-5, rtol=0)
    head.eval()
    assert not torch.allclose(head(x).mean(0), torch.zeros(6), atol=1e-3)


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


@pytest.mark.parametrize("normalization", ["standardize", "batch_norm"])
def test_normalised_training_does_not_depend_on_shift_and_scale(normalization: Any) -> None:
    scale = torch.logspace(-2, 2, 8, dtype=torch.float64)
    protocol = ProbeProtocol(learning_rates=(0.1,), epochs=10, normalization=normalization)
    plain = linear_probe(*DATA, num_classes=6, protocol=protocol)
    odd = linear_probe(
        TRAIN * scale + 50, TRAIN_LABELS, TEST * scale + 50, TEST_LABELS,
        num_classes=6, protocol=protocol,
    )  # fmt: skip
    assert odd.top1 == pytest.approx(plain.top1, abs=0.02)
    logits = (TEST * scale + 50) @ odd.weight.T + odd.bias
    assert topk_accuracy(logits, TEST_LABELS, (1,)) == [odd.top1]


def test_a_rate_that_diverges_is_marked_and_not_chosen() -> None:
    data = (TRAIN.float() * 1e18, TRAIN_LABELS, TEST.float() * 1e18, TEST_LABELS)
    protocol = ProbeProtocol(learning_rates=(1e-36, 1e6), epochs=3)
    result = linear_probe(*data, num_classes=6, protocol=protocol)
    assert [rate.diverged for rate in result.rates] == [False, True]
    assert (result.rates[1].holdout_top1, result.lr) == (0, 1e-36)
    with pytest.raises(DivergedError, match="not finite"):
        linear_probe(*data, num_classes=6, protocol=ProbeProtocol(learning_rates=(1e6,), epochs=3))


def test_few_classes_and_half_precision_features() -> None:
    result = linear_probe(
        TRAIN.bfloat16(), TRAIN_LABELS % 2, TEST.bfloat16(), TEST_LABELS % 2,
        num_classes=2, protocol=ProbeProtocol(epochs=2),
    )  # fmt: skip
    assert result.top5 == 1
    assert result.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_features": TRAIN[0]}, "train_features has shape [8]"),
        ({"test_features": TEST * torch.nan}, "test_features holds a non-finite value"),
        ({"test_features": TEST[:, :3]}, "test_features has 3 dimensions"),
        ({"train_labels": TRAIN_LABELS[:5]}, "train_labels has shape [5]"),
        ({"num_classes": 1}, "num_classes is 1"),
        ({"test_labels": TEST_LABELS.double()}, "dtype torch.float64"),
        ({"num_classes": 5}, "lies in [0, 5], but num_classes is 5"),
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
        ("warmup_fraction", 1.0),
        ("init_std", -1.0),
        ("norm_eps", 0.0),
    ],
)
def test_protocol_refuses(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{field} is"):
        ProbeProtocol(**{field: value})
