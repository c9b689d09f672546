"""The ring of the queue, which rows are neighbours, how one of them is drawn, guards."""

import re
from typing import Any

import pytest
import torch
from scipy.stats import chisquare
from torch import Tensor

from ctune.nearest_neighbor_queue import (
    NearestNeighborQueue,
    draw_neighbors,
    find_nearest_neighbors,
    oracle_part,
)
from ctune.unit_length import unit_length

SIZE, DIM = 12, 5


def directions(count: int, seed: int = 0) -> Tensor:
    return unit_length(torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed)))


def filled(ids: list[int] | None = None, labels: list[int] | None = None) -> NearestNeighborQueue:
    queue = NearestNeighborQueue(SIZE, DIM)
    queue.features.copy_(directions(SIZE))
    queue.ids.copy_(torch.arange(SIZE) if ids is None else torch.tensor(ids))
    if labels is not None:
        queue.labels.copy_(torch.tensor(labels))
    return queue


def test_it_starts_with_directions_of_no_image() -> None:
    torch.manual_seed(0)
    queue = NearestNeighborQueue(SIZE, DIM)
    torch.testing.assert_close(queue.features.norm(dim=1), torch.ones(SIZE))
    assert len(torch.unique(queue.features, dim=0)) == SIZE
    assert queue.labels.tolist() == queue.ids.tolist() == [-1] * SIZE
    assert int(queue.pointer) == 0
    assert len(queue) == SIZE
    assert not list(queue.parameters())


def test_it_holds_exactly_the_last_rows() -> None:
    queue = NearestNeighborQueue(SIZE, DIM)
    batches = [directions(4, seed) for seed in range(6)]
    for n, batch in enumerate(batches):
        rows = torch.arange(4) + 4 * n
        queue.enqueue(batch, rows % 3, rows)
        assert int(queue.pointer) == 4 * (n + 1) % SIZE
    assert torch.equal(queue.features, torch.cat(batches[3:]))
    assert queue.ids.tolist() == list(range(12, 24))
    assert queue.labels.tolist() == [n % 3 for n in range(12, 24)]


