"""Initial weights as a function of seed, parameter name and element index alone.

Every element has its own counter: SplitMix64 (Steele, Lea, Flood: "Fast Splittable Pseudorandom Number Generators",
OOPSLA 2014) at position ``index`` of a stream keyed by seed and name gives a uniform number, which the inverse of the
normal distribution function, in float64, makes normal. A rank computes only the elements of its shard, on its device,
so the weights are the same under any sharding. (``torch.manual_seed`` with DTensor does not give this: every CPU shard
gets the same values.)
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

_CHUNK = 1 << 22  # elements computed at a time: about 200 MB of temporaries


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
    """Return the values of stream ``key`` at ``index`` (int64): float64 of the same shape, strictly between 0 and 1."""
    z = (index + 1) * _GAMMA + _signed(key)
    z = (z ^ _shift_right(z, 30)) * _MIX1
    z = (z ^ _shift_right(z, 27)) * _MIX2
    z = z ^ _shift_right(z, 31)
    return (_shift_right(z, 12).double() + 0.5) * 2.0**-52  # 52 bits and a half: exact, and never 0 or 1


def stream_key(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest(), "little")


class WeightInit:
    """An initializer of the parameters of ``model``, whole or sharded, from ``seed``; models know it as ``Init``."""

    def __init__(self, model: nn.Module, seed: int) -> None:
        self._names = {id(param): name for name, param in model.named_parameters()}
        self._seed = seed

    def trunc_normal(self, param: Tensor, std: float, bound: float = 3.0) -> None:
        """Fill ``param`` from a normal distribution of standard deviation ``std``, truncated at ``bound`` of them."""
        low = 0.5 * (1 + math.erf(-bound / math.sqrt(2)))
        self._fill(param, std, low, 1 - 2 * low)

    def normal(self, param: Tensor, std: float) -> None:
        self._fill(param, std, 0.0, 1.0)

    def ones(self, param: Tensor) -> None:
        param.fill_(1.0)

    def zeros(self, param: Tensor) -> None:
        param.fill_(0.0)

    def _fill(self, param: Tensor, std: float, low: float, width: float) -> None:
        local, offset = _local_shard(param)
        if not local.numel():
            return
        key = stream_key(self._seed, self._names[id(param)])
        *leading, width_of_row = local.shape
        columns = torch.arange(width_of_row, device=local.device) + offset[-1]
        flat = local.view(-1, width_of_row)
        # The index in the whole parameter of the first element of each row of the shard.
        starts = torch.zeros(leading, dtype=torch.int64, device=local.device)
        for d, size in enumerate(leading):
            index = (torch.arange(size, device=local.device) + offset[d]) * math.prod(param.shape[d + 1 :])
            starts += index.view([-1 if e == d else 1 for e in range(len(leading))])
        starts = starts.flatten()
        step = max(1, _CHUNK // max(1, width_of_row))
        for start in range(0, len(flat), step):
            u = uniform(key, starts[start : start + step, None] + columns) * width + low
            flat[start : start + step] = torch.erfinv(2 * u - 1) * (math.sqrt(2) * std)


def _local_shard(param: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return this rank's part of a parameter, and the offset of that part in each dimension."""
    data = param.detach()
    if not isinstance(data, DTensor):
        return data, (0,) * data.dim()
    _, offset = compute_local_shape_and_global_offset(data.shape, data.device_mesh, data.placements)
    return data.to_local(), tuple(offset)
