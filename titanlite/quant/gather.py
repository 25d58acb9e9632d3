"""The form in which FSDP2 gathers quantized weights: their bytes, and the scales of rows."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from titanlite.quant.format import Format, Operand
from titanlite.quant.tensor import QuantTensor


def check_shards(shape: torch.Size, outer_size: torch.Size, mesh: DeviceMesh, format: Format) -> None:
    """Check that FSDP2 can gather shards of ``shape`` with their scales to a weight of ``outer_size``.

    Raises:
        ValueError: they are not rows, or have scales of rows and not all the same number of them.
    """
    shards = 1 if shape == outer_size else mesh.size()
    uneven = format.has_scales_of_rows("weight") and outer_size[0] % shards
    if shape[1:] != outer_size[1:] or uneven:
        raise ValueError(
            f"a weight of shape {tuple(outer_size)} over {shards} shards, to be gathered in {format.name}: "
            "must be sharded by rows, and with scales of rows evenly; leave this layer out, or gather in high "
            "precision"
        )


def gather_inputs(
    operand: Operand, outer_size: torch.Size, shards: int
) -> tuple[tuple[Tensor, ...], tuple[torch.dtype, Tensor | None]]:
    """Return what ``fsdp_pre_all_gather`` returns: the tensors to gather, which are the bytes and the scales of rows,
    and metadata: the dtype, and the scale that all shards share. The bytes are viewed as uint8, which every backend can
    send."""
    data, scale = operand
    assert scale is not None
    padding = -(-outer_size[0] // shards) - data.shape[0]
    payload = F.pad(data.view(torch.uint8), (0, 0, 0, padding)) if padding else data.view(torch.uint8)
    # A single shard has all scales already; FSDP2 (torch 2.13) also allows one tensor at most there.
    if scale.ndim and shards > 1:
        return (payload, scale), (data.dtype, None)
    return (payload,), (data.dtype, scale)


class GathersQuantized:
    """FSDP2's extension of its all-gather, of a tensor subclass that is gathered in a number format. The gathered
    weight is a :class:`QuantTensor`."""

    format: Format
    shape: torch.Size
    dtype: torch.dtype

    def operand_to_gather(self, mesh: DeviceMesh, dtype: torch.dtype) -> Operand:
        """Return this shard in the format, rounded to ``dtype`` before; ``mesh`` is that of the shards."""
        raise NotImplementedError

    def fsdp_pre_all_gather(
        self,
        mesh: DeviceMesh,
        outer_size: torch.Size,
        outer_stride: tuple[int, ...],
        module: nn.Module,
        mp_policy: MixedPrecisionPolicy,
    ) -> tuple[tuple[Tensor, ...], Any]:
        """Return the tensors to gather, and metadata; see :func:`gather_inputs`."""
        check_shards(self.shape, outer_size, mesh, self.format)
        shards = 1 if self.shape == outer_size else mesh.size()
        return gather_inputs(self.operand_to_gather(mesh, mp_policy.param_dtype or self.dtype), outer_size, shards)

    def fsdp_post_all_gather(
        self,
        all_gather_outputs: tuple[Tensor, ...],
        metadata: Any,
        param_dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """Return the gathered weight, which FSDP2 keeps. It frees the weight's memory, refills it in later gathers, and
        then passes the weight as ``out``."""
        payload = all_gather_outputs[0]
        dtype, scale = metadata
        if scale is None:
            scale = all_gather_outputs[1]
        if out is not None:
            local = out._local_tensor if isinstance(out, DTensor) else out
            assert isinstance(local, QuantTensor)
            local.scale = scale
            return None
        return QuantTensor(payload.view(dtype), scale, param_dtype), (payload,)
