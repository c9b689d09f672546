"""The head of MAE-CT: what learns, what does not, order of the steps, variants, guards."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ctune.losses.nnclr import nnclr_loss
from ctune.nnclr_head import NNCLRHead, NNCLRSettings, NNCLRStep, PooledBatch
from ctune.unit_length import unit_length

IN_DIM, BATCH, SIZE = 6, 4, 12
PLAIN = NNCLRSettings(variant="nnclr")
LABELS = torch.tensor([0, 1, 0, 1])
VARIANTS = ["nnclr_ema", "nnclr", "no_queue", "oracle"]


def make_head(seed: int = 0) -> NNCLRHead:
    torch.manual_seed(seed)
    return NNCLRHead(IN_DIM, proj_hidden_dim=8, pred_hidden_dim=10, out_dim=5, queue_size=SIZE)


def views(seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(2, BATCH, IN_DIM, generator=generator).requires_grad_())


def run(head: NNCLRHead, settings: NNCLRSettings = PLAIN, *, step: int = 0) -> NNCLRStep:
    """A step of training on images of its own, without an optimizer."""
    return head.training_loss(
        views(step),
        torch.arange(BATCH) + BATCH * step,
        LABELS,
        settings=settings,
        generator=torch.Generator().manual_seed(step),
    )


def test_layers_and_names() -> None:
    head = make_head()
    shapes = {name: list(p.shape) for name, p in head.named_parameters() if p.ndim == 2}
    assert shapes == {
        "projector.0.weight": [8, 6], "projector.3.weight": [8, 8], "projector.6.weight": [5, 8],
        "predictor.0.weight": [10, 5], "predictor.3.weight": [5, 10],
        "target_projector.0.weight": [8, 6], "target_projector.3.weight": [8, 8],
        "target_projector.6.weight": [5, 8],
    }  # fmt: skip
    norms = [name for name, m in head.named_modules() if isinstance(m, nn.BatchNorm1d)]
    assert [n for n in norms if "target" not in n] == [
        "projector.1", "projector.4", "projector.7", "predictor.1",
    ]  # fmt: skip
    assert all(m.bias is None for m in head.modules() if isinstance(m, nn.Linear))
    trained = {name.split(".")[0] for name, p in head.named_parameters() if p.requires_grad}
    assert trained == {"projector", "predictor"}


@pytest.mark.parametrize("variant", ["nnclr_ema", "nnclr", "oracle"])
def test_the_gradient_goes_through_the_predictions_alone(variant: Any) -> None:
    """It is that of a loss whose neighbours are constants."""
    head, pooled = make_head(), views()
    found = head.training_loss(
        pooled, torch.arange(BATCH), LABELS, settings=replace(PLAIN, variant=variant)
    )
    torch.autograd.backward(found.loss)
    assert not found.z.requires_grad
    assert all(p.grad is None for p in head.target_projector.parameters())
    assert not head.queue.features.requires_grad
    learned = [p.grad for p in [*head.projector.parameters(), *head.predictor.parameters()]]
    again = make_head()
    start = again.queue.features.clone()
    predicted = [again.predictor(again.projector(view.detach())) for view in pooled]
    loss = sum(
        nnclr_loss(predicted[v], start[found.index[1 - v]], temperature=0.15) for v in (0, 1)
    )
    assert isinstance(loss, Tensor)
    torch.autograd.backward(loss / 2)
    expected = [p.grad for p in [*again.projector.parameters(), *again.predictor.parameters()]]
    for mine, theirs in zip(learned, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_without_a_queue_the_gradient_goes_through_both_views() -> None:
    found = run(make_head(), replace(PLAIN, variant="no_queue"))
    head, pooled = make_head(), views()
    projected = [head.projector(view) for view in pooled]
    predicted = [head.predictor(view) for view in projected]
    loss = nnclr_loss(predicted[0], unit_length(projected[1]), temperature=0.15)
    loss = (loss + nnclr_loss(predicted[1], unit_length(projected[0]), temperature=0.15)) / 2
    mine, theirs = make_head(), head
    again = mine.training_loss(
        pooled, torch.arange(BATCH), LABELS, settings=replace(PLAIN, variant="no_queue")
    )
    torch.testing.assert_close(found.loss, loss)
    torch.autograd.backward([again.loss, loss])
    for a, b in zip(mine.projector.parameters(), theirs.projector.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_looks_into_the_queue_of_the_steps_before(variant: Any) -> None:
    head, settings = make_head(), replace(PLAIN, variant=variant, top_k=2)
    first = run(head, settings)
    for step in (1, 2, 3):
        before = head.queue.ids.clone()
        found = run(head, settings, step=step)
        assert not set(before[found.index].flatten().tolist()) & set(range(4 * step, 4 * step + 4))
        rows = slice(4 * step % SIZE, 4 * step % SIZE + 4)
        assert torch.equal(head.queue.features[rows], found.z[0]), "the first view, no other"
    assert head.queue.ids.tolist() == [12, 13, 14, 15, *range(4, 12)]
    assert not torch.equal(head.queue.features[:4], first.z[0])
    assert head.queue.labels.tolist() == LABELS.tolist() * 3
    assert int(head.queue.pointer) == 4
    torch.testing.assert_close(head.queue.features.norm(dim=1), torch.ones(SIZE))


@pytest.mark.parametrize("exclude_self", [True, False])
def test_older_vectors_of_the_same_image(exclude_self: bool) -> None:
    head = make_head()
    settings = replace(PLAIN, exclude_self=exclude_self)
    run(head, settings)
    ids = head.queue.ids.clone()
    found = run(head, settings)
    own = ids[found.index[0]] == torch.arange(BATCH)
    assert own.tolist() == [not exclude_self] * BATCH


def test_under_autocast_only_the_layers_compute_in_half_precision() -> None:
    head = make_head()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(head, NNCLRSettings(top_k=2))
    torch.autograd.backward(found.loss)
    assert found.loss.dtype == found.z.dtype == head.queue.features.dtype == torch.float32
    torch.testing.assert_close(head.queue.features.norm(dim=1), torch.ones(SIZE))
    exact = run(make_head(), NNCLRSettings(top_k=2)).z
    torch.testing.assert_close(found.z, exact, rtol=0, atol=0.1)
    assert not torch.equal(found.z, exact), "autocast was on"


def test_exchanging_the_views_changes_the_queue_but_not_the_loss() -> None:
    one, other = make_head(), make_head()
    pooled, ids = views(), torch.arange(BATCH)
    found = one.training_loss(pooled, ids, settings=PLAIN)
    exchanged = other.training_loss(pooled[::-1], ids, settings=PLAIN)
    torch.testing.assert_close(exchanged.loss, found.loss)
    assert torch.equal(other.queue.features[:BATCH], found.z[1])
    assert not torch.equal(other.queue.features, one.queue.features)


def test_one_direction_is_the_loss_of_the_first_views_predictions() -> None:
    head, pooled, ids = make_head(), views(), torch.arange(BATCH)
    start = head.queue.features.clone()
    found = head.training_loss(pooled, ids, settings=replace(PLAIN, symmetric=False))
    again = make_head()
    predicted = [again.predictor(again.projector(view)) for view in pooled]
    first, second = (
        nnclr_loss(predicted[v], start[found.index[1 - v]], temperature=0.15) for v in (0, 1)
    )
    torch.testing.assert_close(found.loss, first)
    assert not torch.allclose(first, second)
    torch.testing.assert_close(run(make_head()).loss, (first + second) / 2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_order_of_images_changes_nothing_but_the_order_of_the_queue(variant: Any) -> None:
    one, other = make_head().double(), make_head().double()
    order = torch.tensor([2, 0, 3, 1])
    pooled, ids = [view.double() for view in views()], torch.arange(BATCH)
    settings = replace(PLAIN, variant=variant)
    found = one.training_loss(pooled, ids, LABELS, settings=settings)
    permuted = other.training_loss(
        [view[order] for view in pooled], ids[order], LABELS[order], settings=settings
    )
    torch.testing.assert_close(permuted.loss, found.loss)
    torch.testing.assert_close(other.queue.features[:BATCH], one.queue.features[:BATCH][order])
    for name, value in found.metrics.items():
        torch.testing.assert_close(permuted.metrics[name], value, msg=name)


def test_draws_follow_the_generator() -> None:
    settings = replace(PLAIN, top_k=SIZE - 1)
    first, same = run(make_head(), settings), run(make_head(), settings)
    assert torch.equal(first.index, same.index)
    generator = torch.Generator().manual_seed(5)
    other = make_head().training_loss(
        views(), torch.arange(BATCH), LABELS, settings=settings, generator=generator
    )
    assert not torch.equal(other.index, first.index)


def test_the_target_learns_as_an_average_and_copies_statistics() -> None:
    head = make_head()
    run(head, NNCLRSettings())
    with torch.no_grad():
        for parameter in head.projector.parameters():
            parameter.add_(1)
    start = head.target_projector.state_dict()
    start = {name: value.clone() for name, value in start.items()}

    def differing() -> list[str]:
        target = head.target_projector.state_dict()
        return [n for n, v in head.projector.state_dict().items() if not torch.equal(target[n], v)]

    head.update_target(1.0)
    weights = [name for name, _ in head.projector.named_parameters()]
    assert differing() == weights
    for name in weights:
        assert torch.equal(head.target_projector.state_dict()[name], start[name])
    head.update_target(0.75)
    assert differing() == weights
    moved = head.target_projector.state_dict()["0.weight"] - start["0.weight"]
    torch.testing.assert_close(moved, torch.full_like(moved, 0.25))
    head.restart_target()
    assert differing() == []
    with torch.no_grad():
        head.get_parameter("projector.0.weight").zero_()
    assert differing() == ["0.weight"], "a copy shares nothing"


def test_the_target_is_what_is_looked_up() -> None:
    head = make_head()
    with torch.no_grad():
        for parameter in head.target_projector.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(1))
    expected = unit_length(head.target_projector(views()[0])).detach()
    assert torch.equal(run(head, NNCLRSettings()).z[0], expected)
    assert not torch.allclose(run(make_head(), PLAIN).z[0], expected)


def test_accuracy_of_what_was_drawn_and_of_what_is_nearest() -> None:
    head, plain = make_head(), replace(PLAIN, top_k=3, exclude_self=False)
    run(head, plain)
    ranks = torch.tensor([0, 0, 2, 2])
    labels = head.queue.labels.clone()
    told = torch.tensor([0, 1, 0, -1])
    found = head.training_loss(
        views(), torch.arange(BATCH), told, settings=plain, choice=[ranks, ranks]
    )
    drawn = [bool(labels[row] == label) for row, label in zip(found.index[0], told, strict=True)]
    assert float(found.metrics["nn_accuracy"]) == pytest.approx(sum(drawn[:3]) / 3)
    assert float(found.metrics["nn_accuracy_top1"]) == 1.0, "each finds itself"
    assert found.num_labelled == 3


def test_an_oracle_draws_the_class_but_its_accuracy_does_not_see_labels() -> None:
    oracle, plain = replace(PLAIN, variant="oracle"), PLAIN
    heads = [make_head(), make_head()]
    for head in heads:
        run(head, plain)
        head.queue.labels.copy_(torch.arange(SIZE) % 2)
    helped, alone = (run(h, s, step=1) for h, s in zip(heads, (oracle, plain), strict=True))
    assert (helped.index % 2).tolist() == [LABELS.tolist()] * 2
    assert helped.metrics == alone.metrics
    assert float(alone.metrics["nn_accuracy"]) < 1


def test_without_labels_there_is_no_accuracy() -> None:
    head = make_head()
    found = head.training_loss(views(), torch.arange(BATCH), settings=PLAIN)
    assert set(found.metrics) == {"nn_similarity", "nn_agreement"}
    assert found.num_labelled == 0
    assert head.queue.labels.tolist() == [-1] * SIZE


def test_without_labels_neighbours_are_measured_by_their_cosine_and_by_both_views() -> None:
    head, plain = make_head(), replace(PLAIN, exclude_self=False)
    run(head, plain)
    again = run(head, plain)
    assert float(again.metrics["nn_similarity"]) == pytest.approx(1.0), "each finds itself"
    same = head.training_loss([views()[0]] * 2, torch.arange(BATCH), settings=plain)
    assert float(same.metrics["nn_agreement"]) == 1.0
    both = views()
    mixed = [both[0], torch.cat([both[0][:2], both[1][2:]])]
    head.eval()  # so that a vector does not depend on the others of its view
    rows = head.queue.features.clone()
    found = head.training_loss(mixed, torch.arange(BATCH), settings=plain)
    nearest = (found.z @ rows.T).argmax(dim=2)
    agreeing = float((nearest[0] == nearest[1]).float().mean())
    assert 0.5 <= agreeing < 1
    assert float(found.metrics["nn_agreement"]) == agreeing


def batches(count: int) -> list[PooledBatch]:
    rows = [torch.arange(BATCH) + BATCH * step for step in range(count)]
    return [PooledBatch(views(n)[0].detach(), ids, LABELS) for n, ids in enumerate(rows)]


def test_a_queue_filled_first_has_no_noise() -> None:
    head, noise = make_head(), make_head()
    head.prefill(iter(batches(5)))
    assert head.queue.ids.tolist() == list(range(SIZE))
    assert int(head.queue.pointer) == 0
    assert head.queue.labels.tolist() == LABELS.tolist() * 3
    rows = [unit_length(noise.projector(batch.pooled)).detach() for batch in batches(3)]
    assert torch.equal(head.queue.features, torch.cat(rows))
    unlabelled = make_head()
    unlabelled.prefill(batch._replace(labels=None) for batch in batches(3))
    assert unlabelled.queue.labels.tolist() == [-1] * SIZE


def test_a_queue_is_filled_once_and_not_after_a_resume() -> None:
    head = make_head()
    run(head)
    before = {name: value.clone() for name, value in head.state_dict().items()}
    head.prefill(batches(3))
    assert all(torch.equal(value, before[name]) for name, value in head.state_dict().items())


def test_too_few_images_to_fill_the_queue() -> None:
    with pytest.raises(ValueError, match="8 images do not fill the queue of 12 rows"):
        make_head().prefill(batches(2))


def test_classes_of_the_nearest_rows() -> None:
    head = make_head()
    for step in range(3):
        run(head, step=step)
    rows = views(9)[0].detach()
    with pytest.raises(ValueError, match=re.escape("call eval()")):
        head.classify(rows)
    head.eval()
    nearest = (unit_length(head.projector(rows)) @ head.queue.features.T).argmax(1)
    assert torch.equal(head.classify(rows), head.queue.labels[nearest])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pooled": views()[:1]}, "takes two views [B, 6]"),
        ({"pooled": [torch.ones(BATCH, 3)] * 2}, "takes two views [B, 6]"),
        ({"pooled": [torch.ones(1, IN_DIM)] * 2, "ids": torch.arange(1)}, "at least 2 images"),
        ({"ids": torch.arange(BATCH) - 1}, "negative or repeated"),
        ({"ids": torch.tensor([0, 1, 1, 2])}, "negative or repeated"),
        ({"settings": replace(PLAIN, top_k=SIZE)}, "it needs more than top_k"),
        ({"settings": replace(PLAIN, variant="oracle")}, "'oracle' looks at labels"),
        ({"settings": replace(PLAIN, variant="oracle", oracle_fraction=2), "labels": LABELS},
         "oracle_fraction is 2"),
    ],
)  # fmt: skip
def test_refuses(changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "pooled": views(),
        "ids": torch.arange(BATCH),
        "settings": PLAIN,
    } | changes
    with pytest.raises(ValueError, match=re.escape(message)):
        make_head().training_loss(**given)


@pytest.mark.parametrize(
    ("widths", "message"),
    [({"in_dim": 0}, "in_dim is 0"), ({"out_dim": 1}, "out_dim is 1"), ({"queue_size": 1}, "size")],
)
def test_refuses_widths(widths: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NNCLRHead(**({"in_dim": IN_DIM, "queue_size": SIZE} | widths))
