"""Memory snapshots for https://pytorch.org/memory_viz: what was allocated and freed, when, from where; what is alive.

On a GPU the allocator keeps this history itself. On the CPU, where there is none, ``torch.profiler`` sees every
allocation with its address, its size and the stack that asked for it, and :func:`cpu_snapshot` writes down the same.
"""

from __future__ import annotations

import gc
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._profiler import _EventType

_MAX_ENTRIES = 100_000  # events that the allocator keeps, as in torchtitan; what is alive has its stack in any case

Frame = dict[str, Any]


def record_gpu_history(on: bool) -> None:
    """Let the allocator keep the stacks of allocations from now on, or no longer."""
    torch.cuda.memory._record_memory_history(enabled="all" if on else None, max_entries=_MAX_ENTRIES)


def save_gpu_snapshot(path: Path) -> None:
    _save(path, torch.cuda.memory._snapshot())


def save_cpu_snapshot(prof: torch.profiler.profile, path: Path) -> None:
    _save(path, cpu_snapshot(prof))


def _save(path: Path, snapshot: dict[str, Any]) -> None:
    with path.open("wb") as file:
        pickle.dump(snapshot, file, protocol=4)  # the viewer, which is JavaScript, reads 2 to 4


def cpu_snapshot(prof: torch.profiler.profile) -> dict[str, Any]:
    """What ``torch.cuda.memory._snapshot()`` gives for a GPU, of the CPU's memory.

    Args:
        prof: a profile that has been stopped, made with ``profile_memory=True, with_stack=True``.

    Returns:
        ``device_traces``: of one device, the allocations and frees while it was recorded, in their order. ``segments``:
        the storages that are alive now, each a segment with one block, as there is no cache on the CPU; those from
        before the recording, as far as Python knows a tensor of them, say what they are, not where they came from.
    """
    assert prof.profiler is not None
    assert prof.profiler.kineto_results is not None
    found = list(_allocations(prof.profiler.kineto_results.experimental_event_tree()))
    found.sort(key=lambda pair: pair[0].start_time_ns)
    trace: list[dict[str, Any]] = []
    alive: dict[int, tuple[int, list[Frame]]] = {}
    for event, frames in found:
        address, size = event.extra_fields.ptr, event.extra_fields.alloc_size
        if size > 0:
            alive[address] = size, frames
        else:
            alive.pop(address, None)
        what = {"addr": address, "size": abs(size), "stream": 0, "time_us": event.start_time_ns // 1000}
        actions = ("segment_alloc", "alloc") if size > 0 else ("free_requested", "free_completed", "segment_free")
        trace += ({"action": action, **what, "frames": frames} for action in actions)
    for tensor in _living_tensors():
        storage = tensor.untyped_storage()
        if storage.data_ptr() and storage.data_ptr() not in alive:
            shown = f"{type(tensor).__name__} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
            alive[storage.data_ptr()] = storage.nbytes(), [_frame("alive before the recording", 0, shown)]
    segments = [_segment(address, size, frames) for address, (size, frames) in sorted(alive.items())]
    return {"segments": segments, "device_traces": [trace]}


def _segment(address: int, size: int, frames: list[Frame]) -> dict[str, Any]:
    block = {"address": address, "size": size, "requested_size": size, "state": "active_allocated", "frames": frames}
    sizes = dict.fromkeys(("total_size", "allocated_size", "active_size", "requested_size"), size)
    return {"device": 0, "address": address, "stream": 0, "segment_type": "large", **sizes, "blocks": [block]}


def _living_tensors() -> Iterator[Tensor]:
    for thing in gc.get_objects():
        # Not their subclasses, and not the compiler's, which it leaves behind: those wrap tensors that are met here by
        # themselves, or have no memory.
        if type(thing) not in (Tensor, torch.nn.Parameter) or torch._is_functional_tensor(thing):
            continue
        if thing.device.type == "cpu" and not thing.is_sparse:
            yield thing


# A stack, the innermost frame first: a frame and the rest.
_Stack = tuple[Frame, Any] | None


def _allocations(roots: list[Any]) -> Iterator[tuple[Any, list[Frame]]]:
    """Every event of an allocation or a free, with its stack."""
    # Of each event its callers at the lines where they called, and what is known of itself.
    todo: list[tuple[Any, _Stack, _Stack]] = [(event, None, None) for event in roots]
    while todo:
        event, callers, own = todo.pop()
        if event.tag == _EventType.Allocation:
            yield event, list(_flat(own))
            continue
        if event.tag in (_EventType.PyCall, _EventType.PyCCall):
            fields = event.extra_fields
            callers = _of(fields.caller), callers
            own = callers
            if event.tag == _EventType.PyCall and fields.module is not None:
                callers = own = _frame("??", 0, event.name), callers
            elif event.tag == _EventType.PyCall:
                own = _of(fields.callsite), callers
        else:
            own = _frame("??", 0, event.name), own
        todo += ((child, callers, own) for child in event.children)


def _flat(stack: _Stack) -> Iterator[Frame]:
    while stack is not None:
        frame, stack = stack
        yield frame


def _of(state: Any) -> Frame:
    return _frame(state.file_name, state.line_number, state.function_name)


def _frame(filename: str, line: int, name: str) -> Frame:
    """As the viewer shows it; a frame that is not Python's has the file name "??" there."""
    return {"filename": filename, "line": line, "name": name}
