"""What the tuned head of MAE-CT makes of held-out images: `head_knn_accuracy` of mae_ct.md 5.5.

Source: arXiv 2304.10520; ml-jku/MAE-CT, NN accuracy on the test set.
"""

import torch
from torch import nn

from ctune.evaluate.subject import LabelledFeatures
from ctune.nnclr_head import NNCLRHead
from ctune.schema import JsonObject
from ctune.scores import SETTINGS

_ROWS_AT_ONCE = 1024


def queue_scores(head: nn.Module, heldout: LabelledFeatures) -> JsonObject:
    """Return `nnclr_head: {knn_top1}`: the share of images whose nearest row of the queue has their
    label, by the projector in eval mode; empty where images or queue have no labels.

    No row is left out, for the images are not those of the training. Rows without a label are
    wrong. To be compared with the k-NN of the encoder's features at k = 1.

    Args:
        head: the head that the features were trained with.
        heldout: with a label each.
    """
    if not isinstance(head, NNCLRHead):
        raise TypeError(f"the module 'nnclr_head' is a {type(head).__name__}, not an NNCLRHead")
    if not len(heldout.labels) or int(head.queue.labels.max()) < 0:
        return {}
    was_training = head.training
    head.eval()
    found = [head.classify(rows) for rows in torch.split(heldout.features, _ROWS_AT_ONCE)]
    head.train(was_training)
    right = int((torch.cat(found) == heldout.labels).sum())
    settings = {"k": 1, "queue_size": len(head.queue)}
    return {"nnclr_head": {"knn_top1": right / len(heldout.labels), SETTINGS: settings}}
