"""Initial weights as a function of seed, parameter name and element index alone.

A uniform number of :mod:`titanlite.quant.streams`, whose key is seed and name, becomes normal by the inverse of the
normal distribution function, in float64. A rank computes only the elements of its shard, on its device, so the weights
are the same under any sharding. (``torch.manual_seed`` with DTensor does not give this: every CPU shard gets the same
values.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from titanlite.quant.fsdp import shard_with_offset
from titanlite.quant.stored import overwritten
from titanlite.quant.streams import stream_key, uniform

_CHUNK = 1 << 22  # elements computed at a time: about 200 MB of temporaries


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
        with overwritten(param) as local:
            if local.numel():
                self._fill_shard(local, shard_with_offset(param)[1], param, std, low, width)

    def _fill_shard(
        self, local: Tensor, offset: Sequence[int], param: Tensor, std: float, low: float, width: float
    ) -> None:
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
