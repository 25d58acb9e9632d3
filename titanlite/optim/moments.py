"""Moments of Adam in two bytes or one.

A moment changes by a few percent in a step, less than half the distance between neighbouring numbers of eight bits, or
of bfloat16 at a beta of 0.999. Rounded to the nearest one it would stand still. It is rounded stochastically: up or
down, with probabilities such that the mean is the exact value.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from titanlite.quant.streams import random_bits

BLOCK = 64  # elements of the last dimension that share a scale
_E4M3_MAX, _E4M3_SMALLEST_NORMAL, _E4M3_QUANTUM = 448.0, 2.0**-6, 2.0**-9  # the last: of numbers below the second
_TINY = torch.finfo(torch.float32).tiny


def noise(key: Tensor, offset: Sequence[int], local: Sequence[int], whole: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return two independent int32 tensors, uniform in [0, 2^16): the halves of
    :func:`titanlite.quant.streams.random_bits`, which has the arguments."""
    bits = random_bits(key, offset, local, whole)
    return bits & 0xFFFF, bits >> 16 & 0xFFFF


def round_to_bfloat16(x: Tensor, noise: Tensor) -> Tensor:
    """Round float32 ``x`` to a neighbour in bfloat16; up in magnitude where the bits that are cut off, plus ``noise``
    in [0, 2^16), carry."""
    rounded = ((x.view(torch.int32) + noise) & -0x10000).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(torch.bfloat16)


def round_to_e4m3(x: Tensor, noise: Tensor) -> Tensor:
    """Round float32 ``x``, of magnitudes up to 448, to a neighbour in float8_e4m3fn, as :func:`round_to_bfloat16`."""
    normal = ((x.view(torch.int32) + (noise << 4)) & -0x100000).view(torch.float32)  # 20 of 23 bits are cut off
    subnormal = ((x.abs() / _E4M3_QUANTUM + noise * 2.0**-16).floor() * _E4M3_QUANTUM).copysign(x)
    rounded = torch.where(x.abs() < _E4M3_SMALLEST_NORMAL, subnormal, normal)
    return torch.where(x.isfinite(), rounded, x).to(torch.float8_e4m3fn)


def has_blocks(tensor: Tensor) -> bool:
    """Return whether all shards of ``tensor`` consist of whole blocks; the same on all processes. Vectors have none:
    they are small."""
    shards, last = 1, tensor.dim() - 1
    if isinstance(tensor, DTensor):
        for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
            shards *= size if isinstance(placement, Shard) and placement.dim == last else 1
    return last > 0 and tensor.shape[-1] % (BLOCK * shards) == 0


def to_blocks(x: Tensor, noise: Tensor, *, keep_positive: bool) -> tuple[Tensor, Tensor]:
    """Return float32 ``x``, (..., n), in float8_e4m3fn, and the float32 scales of its blocks, (..., n / BLOCK).

    Args:
        keep_positive: round no positive number to 0.
    """
    blocks, noise = x.unflatten(-1, (-1, BLOCK)), noise.unflatten(-1, (-1, BLOCK))
    scale = blocks.abs().amax(-1, keepdim=True).clamp(min=_TINY * _E4M3_MAX) / _E4M3_MAX
    scaled = (blocks / scale).clamp(-_E4M3_MAX, _E4M3_MAX)
    if keep_positive:
        scaled = torch.where(blocks > 0, scaled.clamp(min=_E4M3_QUANTUM), scaled)
    return round_to_e4m3(scaled, noise).flatten(-2), scale.squeeze(-1)


def from_blocks(data: Tensor, scale: Tensor) -> Tensor:
    """Return the float32 numbers that :func:`to_blocks` has made ``data`` and ``scale`` of."""
    return (data.float().unflatten(-1, (-1, BLOCK)) * scale.unsqueeze(-1)).flatten(-2)


def zeros_of_blocks(like: Tensor, dtype: torch.dtype, divisor: int = BLOCK) -> Tensor:
    """Return zeros in ``dtype``, sharded as ``like``, with its last dimension divided by ``divisor``."""
    local = like.to_local() if isinstance(like, DTensor) else like
    zeros = torch.zeros((*local.shape[:-1], local.shape[-1] // divisor) if local.dim() else (), device=local.device)
    zeros = zeros.to(dtype)
    if not isinstance(like, DTensor):
        return zeros
    shape = torch.Size((*like.shape[:-1], like.shape[-1] // divisor))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(zeros, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)


def bytes_per_element(dtype: str) -> float:
    """Return the bytes that one moment takes for each element of a matrix."""
    size: int = getattr(torch, dtype).itemsize
    return 1 + 4 / BLOCK if size == 1 else size
