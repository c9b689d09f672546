"""Heads whose sequence is the batch: blind to pairs and order, sequences, maps, guards."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ctune.distributed import World
from ctune.grad_cache import embed_in_micro_batches
from ctune.head_sizes import FeedForwardSettings, SequenceMode, TransformerSettings
from ctune.losses.contrastive import nt_xent_loss
from ctune.transformer_head import (
    FeedForwardProjectionHead,
    TransformerProjectionHead,
    TransformerProjectorBlock,
    images_in_scope,
)

IMAGES, IN_DIM, DIM, HEADS, DEPTH, OUT_DIM = 6, 10, 8, 2, 3, 5
ROWS = 2 * IMAGES
MODES: list[SequenceMode] = ["joint", "separate"]
Head = TransformerProjectionHead | FeedForwardProjectionHead


def settings(**values: Any) -> TransformerSettings:
    own = {"dim": DIM, "depth": DEPTH, "num_heads": HEADS, "ffn_dim": 16}
    return TransformerSettings(**(own | values))


def transformer(
    mode: SequenceMode = "joint", *, output_norm: bool = True, **values: Any
) -> TransformerProjectionHead:
    torch.manual_seed(0)
    return TransformerProjectionHead(
        IN_DIM, OUT_DIM, settings=settings(**values), sequence_mode=mode, output_norm=output_norm
    ).double()


def feed_forward() -> FeedForwardProjectionHead:
    torch.manual_seed(0)
    own = FeedForwardSettings(hidden_dim=7, depth=2)
    return FeedForwardProjectionHead(IN_DIM, OUT_DIM, settings=own).double()


def rows(count: int = ROWS) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, IN_DIM, generator=generator, dtype=torch.float64)


def permutation(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(2))


def two_views(z: Tensor) -> Tensor:
    return torch.stack(z.chunk(2), dim=1)


HEADS_OF_ALL_KINDS: list[Callable[[], Head]] = [
    transformer,
    lambda: transformer("separate"),
    lambda: transformer(norm="batch", activation="relu"),
    lambda: transformer("separate", norm="batch"),
    lambda: transformer(norm="none", extra_qkv_projection=False),
    feed_forward,
]
ALL_KINDS = pytest.mark.parametrize("make", HEADS_OF_ALL_KINDS)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [transformer, feed_forward])
def test_rows_in_another_order_give_outputs_in_that_order(
    make: Callable[[], Head], training: bool
) -> None:
    head, h, order = make().train(training), rows(), permutation(ROWS)
    torch.testing.assert_close(head(h[order]), head(h)[order])


@pytest.mark.parametrize("training", [True, False])
@ALL_KINDS
def test_pairing_blindness(make: Callable[[], Head], training: bool) -> None:
    """Other partners change no output: those of the rows that moved have moved with them."""
    head, h = make().train(training), rows()
    order = torch.cat([torch.arange(IMAGES), IMAGES + permutation(IMAGES)])
    assert bool((order != torch.arange(ROWS)).any())
    torch.testing.assert_close(head(h[order]), head(h)[order])


@ALL_KINDS
def test_nothing_knows_of_positions(make: Callable[[], Head]) -> None:
    """No tensor is as long as the batch and no argument takes a mask or positions."""
    head = make()
    h = rows(2 * 11)
    head(h)
    sizes = {size for tensor in head.state_dict().values() for size in tensor.shape}
    assert not {11, 22} & sizes
    assert not any("pos" in name or "mask" in name for name in head.state_dict())
    assert list(inspect.signature(head.forward).parameters) == ["h", "num_views"]


def test_separate_sequences_do_not_see_each_other() -> None:
    blind = transformer("separate", output_norm=False)
    seeing = transformer("joint", output_norm=False)
    for head, sees in ((blind, False), (seeing, True)):
        h = rows().requires_grad_()
        first = head(h)[:IMAGES]
        (gradient,) = torch.autograd.grad(first.square().sum(), h)
        assert bool(gradient[:IMAGES].any(dim=1).all())
        assert bool(gradient[IMAGES:].any()) is sees


def test_separate_sequences_are_views_by_themselves() -> None:
    """What a joint head loses without the other view, `leakage_gap`, needs no other head."""
    separate, joint = transformer("separate").eval(), transformer("joint").eval()
    by_view = torch.cat([joint(view, num_views=1) for view in rows().chunk(2)])
    torch.testing.assert_close(separate(rows()), by_view)
    assert not torch.allclose(joint(rows()), by_view)


def test_more_views() -> None:
    head, h = transformer("separate").eval(), rows(3 * 4)
    by_view = torch.cat([head(view, num_views=1) for view in h.chunk(3)])
    torch.testing.assert_close(head(h, num_views=3), by_view)


@pytest.mark.parametrize("extra", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_attention_maps(mode: SequenceMode, extra: bool) -> None:
    head, h = transformer(mode, extra_qkv_projection=extra).eval(), rows()
    maps = head.attention_maps(h)
    assert [list(attention.shape) for attention in maps] == [[HEADS, ROWS, ROWS]] * DEPTH
    for attention in maps:
        assert not attention.requires_grad
        torch.testing.assert_close(attention.sum(dim=2), attention.new_ones(HEADS, ROWS))
        assert bool((attention[:, :IMAGES, IMAGES:] == 0).all()) is (mode == "separate")
    with torch.no_grad():
        output = head.output_norm(head.output_projection(list(head.block_outputs(h))[-1].tokens))
        torch.testing.assert_close(output, head(h), rtol=1e-5, atol=1e-5)


def test_attention_of_images_without_partners() -> None:
    """One view is one sequence, whatever the mode."""
    head = transformer("separate").eval()
    (attention, *_) = head.attention_maps(rows(7), num_views=1)
    assert list(attention.shape) == [HEADS, 7, 7]
    assert bool((attention > 0).all())


@pytest.mark.parametrize("shape", [(ROWS, DIM), (2, IMAGES, DIM)])
@pytest.mark.parametrize("norm", ["layer", "batch", "none"])
def test_block_with_and_without_attention(shape: tuple[int, ...], norm: str) -> None:
    torch.manual_seed(0)
    block = TransformerProjectorBlock(settings(norm=norm)).double()
    x = torch.randn(shape, dtype=torch.float64)
    output, attention = block.forward_with_attention(x)
    assert output.shape == x.shape
    assert list(attention.shape) == [*shape[:-2], HEADS, shape[-2], shape[-2]]
    torch.testing.assert_close(block(x), output)


def test_batch_norm_is_over_the_rows_of_both_sequences() -> None:
    head = transformer("separate", norm="batch", depth=1)
    head(rows())
    block = head.blocks[0]
    assert isinstance(block, TransformerProjectorBlock)
    assert isinstance(block.norm1, nn.BatchNorm1d)
    assert block.norm1.running_mean is not None
    x = head.input_projection(rows())
    views = [block.attention(*[f(v) for f in (block.query, block.key, block.value)])[0]
             for v in x.chunk(2)]  # fmt: skip
    expected = 0.1 * (x + torch.cat(views)).mean(dim=0)
    torch.testing.assert_close(block.norm1.running_mean, expected)


def test_branch_scales() -> None:
    """Both 0: each block only normalises, and rows do not see each other."""
    head = transformer(attention_branch_scale=0.0, ffn_branch_scale=0.0, output_norm=False)
    x = head.input_projection(rows())
    for _ in range(2 * DEPTH):
        x = nn.functional.layer_norm(x, [DIM])
    torch.testing.assert_close(head(rows()), head.output_projection(x))
    halves = (transformer(attention_branch_scale=0.5), transformer(ffn_branch_scale=0.5))
    outputs = [each(rows()) for each in (transformer(), *halves)]
    assert not any(torch.allclose(outputs[a], outputs[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


def test_extra_projections_can_be_composed_into_the_attention() -> None:
    torch.manual_seed(0)
    block = TransformerProjectorBlock(settings()).double()
    for bias in (block.attention.in_proj_bias, block.attention.out_proj.bias):
        nn.init.normal_(bias)
    state = block.state_dict()
    parts = list(zip(("query", "key", "value"), state["attention.in_proj_weight"].chunk(3),
                     state["attention.in_proj_bias"].chunk(3), strict=True))  # fmt: skip
    weights = [weight @ state[f"{name}.weight"] for name, weight, _ in parts]
    biases = [weight @ state[f"{name}.bias"] + bias for name, weight, bias in parts]
    kept = {k: v for k, v in state.items() if k.split(".")[0] not in ("query", "key", "value")}
    plain = TransformerProjectorBlock(settings(extra_qkv_projection=False)).double()
    plain.load_state_dict(
        kept
        | {
            "attention.in_proj_weight": torch.cat(weights),
            "attention.in_proj_bias": torch.cat(biases),
        }
    )
    x = torch.randn(ROWS, DIM, dtype=torch.float64)
    torch.testing.assert_close(plain(x), block(x))


@ALL_KINDS
def test_training_moves_everything_but_the_bias_of_the_output(make: Callable[[], Head]) -> None:
    head = make()
    frozen = [name for name, p in head.named_parameters() if not p.requires_grad]
    assert frozen == ["output_norm.bias"]
    # Twice the same: no dropout.
    assert torch.equal(head(rows()), head(rows()))
    before = {name: p.clone() for name, p in head.named_parameters()}
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        loss = nt_xent_loss(two_views(head(rows())), temperature=0.2, normalize=True)
        torch.autograd.backward(loss)
        optimizer.step()
    still = [name for name, p in head.named_parameters() if torch.equal(p, before[name])]
    assert still == ["output_norm.bias"]
    assert not bool(head.get_parameter("output_norm.bias").any())


def test_a_row_depends_on_its_batch_also_in_eval_mode() -> None:
    alone, among = transformer().eval(), rows()
    assert not torch.allclose(alone(among[:4])[0], alone(among)[0])
    plain = feed_forward().eval()
    torch.testing.assert_close(plain(among[:4])[0], plain(among)[0])


@pytest.mark.parametrize("mode", MODES)
def test_gradient_caching_is_exact(mode: SequenceMode) -> None:
    """The head attends over the whole batch while the encoder sees micro-batches."""
    torch.manual_seed(3)
    encoder = nn.Sequential(nn.Linear(4, IN_DIM), nn.Tanh()).double()
    images = torch.randn(IMAGES, 2, 4, dtype=torch.float64)

    def gradients(vectors: Tensor) -> list[Tensor]:
        head = transformer(mode)
        z = head(vectors.transpose(0, 1).flatten(0, 1))
        loss = nt_xent_loss(two_views(z), temperature=0.2, normalize=True)
        trained = [p for p in head.parameters() if p.requires_grad]
        return list(torch.autograd.grad(loss, [*encoder.parameters(), *trained]))

    cached = embed_in_micro_batches(
        lambda part, _: encoder(part), images, module=encoder, micro_batch_size=4
    )
    for one, other in zip(gradients(cached), gradients(encoder(images)), strict=True):
        torch.testing.assert_close(one, other)


def test_scope() -> None:
    vectors = torch.arange(12.0).view(6, 2, 1)
    ranks = [World(rank, 2) for rank in range(2)]
    assert all(images_in_scope(vectors, "global", world) is vectors for world in ranks)
    local = [images_in_scope(vectors, "local", world) for world in ranks]
    assert [len(part) for part in local] == [3, 3]
    assert torch.equal(torch.cat(local), vectors)
    assert torch.equal(images_in_scope(vectors, "local", World()), vectors)


@pytest.mark.parametrize(
    ("h", "num_views", "message"),
    [
        (rows(7), 2, "7 rows are not 2 views"),
        (rows(8), 3, "8 rows are not 3 views"),
        (rows(8), 0, "8 rows are not 0 views"),
        (rows(0), 2, "0 rows are not 2 views"),
        (rows(2), 2, "the batch is one image"),
        (rows(8)[:, 1:], 2, r"shape \[8, 9\], but the head takes rows of 10 dimensions"),
        (rows(8)[None], 2, r"shape \[1, 8, 10\]"),
    ],
)
@pytest.mark.parametrize("make", [transformer, feed_forward])
def test_what_is_no_batch(
    make: Callable[[], Head], h: Tensor, num_views: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make()(h, num_views=num_views)


def test_guards() -> None:
    wrong: Any = "both"
    with pytest.raises(ValueError, match="sequence_mode is 'both'"):
        transformer(wrong)
    with pytest.raises(ValueError, match="input_dim is 0"):
        TransformerProjectionHead(0, 4, settings=settings())
    with pytest.raises(ValueError, match="output_dim is 1"):
        FeedForwardProjectionHead(4, 1, settings=FeedForwardSettings())
    with pytest.raises(ValueError, match="training mode"):
        transformer().attention_maps(rows())
    broken = rows()
    broken[3, 1] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinity"):
        transformer().eval().attention_maps(broken)
    with pytest.raises(ValueError, match="7 rows are not 2 views"):
        transformer().eval().attention_maps(rows(7))
