"""The results that activation checkpointing should keep for backward."""

import torch

from titanlite.quant.float8 import kernels

SMALL_RESULTS = {torch.ops.aten.amax.default, kernels.AMAXES}
"""Operations of the casts whose results are small, but need a pass over a whole tensor."""
