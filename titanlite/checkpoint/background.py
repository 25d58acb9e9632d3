"""Asynchronous saving: the state is copied to host memory, and a thread writes the copy while training continues."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor
from torch.distributed._state_dict_utils import _copy_state_dict
from torch.distributed.tensor import DTensor

from titanlite.checkpoint.state import State

logger = logging.getLogger()


class BackgroundSaver:
    """Runs one save at a time.

    The thread copies the sharded tensors (parameters, optimizer state) during the next forward and backward pass, which
    do not change them. Call :meth:`wait_for_copy` before the optimizer step, which does. All other tensors are copied
    before :meth:`start` returns. The buffers on the host, pinned or not, are kept and reused by the next save.

    Args:
        pin: use page-locked host memory, to which GPUs copy faster and asynchronously.
    """

    def __init__(self, device: torch.device, pin: bool) -> None:
        self._device, self._pin = device, pin and device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # A new thread uses GPU 0 by default, so select the device of this process.
        initializer = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())
        self._pool = ThreadPoolExecutor(1, "checkpoint", *initializer)
        self._buffers: State = {}
        self._copied = threading.Event()
        self._copied.set()
        self._saving: Future[None] | None = None
        self.step = 0

    def start(self, step: int, state: State, write: Callable[[State, Exception | None], None]) -> None:
        """Start one save in the thread: copy ``state``, then call ``write(copies, failure)``. ``failure`` is the
        exception that the copy raised, or None. The previous save must have ended (:meth:`wait`)."""
        assert self._saving is None
        self.step = step
        unsharded = {name: tensor.detach().clone() for name, tensor in state.items() if not isinstance(tensor, DTensor)}
        sharded = {name: tensor for name, tensor in state.items() if isinstance(tensor, DTensor)}
        ready = torch.cuda.current_stream(self._device).record_event() if self._stream is not None else None
        self._copied.clear()

        def save() -> None:
            copies: State = {}
            failure = None
            try:
                copies = self._copy({**unsharded, **sharded}, ready)
            except Exception as e:  # write() tells the other processes, which would wait for this one
                failure = e
            finally:
                self._copied.set()
            write(copies, failure)

        self._saving = self._pool.submit(save)

    def _copy(self, state: State, ready: torch.cuda.Event | None) -> State:
        if self._buffers.keys() != state.keys():
            self._buffers = {name: _host_buffer(tensor, self._pin) for name, tensor in state.items()}
        if self._stream is None or ready is None:
            return _copy_state_dict(state, self._buffers)
        with torch.cuda.stream(self._stream):
            ready.wait()
            copies: State = _copy_state_dict(state, self._buffers, non_blocking=True)
        self._stream.synchronize()
        return copies

    def wait_for_copy(self) -> None:
        """Wait until the copy is complete; after that the state may change again."""
        self._copied.wait()

    def wait(self) -> float:
        """Wait for the running save, if any, and return the seconds waited. Raise the exception of that save."""
        saving, self._saving = self._saving, None
        if saving is None:
            return 0.0
        start = time.perf_counter()
        saving.result()
        return time.perf_counter() - start

    def close(self) -> None:
        self._pool.shutdown()


def _host_buffer(tensor: Tensor, pin: bool) -> Tensor:
    """Return uninitialized host memory for a copy of the local part of ``tensor``. (torch's own function copies a
    DTensor, from the device too, before it allocates the buffer.)"""
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    buffer = torch.empty(local.shape, dtype=local.dtype, pin_memory=pin and local.numel() > 0)
    return DTensor(buffer, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else buffer
