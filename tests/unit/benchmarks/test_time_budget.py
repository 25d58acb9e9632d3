"""scripts/benchmarks/time_budget.py: what it makes of a trace, by hand and of a real run on the CPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import time_budget

pytestmark = pytest.mark.long


def event(name: str, cat: str, ts: float, dur: float, tid: int = 0) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": cat, "ts": ts, "dur": dur, "tid": tid}


STEP = event("ProfilerStep#8", "user_annotation", 0, 1000)


def test_on_a_gpu_kernels_count_and_what_runs_beside_each_other_counts_once() -> None:
    kernels = [
        event("nvjet_qqtst_128x256", "kernel", 100, 400, tid=7),
        event("triton_poi_fused__to_copy_0", "kernel", 500, 100, tid=7),
        event("ncclDevKernel_AllGather", "kernel", 450, 100, tid=8),  # beside both
        event("Memcpy DtoD", "gpu_memcpy", 1000, 100, tid=7),  # after the host has left the step
    ]
    budget = time_budget.budget({"traceEvents": [STEP, *kernels, event("aten::mm", "cpu_op", 10, 5)]})
    assert budget["step_ms"] == pytest.approx(1.1)
    assert budget["parts_ms"] == pytest.approx(
        {"matmuls": 0.4, "compiled": 0.1, "copies": 0.1, "communication": 0.1, "idle": 0.5, "beside": 0.1}
    )


def test_on_the_cpu_each_operator_counts_without_those_it_calls() -> None:
    operators = [
        event("aten::linear", "cpu_op", 100, 300),
        event("aten::mm", "cpu_op", 150, 200),
        event("aten::silu", "cpu_op", 400, 100),
        event("aten::mm", "cpu_op", 2000, 100),  # of another step
    ]
    budget = time_budget.budget({"traceEvents": [STEP, *operators]})
    assert budget["parts_ms"] == pytest.approx({"matmuls": 0.3, "other operators": 0.1, "host": 0.6})
    assert sum(budget["parts_ms"].values()) == pytest.approx(budget["step_ms"])


@pytest.mark.parametrize("steps", [[], [STEP, STEP]])
def test_a_trace_of_another_number_of_steps(steps: list[dict[str, Any]]) -> None:
    with pytest.raises(ValueError, match=f"of {len(steps)} steps"):
        time_budget.budget({"traceEvents": steps})


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26", "attention"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64", "matmuls"),
        ("row_cast_kernel", "casts"),
        ("swiglu_backward_kernel", "casts"),
        ("triton_per_fused_native_layer_norm_0", "compiled"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdam>", "optimizer"),
        ("void at::native::elementwise_kernel<128, 4>", "other kernels"),
    ],
)
def test_names_of_kernels(name: str, part: str) -> None:
    assert time_budget.part_of(name, "gpu") == part


def test_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "time_budget.json"
    assert time_budget.main(["--device=cpu", "--configs=bf16", "--modes=eager", f"--out={out}"]) == 0
    (row,) = json.loads(out.read_text())["results"]
    assert row["config"] == "bf16"
    assert {"matmuls", "attention", "optimizer", "host"} < set(row["parts_ms"])
    assert sum(row["parts_ms"].values()) == pytest.approx(row["step_ms"])
    assert "matmuls" in capsys.readouterr().out
