"""Loss of NNCLR: predictions of one view against the neighbours of the other.

Sources: Dwibedi et al., arXiv 2104.14548, Eq. 3; as MAE-CT uses it (arXiv 2304.10520;
ml-jku/MAE-CT, ``losses/nnclr_loss.py``). The neighbours have unit length already, so that they are
not normalised again as in the original.

Letters: N images of the global batch, n of them rows of this call, o dimensions.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ctune.unit_length import unit_length


def nnclr_loss(
    predicted: Tensor,
    neighbors: Tensor,
    *,
    temperature: float,
    transposed: bool = False,
    label_offset: int = 0,
) -> Tensor:
    """Mean over the rows of -log softmax(neighbor . prediction / temperature) at the own image.

    Each row is a neighbour and the softmax goes over all predictions; ``transposed`` exchanges the
    two. Fewer rows than candidates are one rank's share: the mean over equal shares is the loss
    of the global batch, and so is the mean of the ranks' gradients if the candidates were gathered
    with gradient.

    Args:
        predicted: [N, o] of the predictor, of any length; they are scaled to unit length here.
            Transposed: [n, o].
        neighbors: [n, o], used as given: unit length. Transposed: [N, o].
        temperature: divides the similarities.
        transposed: whether each prediction is a row and the neighbours are the candidates.
        label_offset: which candidate belongs to the first row.

    Returns:
        Scalar loss, float32 or float64; with unit neighbours in (0, 2 / temperature + ln N].

    Raises:
        ValueError: not floating [., o] of one width; rows that have no candidate at
            ``label_offset``; a temperature not positive.
    """
    if predicted.ndim != 2 or neighbors.ndim != 2 or predicted.shape[1] != neighbors.shape[1]:
        raise ValueError(
            f"predicted has shape {list(predicted.shape)} and neighbors {list(neighbors.shape)}; "
            "both must be 2-D with the same last dimension"
        )
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; it must be positive, 0.15 is usual")
    dtype = torch.float64 if predicted.dtype == torch.float64 else torch.float32
    with torch.autocast(device_type=predicted.device.type, enabled=False):
        pair = (unit_length(predicted), neighbors.to(dtype))
        rows, candidates = pair if transposed else (pair[1], pair[0])
        own = label_offset + torch.arange(len(rows), device=rows.device)
        if not (len(rows) >= 1 and 0 <= label_offset <= len(candidates) - len(rows)):
            raise ValueError(
                f"{len(rows)} rows from label_offset {label_offset} on do not lie in the "
                f"{len(candidates)} candidates; gather the candidates of all ranks in rank order"
            )
        return cross_entropy(rows @ candidates.T / temperature, own)
