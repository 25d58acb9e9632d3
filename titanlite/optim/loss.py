"""The training loss."""

import torch.nn.functional as F
from torch import Tensor

# The label of a token that is not scored, as everywhere in PyTorch.
IGNORED = -100


def cross_entropy_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum of the negative log-likelihoods of the labels in nats, computed in float32; a scalar.

    Args:
        logits: [batch, seq_len, vocab_size], any floating dtype.
        labels: int64 [batch, seq_len]; labels equal to :data:`IGNORED` are not scored.
    """
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(0, 1), ignore_index=IGNORED, reduction="sum")
