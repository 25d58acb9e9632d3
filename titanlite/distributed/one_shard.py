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
    bytes for each parameter with gradients in float32. A tensor copied to itself is not touched.
    """

    def __init__(self) -> None:
        self._input: weakref.ref[Tensor] | None = None

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return a new tensor for the input, and the same for the output that follows."""
        buffer = self._input() if self._input is not None else None  # None too after a step that failed between them
        if buffer is None:
            buffer = torch.empty(*size, dtype=dtype, device=device)
            self._input = weakref.ref(buffer)
            return buffer
        self._input = None
        if device.type == "cuda":
            # The output is used in FSDP2's stream, which this is: its memory must not serve others before that.
            buffer.record_stream(torch.cuda.current_stream(device))
        return buffer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("FSDP2 reduces nothing over one process")
