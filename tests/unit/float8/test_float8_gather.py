"""The cast of a shard that FSDP2 gathers in float8: by the kernels' operators, the bits of the plain operations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from tests.unit.float8.interpreted import exact_conversions
from tests.unit.float8.test_float8_kernels import Traffic
from titanlite.float8 import Float8LinearConfig
from titanlite.quant.fsdp import ShardedWeight
from titanlite.quant.kernels import launch

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


@contextmanager
def interpreted_kernels() -> Iterator[None]:
    """The operators are the Triton kernels on the CPU, too."""
    with torch.library._scoped_library("titanlite_quant", "IMPL") as library, exact_conversions():
        library.impl("amaxes", launch.amaxes, "CPU", allow_override=True)
        library.impl("cast", launch.cast_with, "CPU", allow_override=True)
        yield


def check(shard: Tensor, computed: torch.dtype, mesh: DeviceMesh, recipe: str, **options: Any) -> list[str]:
    """Compare with plain operations, and return the operators."""
    data, scale, operators = gathered(shard, computed, mesh, recipe, target="sm_90", **options)
    plain, plain_scale, _ = gathered(shard, computed, mesh, recipe, emulate=True)
    assert data.is_contiguous()
    assert (scale.shape, scale.dtype) == (plain_scale.shape, plain_scale.dtype)
    assert torch.equal(scale.nan_to_num(-1), plain_scale.nan_to_num(-1))
    same = (data.view(torch.uint8) == plain.view(torch.uint8)) | (data.float().isnan() & plain.float().isnan())
    assert same.all()
    return operators


@pytest.mark.parametrize(
    ("stored", "computed"),
    [(torch.float32, torch.bfloat16), (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize(("recipe", "most"), [("tensorwise", 4), ("rowwise", 2), ("rowwise_with_gw_hp", 2)])
@pytest.mark.parametrize("kernels", ["auto", "inductor"])
def test_the_cast_of_a_shard(
    mesh: DeviceMesh, recipe: str, most: int, stored: torch.dtype, computed: torch.dtype, kernels: str
) -> None:
    """With the compiler's casts in the layers, too: a shard is cast outside compiled code, by 10 to 22 operators if
    they were plain."""
    for shard in shards(stored):
        operators = check(shard, computed, mesh, recipe, kernels=kernels)
        assert len(operators) <= most, operators


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("computed", [torch.bfloat16, torch.float16], ids=str)
def test_the_kernels_round_as_a_copy_would(mesh: DeviceMesh, recipe: str, computed: torch.dtype) -> None:
    with interpreted_kernels():
        for shard in shards(torch.float32):
            check(shard, computed, mesh, recipe)


@pytest.mark.parametrize(("recipe", "read"), [("tensorwise", 8), ("rowwise", 4), ("rowwise_with_gw_hp", 4)])
def test_bytes_per_element_of_a_shard(mesh: DeviceMesh, recipe: str, read: int) -> None:
    """Float32 is read once, and once before where the amax of the whole weight must be known; float8 is written."""
    shard = torch.randn(256, 512)
    with interpreted_kernels(), Traffic() as traffic:
        gathered(shard, torch.bfloat16, mesh, recipe, target="sm_90", kernels="inductor")
    assert read <= traffic.read / shard.numel() <= read * 1.01
    assert 1 <= traffic.written / shard.numel() <= 1.01
