"""With one shard, FSDP2 copies no gradient, and they are the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode

from titanlite.config import load_config, resolve_degrees
from titanlite.distributed.data_parallel import apply_fsdp
from titanlite.distributed.mesh import Mesh, build_mesh
from titanlite.distributed.one_shard import OneShard

CPU = torch.device("cpu")


@pytest.fixture
def mesh() -> Iterator[Mesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    yield build_mesh(resolve_degrees(load_config([]).parallelism, 1), "cpu")
    dist.destroy_process_group()


class Copies(TorchDispatchMode):
    """Counts the copies between different tensors in float32."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and args[0] is not args[1]:
            self.count += args[0].dtype == args[1].dtype == torch.float32
        return func(*args, **(kwargs or {}))


def gradients(mesh: Mesh, microbatches: int) -> tuple[list[Tensor], int]:
    """Return the gradients of a sharded model, each microbatch reduced, and the copies in the last backward."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    apply_fsdp(model, mesh, load_config([]).training, "default", groups=[[model[0]], [model[1]]])
    assert isinstance(model, FSDPModule)
    for _ in range(microbatches):
        loss = model(torch.randn(4, 8, dtype=torch.bfloat16)).square().sum()
        with Copies() as copies:
            loss.backward()
    return [param.grad.to_local() for param in model.parameters()], copies.count  # type: ignore[union-attr]


@pytest.mark.parametrize("microbatches", [1, 2])
def test_no_copy_and_the_same_gradients(mesh: Mesh, monkeypatch: pytest.MonkeyPatch, microbatches: int) -> None:
    without, none = gradients(mesh, microbatches)
    monkeypatch.setattr(OneShard, "allocate", lambda self, size, dtype, device: torch.empty(*size, dtype=dtype))
    with_copies, some = gradients(mesh, microbatches)
    assert (none, some) == (0, 2)
    assert all(torch.equal(one, other) for one, other in zip(without, with_copies, strict=True))


def test_an_input_without_output_is_not_the_output_of_another() -> None:
    """A step may fail between the two."""
    reduce = OneShard()
    reduce.allocate((4,), dtype=torch.float32, device=CPU)
    first = reduce.allocate((4,), dtype=torch.float32, device=CPU)
    assert reduce.allocate((4,), dtype=torch.float32, device=CPU) is first
    assert reduce.allocate((4,), dtype=torch.float32, device=CPU) is not first
