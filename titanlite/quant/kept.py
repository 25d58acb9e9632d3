"""The operations that are not cheap to compute again, for activation checkpointing."""

import torch

from titanlite.quant import emulation as emulation  # it registers its operator
from titanlite.quant import kernels
from titanlite.quant.int8 import cpu
from titanlite.quant.mx import grouped as grouped  # as above

SMALL_RESULTS = {torch.ops.aten.amax.default, kernels.AMAXES}
"""Operations of the casts whose results are small, but need a pass over a whole tensor."""

MATMULS = {
    torch.ops.aten.mm.default,
    torch.ops.aten._scaled_mm.default,
    torch.ops.aten._int_mm.default,
    cpu.MULTIPLY,
    torch.ops.aten._scaled_grouped_mm.default,
    torch.ops.titanlite.multiply_groups_in_float32.default,
    torch.ops.titanlite_mx.multiply_groups.default,
}
"""The matmuls of linear layers, in high precision, in number formats, and emulated."""
