"""titanlite against torchtitan with torchao: the same model, data and step, in turn, on the same device.

    pip install torchtitan==0.2.2 torchao==0.17.0     # into the environment that has titanlite
    python scripts/benchmarks/peers.py --out docs/benchmarks/peers.json

Each case runs in a process of its own (peer_worker.py; peer_torchtitan.py says which parts of torchtitan are used):
Llama 3 8B cut to --layers layers, FSDP2's mixed precision with bfloat16 parameters and float32 masters, fused AdamW,
clipping, selective activation checkpointing per operation, and compile alike. The two systems take turns, and who
begins changes from pair to pair. They begin with the same weights, and the losses and gradient norms of their first
steps are compared: where they differ by more than rounding explains, the speeds are not of the same computation, the
row says so and the exit status is 1. A case that fails, or for which no time is left, is a row that says why.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cases
import harness
import results
from cases import Case

OTHER = "torchtitan+torchao"
SYSTEMS = ("titanlite", OTHER)
NEEDED = ("torchtitan", "torchao")
INSTALL = "pip install torchtitan==0.2.2 torchao==0.17.0"
# The largest relative differences of the first steps that rounding explains: two implementations of one network in
# bfloat16, or in float8, whose scales and accumulation differ in the last bits.
LOSS_BOUND = {"bf16": 2e-3, "float8": 5e-3}
NORM_BOUND = {"bf16": 3e-2, "float8": 1e-1}


def options(case: Case, args: argparse.Namespace) -> list[str]:
    """The case in the options of titanlite's command; peer_torchtitan.py reads them for torchtitan."""
    return [
        *cases.options(case, args),
        f"--training.steps={args.steps}",
        "--training.spike_sigmas=0",
        # The same learning rate at every step, so that no schedules have to be the same.
        "--optimizer.lr=1e-4",
        "--lr_scheduler.warmup_steps=0",
        "--lr_scheduler.decay_ratio=0",
    ]


def measure(case: Case, args: argparse.Namespace, limit: float) -> cases.Run:
    """One run of ``case``: what it measured, or why it failed."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        worker = str(Path(__file__).with_name("peer_worker.py"))
        given = [*options(case, args), f"--job.dump_folder={folder}/run"]
        command = [sys.executable, worker, case.system.split("+")[0], str(result), *given]
        # torchtitan's own script sets the allocator so; both get it.
        env = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **harness.device_env(args.device)}
        child = harness.run(command, limit, env)
        if child.status != 0 or not result.exists():
            return {"failed": child.why()}
        return json.loads(result.read_text(encoding="utf-8"))  # type: ignore[no-any-return]


def turns(args: argparse.Namespace) -> list[Case]:
    """The order of a round: pairs of the same case, and who begins changes."""
    pairs = [(c, m == "compile", b) for b in args.batches for m in args.modes for c in args.configs]
    order = []
    for i, pair in enumerate(pairs):
        order += [Case(system, *pair) for system in (SYSTEMS if i % 2 == 0 else SYSTEMS[::-1])]
    return order


def row_of(case: Case, runs: list[cases.Run], args: argparse.Namespace) -> dict[str, Any]:
    """With the first losses and norms of the first run that did not fail."""
    good = next((run for run in runs if "failed" not in run), {})
    return {**cases.row_of(case, runs, args), **{key: good.get(key) for key in ("losses", "grad_norms")}}


def difference(a: list[float], b: list[float]) -> float:
    """The largest relative difference; infinite where a value is not finite."""
    differences = [abs(x - y) / max(abs(y), 1e-12) for x, y in zip(a, b, strict=True)]
    return max(differences) if all(map(math.isfinite, differences)) else math.inf


def compare(rows: list[dict[str, Any]]) -> None:
    """To titanlite's rows what they are over torchtitan's of the same case, and whether both computed the same; to all
    what they are over the same system's bf16, in speed and memory."""
    cases.add_ratios(rows)
    others = {(r["config"], r["compile"], r["batch"]): r for r in rows if r["system"] == OTHER and r["tps"]}
    for row in rows:
        other = others.get((row["config"], row["compile"], row["batch"]))
        if row["system"] == OTHER or not row["tps"] or other is None:
            continue
        kind = "bf16" if row["config"] == "bf16" else "float8"
        row["speedup_over_peer"] = row["tps"] / other["tps"]
        row["memory_over_peer"] = row["peak_memory_gib"] / other["peak_memory_gib"]
        row["loss_difference"] = difference(row["losses"], other["losses"])
        row["grad_norm_difference"] = difference(row["grad_norms"], other["grad_norms"])
        row["same_computation"] = (
            row["loss_difference"] <= LOSS_BOUND[kind] and row["grad_norm_difference"] <= NORM_BOUND[kind]
        )


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = harness.gpu_parser(__doc__)
    cases.add_options(parser, harness.CONFIGS[:3], ["compile"], [1])
    parser.add_argument("--steps", type=int, default=20, help="steps of a run; the first five are not timed")
    args = parser.parse_args(argv)
    cases.check(parser, args)
    if args.steps < 8:
        parser.error(f"--steps: {args.steps} must be at least 8, of which the first five are not timed")
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        print(f"peers.py: {' and '.join(missing)}: not installed, and there is nothing to compare with: {INSTALL}")
        return 2
    # What they import in turn is known only to them.
    tried = harness.run([sys.executable, "-c", "import peer_torchtitan"], 120, harness.device_env(args.device))
    if tried.status != 0:
        print(f"peers.py: torchtitan {results.version('torchtitan')} cannot be imported: {tried.why()}")
        return 2
    about = {name: results.version(name) for name in NEEDED}
    rows: list[dict[str, Any]] = []
    for runs in cases.in_turn(turns(args), args, measure, together=len(SYSTEMS)):
        rows = [row_of(case, done, args) for case, done in runs.items()]
        compare(rows)
        results.save("peers", rows, args, **about)
    columns = ("system", "config", "compile", "batch", "tps", "mfu_pct", "peak_memory_gib", "speedup_over_bf16")
    print(
        harness.show(rows, (*columns, "speedup_over_peer", "memory_over_peer", "loss_difference", "same_computation"))
    )
    compared = [row["same_computation"] for row in rows if "same_computation" in row]
    return 0 if compared and all(compared) else 1


if __name__ == "__main__":
    sys.exit(main())
