"""Adapters of the projection heads that take the batch for a sequence, and of their loss."""

from typing import Any

import torch
from torch import nn

from ctune.head_sizes import FeedForwardSettings, TransformerSettings, count_head_parameters
from ctune.losses.contrastive import nt_xent_loss
from ctune.transformer_head import (
    FeedForwardProjectionHead,
    TransformerProjectionHead,
    TransformerProjectorBlock,
)
from tests.conformance.convert import Adapter, Case, options, tensors

NOT_OF_BLOCKS = (
    "input_dim", "output_dim", "training", "temperature", "sequence_mode", "kind",
)  # fmt: skip


def _load(module: nn.Module, state_dict: dict[str, Any]) -> None:
    """Load every key that a module has but for counters; counts of batches are not in the cases."""
    module.double()
    own = module.state_dict()
    state = {name: torch.tensor(value).to(own[name]) for name, value in state_dict.items()}
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(name.endswith("num_batches_tracked") for name in missing), missing


def _block(inputs: Case, parameters: Case) -> Case:
    block = TransformerProjectorBlock(TransformerSettings(**options(parameters)))
    _load(block, inputs["state_dict"])
    x, cotangent = tensors(inputs, parameters, "x", "cotangent")
    output, attention = block.forward_with_attention(x.requires_grad_())
    torch.testing.assert_close(block(x), output)
    (gradient,) = torch.autograd.grad((output * cotangent).sum(), x)
    return {
        "output": output.tolist(),
        "attention": attention.tolist(),
        "grad_x": gradient.tolist(),
    }


def _transformer_head(inputs: Case, parameters: Case) -> Case:
    return _head(
        TransformerProjectionHead(
            parameters["input_dim"],
            parameters["output_dim"],
            settings=TransformerSettings(**options(parameters, *NOT_OF_BLOCKS)),
            sequence_mode=parameters["sequence_mode"],
        ),
        inputs,
        parameters,
    )


def _feed_forward_head(inputs: Case, parameters: Case) -> Case:
    return _head(
        FeedForwardProjectionHead(
            parameters["input_dim"],
            parameters["output_dim"],
            settings=FeedForwardSettings(**options(parameters, *NOT_OF_BLOCKS)),
        ),
        inputs,
        parameters,
    )


def _head(
    head: TransformerProjectionHead | FeedForwardProjectionHead, inputs: Case, parameters: Case
) -> Case:
    _load(head.train(parameters["training"]), inputs["state_dict"])
    (h,) = tensors(inputs, parameters, "h")
    output = head(h.requires_grad_())
    views = torch.stack(output.chunk(2), dim=1)
    loss = nt_xent_loss(views, temperature=parameters["temperature"], normalize=True)
    (gradient,) = torch.autograd.grad(loss, h)
    norm = head.output_norm
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return {
        "output": output.tolist(),
        "loss": loss.item(),
        "grad_h": gradient.tolist(),
        "running_mean_after": norm.running_mean.tolist(),
        "running_var_after": norm.running_var.tolist(),
    }


def _count_head_parameters(inputs: Case, parameters: Case) -> Case:
    kind: Any = {"transformer": TransformerSettings, "feed_forward": FeedForwardSettings}
    settings = kind[parameters["kind"]](**options(parameters, *NOT_OF_BLOCKS))
    count = count_head_parameters(
        settings, input_dim=parameters["input_dim"], output_dim=parameters["output_dim"]
    )
    return count._asdict()


ADAPTERS: dict[tuple[str, str], Adapter] = {
    ("transformer_head", "TransformerProjectorBlock"): _block,
    ("transformer_head", "TransformerProjectionHead"): _transformer_head,
    ("transformer_head", "FeedForwardProjectionHead"): _feed_forward_head,
    ("transformer_head", "count_head_parameters"): _count_head_parameters,
}
