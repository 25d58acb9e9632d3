"""The step time that a plan predicts for this machine's CPU, against the trainer's.

    python scripts/benchmarks/plan_cpu.py --out docs/benchmarks/plan_cpu.json

A round of a case times the operators of its step, each alone and in all processes at once
(titanlite/doctor/cpu_time.py), and then runs the trainer by the launcher. Rounds alternate the two, so that both see
the machine in the same state; both figures are medians over the rounds, the trainer's of the medians over its steps.
The first two steps are left out. On an idle machine of two processors it takes about 15 minutes. Options of the trainer
may follow.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import harness
import results

from titanlite.config import load_config
from titanlite.doctor.cpu_time import CpuTime, plan_cpu

FLAVORS = ("debugmodel", "20M", "100M")
PROCESSES = (1, 2)
WARM_UP = 2  # steps
SECONDS = 15  # of a run of the trainer, without its start
LEAST, MOST = 6, 60  # steps of it
TOML = harness.ROOT / "train_configs" / "debug_model.toml"


def options_of(flavor: str, given: list[str]) -> list[str]:
    return [f"--model.flavor={flavor}", "--metrics.log_freq=1", "--checkpoint.keep_model=false", *given]


def measured(options: list[str], processes: int, steps: int) -> float:
    """Return the median seconds of a step of the trainer."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "titanlite.commands", "train", f"--job.config_file={TOML}", *options]
        command += [
            f"--job.dump_folder={folder}/run",
            f"--training.steps={steps}",
            "--metrics.enable_tensorboard=false",
        ]
        environment = {**os.environ, "NGPU": str(processes), "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder, check=False)
        if done.returncode:
            raise SystemExit(f"the trainer ended with status {done.returncode}:\n{done.stdout}{done.stderr}")
        rows = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    config = load_config(options, str(TOML))
    tokens = config.training.local_batch_size * config.training.seq_len  # of each process
    return statistics.median(tokens / row["tps"] for row in rows[WARM_UP:])


def run_case(flavor: str, processes: int, rounds: int, given: list[str]) -> dict[str, Any]:
    options = options_of(flavor, given)
    config = load_config(options, str(TOML))
    predictions: list[CpuTime] = []
    times: list[float] = []
    for _ in range(rounds):
        predictions.append(plan_cpu(config, processes).time)
        steps = WARM_UP + min(MOST, max(LEAST, round(SECONDS / predictions[-1].seconds)))
        times.append(measured(options, processes, steps))
    predicted, step = statistics.median(p.seconds for p in predictions), statistics.median(times)
    middle = min(predictions, key=lambda p: abs(p.seconds - predicted))
    training = config.training
    row = {"system": "titanlite", "config": "bf16", "flavor": flavor, "processes": processes}
    row |= {"batch": training.local_batch_size, "seq_len": training.seq_len, "rounds": rounds}
    row |= {"predicted_ms": round(1e3 * predicted, 2), "step_ms": round(1e3 * step, 2)}
    row |= {"tps": round(training.local_batch_size * training.seq_len / step, 1)}
    row |= {"error_pct": round(100 * (predicted / step - 1), 1)}
    parts = ("matmuls", "attention", "others", "host", "communication")
    row |= {f"{name}_ms": round(1e3 * getattr(middle, name), 2) for name in parts}
    return {**row, "not_timed": list(middle.failed)}


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--flavors", type=harness.words, default=[*FLAVORS])
    parser.add_argument("--processes", type=harness.numbers, default=[*PROCESSES])
    parser.add_argument("--rounds", type=int, default=3)
    args, given = parser.parse_known_args()
    rows = []
    for flavor in args.flavors:
        for processes in args.processes:
            rows.append(run_case(flavor, processes, args.rounds, given))
            print(json.dumps(rows[-1]), flush=True)
    results.save("plan_cpu", rows, args, kind="cpu")
    return 0


if __name__ == "__main__":
    sys.exit(main())
