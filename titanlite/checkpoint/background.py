"""Asynchronous saving: the state is copied to host memory, and the copy is written while training continues.

A thread makes the copy and plans the files. Another process hashes and writes them, where it can share the memory: a
thread that did would ask for the interpreter's lock, which training needs.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from titanlite.checkpoint.hashing_file import HashingFile
from titanlite.checkpoint.state import State, local_part
from titanlite.checkpoint.writer_process import SentFile, WriterProcess

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
        # Of the last copy: the tensors, their local parts, and the shapes and dtypes that they are for.
        self._buffers: State = {}
        self._local_buffers: State = {}
        self._layout: dict[str, tuple[torch.Size, torch.Size, torch.dtype]] = {}
        # Page-locked memory would have to be registered with CUDA, which no GPU has tried. Only Linux shares memory
        # that has no name, and so no limit of a file system.
        self._shares = not self._pin and hasattr(os, "memfd_create")
        self._writer: WriterProcess | None = None
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
        parts = {name: local_part(tensor) for name, tensor in state.items()}
        layout = {name: (state[name].shape, part.shape, part.dtype) for name, part in parts.items()}
        if layout != self._layout:
            self._layout = {}  # in case that the memory is not there
            self._local_buffers = self._allocate(parts)
            self._buffers = {name: _like(tensor, self._local_buffers[name]) for name, tensor in state.items()}
            self._layout = layout
        copies, tensors = [self._local_buffers[name] for name in parts], [*parts.values()]
        # One call for all tensors, which asks for the interpreter's lock once.
        if self._stream is None or ready is None:
            torch._foreach_copy_(copies, tensors)
        else:
            with torch.cuda.stream(self._stream):
                ready.wait()
                torch._foreach_copy_(copies, tensors, non_blocking=True)
            self._stream.synchronize()
        return self._buffers

    def _allocate(self, parts: State) -> State:
        """Return uninitialized memory on the host for ``parts``, in the place of that of earlier copies."""
        self._end_writer()
        self._buffers, self._local_buffers = {}, {}
        if self._shares:
            try:
                self._writer = WriterProcess(parts)
            except OSError as e:
                self._shares = False
                logger.warning(
                    "checkpoint.async_mode: a thread of this process writes the checkpoints, because another process "
                    "cannot (%s)",
                    e,
                )
            else:
                return self._writer.tensors
        return {
            name: torch.empty(part.shape, dtype=part.dtype, pin_memory=self._pin and part.numel() > 0)
            for name, part in parts.items()
        }

    def new_file(self, path: str | os.PathLike[str]) -> HashingFile | SentFile:
        """Create a file for a part of the copies."""
        return HashingFile(path) if self._writer is None else self._writer.open(path)

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
        self._end_writer()

    def _end_writer(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _like(tensor: Tensor, local: Tensor) -> Tensor:
    """Return ``local`` as the part that this process holds of a tensor like ``tensor``."""
    return DTensor(local, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else local
