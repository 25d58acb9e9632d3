"""Saving while training goes on: a copy of the state on the host, and a thread that writes it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch.distributed._state_dict_utils import _copy_state_dict, _create_cpu_state_dict
from torch.distributed.tensor import DTensor

from titanlite.checkpoint.state import State

logger = logging.getLogger()


class BackgroundSaver:
    """Runs one save at a time.

    What is sharded (parameters, optimizer state) is copied by the thread, beside the next forward and backward, which
    do not change it: call :meth:`wait_for_copy` before the optimizer does. Everything else is copied at once.

    Args:
        pin: page-locked memory, which GPUs copy to faster and without waiting. The memory of the copy is kept from save
            to save, pinned or not.
    """

    def __init__(self, device: torch.device, pin: bool) -> None:
        self._device, self._pin = device, pin and device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # A thread begins with the first GPU, whichever is its process's.
        begin = (torch.cuda.set_device, (device,)) if device.type == "cuda" else (None, ())
        self._pool = ThreadPoolExecutor(1, "checkpoint", *begin)
        self._buffers: State = {}
        self._copied = threading.Event()
        self._copied.set()
        self._saving: Future[None] | None = None
        self.step = 0

    def start(self, step: int, state: State, write: Callable[[State, Exception | None], None]) -> None:
        """Copy ``state`` and call ``write`` with the copy, in the thread, or with what copying raised. The save before
        has ended."""
        assert self._saving is None
        self.step = step
        now = {name: tensor.detach().clone() for name, tensor in state.items() if not isinstance(tensor, DTensor)}
        sharded = {name: tensor for name, tensor in state.items() if isinstance(tensor, DTensor)}
        ready = torch.cuda.current_stream(self._device).record_event() if self._stream is not None else None
        self._copied.clear()

        def save() -> None:
            copies: State = {}
            failure = None
            try:
                copies = self._copy({**now, **sharded}, ready)
            except Exception as e:  # the other processes are told, who would wait for this one
                failure = e
            finally:
                self._copied.set()
            write(copies, failure)

        self._saving = self._pool.submit(save)

    def _copy(self, state: State, ready: torch.cuda.Event | None) -> State:
        if self._buffers.keys() != state.keys():
            self._buffers = _create_cpu_state_dict(state, pin_memory=self._pin)
        if self._stream is None or ready is None:
            return _copy_state_dict(state, self._buffers)
        with torch.cuda.stream(self._stream):
            ready.wait()
            copies: State = _copy_state_dict(state, self._buffers, non_blocking=True)
        self._stream.synchronize()
        return copies

    def wait_for_copy(self) -> None:
        """Return when the state may change again."""
        self._copied.wait()

    def wait(self) -> float:
        """Return when nothing is being saved, with the seconds that took; raises what the save raised."""
        saving, self._saving = self._saving, None
        if saving is None:
            return 0.0
        start = time.perf_counter()
        saving.result()
        return time.perf_counter() - start

    def close(self) -> None:
        self._pool.shutdown()