def test_a_smaller_batch_goes_on_at_the_pointer_and_round_the_end() -> None:
    queue = NearestNeighborQueue(SIZE, DIM)
    for count, first in ((4, 0), (6, 4), (4, 10)):
        ids = torch.arange(first, first + count)
        queue.enqueue(directions(count, first), ids, ids)
    assert queue.ids.tolist() == [12, 13, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert int(queue.pointer) == 2


def test_what_is_enqueued_keeps_no_graph_and_no_share_of_its_batch() -> None:
    queue = NearestNeighborQueue(SIZE, DIM)
    batch = directions(4).requires_grad_()
    queue.enqueue(2 * batch, torch.zeros(4).long(), torch.arange(4))
    assert not queue.features.requires_grad
    with torch.no_grad():
        batch.zero_()
    torch.testing.assert_close(queue.features[:4], 2 * directions(4))


def test_the_state_goes_through_a_checkpoint() -> None:
    queue, again = NearestNeighborQueue(SIZE, DIM), NearestNeighborQueue(SIZE, DIM)
    queue.enqueue(directions(4), torch.arange(4), torch.arange(4))
    again.load_state_dict(queue.state_dict())
    for each in (queue, again):
        each.enqueue(directions(4, 1), torch.arange(4), torch.arange(4, 8))
    for name, value in queue.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert again.ids[:8].tolist() == list(range(8))


@pytest.mark.parametrize("chunk_rows", [1, 5, 100])
@pytest.mark.parametrize("top_k", [1, 3, SIZE])
def test_the_most_similar_rows_best_first(
    top_k: int, chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many rows are compared at a time."""
    monkeypatch.setattr("ctune.nearest_neighbor_queue.CHUNK_ROWS", chunk_rows)
    queue, z = filled(), directions(7, seed=1)
    found = find_nearest_neighbors(z, queue=queue, top_k=top_k)
    expected = (z @ queue.features.T).argsort(1, descending=True)[:, :top_k]
    assert torch.equal(found, expected)


def test_one_neighbour_is_the_argmax() -> None:
    queue, z = filled(), directions(7, seed=1)
    ranked = find_nearest_neighbors(z, queue=queue)
    drawn = draw_neighbors(ranked, generator=torch.Generator().manual_seed(0))
    assert torch.equal(drawn, (z @ queue.features.T).argmax(1))


def test_no_image_finds_its_own_rows() -> None:
    """Not even where they are the vectors themselves, or all others point the other way."""
    queue = filled(ids=[7, 8] * 5 + [9, 10])
    queue.features[10:] = -queue.features[0]
    z = queue.features[[0, 1]].clone()
    assert find_nearest_neighbors(z, queue=queue)[:, 0].tolist() == [0, 1]
    ids = torch.tensor([7, 8])
    found = find_nearest_neighbors(z, ids, queue=queue, top_k=7)
    for own, rows in zip(ids, found, strict=True):
        assert own not in queue.ids[rows]
        assert len(torch.unique(rows)) == 7


def test_too_few_rows_of_other_images() -> None:
    queue = filled(ids=[7] * 10 + [8, 9])
    find_nearest_neighbors(directions(1), torch.tensor([7]), queue=queue, top_k=2)
    with pytest.raises(ValueError, match="fewer than top_k = 3 rows of other images"):
        find_nearest_neighbors(directions(1), torch.tensor([7]), queue=queue, top_k=3)


def test_with_an_oracle_rows_of_the_class_come_first() -> None:
    queue, z = filled(labels=[0, 1, 2, -1] * 3), directions(4, seed=1)
    ids, told = torch.tensor([5, 2, 0, 3]), torch.tensor([1, 2, -1, 5])
    found = find_nearest_neighbors(z, ids, queue=queue, top_k=4, oracle_labels=told)
    plain = find_nearest_neighbors(z, ids, queue=queue, top_k=SIZE - 1)
    assert [(queue.labels[found[n]] == told[n]).tolist() for n in (0, 1)] == [
        [True, True, False, False]  # of three rows of the class one is the image's own
    ] * 2
    for image, own_class in ((0, 1), (1, 2)):
        same = [row for row in plain[image].tolist() if queue.labels[row] == own_class]
        others = [row for row in plain[image].tolist() if queue.labels[row] != own_class]
        assert found[image].tolist() == (same + others)[:4]
    assert torch.equal(found[2:], plain[2:, :4]), "no label, or a class that is not there"


def test_neighbours_are_found_in_float32_under_autocast() -> None:
    """Two rows that bfloat16 cannot tell apart."""
    queue = NearestNeighborQueue(2, 2)
    z = torch.tensor([[1.0, 0.0]])
    queue.features.copy_(torch.tensor([[0.99990, 0.0], [0.99995, 0.0]]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert find_nearest_neighbors(z, queue=queue).item() == 1


def test_draws_are_uniform_over_the_nearest_and_independent() -> None:
    ranked = torch.tensor([[5, 2, 9], [1, 0, 7]]).repeat(3000, 1)
    generator = torch.Generator().manual_seed(0)
    drawn = draw_neighbors(ranked, generator=generator).view(3000, 2)
    for column, rows in ((0, [5, 2, 9]), (1, [1, 0, 7])):
        counts = [int((drawn[:, column] == row).sum()) for row in rows]
        assert sum(counts) == 3000
        assert chisquare(counts).pvalue > 0.001
    joint = [int(((drawn == torch.tensor([a, b])).all(1)).sum()) for a in (5, 2, 9) for b in (1, 0)]
    assert chisquare([*joint, 3000 - sum(joint)], [3000 / 9] * 6 + [1000]).pvalue > 0.001
    again = draw_neighbors(ranked, generator=generator.manual_seed(0)).view(3000, 2)
    assert torch.equal(again, drawn)


def test_a_choice_takes_the_place_of_a_draw() -> None:
    ranked = torch.tensor([[5, 2, 9], [1, 0, 7]])
    assert draw_neighbors(ranked, choice=torch.tensor([0, 2])).tolist() == [5, 7]


@pytest.mark.parametrize(
    ("count", "fraction", "told"), [(5, 0.4, 2), (100, 0.29, 29), (3, 0.0, 0), (3, 1.0, 3)]
)
def test_an_oracle_for_the_first_part_of_the_batch(count: int, fraction: float, told: int) -> None:
    labels = torch.arange(count)
    assert oracle_part(labels, fraction).tolist() == [*range(told), *[-1] * (count - told)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": directions(5)}, "no multiple of the batch of 5"),
        ({"features": directions(0)}, "no multiple of the batch of 0"),
        ({"features": torch.ones(4, 3)}, "the queue takes [N, 5]"),
        ({"labels": torch.arange(3)}, "4 features need [4]"),
        ({"ids": torch.arange(3)}, "4 features need [4]"),
    ],
)
def test_refuses_to_enqueue(changes: dict[str, Tensor], message: str) -> None:
    features = changes.get("features", directions(4))
    rows = torch.arange(len(features))
    given = {"features": features, "labels": rows, "ids": rows} | changes
    with pytest.raises(ValueError, match=re.escape(message)):
        filled().enqueue(**given)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"z": torch.ones(2, 3)}, "the queue has vectors of 5"),
        ({"ids": torch.arange(3)}, "ids has shape [3]; z needs [2]"),
        ({"oracle_labels": torch.arange(3)}, "oracle_labels has shape [3]"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_k": SIZE + 1}, "must be in [1, 12]"),
    ],
)
def test_refuses_to_look_up(changes: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"z": directions(2), "queue": filled()} | changes
    with pytest.raises(ValueError, match=re.escape(message)):
        find_nearest_neighbors(**given)


def test_other_guards() -> None:
    with pytest.raises(ValueError, match="size is 1 and dim 5"):
        NearestNeighborQueue(1, 5)
    for choice in (torch.tensor([3]), torch.tensor([-1]), torch.tensor([0, 0])):
        with pytest.raises(ValueError, match=re.escape("must be [1] of 0..2")):
            draw_neighbors(torch.tensor([[5, 2, 9]]), choice=choice)
    with pytest.raises(ValueError, match=re.escape("oracle_fraction is 1.5")):
        oracle_part(torch.arange(3), 1.5)
