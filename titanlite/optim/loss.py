"""The training loss."""

import torch.nn.functional as F
from torch import Tensor


def cross_entropy_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The mean negative log-likelihood in nats, computed in float32.

    Args:
        logits: [batch, seq_len, vocab_size], any floating dtype.
        labels: int64 [batch, seq_len].
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(0, 1))
