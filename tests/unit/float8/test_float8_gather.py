"""The cast of a shard that FSDP2 gathers in float8: by the kernels' operators, the bits of the plain operations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from titanlite.float8 import Float8LinearConfig
from titanlite.quant.fsdp import ShardedWeight

ROWS, COLUMNS = 33, 130  # no multiples of a block


@pytest.fixture(scope="module")
def mesh() -> Iterator[DeviceMesh]:
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


class Operators(TorchDispatchMode):
    """The operators that compute something: views and communication are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(r.alias_info is not None for r in func._schema.returns) and func.namespace != "c10d":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def gathered(shard: Tensor, param_dtype: torch.dtype, mesh: DeviceMesh, recipe: str, **device: Any) -> tuple[Any, ...]:
    """Return the bytes and the scale that travel, and the operators that made them."""
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), **device)
    weight, outer = ShardedWeight(shard, config.format), torch.Size((2 * shard.shape[0], shard.shape[1]))
    with Operators() as operators:
        inputs, (dtype, scale) = weight.fsdp_pre_all_gather(
            mesh, outer, (outer[1], 1), nn.Module(), MixedPrecisionPolicy(param_dtype=param_dtype)
        )
    return inputs[0].view(dtype), inputs[1] if scale is None else scale, operators.names


def shards(dtype: torch.dtype) -> Iterator[Tensor]:
    torch.manual_seed(0)
    shard = (torch.randn(ROWS, COLUMNS) * torch.exp(4 * torch.randn(ROWS, 1))).to(dtype)
    shard[3] = 0.0
    shard[4] = -0.0
    shard[5] = torch.finfo(dtype).tiny / 4
    yield shard
    for bad in (math.nan, math.inf, -math.inf, torch.finfo(dtype).max):
        changed = shard.clone()
        changed[7, 11] = bad
        yield changed
    yield torch.zeros(ROWS, COLUMNS, dtype=dtype)


@pytest.mark.parametrize(
    ("stored", "computed"),
    [(torch.float32, torch.bfloat16), (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize(("recipe", "most"), [("tensorwise", 6), ("rowwise", 3), ("rowwise_with_gw_hp", 3)])
def test_the_cast_of_a_shard(
    mesh: DeviceMesh, recipe: str, most: int, stored: torch.dtype, computed: torch.dtype
) -> None:
    for shard in shards(stored):
        data, scale, operators = gathered(shard, computed, mesh, recipe, target="sm_90")
        plain, plain_scale, _ = gathered(shard, computed, mesh, recipe, emulate=True)
        assert len(operators) <= most, operators  # 10 to 22 plain ones
        assert data.is_contiguous()
        assert (scale.shape, scale.dtype) == (plain_scale.shape, plain_scale.dtype)
        assert torch.equal(scale.nan_to_num(-1), plain_scale.nan_to_num(-1))
        same = (data.view(torch.uint8) == plain.view(torch.uint8)) | (data.float().isnan() & plain.float().isnan())
        assert same.all()
