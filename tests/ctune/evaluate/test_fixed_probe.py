"""The probe of a fixed recipe: against torch's own training with hidden layers, guards."""

import re
from typing import Any

import pytest
import torch
from torch import nn

from ctune.evaluate.fixed_probe import fit_linear_probe
from ctune.evaluate.probe_protocol import ProbeProtocol

GENERATOR = torch.Generator().manual_seed(0)
FEATURES = torch.randn(40, 5, generator=GENERATOR, dtype=torch.float64)
LABELS = FEATURES[:, :3].argmax(1)
PROTOCOL = ProbeProtocol(
    learning_rates=(0.1,), epochs=4, batch_size=16, weight_decay=0.01, schedule="constant"
)


@pytest.mark.parametrize("hidden_dims", [(), (7,), (7, 4)])
def test_trains_as_torch_does(hidden_dims: tuple[int, ...]) -> None:
    first = fit_linear_probe(
        FEATURES, LABELS, 3, protocol=PROTOCOL, shuffle=False, hidden_dims=hidden_dims
    )
    begun = ProbeProtocol(learning_rates=(1e-300,), epochs=1, schedule="constant")
    start = fit_linear_probe(FEATURES, LABELS, 3, protocol=begun, hidden_dims=hidden_dims).layers
    model = nn.Sequential()
    for i, (weight, bias) in enumerate(start):
        layer = nn.Linear(weight.shape[1], weight.shape[0], dtype=torch.float64)
        layer.load_state_dict({"weight": weight, "bias": bias})
        model.extend([nn.ReLU(), layer] if i else [layer])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    losses = []
    for rows in torch.split(torch.arange(40), 16) * 4:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(FEATURES[rows]), LABELS[rows])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert first.losses == pytest.approx(losses)
    torch.testing.assert_close(first.logits(FEATURES), model(FEATURES).detach())
    right = (model(FEATURES).argmax(1) == LABELS).double().mean().item()
    assert first.accuracy(FEATURES, LABELS) == pytest.approx(right)


def test_learns_and_depends_on_the_seed_only() -> None:
    probes = [
        fit_linear_probe(
            FEATURES, LABELS, 3, protocol=ProbeProtocol(learning_rates=(0.1,), epochs=20, seed=s)
        )
        for s in (0, 0, 1)
    ]
    assert probes[0].accuracy(FEATURES, LABELS) > 0.8
    assert torch.equal(probes[0].weight, probes[1].weight)
    assert not torch.equal(probes[0].weight, probes[2].weight)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": 1}, "num_classes is 1"),
        ({"num_classes": 2}, "labels lies in [0, 2]"),
        ({"labels": LABELS * 0 + 1}, "labels are all 1"),
        ({"features": FEATURES[0]}, "must be [N, D]"),
        ({"protocol": ProbeProtocol()}, "one learning rate"),
        ({"start": (torch.zeros(3, 4), torch.zeros(3))}, "weight [3, 5]"),
        ({"start": (torch.zeros(3, 5), torch.zeros(3)), "hidden_dims": (4,)}, "one layer"),
        ({"hidden_dims": (0,)}, "hidden_dims holds 0"),
    ],
)
def test_refuses(changes: dict[str, Any], message: str) -> None:
    given = {
        "features": FEATURES, "labels": LABELS, "num_classes": 3, "protocol": PROTOCOL, **changes,
    }  # fmt: skip
    with pytest.raises(ValueError, match=re.escape(message)):
        fit_linear_probe(**given)
