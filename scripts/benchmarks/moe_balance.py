"""The balance of experts with the bias update and without it, and the loss of both beside that of a dense model that
computes with as many parameters for each token.

    python scripts/benchmarks/moe_balance.py --output docs/benchmarks/moe_balance.json

Each run is the trainer's own command on the debug model of deepseek_v3, on Python's standard library. Runs of the same
seed have the same data, and with experts the same initial weights. The share is that of the tokens of a layer which its
most loaded expert has in a step: the largest of all layers, averaged over the steps after --settled. Losses (the mean
over the last steps) are compared in pairs, with a 95% interval from Student's t over the seeds. Beside the result file
goes a picture, where matplotlib is installed. The file is written after each run. Options of the trainer may follow.
"""

from __future__ import annotations

import itertools
import statistics
import sys
from pathlib import Path
from typing import Any

import harness
import results
from loss_parity import paired_difference

_EXPERTS = ["--model.name=deepseek_v3"]
CONFIGS = {
    "bias": [*_EXPERTS, "--experts.bias_update_rate=0.01"],  # DeepSeek-V3's 0.001 is for many thousand steps
    "no bias": [*_EXPERTS, "--experts.bias_update_rate=0"],
    "dense": [
        "--experimental.custom_import=scripts.benchmarks.benchmark_models",
        "--model.name=deepseek_v3_benchmark",
        "--model.flavor=dense",
    ],
}


def train(config: str, seed: int, options: list[str]) -> dict[str, list[float]]:
    """The loss of every step of one run and, with experts, the largest share and the mean share."""
    given = [f"--training.seed={seed}", "--metrics.log_freq=1", "--metrics.enable_tensorboard=false", *CONFIGS[config]]
    debug_model = f"--job.config_file={harness.ROOT / 'train_configs' / 'debug_model.toml'}"
    with harness.trained([debug_model, *given, *options]) as (child, run_folder):
        if child.status != 0:
            raise RuntimeError(f"{config}, seed {seed}: {child.why()}")
        rows = harness.metrics_of(run_folder)
    keys = ("loss", "expert_largest_share", "expert_mean_share")
    return {key: [row[key] for row in rows] for key in keys if key in rows[0]}


def rows_of(runs: dict[str, list[dict[str, list[float]]]], last: int, settled: int) -> list[dict[str, Any]]:
    """A row for each configuration that ran, compared with the dense model where both have two seeds or more."""
    final = {config: [statistics.mean(run["loss"][-last:]) for run in many] for config, many in runs.items()}
    rows: list[dict[str, Any]] = []
    for config, many in runs.items():
        if not many:
            continue
        row: dict[str, Any] = {"system": "titanlite", "config": config, "steps": len(many[0]["loss"])}
        row |= {"final_loss": final[config], "losses": [run["loss"] for run in many]}
        if "expert_largest_share" in many[0]:
            shares = [run["expert_largest_share"] for run in many]
            row |= {
                "mean_share": many[0]["expert_mean_share"][0],
                "largest_share": [statistics.mean(share[settled:]) for share in shares],
                "largest_shares": shares,
            }
        both = min(len(final[config]), len(final["dense"]))
        if config != "dense" and both > 1:
            mean, half = paired_difference(final[config][:both], final["dense"][:both])
            row |= {"difference_from_dense_pct": mean, "interval_95_pct": [mean - half, mean + half]}
        rows.append(row)
    return rows


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Above the largest share of every seed, below the loss, averaged over the seeds."""
    pyplot = harness.pyplot()
    if pyplot is None:
        return
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 7), sharex=True)
    for number, row in enumerate(rows):
        steps, color = range(1, row["steps"] + 1), f"C{number}"
        for seed, shares in enumerate(row.get("largest_shares", [])):
            above.plot(steps, shares, color=color, linewidth=0.8, label=None if seed else row["config"])
        mean = [statistics.mean(step) for step in zip(*row["losses"], strict=True)]
        below.plot(steps, mean, color=color, linewidth=1, label=row["config"])
    balanced = next((row["mean_share"] for row in rows if "mean_share" in row), None)
    if balanced is not None:
        above.axhline(balanced, color="black", linewidth=0.8, linestyle=":", label="equal load")
    above.set_ylabel("share of the most loaded expert")
    above.legend()
    below.set_ylabel("loss (nats)")
    below.set_xlabel("step")
    below.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1 to this number, from 1 to 10")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--settled", type=int, default=100, help="steps before the share counts")
    parser.add_argument("--last", type=int, default=20, help="steps that the final loss is the mean of")
    args, options = parser.parse_known_args()
    options = [f"--training.steps={args.steps}", *options]
    runs: dict[str, list[dict[str, list[float]]]] = {config: [] for config in CONFIGS}
    for seed, config in itertools.product(range(1, args.seeds + 1), CONFIGS):
        runs[config].append(train(config, seed, options))
        rows = rows_of(runs, args.last, args.settled)
        row = next(row for row in rows if row["config"] == config)
        share = f", largest share {row['largest_share'][-1]:.1%}" if "largest_share" in row else ""
        print(f"seed {seed}, {config}: loss {row['final_loss'][-1]:.4f}{share}", flush=True)
        results.save("moe_balance", rows, args, "cpu", options=options)
    for row in rows:
        if "difference_from_dense_pct" in row:
            low, high = row["interval_95_pct"]
            shown = f"{row['difference_from_dense_pct']:+.2f}% of its loss, 95% interval {low:+.2f}% to {high:+.2f}%"
            print(f"{row['config']} against the dense model: {shown}")
    if args.out:
        draw(rows, args.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
