"""Traces, memory snapshots and the end of memory on a real GPU."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

# After the second step little more can be had than there is.
LIMIT = """
import torch
from titanlite.converters import register_converter

@register_converter("limit")
class Limit:
    def __init__(self, config, mesh):
        self.steps = 0
    def convert(self, model):
        return "little memory later"
    def post_optimizer_hook(self, model):
        self.steps += 1
        if self.steps == 2:
            torch.cuda.empty_cache()
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (8 << 20)) / total)
"""


def test_a_trace_has_the_kernels_of_its_step(train: Any) -> None:
    run = train(profiling__enable_profiling="true", profiling__profile_freq=2, training__steps=4)
    assert run.status == 0, run.output
    for step in (2, 4):
        path = run.folder / "profile_traces" / f"iteration_{step}" / "rank0_trace.json"
        events = json.loads(path.read_text())["traceEvents"]
        assert any(event.get("cat") == "kernel" for event in events)
        names = [event.get("name", "") for event in events if event.get("cat") == "user_annotation"]
        assert [name for name in names if name.startswith("ProfilerStep#")] == [f"ProfilerStep#{step}"]


def test_a_snapshot_has_the_stacks_of_what_is_alive(train: Any) -> None:
    run = train(
        profiling__enable_memory_snapshot="true",
        profiling__enable_profiling="true",
        profiling__profile_freq=2,
        training__steps=4,
    )
    assert run.status == 0, run.output
    paths = sorted(run.folder.glob("memory_snapshot/*/rank0_memory_snapshot.pickle"))
    assert [path.parent.name for path in paths] == ["iteration_2", "iteration_4"]
    snapshot = pickle.loads(paths[1].read_bytes())
    blocks = [block for segment in snapshot["segments"] for block in segment["blocks"]]
    alive = [block for block in blocks if block["state"] == "active_allocated"]
    assert sum(block["size"] for block in alive) >= 3 * 4 * 6_163_712  # parameters and two moments
    functions = {frame["name"] for block in alive for frame in block["frames"]}
    assert {"allocate", "step"} <= functions
    assert any(event["action"] == "alloc" for event in snapshot["device_traces"][0])


def test_the_end_of_memory_is_reported_with_what_would_have_saved_the_run(train: Any, tmp_path: Path) -> None:
    (tmp_path / "limit.py").write_text(LIMIT)
    run = train(
        experimental__custom_import="limit",
        model__converters="limit",
        profiling__enable_memory_snapshot="true",
        training__seq_len=1024,
        training__local_batch_size=8,
    )
    assert run.status == 1
    assert run.output.count("titanlite: error:") == 1
    assert "Traceback" not in run.output
    assert "rank 0 ran out of memory in step 3, at " in run.output
    assert "OutOfMemoryError: CUDA out of memory. Tried to allocate" in run.output
    path = run.folder / "memory_snapshot" / "iteration_2_exit" / "rank0_memory_snapshot.pickle"
    events = pickle.loads(path.read_bytes())["device_traces"][0]
    assert any(event["action"] == "oom" for event in events)
    for option in ("--activation_checkpoint.mode=full", "--training.local_batch_size=1", "--training.enable_cpu_off"):
        assert option in run.output
    assert "on 2 devices: --parallelism.data_parallel_shard_degree=2" in run.output
