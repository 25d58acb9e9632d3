"""Random numbers as functions of a seed, a name and a place, the same under any sharding.

Two generators, because they serve two costs: :func:`uniform` has 52 bits, for initial weights, which are computed once;
:func:`random_bits` has 32, for roundings, which are computed in every step in the pass that they are part of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def stream_key(seed: int, name: str) -> int:
    """Return the key of a stream, in [0, 2^64)."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")


# ---- 52 bits: SplitMix64


def _signed(value: int) -> int:
    """Return the int64 with the bits of the uint64 ``value``; torch has no arithmetic on uint64."""
    return value - (1 << 64) if value >= 1 << 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX1 = _signed(0xBF58476D1CE4E5B9)
_MIX2 = _signed(0x94D049BB133111EB)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; the operator ``>>`` would copy the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def uniform(key: int, index: Tensor) -> Tensor:
    """Return the values of stream ``key`` at ``index`` (int64): float64 of the same shape, strictly between 0 and 1.
    (SplitMix64: Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014.)"""
    z = (index + 1) * _GAMMA + _signed(key)
    z = (z ^ _shift_right(z, 30)) * _MIX1
    z = (z ^ _shift_right(z, 27)) * _MIX2
    z = z ^ _shift_right(z, 31)
    return (_shift_right(z, 12).double() + 0.5) * 2.0**-52  # 52 bits and a half: exact, and never 0 or 1


# ---- 32 bits

_MULTIPLIER = 0x45D9F3B


def mix(x: Tensor) -> Tensor:
    """Return int32 hashes of the int32 numbers ``x``: each bit depends on all bits. (The multiplication wraps.)"""
    for _ in range(2):
        x = ((x >> 16 & 0xFFFF) ^ x) * _MULTIPLIER
    return (x >> 16 & 0xFFFF) ^ x


def rounding_key(seed: int, name: str) -> int:
    """Return the int32 key of what is rounded in a run, for :func:`random_bits`."""
    return (stream_key(seed, name) & 0xFFFFFFFF) - (1 << 31)


def random_bits(key: Tensor, offset: Sequence[int], local: Sequence[int], whole: Sequence[int]) -> Tensor:
    """Return int32 numbers of 32 uniform bits, of the shape ``local``.

    A number is a function of ``key`` and of its place in the whole tensor, so it does not depend on the sharding.

    Args:
        key: int32 scalar.
        offset, local, whole: the place of the shard in the whole tensor, its shape, and that of the whole.
    """
    place = torch.zeros((), dtype=torch.int64, device=key.device)
    for start, length, size in zip(offset, local, whole, strict=True):
        place = place.unsqueeze(-1) * size + torch.arange(start, start + length, device=key.device)
    return mix((place & 0x7FFFFFFF).to(torch.int32) + mix(key))
