"""The reduction of gradients where there is one shard, without FSDP2's copy."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter


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
