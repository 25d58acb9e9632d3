"""Traces: what is in the files, and of which steps there are any. (Memory snapshots need a GPU: tests/gpu.)"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from titanlite.config.schema import Profiling
from titanlite.metrics.device import is_out_of_memory
from titanlite.metrics.profiling import Profiler


def profile(folder: Path, step: Callable[[int], None], after: int, last: int, **options: Any) -> None:
    """Steps behind step ``after`` up to ``last``; ``step`` is called with the number of each."""
    profiler = Profiler(Profiling(**options), folder, 0, torch.device("cpu"))
    with profiler.steps(after, last) as step_done:
        for number in range(after + 1, last + 1):
            step(number)
            step_done()


def operators(path: Path) -> list[str]:
    return [event["name"] for event in json.loads(path.read_text())["traceEvents"] if event.get("cat") == "cpu_op"]


def traces(folder: Path) -> dict[str, int]:
    """How many matmuls there are in each trace."""
    paths = sorted(folder.glob("profile_traces/*/rank0_trace.json"))
    return {path.parent.name: operators(path).count("aten::mm") for path in paths}


def matmuls(number: int) -> None:
    for _ in range(number):
        torch.mm(torch.ones(2, 2), torch.ones(2, 2))


@pytest.mark.parametrize(
    ("freq", "after", "last", "expected"),
    [(1, 0, 2, [1, 2]), (2, 0, 5, [2, 4]), (3, 1, 4, [3]), (10, 15, 20, [20]), (10, 19, 21, [20]), (10, 0, 9, [])],
)
def test_a_trace_is_of_its_own_step_alone(
    tmp_path: Path, freq: int, after: int, last: int, expected: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    """Step n has n matmuls. A run that went on behind step ``after`` counts as one that did not stop there."""
    profile(tmp_path, matmuls, after, last, enable_profiling=True, profile_freq=freq)
    assert traces(tmp_path) == {f"iteration_{step}": step for step in expected}
    warned = f"profiling.profile_freq = {freq}: none of the steps {after + 1} to {last} is a multiple of it"
    assert any(message.startswith(warned) for message in caplog.messages) == (not expected)


def test_memory_snapshots_without_a_gpu_are_refused(train: Any) -> None:
    run = train(profiling__enable_memory_snapshot="true")
    assert run.status == 2
    assert "profiling.enable_memory_snapshot = true (the argument" in run.output
    assert not (run.folder / "metrics.jsonl").exists()


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
    (tmp_path / "run" / "traces").write_text("no folder")
    run = train(profiling__enable_profiling="true", profiling__profile_freq=2, profiling__save_traces_folder="traces/x")
    assert run.status == 0, run.output
    assert "the profiler trace of step 2 CANNOT BE WRITTEN" in run.output


@pytest.mark.slow
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
