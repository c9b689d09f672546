"""Heads on top of an encoder. Letters: D input, d output dimensions."""

from typing import Literal

from torch import Tensor, nn

from ctune.unit_length import unit_length

ProjectionKind = Literal["mlp", "linear", "none"]


class ProjectionHead(nn.Module):
    """Map encoder features to the space of the contrastive loss, [..., D] -> [..., d].

    ``mlp``: Linear(D, hidden), ReLU, Linear(hidden, d), biases on, no batch norm, PyTorch's own
    initialisation (HobbitLong/SupContrast, ``networks/resnet_big.py``, as in LaCViT); with
    ``batch_norm`` each of its layers has one in place of its bias (lightly, ``heads.py``);
    ``linear``: one Linear(D, d); ``none``: the features themselves, so d = D and ``out_dim`` is
    not used. The layers are the attribute ``mlp``. Unit length is computed in float32 at least,
    also under autocast, with an epsilon of 1e-12.

    Args:
        in_dim: D.
        hidden_dim: width of the MLP; None: D.
        out_dim: d.
        kind: see above.
        normalize: whether outputs have unit length.
        batch_norm: of ``mlp``; rows then depend on each other in training.

    Raises:
        ValueError: a width below 1, an unknown kind; in ``forward``, a last dimension other than D.
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dim: int | None = None,
        *,
        out_dim: int = 128,
        kind: ProjectionKind = "mlp",
        normalize: bool = True,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        hidden = in_dim if hidden_dim is None else hidden_dim
        for name, value in (("in_dim", in_dim), ("hidden_dim", hidden), ("out_dim", out_dim)):
            if value < 1:
                raise ValueError(f"{name} is {value}; a width must be at least 1")
        self.in_dim = in_dim
        self.out_dim = in_dim if kind == "none" else out_dim
        self.normalize = normalize
        self.mlp: nn.Module
        if kind == "mlp":
            first = nn.Linear(in_dim, hidden, bias=not batch_norm)
            last = nn.Linear(hidden, out_dim, bias=not batch_norm)
            layers = [first, nn.ReLU(), last]
            if batch_norm:
                layers = [first, nn.BatchNorm1d(hidden), nn.ReLU(), last, nn.BatchNorm1d(out_dim)]
            self.mlp = nn.Sequential(*layers)
        elif kind == "linear":
            self.mlp = nn.Linear(in_dim, out_dim)
        elif kind == "none":
            self.mlp = nn.Identity()
        else:
            raise ValueError(f"kind is {kind!r}; use 'mlp', 'linear' or 'none'")

    def forward(self, x: Tensor) -> Tensor:
        """Project x [..., D] to z [..., d], of unit length if ``normalize``."""
        if x.shape[-1] != self.in_dim:
            raise ValueError(
                f"x has shape {list(x.shape)}, but the head takes {self.in_dim} dimensions; build "
                "it with the encoder's feature size"
            )
        z: Tensor = self.mlp(x)
        if not self.normalize:
            return z
        return unit_length(z)
