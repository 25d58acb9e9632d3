"""Expert parallelism: each process has a part of the experts of a mixture, and tokens travel to their experts and back.

Nothing is dropped, and nothing is padded: every process sends each other one exactly the rows that are for its experts
(an all-to-all with uneven splits). Its sizes must be known to the host, so the host waits once for each mixture, for
the loads. All else of the exchange is two operators, each of which is the other's backward. The compiler does not look
into them: to it, they make a tensor whose size is only known when it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_module, distribute_tensor

from titanlite.distributed.mesh import Mesh
from titanlite.models.layers import Experts, Mixture

_c10d = torch.ops._c10d_functional
_UNKNOWN = -1


@torch.library.custom_op("titanlite::exchange_loads", mutates_args=())
def _exchange_loads(loads: Tensor, group: str, ranks: int) -> tuple[Tensor, Tensor]:
    """Tell each process of ``group`` the loads of its experts.

    Args:
        loads: the rows of this process for each expert, integers [experts]; rank r has the r-th part of the experts.

    Returns:
        The rows that each process has for the experts of this one, int64 [ranks, experts / ranks]. And on the host,
        int64 [2, ranks, experts / ranks]: the rows that go to each process and expert there, and the first result.
    """
    even = [loads.shape[0] // ranks] * ranks
    coming = _c10d.wait_tensor(_c10d.all_to_all_single(loads, even, even, group)).long()
    both = torch.stack((loads.long(), coming)).unflatten(1, (ranks, -1)).cpu()  # the host waits here
    return coming.unflatten(0, (ranks, -1)), both


@_exchange_loads.register_fake
def _(loads: Tensor, group: str, ranks: int) -> tuple[Tensor, Tensor]:
    shape = ranks, loads.shape[0] // ranks
    return loads.new_empty(shape, dtype=torch.int64), torch.empty(2, *shape, dtype=torch.int64, device="cpu")


def _transposed(rows: Tensor, counts: Tensor) -> Tensor:
    """Return ``rows`` [rows, features] with their groups in another order. ``counts`` [n, m] are the sizes of groups.
    They lie row by row of that matrix, and in the result column by column. ``counts`` is on the host, which does not
    wait for the device."""
    if 1 in counts.shape:
        return rows
    starts = (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts).T.flatten()
    sizes = counts.T.flatten()
    shifts = starts - (sizes.cumsum(0) - sizes)  # of each group, from where it goes to where it is
    shifts, sizes = torch.stack((shifts, sizes)).to(rows.device, non_blocking=True)
    index = torch.arange(rows.shape[0], device=rows.device)
    return rows.index_select(0, index + shifts.repeat_interleave(sizes, output_size=rows.shape[0]))


@torch.library.custom_op("titanlite::to_experts", mutates_args=())
def _to_experts(rows: Tensor, loads: Tensor, size: int, group: str) -> Tensor:
    """Send rows to the processes of their experts.

    Args:
        rows: [rows, features], sorted by expert.
        loads: the second result of ``exchange_loads``.
        size: the number of rows that come, where it is known; else -1.

    Returns:
        The rows for the experts of this process, [size, features], sorted by expert, and those of an expert by the
        process that they are from.
    """
    going, coming = loads
    splits = coming.sum(1).tolist(), going.sum(1).tolist()
    received = _c10d.wait_tensor(_c10d.all_to_all_single(rows.contiguous(), *splits, group))
    return _transposed(received, coming)


@_to_experts.register_fake
def _(rows: Tensor, loads: Tensor, size: int, group: str) -> Tensor:
    count = torch.library.get_ctx().new_dynamic_size() if isinstance(size, int) and size == _UNKNOWN else size
    return rows.new_empty(count, rows.shape[1])


@torch.library.custom_op("titanlite::from_experts", mutates_args=())
def _from_experts(rows: Tensor, loads: Tensor, size: int, group: str) -> Tensor:
    """Send rows back: the inverse of ``to_experts``. ``size`` is the number of rows that this process had sent."""
    going, coming = loads
    rows = _transposed(rows, coming.T)
    splits = going.sum(1).tolist(), coming.sum(1).tolist()
    return _c10d.wait_tensor(_c10d.all_to_all_single(rows.contiguous(), *splits, group))  # type: ignore[no-any-return]


@_from_experts.register_fake
def _(rows: Tensor, loads: Tensor, size: int, group: str) -> Tensor:
    return rows.new_empty(size, rows.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, int, str], output: Tensor) -> None:
    rows, loads, _, ctx.group = inputs
    ctx.size = rows.shape[0]
    ctx.save_for_backward(loads)


def _send_back(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return _from_experts(grad, *ctx.saved_tensors, ctx.size, ctx.group), None, None, None


def _send_again(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return _to_experts(grad, *ctx.saved_tensors, ctx.size, ctx.group), None, None, None


_to_experts.register_autograd(_send_back, setup_context=_keep)
_from_experts.register_autograd(_send_again, setup_context=_keep)

EXCHANGES = (
    torch.ops.titanlite.exchange_loads.default,
    torch.ops.titanlite.to_experts.default,
    torch.ops.titanlite.from_experts.default,
)
"""The operators of the exchange, for activation checkpointing."""


class _ScaledGradient(torch.autograd.Function):
    """``x`` itself, whose gradient is multiplied by ``factor``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return grad * ctx.factor, None


