"""The norm of gradients under any sharding, the number that clips it, and the mean loss."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titanlite.distributed.mesh import Mesh
from titanlite.distributed.target import Target

# A norm on the CPU sums the squares one by one in float32: an error of 1e-5 for a million elements, which differs with
# the sharding. Parts of this size are accurate to 1e-7.
_CPU_PART = 8192


class GradientScale(NamedTuple):
    """The factors that make the gradients of a step those of the mean loss, clipped. All are scalars, the same on all
    ranks.

    Attributes:
        norm: the norm of the gradients of all processes before clipping, float32.
        loss: the mean loss, float64.
        divisor: what to divide the gradients by; float32.
        stops: the number of ranks that were asked to stop; float64.
        scored: the number of scored labels of all ranks, once for each rank that has them; float64.
    """

    norm: Tensor
    loss: Tensor
    divisor: Tensor
    stops: Tensor
    scored: Tensor


@torch.no_grad()
def gradient_scale(
    params: Iterable[nn.Parameter],
    max_norm: float,
    mesh: Mesh,
    total: Tensor,
    scored: Tensor,
    labels: int,
    stop: bool = False,
) -> GradientScale:
    """Compute what divides the gradients to those of the mean loss over all scored labels, with their norm clipped to
    ``max_norm``. The gradients are not changed: :func:`titanlite.optim.update_parameters` divides them.

    Each rank sums the squares of its gradients, divided by the number of ranks that have the same ones. One all-reduce
    is then enough for any placements; the loss, the number of labels and requests to stop are part of it.

    Args:
        params: parameters whose gradients are those of the sum of all ranks' losses, divided by the number of all
            labels, scored or not.
        total: the sum of the losses of this rank's labels, a scalar; 0 without the last pipeline stage.
        scored: the number of this rank's scored labels, a scalar; 0 without the last pipeline stage.
        labels: the number of labels of each rank.
        stop: this rank was asked to stop.
    """
    params = [p for p in params if p.grad is not None]
    by_copies: defaultdict[int, list[Tensor]] = defaultdict(list)
    for param in params:
        assert param.grad is not None
        by_copies[_copies(param.grad, mesh)].append(param.grad)
    squares = [_norms(grads, mesh.target).double().square().sum() / n for n, grads in by_copies.items()]
    square = torch.stack(squares).sum()
    # The ranks of one tensor-parallel group have the same labels; they count once for each rank, as in stage.size().
    sums = torch.stack((square, total.detach().to(square), scored.to(square), torch.full_like(square, stop)))
    if mesh.world.size() > 1:
        dist.all_reduce(sums)
    square, loss, scored_by_all, stops = sums.unbind()
    count = scored_by_all.clamp(min=1)
    share = count / (mesh.stage.size() * labels)  # 1 where all labels are scored
    norm = (square.sqrt() / share).float()
    # Like clip_grads_with_norm_, which does not support DTensors of different meshes.
    divisor = share / (max_norm / (norm + 1e-6)).clamp(max=1.0)
    return GradientScale(norm, loss / count, divisor.float(), stops, scored_by_all)


def _local(grad: Tensor) -> Tensor:
    return grad.to_local() if isinstance(grad, DTensor) else grad


def _norms(grads: list[Tensor], target: Target) -> Tensor:
    """Return norms of parts that make up ``grads``: float32 [number of parts]."""
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
    """Return the number of ranks that have the same part of this gradient."""
    shards = 1
    if isinstance(grad, DTensor):
        for dim, placement in enumerate(grad.placements):
            shards *= 1 if placement.is_replicate() else grad.device_mesh.size(dim)
    return mesh.stage.size() // shards
