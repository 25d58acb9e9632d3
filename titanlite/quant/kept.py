"""What is worth keeping for backward, where activations are otherwise computed again."""

import torch

from titanlite.quant.float8 import kernels

SMALL_RESULTS = {torch.ops.aten.amax.default, kernels.AMAXES}
"""Operations of the casts whose results are a few numbers, but take a pass over a tensor to compute."""