class ExpertParallel:
    """The slot :attr:`Mixture.spread` under expert parallelism over ``mesh``. One object serves all mixtures.

    Attributes:
        assumed: for estimates, which have no loads: the rows that come, for each that goes. None: they are exchanged.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.group: str = mesh.get_group().group_name
        self.ranks = mesh.size()
        self.assumed: float | None = None

    def __call__(self, experts: Experts, rows: Tensor, weights: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the experts of all processes to ``rows`` of this one; arguments as of :meth:`Experts.forward`. Return
        the result, and the number of rows that this process has computed, an integer scalar."""
        coming, loads = _exchange_loads(offsets.diff(prepend=offsets.new_zeros(1)), self.group, self.ranks)
        size = _UNKNOWN if self.assumed is None else round(self.assumed * rows.shape[0])
        here = _to_experts(rows, loads, size, self.group)
        factors = _to_experts(weights[:, None], loads, here.shape[0], self.group)[:, 0]
        ends = coming.sum(0).cumsum(0)
        out = experts(here, factors, ends.int())
        return _from_experts(out, loads, rows.shape[0], self.group), ends[-1]


def spread_mixtures(model: nn.Module, mesh: Mesh) -> None:
    """Shard the experts of ``model`` for expert parallelism, and fill the slots with which a process computes its part
    of them. On the meta device.

    Tensor parallelism shards the tokens between the parts of a block over the sequence. So its processes compute whole
    experts, as those of data parallelism do, and FSDP2 shards experts over both. It takes the mean of their gradients
    over the processes that have the same experts, each of which has seen the tokens of ``ep`` processes. The gradient
    must be the sum over the processes of ``tp``, and the mean over all others: the factor is tp / ep.
    """
    mixtures = [module for module in model.modules() if isinstance(module, Mixture)]
    if not mixtures or mesh.experts is None or mesh.experts.ep.size() * mesh.tp.size() == 1:
        return
    ep, tp = mesh.experts.ep, mesh.tp
    # The same objects for all blocks: only then can torch.compile share code between them.
    spread = ExpertParallel(ep) if ep.size() > 1 else None
    part = _Part(tp.size() / ep.size())
    for mixture in mixtures:
        if spread is not None:
            distribute_module(mixture.experts, ep, _shard_experts)
            mixture.spread = spread
        mixture.experts.part_of = part
        if tp.size() > 1:
            router = mixture.router
            router.weight = nn.Parameter(distribute_tensor(router.weight, tp, src_data_rank=None))
            router.part_of = _whole


def _shard_experts(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
    for key, param in module.named_parameters(recurse=False):
        # No process has the values yet, and each will fill its own part.
        setattr(module, key, nn.Parameter(distribute_tensor(param, mesh, [Shard(0)], src_data_rank=None)))


class _Part:
    """The slot :attr:`Experts.part_of`: this process's experts, whose gradient is multiplied by ``factor``."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, param: Tensor) -> Tensor:
        local = param.to_local() if isinstance(param, DTensor) else param
        return local if self.factor == 1 else cast(Callable[..., Tensor], _ScaledGradient.apply)(local, self.factor)


def _whole(weight: Tensor) -> Tensor:
    """Return the router's weight, which every process has; its gradient is summed over their tokens."""
    return weight.to_local(grad_placements=[Partial()]) if isinstance(weight, DTensor) else weight
