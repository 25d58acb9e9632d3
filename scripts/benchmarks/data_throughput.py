"""Measure the data pipeline alone: tokens per second of one process, and how many times that is what a run needs.

    python scripts/benchmarks/data_throughput.py --metrics outputs/metrics.jsonl

The settings are the debug model's (seq_len 256, 8 sequences a step), so the ratio to a debug run's ``tps`` says how
far the data are from holding training back.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import harness
import results

from titanlite.data import DataLoader, build_source, load_tokenizer
from titanlite.errors import ConfigError

SEQ_LEN = 256
BATCH = 8
WINDOWS = 7


def measure(dataset: str, path: str | None, tokenizer_path: str, window_s: float) -> float:
    """Median tokens per second over windows of ``window_s`` seconds each, after one window of warm-up."""
    source = build_source(dataset, path=path, seed=0)
    loader = DataLoader(
        source,
        load_tokenizer(tokenizer_path),
        seq_len=SEQ_LEN,
        global_batch_size=BATCH,
        local_batch_size=BATCH,
        dp_rank=0,
        dp_degree=1,
    )
    try:
        rates = [_window(loader, window_s) for _ in range(WINDOWS + 1)]
    finally:
        loader.close()
    return statistics.median(rates[1:])


def _window(loader: DataLoader, window_s: float) -> float:
    tokens = 0
    begin = time.perf_counter()
    while (elapsed := time.perf_counter() - begin) < window_s:
        tokens += next(loader).inputs.numel()
    return tokens / elapsed


def run_tps(metrics: Path) -> float:
    """The median ``tps`` of a run, without its first row, whose window includes compilation.

    Raises:
        ConfigError: the file cannot be read, or has fewer than two rows with ``tps``.
    """
    try:
        rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"--metrics {metrics}: cannot be read ({error}); give a run's metrics.jsonl") from error
    rates = [row["tps"] for row in rows if row.get("tps") is not None][1:]
    if not rates:
        raise ConfigError(f"--metrics {metrics}: needs at least two rows with tps; let the run go on for longer")
    return statistics.median(rates)


def main(argv: list[str] | None = None) -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--dataset", default="pystdlib", help="as training.dataset")
    parser.add_argument("--dataset_path", help="as training.dataset_path")
    parser.add_argument("--tokenizer_path", default="", help="as model.tokenizer_path")
    parser.add_argument("--window_s", type=float, default=1.0, help=f"seconds of each of the {WINDOWS} windows")
    parser.add_argument("--metrics", type=Path, help="metrics.jsonl of a run on one device to compare with")
    args = parser.parse_args(argv)
    try:
        needed = run_tps(args.metrics) if args.metrics else None
        rate = measure(args.dataset, args.dataset_path, args.tokenizer_path, args.window_s)
    except ConfigError as error:
        print(f"data_throughput.py: {error}", file=sys.stderr)
        return 2
    result: dict[str, Any] = {
        "system": "titanlite",
        "config": args.dataset,
        "seq_len": SEQ_LEN,
        "batch": BATCH,
        "tokens_per_s": round(rate),
        "run_tps": needed,
        "ratio": round(rate / needed, 2) if needed else None,
    }
    print(
        f"{args.dataset}: {rate:,.0f} tokens/s" + (f", {rate / needed:.1f} x the run's {needed:,.0f}" if needed else "")
    )
    results.save("data_throughput", [result], args)
    return 0


if __name__ == "__main__":
    sys.exit(main())
