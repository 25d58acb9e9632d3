"""What activation checkpointing saves and costs on one device: memory and tokens per second of every mode, eager and
compiled, in bf16 and float8.

    python scripts/benchmarks/activation_checkpoint.py --output docs/benchmarks/activation_checkpoint.json \
        --model.flavor=1B --training.seq_len=8192 --training.local_batch_size=1

Each line is a run of the trainer's own command; further options go to it. Peak memory is the highest of the steady
steps, tokens per second their median. Memory on the CPU is the whole process's, so only a GPU's tells the modes apart.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import results

ROOT = Path(__file__).parents[2]
MODES = {
    "none": [],
    "selective 2": ["--activation_checkpoint.selective_ac_option=2"],
    "selective op": ["--activation_checkpoint.selective_ac_option=op"],
    "full": [],
}
CONFIGS = ["bf16", "tensorwise", "rowwise"]


def train(config: str, mode: str, compiled: bool, options: list[str]) -> dict[str, Any]:
    """One run; what its steady steps had, or why it failed."""
    given = [f"--activation_checkpoint.mode={mode.split()[0]}", *MODES[mode], *options]
    if compiled:
        given.append("--training.compile")
    if config != "bf16":
        given += ["--model.converters=float8", f"--float8.recipe_name={config}"]
    with tempfile.TemporaryDirectory() as folder:
        fixed = [f"--job.dump_folder={folder}", "--metrics.log_freq=1", "--metrics.enable_tensorboard=false"]
        command = [sys.executable, "-m", "titanlite.commands", "train", "--training.seed=1", *fixed, *given]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        row: dict[str, Any] = {"system": "titanlite", "config": config, "activation_checkpoint": mode}
        row["compile"] = compiled
        if done.returncode:
            return {**row, "failed": done.stderr.strip().splitlines()[-1:]}
        steps = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    steady = steps[len(steps) // 2 :]  # past compilation and warm-up
    mfu = [step["mfu"] for step in steady if step["mfu"] is not None]
    return {
        **row,
        "tps": statistics.median(step["tps"] for step in steady),
        "mfu_pct": statistics.median(mfu) if mfu else None,
        "peak_memory_gib": max(step["memory_gib"] for step in steady),
        "last_loss": steps[-1]["loss"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10, help="of each run; the first half is warm-up")
    parser.add_argument("--output", type=Path, help="write the results here")
    args, options = parser.parse_known_args()
    rows = []
    for config, compiled, mode in itertools.product(CONFIGS, (False, True), MODES):
        rows.append(train(config, mode, compiled, [f"--training.steps={args.steps}", *options]))
        print(json.dumps(rows[-1]), flush=True)
    if args.output:
        results.write("activation_checkpoint", rows, args.output)
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())
