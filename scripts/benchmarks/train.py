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
import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import cases
import harness
import results
from cases import Case

WINDOW = 5  # steps between two rows of metrics.jsonl
WARMUP = 2  # rows: of the first step, and of the rest of the first window


def options(case: Case, args: argparse.Namespace) -> list[str]:
    """Return the options of the trainer's command; those that were given for it come last."""
    fixed = [f"--training.steps={steps(args)}", f"--metrics.log_freq={WINDOW}", "--sample.enable=false"]
    return [*cases.options(case, args), *fixed]


def steps(args: argparse.Namespace) -> int:
    return WINDOW * (1 + args.windows)


def train(case: Case, args: argparse.Namespace, limit: float) -> cases.Run:
    """One run of ``case``: what it measured, or why it failed."""
    with harness.trained([*options(case, args), *args.options], limit, args.device) as (child, run_folder):
        return {"failed": child.why()} if child.status != 0 else measured(harness.metrics_of(run_folder))


def measured(rows: list[dict[str, Any]]) -> cases.Run:
    """Return the medians of metrics.jsonl over the steady steps; of memory and loss, of all."""
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


def chosen(args: argparse.Namespace) -> Iterator[Case]:
    """The most telling first: all configurations of a batch size and mode, before the next of these."""
    for batch, mode, config in itertools.product(args.batches, args.modes, args.configs):
        yield Case("titanlite", config, mode == "compile", batch)


def arguments(
    argv: list[str] | None,
    doc: str | None = __doc__,
    configs: Sequence[str] = harness.CONFIGS,
    modes: Sequence[str] = cases.MODES,
    batches: Sequence[int] = (1, 2),
) -> argparse.Namespace:
    """Read the command line of ``doc``'s script; the others are what is run by default."""
    parser = harness.gpu_parser(doc)
    cases.add_options(parser, configs, modes, batches)
    parser.add_argument("--windows", type=int, default=4, help=f"measured windows of {WINDOW} steps each")
    args, options_of_trainer = parser.parse_known_args(argv)
    args.options = options_of_trainer
    cases.check(parser, args)
    return args


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    rows: list[dict[str, Any]] = []
    for runs in cases.in_turn(chosen(args), args, train):
        rows = [cases.row_of(case, done, args, "first_loss", "loss") for case, done in runs.items()]
        rows = [{**row, "steps": steps(args)} for row in rows]
        cases.add_ratios(rows)
        results.save("train", rows, args)
    columns = ("config", "compile", "batch", "tps", "mfu_pct", "peak_memory_gib", "loss")
    print(harness.show(rows, (*columns, "speedup_over_bf16", "memory_over_bf16")))
    return 0 if any(row["tps"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
