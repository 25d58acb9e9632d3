"""Moments of Adam in two bytes or one.

A moment changes by a few percent in a step, less than half the distance between neighbouring numbers of eight bits, or
of bfloat16 at a beta of 0.999. Rounded to the nearest one it would stand still. It is rounded stochastically: up or
down, with probabilities such that the mean is the exact value.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

BLOCK = 64  # elements of the last dimension that share a scale
_E4M3_MAX, _E4M3_SMALLEST_NORMAL, _E4M3_QUANTUM = 448.0, 2.0**-6, 2.0**-9  # the last: of numbers below the second
_TINY = torch.finfo(torch.float32).tiny
_MULTIPLIER = 0x45D9F3B


def mix(x: Tensor) -> Tensor:
    """Return int32 hashes of the int32 numbers ``x``: each bit depends on all bits. (The multiplication wraps.)"""
    for _ in range(2):
        x = ((x >> 16 & 0xFFFF) ^ x) * _MULTIPLIER
    return (x >> 16 & 0xFFFF) ^ x


def noise(key: Tensor, offset: Sequence[int], local: Sequence[int], whole: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return two independent int32 tensors, uniform in [0, 2^16), of the shape ``local``.

    A number is a function of ``key`` and of its place in the whole tensor, so it does not depend on the sharding.

    Args:
        key: int32 scalar.
        offset, local, whole: the place of the shard in the whole tensor, its shape, and that of the whole.
    """
    place = torch.zeros((), dtype=torch.int64, device=key.device)
    for start, length, size in zip(offset, local, whole, strict=True):
        place = place.unsqueeze(-1) * size + torch.arange(start, start + length, device=key.device)
    bits = mix((place & 0x7FFFFFFF).to(torch.int32) + mix(key))
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


def bytes_per_element(dtype: str) -> float:
    """Return the bytes that one moment takes for each element of a matrix."""
    size: int = getattr(torch, dtype).itemsize
    return 1 + 4 / BLOCK if size == 1 else size


def key_of(seed: int, name: str) -> int:
    """Return the int32 number of a parameter in a run: for the noise of its moments."""
    digest = hashlib.blake2s(f"{seed} {name}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little", signed=True)
