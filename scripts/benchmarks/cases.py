"""The cases of train.py, peers.py and time_budget.py: each a model that is trained in a process of its own. They
take turns, and one that fails, or for which no time is left, is a row that says why."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import benchmark_models
import harness

MODES = ("compile", "eager")
Run = dict[str, Any]


class Case(NamedTuple):
    system: str
    config: str
    compile: bool
    batch: int

    def __str__(self) -> str:
        return f"{self.system}, {self.config}, {'compiled' if self.compile else 'eager'}, batch {self.batch}"


def add_options(
    parser: argparse.ArgumentParser, configs: Sequence[str], modes: Sequence[str], batches: Sequence[int]
) -> None:
    """The options that choose cases, and by default choose these."""
    parser.add_argument("--configs", type=harness.words, default=[*configs], help=f"of {','.join(harness.CONFIGS)}")
    parser.add_argument("--modes", type=harness.words, default=[*modes], help=f"of {','.join(MODES)}")
    parser.add_argument("--batches", type=harness.numbers, default=[*batches], help="sequences per step")
    parser.add_argument("--layers", type=int, default=16, help="of Llama 3 8B's 32 (1 to 32)")
    parser.add_argument("--seq_len", type=int, default=8192, help="tokens per sequence")
    parser.add_argument("--repeats", type=int, default=1, help="how often each case runs, in turn")
    parser.add_argument("--case_seconds", type=float, default=180, help="the limit of one run")


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with status 2 where there is no such case or device; choose the flavor, on the CPU a toy."""
    harness.check_known(parser, args, configs=harness.CONFIGS, modes=MODES)
    harness.check_device(parser, args.device)
    args.flavor = f"8B-{args.layers}"
    if args.device == "cpu":
        args.flavor, args.layers, args.seq_len = "toy", 2, 64


def options(case: Case, args: argparse.Namespace) -> list[str]:
    """The case in the options of titanlite's command."""
    return [
        *benchmark_models.options(
            args.flavor, case.config, seq_len=args.seq_len, batch=case.batch, compile=case.compile
        ),
        "--training.seed=0",
        "--activation_checkpoint.mode=selective",
        "--activation_checkpoint.selective_ac_option=op",
        "--metrics.enable_tensorboard=false",
    ]


def in_turn(
    cases: Iterable[Case],
    args: argparse.Namespace,
    measure: Callable[[Case, argparse.Namespace, float], Run],
    show: Callable[[Run], str] = lambda run: f"{run['tps']:,.0f} tokens/s",
    together: int = 1,
) -> Iterator[dict[Case, list[Run]]]:
    """Run each case ``args.repeats`` times. Yields the runs so far, by case, after each.

    Args:
        measure: of a case, with the options and the seconds that it may take: what it measured, or ``failed``.
        show: what is printed of a run.
        together: so many cases in a row are compared: the first begins only where there is time for all of them.
    """
    budget = harness.Budget(args.seconds)
    runs: dict[Case, list[Run]] = {case: [] for case in cases}
    took: list[float] = []  # seconds of the runs so far
    for _ in range(args.repeats):
        for i, (case, done) in enumerate(runs.items()):
            left = budget.left()
            if left < (5.0 if i % together else max(together * statistics.median(took or [0.0]), 5.0)):
                done.append({"failed": f"left out: {left:.0f} s were left of {args.seconds:.0f}", "seconds": 0.0})
            else:
                start = time.perf_counter()
                run = measure(case, args, min(left, args.case_seconds))
                took.append(time.perf_counter() - start)
                done.append({**run, "seconds": took[-1]})
            print(f"{case}: {done[-1].get('failed') or show(done[-1])}", flush=True)
            yield {case: done for case, done in runs.items() if done}


def row_of(case: Case, runs: list[Run], args: argparse.Namespace, *more: str) -> dict[str, Any]:
    """The medians over a case's runs that did not fail, of speed, memory and ``more``; and why others did."""
    row: dict[str, Any] = {**case._asdict(), "layers": args.layers, "seq_len": args.seq_len}
    for key in ("tps", "mfu_pct", "step_time_s", "peak_memory_gib", *more):
        values = [run[key] for run in runs if "failed" not in run and run[key] is not None]
        row[key] = statistics.median(values) if values else None
    if failed := [run["failed"] for run in runs if "failed" in run]:
        row["failed"] = failed
    return {**row, "runs": runs}


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """To each row its speed and its memory over bf16's of the same system, mode and batch size, if both were
    measured."""
    base = {(r["system"], r["compile"], r["batch"]): r for r in rows if r["config"] == "bf16" and r["tps"]}
    for row in rows:
        bf16 = base.get((row["system"], row["compile"], row["batch"]))
        if bf16 is not None and row["tps"]:
            row["speedup_over_bf16"] = row["tps"] / bf16["tps"]
            row["memory_over_bf16"] = row["peak_memory_gib"] / bf16["peak_memory_gib"]
