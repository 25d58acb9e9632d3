"""The norm of all gradients, however they are sharded, and the loss that they are of."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titanlite.distributed.mesh import Mesh
from titanlite.distributed.target import Target

# A norm on the CPU adds up its squares one after the other, in float32: 1e-5 off for a million elements, and for each
# sharding differently. Parts of this size are accurate to 1e-7.
_CPU_PART = 8192


def clip_gradients(
    params: Iterable[nn.Parameter], max_norm: float, mesh: Mesh, total: Tensor, scored: Tensor, labels: int
) -> tuple[Tensor, Tensor]:
    """Make the gradients those of the mean loss over all labels that are scored, and scale them down to ``max_norm``.

    Each rank adds up the squares of what it has, divided by the number of ranks that have the same, so that one
    all-reduce is enough whatever the placements are; the loss and the number of labels travel with it.

    Args:
        params: with the gradients of the sum of the losses of all ranks, divided by the number of all their labels,
            whether they are scored or not.
        total: the sum of the losses of this rank's labels, 0 where the last pipeline stage is elsewhere; a scalar.
        scored: how many of them are scored, 0 where the last pipeline stage is elsewhere; a scalar.
        labels: how many there are on each rank.

    Returns:
        The norm of the gradients over all processes before they are clipped, float32, and the mean loss, float64:
        scalars, the same on all ranks.
    """
    params = [p for p in params if p.grad is not None]
    by_copies: defaultdict[int, list[Tensor]] = defaultdict(list)
    for param in params:
        assert param.grad is not None
        by_copies[_copies(param.grad, mesh)].append(param.grad)
    squares = [_norms(grads, mesh.target).double().square().sum() / n for n, grads in by_copies.items()]
    square = torch.stack(squares).sum()
    # Ranks of a stage have labels each, those that tensor parallelism gives the same sequence the same ones.
    sums = torch.stack((square, total.detach().to(square), scored.to(square)))
    if mesh.world.size() > 1:
        dist.all_reduce(sums)
    square, loss, count = sums.unbind()
    count = count.clamp(min=1)
    divisor = mesh.stage.size() * labels / count  # 1 where all labels are scored
    norm = (square.sqrt() * divisor).float()
    # As clip_grads_with_norm_, which does not take DTensors of different meshes together.
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0) * divisor
    with torch.no_grad():
        torch._foreach_mul_([_local(param.grad) for param in params if param.grad is not None], scale.float())
    return norm, loss / count


def _local(grad: Tensor) -> Tensor:
    return grad.to_local() if isinstance(grad, DTensor) else grad


def _norms(grads: list[Tensor], target: Target) -> Tensor:
    """Norms of parts of ``grads``: float32 [any]."""
    grads = [_local(grad).reshape(-1) for grad in grads]
    if not target.is_cpu:
        return torch.stack(torch._foreach_norm(grads))
    parts = []
    for grad in grads:
        whole = grad.numel() // _CPU_PART * _CPU_PART
        parts += [torch.linalg.vector_norm(grad[:whole].view(-1, _CPU_PART), dim=1)] if whole else []
        parts.append(torch.linalg.vector_norm(grad[whole:])[None])
    return torch.cat(parts)


def _copies(grad: Tensor, mesh: Mesh) -> int:
    """The number of ranks that have the same part of this gradient."""
    shards = 1
    if isinstance(grad, DTensor):
        for dim, placement in enumerate(grad.placements):
            shards *= 1 if placement.is_replicate() else grad.device_mesh.size(dim)
    return mesh.stage.size() // shards
