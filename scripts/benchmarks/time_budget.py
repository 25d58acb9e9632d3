"""The time of a training step, by kind of work: a trace of one step, its time by kind of work.

    python scripts/benchmarks/time_budget.py --out docs/benchmarks/time_budget.json
    python scripts/benchmarks/time_budget.py --trace run/profile_traces/iteration_8/rank0_trace.json

The cases are those of train.py, each a run of ``python -m titanlite.train`` that records one steady step; options that
are not known here go to it. On a GPU the kernels count, by their names, and ``idle`` is when none runs. Kernels run
beside each other on several streams, so parts may add up to more than the step; ``beside`` is by how much. On the CPU
the operators count, each without those it calls, and what is left is Python's and the autograd engine's.

Tracing slows what it traces: shares are to be trusted, not the step's own time.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import cases
import harness
import results
import train

STEP = 8  # which is recorded: what came before it compiled, and warmed the profiler up

# The first that is found in a kernel's, or an operator's, name counts.
GPU_PARTS = {
    "compiled": r"^triton_",
    "attention": r"flash|fmha|sdpa|attention",
    "casts": r"amax_kernel|cast_kernel|swiglu_backward_kernel|rescale_kernel",
    "communication": r"nccl",
    "matmuls": r"matmul_kernel|gemm|nvjet|cutlass|xmma|cublas|splitK",
    "optimizer": r"adam|multi_tensor",
    "copies": r"memcpy|memset|copy|CatArray|chunk_cat|fill",
}
CPU_PARTS = {
    "attention": r"scaled_dot_product",
    "casts": r"titanlite_quant|titanlite_(int8|mx)::cast",
    "communication": r"c10d|gloo",
    "matmuls": r"^aten::(mm|addmm|bmm|_scaled_mm|linear)$|titanlite_int8::multiply",
    "optimizer": r"adam|_foreach_norm|clip",
    "copies": r"^fsdp::|copy|chunk_cat|^aten::(cat|clone|fill_|zero_|_to_copy|contiguous)$",
    "compiled": r"Compiled",
}
_OTHERS = {"gpu": "other kernels", "cpu": "other operators"}
PARTS = ("matmuls", "attention", "casts", "compiled", "optimizer", "copies", "communication", *_OTHERS.values())


def part_of(name: str, kind: str) -> str:
    patterns = GPU_PARTS if kind == "gpu" else CPU_PARTS
    return next((part for part, pattern in patterns.items() if re.search(pattern, name, re.I)), _OTHERS[kind])


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of (begin, end)."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    return total


def own_times(events: list[dict[str, Any]]) -> Iterable[tuple[str, float]]:
    """(name, microseconds without those of what it called) of events that lie in each other, of any threads."""
    open_: dict[Any, list[list[Any]]] = {}  # by thread: name, end, own time
    for event in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        stack = open_.setdefault(event["tid"], [])
        while stack and stack[-1][1] <= event["ts"]:
            name, _, microseconds = stack.pop()
            yield name, microseconds
        if stack:
            stack[-1][2] -= event["dur"]
        stack.append([event["name"], event["ts"] + event["dur"], event["dur"]])
    for stack in open_.values():
        yield from ((name, microseconds) for name, _, microseconds in stack)


def budget(trace: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of the traced step by part.

    Args:
        trace: as torch.profiler exports it, of one step.

    Raises:
        ValueError: it is of no step, or of several.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X" and event.get("dur") is not None]
    steps = [e for e in events if e["name"].startswith("ProfilerStep#") and e.get("cat") == "user_annotation"]
    if len(steps) != 1:
        raise ValueError(f"a trace of {len(steps)} steps: must be of one")
    begin = steps[0]["ts"]
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    parts: defaultdict[str, float] = defaultdict(float)
    if kernels:
        # Kernels end after the host has left the step: it is as long as from one end of work to the next.
        end = max(steps[0]["ts"] + steps[0]["dur"], *(e["ts"] + e["dur"] for e in kernels))
        for event in kernels:
            parts[part_of(event["name"], "gpu")] += event["dur"]
        busy = covered((e["ts"], e["ts"] + e["dur"]) for e in kernels)
        whole = end - min(begin, *(e["ts"] for e in kernels))
        rest = {"idle": whole - busy, "beside": sum(parts.values()) - busy}
    else:
        whole = steps[0]["dur"]
        inside = [e for e in events if e.get("cat") == "cpu_op" and begin <= e["ts"] < begin + whole]
        for name, microseconds in own_times(inside):
            parts[part_of(name, "cpu")] += microseconds
        rest = {"host": whole - sum(parts.values())}
    milliseconds = {name: parts[name] / 1e3 for name in PARTS if parts[name]}
    return {"step_ms": whole / 1e3, "parts_ms": {**milliseconds, **{name: us / 1e3 for name, us in rest.items()}}}


def traced(case: cases.Case, args: argparse.Namespace, limit: float) -> cases.Run:
    """The budget of a run of ``case``, or why it failed."""
    profile = [f"--training.steps={STEP}", "--profiling.enable_profiling", f"--profiling.profile_freq={STEP}"]
    given = [*train.options(case, args), *profile, *args.options]
    with harness.trained(given, limit, args.device) as (child, run_folder):
        if child.status != 0:
            return {"failed": child.why()}
        path = run_folder / "profile_traces" / f"iteration_{STEP}" / "rank0_trace.json"
        return budget(json.loads(path.read_text(encoding="utf-8")))


def show(row: dict[str, Any]) -> str:
    parts = (f"{name} {ms:.1f} ms ({100 * ms / row['step_ms']:.1f}%)" for name, ms in row["parts_ms"].items())
    return f"{row['step_ms']:.1f} ms: {', '.join(parts)}"


def main(argv: list[str] | None = None) -> int:
    given = sys.argv[1:] if argv is None else argv
    if given and given[0] == "--trace":
        print(show(budget(json.loads(Path(given[1]).read_text(encoding="utf-8")))))
        return 0
    args = train.arguments(given, doc=__doc__, configs=["rowwise", "bf16"], modes=["compile"], batches=[1])
    rows: list[dict[str, Any]] = []
    for runs in cases.in_turn(train.chosen(args), args, traced, show):
        rows = [{**case._asdict(), **run} for case, done in runs.items() for run in done]
        results.save("time_budget", rows, args)
    return 0 if any("failed" not in row for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
