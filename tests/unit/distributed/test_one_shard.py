"""With one shard, FSDP2 copies no gradient, in float32 no weight either, and both are the same bits."""

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
from titanlite.distributed.data_parallel import apply_fsdp, reduce_gradients_after
from titanlite.distributed.mesh import Mesh, build_mesh
from titanlite.distributed.one_shard import OneShard, gather_in_place, take_gradients
from titanlite.quant.fsdp import plain

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


# ---- float32


class Tied(nn.Module):
    """Two layers with one weight, and a weight without a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unused = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())  # type: ignore[no-any-return]


class Written(TorchDispatchMode):
    """Counts the elements that FSDP2's copies write."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.copy_.default and args[0] is not args[1]:
            self.count += args[0].numel()
        elif func._opname == "chunk_cat":
            self.count += sum(tensor.numel() for tensor in args[0])
        return out


def trained(mesh: Mesh, microbatches: int, in_place: bool, reshard: str) -> tuple[dict[str, Tensor], int]:
    """Return the weights after three steps, and the elements that FSDP2 copied in the last one."""
    torch.manual_seed(0)
    model = nn.Sequential(Tied(), nn.Linear(8, 8))
    training = load_config(["--training.mixed_precision_param=float32"]).training
    apply_fsdp(model, mesh, training, reshard, groups=[[model[0]], [model[1]]])
    assert not in_place or gather_in_place(model, torch.float32, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for _ in range(3):
        with Written() as written:
            for i in range(microbatches):
                reduce_gradients_after(model, last=i == microbatches - 1, each=False, in_place=in_place)
                model(torch.randn(4, 8)).square().sum().backward()
            if in_place:
                take_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():  # as in validation
            model(torch.randn(4, 8))
    for module in (model, *model):
        module.reshard()  # type: ignore[operator]
    weights = {name: plain(param).to_local() for name, param in model.named_parameters()}  # type: ignore[attr-defined]
    assert all(type(weight) is Tensor for weight in weights.values())
    return weights, written.count


@pytest.mark.parametrize("reshard", ["default", "always"])
@pytest.mark.parametrize("microbatches", [1, 3])
def test_in_place_nothing_is_copied_and_weights_are_the_same(mesh: Mesh, microbatches: int, reshard: str) -> None:
    expected, some = trained(mesh, microbatches, False, reshard)
    weights, none = trained(mesh, microbatches, True, reshard)
    assert some > 0
    assert none == 0
    assert {*weights} == {*expected}
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize(("gathered", "reduced"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_what_is_cast_is_copied(mesh: Mesh, gathered: torch.dtype, reduced: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    apply_fsdp(model, mesh, load_config([]).training, "default", groups=[[model[0]]])
    assert not gather_in_place(model, gathered, reduced)
