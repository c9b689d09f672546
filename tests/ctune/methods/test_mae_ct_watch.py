"""The watch over neighbours: hubs, drift, averages, and all of it after a resume."""

import math

import pytest
import torch
from torch import Tensor

from ctune.methods.mae_ct.watch import NeighborWatch, make_collapse_watch
from ctune.nnclr_head import NNCLRStep
from tests.ctune.methods.test_contract import same

SIZE, BATCH = 2048, 128
WINDOW = SIZE // (2 * BATCH)


def step_of(
    index: Tensor,
    accuracy: float | None = None,
    *,
    num_labelled: int | None = None,
    similarity: float = 0.5,
) -> NNCLRStep:
    """A step that drew these rows [2, B]."""
    metrics = {"nn_similarity": torch.tensor(similarity), "nn_agreement": torch.tensor(0.1)}
    if accuracy is not None:
        value = torch.tensor(accuracy)
        metrics |= {"nn_accuracy": value, "nn_accuracy_top1": value}
    labelled = 0 if accuracy is None else index.shape[1]
    count = labelled if num_labelled is None else num_labelled
    return NNCLRStep(torch.tensor(1.0), torch.empty(2, 0), index, metrics, torch.tensor(count))


def spread(step: int, batch: int = BATCH, size: int = SIZE) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randint(size, (2, batch), generator=generator)


def one_hub(step: int, share: float) -> Tensor:
    """Draws of which a share are of one row."""
    index = spread(step)
    index[:, : round(share * BATCH)] = 7
    return index


def told(watch: NeighborWatch, steps: list[NNCLRStep], start: int = 0) -> list[tuple[int, str]]:
    found = []
    for number, step in enumerate(steps, start):
        watch.observe(step)
        found += [(number, warning.code) for warning in watch.warnings(number)]
    return found


def test_one_row_drawn_by_many_is_told_once() -> None:
    watch = NeighborWatch(SIZE, "head_init")
    steps = [step_of(one_hub(n, 0.06)) for n in range(60)]
    assert told(watch, steps) == [(29, "hubness")], "the first check after the third window"
    assert (
        told(NeighborWatch(SIZE, "head_init"), [step_of(one_hub(n, 0.04)) for n in range(60)]) == []
    )


@pytest.mark.parametrize(("rows", "codes"), [(80, ["hubness"]), (84, [])])
def test_few_rows_drawn_by_all_are_told(rows: int, codes: list[str]) -> None:
    """Of 8192 rows 82 are 1 %; none of them is 5 % of the draws."""
    watch = NeighborWatch(8192, "contrastive_tuning")
    steps = [step_of(spread(n, 512, rows) * 97) for n in range(30)]
    assert [code for _, code in told(watch, steps)] == codes
    assert float(watch.drawn_share) == pytest.approx(rows / 8192)
    assert float(watch.largest_share) < 0.05


def test_a_hub_in_the_noise_that_the_queue_starts_with_is_no_fault() -> None:
    steps = [step_of(one_hub(n, 0.5 if n < 2 * WINDOW else 0.0)) for n in range(60)]
    assert told(NeighborWatch(SIZE, "head_init"), steps) == []


