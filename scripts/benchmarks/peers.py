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
import statistics
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import harness
import results

CONFIGS = ("bf16", "tensorwise", "rowwise", "rowwise_with_gw_hp")
OTHER = "torchtitan+torchao"
SYSTEMS = ("titanlite", OTHER)
NEEDED = ("torchtitan", "torchao")
INSTALL = "pip install torchtitan==0.2.2 torchao==0.17.0"
# The largest relative differences of the first steps that rounding explains: two implementations of one network in
# bfloat16, or in float8, whose scales and accumulation differ in the last bits.
LOSS_BOUND = {"bf16": 2e-3, "float8": 5e-3}
NORM_BOUND = {"bf16": 3e-2, "float8": 1e-1}


class Case(NamedTuple):
    system: str
    config: str
    compile: bool
    batch: int

    def __str__(self) -> str:
        return f"{self.system}, {self.config}, {'compiled' if self.compile else 'eager'}, batch {self.batch}"


def options(case: Case, args: argparse.Namespace) -> list[str]:
    """The case in the options of titanlite's command; peer_torchtitan.py reads them for torchtitan."""
    toy = args.device == "cpu"
    given = [
        "--experimental.custom_import=benchmark_models",
        "--model.name=llama3_benchmark",
        f"--model.flavor={'toy' if toy else f'8B-{args.layers}'}",
        f"--training.seq_len={64 if toy else args.seq_len}",
        f"--training.local_batch_size={case.batch}",
        f"--training.steps={args.steps}",
        f"--training.compile={str(case.compile).lower()}",
        "--training.seed=0",
        "--training.spike_sigmas=0",
        # The same learning rate at every step, so that no schedules have to be the same.
        "--optimizer.lr=1e-4",
        "--lr_scheduler.warmup_steps=0",
        "--lr_scheduler.decay_ratio=0",
        "--activation_checkpoint.mode=selective",
        "--activation_checkpoint.selective_ac_option=op",
        "--metrics.enable_tensorboard=false",
    ]
    if case.config != "bf16":
        given += ["--model.converters=float8", f"--float8.recipe_name={case.config}", "--float8.filter_fqns=output"]
    return given


