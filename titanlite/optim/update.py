"""Scaling of the gradients and the optimizer's update in one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from titanlite.optim.by_parameter import ByParameter


@torch.no_grad()
def update_parameters(optimizer: torch.optim.Optimizer, divisor: Tensor, skip: Tensor | None = None) -> None:
    """Divide the gradients by ``divisor``, and call ``optimizer.step()``.

    A fused optimizer divides in its kernel, by the protocol of :class:`torch.amp.GradScaler`, which saves a pass over
    the gradients. For the others, the gradients are divided before the step.

    Args:
        divisor: float32 scalar on the device of the gradients.
        skip: scalar of any dtype; if it is not 0, change no bit of the parameters and of the optimizer state. The host
            waits for it, unless the optimizer can skip by itself.
    """
    if skip is not None and not _skips_by_itself(optimizer):
        if skip.item():
            return
        skip = None
    if _divides_by_itself(optimizer):
        # The kernels read both on the device.
        optimizer.grad_scale = divisor  # type: ignore[attr-defined]
        optimizer.found_inf = torch.zeros_like(divisor) if skip is None else skip.float()  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf  # type: ignore[attr-defined]
    else:
        torch._foreach_div_(_local_gradients(optimizer), divisor)
        optimizer.step()


def _divides_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def _skips_by_itself(optimizer: torch.optim.Optimizer) -> bool:
    """Return True if ``found_inf`` makes an optimizer skip a step without any change. Fused Adam and AdamW do, and
    those that update by parameter. Fused SGD has uninitialized momentum if its first step is skipped."""
    return isinstance(optimizer, torch.optim.Adam | ByParameter) and _divides_by_itself(optimizer)


def _local_gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Return this rank's gradients, as plain tensors: foreach operators do not take DTensors of different meshes."""
    grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    return [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
