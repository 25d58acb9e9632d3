"""A comparison of what a model learns in low precision and in bf16: the same training runs in bf16, with each recipe of
float8, int8 and mxfp8, and with moments of low precision.

    python scripts/benchmarks/loss_parity.py --output docs/benchmarks/loss_parity.json
    python scripts/benchmarks/loss_parity.py --output loss_parity_quantized.json --configs="bf16,int8 rowwise"

Each run is the trainer's own command on the debug model, at a lower learning rate than its file's: at that one, runs
that differ by rounding alone end percents apart, and nothing finer could be seen. Runs of the same seed have the same
initial weights and the same data, so that their final losses (the mean over the last steps) are compared in pairs: the
relative difference from bf16, averaged over the seeds, with its 95% interval from Student's t. float32 runs along as a
control: what it differs by is what rounding does to a run, whichever way. Beside the result file goes a picture of the
loss curves, where matplotlib is installed. The file is written after each run, and --resume goes on from it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import harness
import results

CONFIGS = {
    "bf16": [],
    "float32": ["--training.mixed_precision_param=float32"],
    **{recipe: ["--model.converters=float8", f"--float8.recipe_name={recipe}"] for recipe in harness.RECIPES},
    **{
        f"int8 {recipe}": ["--model.converters=int8", f"--int8.recipe_name={recipe}"]
        for recipe in ("rowwise", "rowwise_with_gw_hp", "forward_only", "weights")
    },
    "int8 rowwise with output": ["--model.converters=int8", "--int8.filter_fqns="],
    **{recipe: ["--model.converters=mx", f"--mx.recipe_name={recipe}"] for recipe in ("mxfp8", "mxfp8_with_gw_hp")},
    **{f"moments in {dtype}": [f"--optimizer.moments={dtype}"] for dtype in ("bfloat16", "float8_e4m3fn")},
}
# The 97.5% quantile of Student's t by degrees of freedom: what a mean of n differences is multiplied with for 95%.
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def train(config: str, seed: int, options: list[str]) -> list[float]:
    """The loss of every step of one run."""
    given = [f"--training.seed={seed}", "--metrics.log_freq=1", "--metrics.enable_tensorboard=false", *CONFIGS[config]]
    debug_model = f"--job.config_file={harness.ROOT / 'train_configs' / 'debug_model.toml'}"
    with harness.trained([debug_model, *given, *options]) as (child, run_folder):
        if child.status != 0:
            raise RuntimeError(f"{config}, seed {seed}: {child.why()}")
        return [row["loss"] for row in harness.metrics_of(run_folder)]


def paired_difference(losses: list[float], reference: list[float]) -> tuple[float, float]:
    """The mean relative difference over the seeds in percent, and the half width of its 95% interval."""
    differences = [100 * (a - b) / b for a, b in zip(losses, reference, strict=True)]
    spread = statistics.stdev(differences) / math.sqrt(len(differences))
    return statistics.mean(differences), T_975[len(differences) - 1] * spread


def draw(curves: dict[str, list[list[float]]], path: Path) -> None:
    """The curves, averaged over the seeds, and below them the difference from bf16."""
    pyplot = harness.pyplot()
    if pyplot is None:
        return
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(8, 7), sharex=True, height_ratios=(2, 1))
    mean = {
        config: [statistics.mean(step) for step in zip(*runs, strict=True)] for config, runs in curves.items() if runs
    }
    for config, losses in mean.items():
        steps = range(1, len(losses) + 1)
        above.plot(steps, losses, label=config, linewidth=1)
        difference = [100 * (a - b) / b for a, b in zip(losses, mean["bf16"], strict=True)]
        below.plot(steps, difference, label=config, linewidth=1)
    above.set_ylabel("loss (nats)")
    above.legend()
    below.set_ylabel("difference from bf16 (%)")
    below.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def known(path: Path | None, options: list[str], parser: argparse.ArgumentParser) -> dict[str, list[list[float]]]:
    """The losses in an earlier result file, of runs with the same options."""
    losses: dict[str, list[list[float]]] = {config: [] for config in CONFIGS}
    if path is None or not path.exists():
        return losses
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["options"] != options:
        parser.error(f"--resume: {path} is of runs with {content['options']}, and these would be with {options}")
    return losses | {row["config"]: row["losses"] for row in content["results"]}


def rows_of(curves: dict[str, list[list[float]]], last: int) -> list[dict[str, Any]]:
    """A row for each configuration that ran; compared with bf16 over the seeds that both have, if those are two."""
    final = {config: [statistics.mean(run[-last:]) for run in runs] for config, runs in curves.items() if runs}
    rows: list[dict[str, Any]] = []
    for config, losses in final.items():
        row: dict[str, Any] = {"system": "titanlite", "config": config, "steps": len(curves[config][0])}
        row |= {"final_loss": losses, "mean_final_loss": statistics.mean(losses), "losses": curves[config]}
        both = min(len(losses), len(final["bf16"]))
        if both > 1:
            row["stdev_final_loss"] = statistics.stdev(losses)
        if config != "bf16" and both > 1:
            mean, half = paired_difference(losses[:both], final["bf16"][:both])
            row |= {"difference_pct": mean, "interval_95_pct": [mean - half, mean + half]}
        rows.append(row)
    return rows


def main() -> int:
    parser = harness.parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="seeds 1 to this number, from 2 to 10")
    parser.add_argument("--configs", help="those to run, separated by commas; by default all")
    parser.add_argument("--last", type=int, default=20, help="steps that the final loss is the mean of")
    parser.add_argument("--lr", type=float, default=5e-4, help="the learning rate")
    parser.add_argument("--seconds", type=float, help="begin no run that would end after this time")
    parser.add_argument("--resume", type=Path, metavar="FILE", help="a result to go on from: its runs are not repeated")
    args, options = parser.parse_known_args()
    options = [f"--optimizer.lr={args.lr}", *options]
    curves = known(args.resume, options, parser)
    budget = harness.Budget(args.seconds)
    configs = args.configs.split(",") if args.configs else list(CONFIGS)
    if unknown := [config for config in configs if config not in CONFIGS]:
        parser.error(f"--configs: {', '.join(unknown)}: known are {', '.join(CONFIGS)}")
    runs = itertools.product(range(1, args.seeds + 1), configs)
    missing = [(seed, config) for seed, config in runs if len(curves[config]) < seed]
    for seed, config in budget.within(missing, lambda run: f"seed {run[0]}, {run[1]}"):
        curves[config].append(train(config, seed, options))
        print(f"seed {seed}, {config}: {statistics.mean(curves[config][-1][-args.last :]):.4f}", flush=True)
        results.save(args.out.stem if args.out else "", rows_of(curves, args.last), args, options=options)
    for row in rows_of(curves, args.last):
        if "difference_pct" in row:
            low, high = row["interval_95_pct"]
            shown = f"{row['difference_pct']:+.3f}% of bf16's loss, 95% interval {low:+.3f}% to {high:+.3f}%"
            print(f"{row['config']}: {shown}")
    budget.print_left_out()
    if args.out and not budget.left_out:
        draw(curves, args.out.with_suffix(".png"))
    return int(bool(budget.left_out))


if __name__ == "__main__":
    sys.exit(main())