def measure(case: Case, args: argparse.Namespace, limit: float) -> dict[str, Any]:
    """One run of ``case``: what it measured, or why it failed."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        worker = str(Path(__file__).with_name("peer_worker.py"))
        given = [*options(case, args), f"--job.dump_folder={folder}/run"]
        command = [sys.executable, worker, case.system.split("+")[0], str(result), *given]
        # torchtitan's own script sets the allocator so; both get it.
        env = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", **harness.device_env(args.device)}
        child = harness.run(command, limit, env)
        if child.status == 0 and result.exists():
            measured: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
            return {**measured, "seconds": child.seconds}
        return {"failed": child.why(), "seconds": child.seconds}


def turns(args: argparse.Namespace) -> list[Case]:
    """The order of a round: pairs of the same case, and who begins changes."""
    pairs = [(c, m == "compile", b) for b in args.batches for m in args.modes for c in args.configs]
    order = []
    for i, pair in enumerate(pairs):
        order += [Case(system, *pair) for system in (SYSTEMS if i % 2 == 0 else SYSTEMS[::-1])]
    return order


def row_of(case: Case, runs: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    toy = args.device == "cpu"
    row: dict[str, Any] = {
        **case._asdict(),
        "layers": 2 if toy else args.layers,
        "seq_len": 64 if toy else args.seq_len,
    }
    good = [run for run in runs if "failed" not in run]
    for key in ("tps", "mfu_pct", "step_time_s", "peak_memory_gib"):
        values = [run[key] for run in good if run[key] is not None]
        row[key] = statistics.median(values) if values else None
    for key in ("losses", "grad_norms"):
        row[key] = good[0][key] if good else None
    if failed := [run["failed"] for run in runs if "failed" in run]:
        row["failed"] = failed
    return {**row, "runs": runs}


def difference(a: list[float], b: list[float]) -> float:
    """The largest relative difference; infinite where a value is not finite."""
    found = [abs(x - y) / max(abs(y), 1e-12) for x, y in zip(a, b, strict=True)]
    return max(found) if all(map(math.isfinite, found)) else math.inf


def compare(rows: list[dict[str, Any]]) -> None:
    """To titanlite's rows what they are over torchtitan's of the same case, and whether both computed the same; to all
    what they are over the same system's bf16, in speed and memory."""

    def key(row: dict[str, Any], system: str, config: str) -> tuple[Any, ...]:
        return system, config, row["compile"], row["batch"]

    by_case = {key(row, row["system"], row["config"]): row for row in rows if row["tps"]}
    for row in rows:
        bf16 = by_case.get(key(row, row["system"], "bf16"))
        if row["tps"] and bf16:
            row["speedup_over_bf16"] = row["tps"] / bf16["tps"]
            row["memory_over_bf16"] = row["peak_memory_gib"] / bf16["peak_memory_gib"]
        other = by_case.get(key(row, OTHER, row["config"]))
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
    parser = harness.parser(__doc__)
    parser.add_argument("--configs", type=harness.words, default=list(CONFIGS[:3]), help=",".join(CONFIGS))
    parser.add_argument("--modes", type=harness.words, default=["compile"], help="compile,eager")
    parser.add_argument("--batches", type=harness.numbers, default=[1], help="sequences per step, for example 1,2")
    parser.add_argument("--layers", type=int, default=16, help="of Llama 3 8B's 32 (1 to 32)")
    parser.add_argument("--seq_len", type=int, default=8192, help="tokens per sequence")
    parser.add_argument("--steps", type=int, default=20, help="steps of a run; the first five are not timed")
    parser.add_argument("--repeats", type=int, default=1, help="rounds")
    parser.add_argument("--case_seconds", type=float, default=180, help="the limit of one run")
    args = parser.parse_args(argv)
    harness.check_known(parser, args, configs=CONFIGS, modes=("compile", "eager"))
    if args.steps < 8:
        parser.error(f"--steps: {args.steps} must be at least 8, of which the first five are not timed")
    harness.check_device(parser, args.device)
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
    budget = harness.Budget(args.seconds)
    about = {"toy": args.device == "cpu", **{name: results.version(name) for name in NEEDED}}
    runs: dict[Case, list[dict[str, Any]]] = {case: [] for case in turns(args)}
    took: list[float] = []  # seconds of the runs so far
    rows: list[dict[str, Any]] = []
    for _ in range(args.repeats):
        for i, (case, done) in enumerate(runs.items()):
            left = budget.left()
            # Nobody begins where there is no time for the other's turn; who is second begins in any case.
            if left < (5.0 if i % 2 else max(2 * statistics.median(took or [0.0]), 5.0)):
                done.append({"failed": f"left out: {left:.0f} s were left of {args.seconds:.0f}", "seconds": 0.0})
            else:
                done.append(measure(case, args, min(left, args.case_seconds)))
                took.append(done[-1]["seconds"])
            tps = done[-1].get("tps")
            print(f"{case}: {done[-1].get('failed') or f'{tps:,.0f} tokens/s'}", flush=True)
            rows = [row_of(case, done, args) for case, done in runs.items() if done]
            compare(rows)
            if args.out:
                results.write("peers", rows, args.out, args.device, **about)
    columns = ("system", "config", "compile", "batch", "tps", "mfu_pct", "peak_memory_gib", "speedup_over_bf16")
    print(
        harness.show(rows, (*columns, "speedup_over_peer", "memory_over_peer", "loss_difference", "same_computation"))
    )
    compared = [row["same_computation"] for row in rows if "same_computation" in row]
    return 0 if compared and all(compared) else 1


if __name__ == "__main__":
    sys.exit(main())