def test_hubs_that_come_and_go_are_no_fault() -> None:
    steps = [step_of(one_hub(n, 0.5 if n // WINDOW % 3 else 0.0)) for n in range(120)]
    assert told(NeighborWatch(SIZE, "head_init"), steps) == []


def test_in_a_short_queue_chance_is_no_hub() -> None:
    steps = [step_of(spread(n, 12, 24)) for n in range(400)]
    assert told(NeighborWatch(24, "head_init"), steps) == []


def falling(at: int, to: float, *, steps: int = 200) -> list[NNCLRStep]:
    """Noisy accuracies of 0.5 that fall."""
    found = []
    for number in range(steps):
        generator = torch.Generator().manual_seed(1000 + number)
        p = 0.5 if number < at else to
        accuracy = float((torch.rand(BATCH, generator=generator) < p).float().mean())
        found.append(step_of(spread(number), accuracy))
    return found


def test_neighbours_that_get_worse_are_told_in_contrastive_tuning_alone() -> None:
    found = told(NeighborWatch(SIZE, "contrastive_tuning"), falling(100, 0.33))
    assert found == [(159, "neighbour_drift")], "a window is 32 steps; the fall fills two"
    assert told(NeighborWatch(SIZE, "head_init"), falling(100, 0.33)) == []


@pytest.mark.parametrize("to", [0.5, 0.45, 0.41])
def test_a_smaller_fall_or_noise_is_no_drift(to: float) -> None:
    assert told(NeighborWatch(SIZE, "contrastive_tuning"), falling(100, to)) == []


@pytest.mark.parametrize(("to", "codes"), [(0.37, []), (0.355, ["neighbour_drift"])])
def test_a_fall_must_be_certain(to: float, codes: list[str]) -> None:
    """Of 4096 images 0.5 is at least 0.477, 0.37 may be 0.393, and 0.355 at most 0.377."""
    accuracies = [0.5] * 32 + [to] * 68
    steps = [step_of(spread(n), accuracy) for n, accuracy in enumerate(accuracies)]
    assert [code for _, code in told(NeighborWatch(SIZE, "contrastive_tuning"), steps)] == codes


def test_rare_hits_of_few_images_are_no_drift() -> None:
    """16 hits per window, 4 more or less."""
    watch = NeighborWatch(SIZE, "contrastive_tuning")
    generator = torch.Generator().manual_seed(0)
    for number in range(2000):
        accuracy = float((torch.rand(BATCH, generator=generator) < 0.004).float().mean())
        watch.observe(step_of(spread(0), accuracy))
        assert watch.warnings(number) == []


def test_windows_without_labelled_images_are_passed_over() -> None:
    nothing = [step_of(spread(n), 0.0, num_labelled=0) for n in range(64)]
    found = told(NeighborWatch(SIZE, "contrastive_tuning"), nothing + falling(64, 0.3))
    assert [code for _, code in found] == ["neighbour_drift"]


def test_without_labels_there_is_no_drift_and_no_accuracy() -> None:
    watch = NeighborWatch(SIZE, "contrastive_tuning")
    metrics = watch.observe(step_of(spread(0)))
    assert set(metrics) == {"nn_similarity", "nn_agreement", "drawn_share"}
    steps = [step_of(spread(n), 0.0, num_labelled=0) for n in range(1, 100)]
    assert told(watch, steps, 1) == []
    assert math.isnan(float(watch.observe(steps[0])["nn_accuracy"]))


def test_metrics_are_means_since_the_last_log() -> None:
    """Logged are steps 0, 3, 6, ...; an accuracy counts by its labelled images."""
    watch = NeighborWatch(SIZE, "head_init", log_steps=3)
    logged = []
    for number in range(7):
        step = step_of(
            spread(number), number / 10, num_labelled=100 * number, similarity=number / 10
        )
        metrics = watch.observe(step)
        watch.warnings(number)
        if number % 3 == 0:
            logged.append({name: float(value) for name, value in metrics.items()})
    assert [values["nn_similarity"] for values in logged] == pytest.approx([0, 0.2, 0.5])
    weighted = [math.nan, (1 + 4 + 9) / 60, (16 + 25 + 36) / 150]
    for name in ("nn_accuracy", "nn_accuracy_top1"):
        assert [values[name] for values in logged] == pytest.approx(weighted, nan_ok=True)


def test_a_resumed_watch_goes_on_bit_for_bit() -> None:
    steps = falling(60, 0.3)
    whole = NeighborWatch(SIZE, "contrastive_tuning", log_steps=7)
    expected = told(whole, steps)
    assert expected
    for at in (3, 77, 131):
        first = NeighborWatch(SIZE, "contrastive_tuning", log_steps=7)
        found = told(first, steps[:at])
        resumed = NeighborWatch(SIZE, "contrastive_tuning", log_steps=7)
        resumed.load_state_dict(first.state_dict())
        assert found + told(resumed, steps[at:], at) == expected
        for name, value in whole.state_dict().items():
            assert same(value, resumed.state_dict()[name]), name


def test_vectors_that_are_alike_and_a_loss_of_nothing_learned_are_a_collapse() -> None:
    alike, high, low, new = (
        make_collapse_watch(warmup_steps=20, steps_per_epoch=10) for _ in range(4)
    )
    module = torch.nn.Linear(1, 1)
    various = torch.randn(8, 2, 16, generator=torch.Generator().manual_seed(0))
    codes: list[tuple[int, str, str]] = []
    uniform = math.log(8)
    for number in range(90):
        for name, watch, z, loss in (
            ("alike", alike, torch.ones(8, 2, 16) + 0.01 * various, 0.5),
            ("high", high, various, 0.995 * uniform),
            ("low", low, various, 0.985 * uniform),
            ("new", new, various, 1.015 * uniform),
        ):
            watch.observe(z, None, loss=torch.tensor(loss), uniform_loss=uniform)
            codes += [(number, name, w.code) for w in watch.warnings(number, module)]
    found = [entry for entry in codes if entry[2] == "collapse"]
    assert found == [(49, "alike", "collapse"), (69, "high", "collapse")]
