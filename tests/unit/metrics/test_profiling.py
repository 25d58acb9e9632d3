"""Traces and memory snapshots: what is in the files, and of which steps there are any."""

from __future__ import annotations

import json
import pickle
import pickletools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.cuda._memory_viz import segsum, trace

from titanlite.config.schema import Profiling
from titanlite.metrics.device import is_out_of_memory
from titanlite.metrics.profiling import Profiler

# What the viewer's own reader of pickles knows (torch/utils/viz/MemoryViz.js).
VIEWER_READS = {
    *("PROTO", "FRAME", "MARK", "STOP", "MEMOIZE", "BINGET", "LONG_BINGET", "BININT", "BININT1", "BININT2", "LONG1"),
    *("EMPTY_DICT", "SETITEM", "SETITEMS", "EMPTY_LIST", "APPEND", "APPENDS", "SHORT_BINUNICODE", "BINUNICODE"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "NONE", "NEWTRUE", "NEWFALSE", "BINFLOAT"),
}


def profile(folder: Path, step: Callable[[int], None], after: int, last: int, **options: Any) -> None:
    """Steps behind step ``after`` up to ``last``; ``step`` is called with the number of each."""
    profiler = Profiler(Profiling(**options), folder, 0, torch.device("cpu"))
    with profiler.steps(after) as step_done:
        for number in range(after + 1, last + 1):
            step(number)
            step_done()


def operators(path: Path) -> list[str]:
    return [event["name"] for event in json.loads(path.read_text())["traceEvents"] if event.get("cat") == "cpu_op"]


def traces(folder: Path) -> dict[str, int]:
    """How many matmuls there are in each trace."""
    found = sorted(folder.glob("profile_traces/*/rank0_trace.json"))
    return {path.parent.name: operators(path).count("aten::mm") for path in found}


def matmuls(number: int) -> None:
    for _ in range(number):
        torch.mm(torch.ones(2, 2), torch.ones(2, 2))


@pytest.mark.parametrize("snapshots", [False, True])
@pytest.mark.parametrize(
    ("freq", "after", "last", "expected"),
    [(1, 0, 2, [1, 2]), (2, 0, 5, [2, 4]), (3, 1, 4, [3]), (10, 15, 20, [20]), (10, 19, 21, [20]), (10, 0, 9, [])],
)
def test_a_trace_is_of_its_own_step_alone(
    tmp_path: Path, freq: int, after: int, last: int, expected: list[int], snapshots: bool
) -> None:
    """Step n has n matmuls. A run that went on behind step ``after`` counts as one that did not stop there."""
    profile(tmp_path, matmuls, after, last, enable_profiling=True, profile_freq=freq, enable_memory_snapshot=snapshots)
    assert traces(tmp_path) == {f"iteration_{step}": step for step in expected}
    saved = {path.parent.name for path in tmp_path.glob("memory_snapshot/*/rank0_memory_snapshot.pickle")}
    assert saved == ({f"iteration_{step}" for step in expected} if snapshots else set())


