"""FSDP2 where there is one shard: without its copies of weights and gradients, where that is exact."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.fsdp._fully_shard._fsdp_common import _from_local_no_grad
from torch.distributed.tensor import DTensor


class OneShard(ReduceScatter):
    """A reduce-scatter over one process, whose input is its output.

    FSDP2 asks for an input, fills it, asks for an output, and, with one process, copies the first to the second: 8
    bytes for each parameter with gradients in float32. A tensor copied to itself is not touched. (torch 2.11 to 2.13,
    ``foreach_reduce`` in torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py. An error in between ends the run.)
    """

    def __init__(self) -> None:
        self._input: weakref.ref[Tensor] | None = None

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a new tensor for the input, and the same for the output that follows."""
        buffer = self._input() if self._input is not None else None
        if buffer is None:
            buffer = torch.empty(*size, dtype=dtype, device=device)
            self._input = weakref.ref(buffer)
            return buffer
        self._input = None
        assert (buffer.shape, buffer.dtype) == (torch.Size(size), dtype)  # type: ignore[arg-type]
        if device.type == "cuda":
            # FSDP2 drops the input when this stream, that of its reductions, has copied it. It then still adds the
            # output to gradients, or copies it to host memory, in this stream: until then, nothing may take the memory.
            # (The stream of HSDP's all-reduce needs no such care: FSDP2 holds what it reduces until the backward ends.)
            buffer.record_stream(torch.cuda.current_stream(device))
        return buffer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("FSDP2 reduces nothing over one process")


class InPlace:
    """The hooks by which FSDP2 gathers a shard that is the whole weight, in the dtype of the gather: the gathered
    weight is in the same memory, and nothing is copied. A base of subclasses of ``Tensor``."""

    detach: Callable[[], Tensor]
    new_empty: Callable[..., Tensor]
    data_ptr: Callable[[], int]

    def fsdp_pre_all_gather(
        self,
        mesh: DeviceMesh,
        outer_size: torch.Size,
        outer_stride: tuple[int, ...],
        module: nn.Module,
        mp_policy: MixedPrecisionPolicy,
    ) -> tuple[tuple[Tensor], None]:
        """Return nothing to gather, as FSDP2's extension for tensor subclasses wants it."""
        return (self.new_empty(0),), None

    def fsdp_post_all_gather(
        self, outputs: tuple[Tensor, ...], metadata: None, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """Return the gathered weight, and no memory of its own that FSDP2 could free."""
        if out is None:
            return self.detach(), ()
        local = out.to_local() if isinstance(out, DTensor) else out
        assert local.data_ptr() == self.data_ptr(), "the memory of a weight was replaced after the first step"
        return None


class WholeShard(InPlace, Tensor):
    """A shard that is gathered in place. All operations see a plain tensor, and return plain ones."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


def whole_shard(local: Tensor) -> Tensor | None:
    """Return a plain tensor as a :class:`WholeShard`; None for others, such as those that are gathered in a number
    format."""
    return local.as_subclass(WholeShard) if type(local) is Tensor else None


def gather_in_place(
    model: nn.Module,
    gathered: torch.dtype,
    reduced: torch.dtype,
    whole_shard: Callable[[Tensor], Tensor | None] = whole_shard,
) -> bool:
    """Let FSDP2 compute with the weights of ``model`` themselves. Weights that it would cast, or that are gathered in a
    number format, are gathered as before.

    Args:
        model: sharded by FSDP2 over one process, with memory, before the first forward.
        gathered, reduced: the dtypes of the gathered weights, and of the reduction of their gradients.
        whole_shard: returns a shard as an :class:`InPlace`, or None; an estimate has its own kind.

    Returns:
        Whether all weights are in place, so that :func:`take_gradients` can take their gradients.
    """
    in_place = True
    for param in model.parameters():
        assert isinstance(param, DTensor)
        local = param._local_tensor
        whole = whole_shard(local) if local.dtype == gathered == reduced else None
        if whole is None:
            in_place = False
        else:
            param._local_tensor = whole
    return in_place


def take_gradients(model: nn.Module) -> None:
    """Give the gradients of the gathered weights to the shards, after backwards that FSDP2 did not reduce, and that
    left the weights gathered."""
    gradients = {}
    for name, param in model.named_parameters():
        gradients[name], param.grad = param.grad, None
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    for name, param in model.named_parameters():
        gradient = gradients[name]
        if gradient is not None:
            assert isinstance(param, DTensor)
            param.grad = _from_local_no_grad(gradient, param._spec)
