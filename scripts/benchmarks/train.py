"""The trainer end to end on one device: tokens per second, MFU and memory in bf16 and with each float8 recipe.

    python scripts/benchmarks/train.py --out docs/benchmarks/train.json

Each case is a run of ``python -m titanlite.train`` in a process of its own: Llama 3 8B cut to --layers layers, with its
vocabulary of 128256, sequences of 8192 tokens, selective activation checkpointing per operation, fused AdamW on float32
weights, text of the default source. What is quoted is the median over windows of five steps; the first steps, which
compile and warm up, are left out. With --repeats the cases take turns. A case that fails, or for which no time is
left, is a row that says why.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import harness
import results

CONFIGS = ("bf16", *harness.RECIPES)
MODES = ("compile", "eager")
WINDOW = 5  # steps between two rows of metrics.jsonl
WARMUP = 2  # rows: of the first step, and of the rest of the first window


class Case(NamedTuple):
    config: str
    compile: bool
    batch: int

    def __str__(self) -> str:
        return f"{self.config}, {'compiled' if self.compile else 'eager'}, batch {self.batch}"


def shape(args: argparse.Namespace) -> list[str]:
    """The options that all cases have."""
    toy = args.device == "cpu"
    return [
        "--experimental.custom_import=scripts.benchmarks.benchmark_models",
        "--model.name=llama3_benchmark",
        f"--model.flavor={'toy' if toy else f'8B-{args.layers}'}",
        f"--training.seq_len={64 if toy else args.seq_len}",
        f"--training.steps={steps(args)}",
        "--training.seed=0",
        "--activation_checkpoint.mode=selective",
        "--activation_checkpoint.selective_ac_option=op",
        f"--metrics.log_freq={WINDOW}",
        "--metrics.enable_tensorboard=false",
        "--sample.enable=false",
    ]


def steps(args: argparse.Namespace) -> int:
    return WINDOW * (1 + args.windows)


def options(case: Case) -> list[str]:
    given = [f"--training.compile={str(case.compile).lower()}", f"--training.local_batch_size={case.batch}"]
    if case.config != "bf16":
        given += [
            "--model.converters=float8",
            f"--float8.recipe_name={case.config}",
            "--float8.filter_fqns=output",
        ]
    return given


def train(case: Case, args: argparse.Namespace, limit: float) -> dict[str, Any]:
    """One run of ``case``: what it measured, or why it failed."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "titanlite.train", f"--job.dump_folder={folder}/run"]
        given = [*command, *shape(args), *options(case), *args.options]
        child = harness.run(given, limit, harness.device_env(args.device))
        if child.status != 0:
            return {"failed": child.why(), "seconds": child.seconds}
        lines = (Path(folder) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return {**measured([json.loads(line) for line in lines]), "seconds": child.seconds}


def measured(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the rows of metrics.jsonl say of the steady steps; of memory and loss, of all."""
    steady = rows[WARMUP:]
    mfu = [row["mfu"] for row in steady]
    return {
        "tps": statistics.median(row["tps"] for row in steady),
        "mfu_pct": None if None in mfu else statistics.median(mfu),
        "step_time_s": statistics.median(row["step_time_s"] for row in steady),
        "peak_memory_gib": max(row["memory_gib"] for row in rows),
        "first_loss": rows[0]["loss"],
        "loss": rows[-1]["loss"],
        "window_tps": [row["tps"] for row in steady],
    }


def cases(args: argparse.Namespace) -> Iterator[Case]:
    """The most telling first: all configurations of a batch size and mode, before the next of these."""
    for batch, mode, config in itertools.product(args.batches, args.modes, args.configs):
        yield Case(config, mode == "compile", batch)


def row_of(case: Case, runs: list[dict[str, Any]], args: argparse.Namespace) -> dict[str, Any]:
    """The medians over a case's runs that did not fail, and why others did."""
    row: dict[str, Any] = {"system": "titanlite", "config": case.config, "compile": case.compile, "batch": case.batch}
    row |= {"layers": 2 if args.device == "cpu" else args.layers}
    row |= {"seq_len": 64 if args.device == "cpu" else args.seq_len, "steps": steps(args)}
    good = [run for run in runs if "failed" not in run]
    for key in ("tps", "mfu_pct", "step_time_s", "peak_memory_gib", "first_loss", "loss"):
        values = [run[key] for run in good if run[key] is not None]
        row[key] = statistics.median(values) if values else None
    if failed := [run["failed"] for run in runs if "failed" in run]:
        row["failed"] = failed
    return {**row, "runs": runs}


def add_ratios(rows: list[dict[str, Any]]) -> None:
    """To each row its speed and its memory over bf16's of the same mode and batch size, where both were measured."""
    base = {(r["compile"], r["batch"]): r for r in rows if r["config"] == "bf16" and r["tps"]}
    for row in rows:
        bf16 = base.get((row["compile"], row["batch"]))
        if bf16 is not None and row["tps"]:
            row["speedup_over_bf16"] = row["tps"] / bf16["tps"]
            row["memory_over_bf16"] = row["peak_memory_gib"] / bf16["peak_memory_gib"]


def arguments(
    argv: list[str] | None,
    doc: str | None = __doc__,
    configs: Sequence[str] = CONFIGS,
    modes: Sequence[str] = MODES,
    batches: Sequence[int] = (1, 2),
) -> argparse.Namespace:
    """Read the command line of ``doc``'s script; the others are what is run by default."""
    parser = harness.parser(doc)
    parser.add_argument("--configs", type=harness.words, default=list(configs), help=f"of {','.join(CONFIGS)}")
    parser.add_argument("--modes", type=harness.words, default=list(modes), help=f"of {','.join(MODES)}")
    parser.add_argument("--batches", type=harness.numbers, default=list(batches), help="sequences per step")
    parser.add_argument("--layers", type=int, default=16, help="of Llama 3 8B's 32 (1 to 32)")
    parser.add_argument("--seq_len", type=int, default=8192, help="tokens per sequence")
    parser.add_argument("--windows", type=int, default=4, help=f"measured windows of {WINDOW} steps each")
    parser.add_argument("--repeats", type=int, default=1, help="how often each case runs, in turn")
    parser.add_argument("--case_seconds", type=float, default=180, help="the limit of one run")
    args, options_of_trainer = parser.parse_known_args(argv)
    args.options = options_of_trainer
    harness.check_known(parser, args, configs=CONFIGS, modes=MODES)
    harness.check_device(parser, args.device)
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    budget = harness.Budget(args.seconds)
    runs: dict[Case, list[dict[str, Any]]] = {case: [] for case in cases(args)}
    took: list[float] = []  # seconds of the runs so far: a case begins while as much is left as they took
    rows: list[dict[str, Any]] = []
    for repeat in range(args.repeats):
        for case, done in runs.items():
            left = budget.left()
            if left < max(statistics.median(took or [0.0]), 5.0):
                done.append({"failed": f"left out: {left:.0f} s were left of {args.seconds:.0f}", "seconds": 0.0})
            else:
                done.append(train(case, args, min(left, args.case_seconds)))
                took.append(done[-1]["seconds"])
            tps = done[-1].get("tps")
            print(f"{case}, run {repeat + 1}: {done[-1].get('failed') or f'{tps:,.0f} tokens/s'}", flush=True)
            rows = [row_of(case, done, args) for case, done in runs.items() if done]
            add_ratios(rows)
            if args.out:
                results.write("train", rows, args.out, args.device, toy=args.device == "cpu")
    columns = ("config", "compile", "batch", "tps", "mfu_pct", "peak_memory_gib", "loss")
    print(harness.show(rows, (*columns, "speedup_over_bf16", "memory_over_bf16")))
    return 0 if any(row["tps"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