def load(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    assert {opcode.name for opcode, _, _ in pickletools.genops(data)} <= VIEWER_READS
    assert data[1] <= 4  # the protocol
    found: dict[str, Any] = pickle.loads(data)
    return found


def test_a_snapshot_of_the_cpu_has_what_was_allocated_and_what_is_alive(tmp_path: Path) -> None:
    old, kept = torch.empty(1000, 3), []
    compilers = torch._to_functional_tensor(torch.empty(3))  # whose address cannot be asked for

    def step(number: int) -> None:
        kept.append(torch.empty(number, 1000))
        torch.empty(number, 7000)  # freed at once

    profile(tmp_path, step, 0, 4, enable_memory_snapshot=True, profile_freq=2)
    found = load(tmp_path / "memory_snapshot" / "iteration_4" / "rank0_memory_snapshot.pickle")
    (events,) = found["device_traces"]
    sizes = [(event["action"], event["size"]) for event in events if event["size"] in (16000, 112000)]
    taken, given = ["segment_alloc", "alloc"], ["free_requested", "free_completed", "segment_free"]
    assert sizes == [*((a, 16000) for a in taken), *((a, 112000) for a in taken), *((a, 112000) for a in given)]
    # Every frame as it was: the innermost is the operator.
    (allocation,) = [event for event in events if event["action"] == "alloc" and event["size"] == 16000]
    assert allocation["frames"][0]["name"] == "aten::empty"
    own = [frame["name"] for frame in allocation["frames"] if frame["filename"].endswith("test_profiling.py")]
    assert own[:2] == ["step", "profile"]
    assert allocation["addr"] == kept[3].data_ptr()
    blocks = {segment["address"]: segment["blocks"][0] for segment in found["segments"]}
    assert blocks[kept[3].data_ptr()]["frames"] == allocation["frames"]
    del compilers
    for tensor, shape in ((old, "(1000, 3)"), (kept[0], "(1, 1000)")):
        block = blocks[tensor.data_ptr()]
        assert block["size"] == tensor.untyped_storage().nbytes()
        assert block["frames"] == [
            {"filename": "alive before the recording", "line": 0, "name": f"Tensor {shape} float32"}
        ]


def test_a_snapshot_of_a_step_can_be_walked_back_as_the_viewer_does(train: Any) -> None:
    """From what is alive at the end back to the beginning: every allocation is alive when its turn comes, and nothing
    is freed that is. The memory at the highest point is that of a step of the model."""
    run = train(profiling__enable_memory_snapshot="true", profiling__profile_freq=3)
    assert run.status == 0, run.output
    assert "USDT" not in run.output
    found = load(run.folder / "memory_snapshot" / "iteration_3" / "rank0_memory_snapshot.pickle")
    assert "blocks" in segsum(found)
    assert "aten::" in str(found["device_traces"])
    trace(found)
    alive = {segment["address"]: segment["total_size"] for segment in found["segments"]}
    peak = now = sum(alive.values())
    for event in reversed(found["device_traces"][0]):
        address, size = event["addr"], event["size"]
        if event["action"] == "alloc":
            assert alive.pop(address) == size
            now -= size
        elif event["action"] == "free_completed":
            assert address not in alive
            alive[address] = size
            now += size
        peak = max(peak, now)
    state = 3 * 4 * 6_163_712  # parameters and two moments
    assert state < sum(alive.values()) < 1.2 * state
    assert peak > state + 4 * 6_163_712  # and gradients
    names = {frame["name"] for event in found["device_traces"][0] for frame in event["frames"]}
    assert {"nn.Module: FeedForward_1", "forward_backward", "causal_attention"} <= names


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling ..."), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("DefaultCPUAllocator: can't allocate memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected
    outer = RuntimeError("stage 1 failed to run its forward")
    outer.__cause__ = error
    assert is_out_of_memory(outer) is expected


def test_a_file_that_cannot_be_written_does_not_end_the_run(train: Any, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "traces").symlink_to("/proc/version")
    run = train(profiling__enable_profiling="true", profiling__profile_freq=2, profiling__save_traces_folder="traces/x")
    assert run.status == 0, run.output
    assert "the profiler trace of step 2 CANNOT BE WRITTEN" in run.output


def test_each_rank_has_files_of_its_own(train: Any) -> None:
    run = train(2, profiling__enable_profiling="true", profiling__profile_freq=2, training__steps=4)
    assert run.status == 0, run.output
    for step in (2, 4):
        for rank in (0, 1):
            path = run.folder / "profile_traces" / f"iteration_{step}" / f"rank{rank}_trace.json"
            names = [event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]]
            steps = [name for name in names if name.startswith("ProfilerStep#")]
            assert steps == [f"ProfilerStep#{step}"]
            assert names.count("Optimizer.step#AdamW.step") == 1
            assert "aten::mm" in names
