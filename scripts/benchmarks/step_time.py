"""Fit the constants of the cost model (titanlite/plan/time.py) to published runs, and hold every prediction against
every published value.

    python scripts/benchmarks/step_time.py --output docs/benchmarks/step_time.json

The constants are fitted to the logarithm of tokens per second, with a weak pull to the values before the fit
(``PRIOR``). Small errors count by their squares, large ones by their size, so that a device whose assumed ceilings are
wrong does not move the constants of all others. ``left_out`` is the prediction with constants that are fitted to the
other tables only. Runs with ``fit = false`` in published_runs.toml are never fitted.
"""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import harness
import numpy as np
import results
import tomli

from titanlite.config import load_config
from titanlite.models.spec import get_model_spec
from titanlite.plan.constants import FITTED, PRIOR, Constants
from titanlite.plan.devices import Device, find_device
from titanlite.plan.layout_memory import reserved_gib
from titanlite.plan.time import step_time
from titanlite.plan.work import Work, work_of

RUNS = Path(__file__).with_name("published_runs.toml")
PULL = 0.3  # weight of ln(constant / prior), where a residual of ln(tps) has weight 1
TOLERATED = 0.05  # of ln(tps): runs of one configuration on other days and machines differ by about as much


@dataclass
class Run:
    """A published run. ``about`` is its entry in the file."""

    about: dict[str, Any]
    work: Work

    @property
    def device(self) -> Device:
        return replace(find_device(self.about["device"]), **self.about.get("cluster", {}))

    def tps(self, constants: Constants) -> float:
        seconds = step_time(self.work, self.device, constants).seconds
        return self.work.tokens_per_device / seconds


def read_runs() -> list[Run]:
    runs = []
    for about in tomli.loads(RUNS.read_text(encoding="utf-8"))["run"]:
        family = about.get("model", "llama3")
        base = [f"--model.name={family}", f"--model.flavor={about['flavor']}", "--training.seq_len=8192"]
        config = load_config([*base, *about["options"]])
        flavor = get_model_spec(family).flavor(about["flavor"])
        args = flavor.configured(0, config.training.seq_len)
        runs.append(Run(about, as_published(work_of(config, args, about["gpus"]))))
    return runs


def as_published(work: Work) -> Work:
    """Return the work as torchao does it, which the published runs used: under tensor parallelism it gathers
    activations in float8 with the recipe tensorwise alone, and titanlite with rowwise too."""
    if work.cost is None or not work.cost.row_scales:
        return work
    return replace(work, cost=replace(work.cost, casts_shards=False))


def fit(runs: Sequence[Run]) -> Constants:
    """Fit the logarithms of the constants: Gauss-Newton with Levenberg's damping, where each residual beyond
    :data:`TOLERATED` has the weight that makes it count by its size instead of its square (Huber 1964)."""
    prior, count = np.log(np.array(PRIOR)), len(runs)

    def residuals(x: np.ndarray) -> np.ndarray:
        constants = Constants(*np.exp(x))
        return np.array([math.log(run.tps(constants) / run.about["tps"]) for run in runs] + [*(PULL * (x - prior))])

    def loss(r: np.ndarray) -> float:
        size = np.abs(r[:count])
        of_runs = np.where(size <= TOLERATED, size**2, 2 * TOLERATED * size - TOLERATED**2)
        return float(of_runs.sum() + (r[count:] ** 2).sum())

    x, damping = prior.copy(), 1e-2
    r = residuals(x)
    for _ in range(100):
        jacobian = np.stack([(residuals(x + 1e-5 * e) - r) / 1e-5 for e in np.eye(len(x))], axis=1)
        weights = np.ones(len(r))
        weights[:count] = np.minimum(1, TOLERATED / np.maximum(np.abs(r[:count]), 1e-9))
        weighted = jacobian.T * weights
        step = np.linalg.solve(weighted @ jacobian + damping * np.eye(len(x)), -weighted @ r)
        after = residuals(x + step)
        if loss(after) < loss(r):
            x, r, damping = x + step, after, damping / 3
        else:
            damping *= 4
        if np.abs(step).max() < 1e-6:
            break
    return Constants(*(round(float(value), 4) for value in np.exp(x)))


def predictions(runs: Sequence[Run]) -> tuple[Constants, list[dict[str, Any]]]:
    fitted = [run for run in runs if run.about["fit"]]
    constants = fit(fitted)
    others = {
        table: fit([run for run in fitted if run.about["table"] != table])
        for table in dict.fromkeys(run.about["table"] for run in fitted)
    }
    rows = []
    for run in runs:
        about = run.about
        row = {"system": "torchtitan+torchao", **{k: about[k] for k in ("table", "name", "source", "device", "gpus")}}
        row |= {"fitted": about["fit"], "published_tps": about["tps"]}
        used = {"all": constants, "left_out": others.get(about["table"], constants)}
        for name, chosen in used.items():
            tps = run.tps(chosen)
            row |= {f"{name}_tps": round(tps, 1), f"{name}_error_pct": round(100 * (tps / about["tps"] - 1), 1)}
        if "memory_gib" in about:
            memory = reserved_gib(run.work).total
            error = 100 * (memory / about["memory_gib"] - 1)
            row |= {"published_gib": about["memory_gib"], "gib": round(memory, 2), "memory_error_pct": round(error, 1)}
        rows.append(row)
    return constants, rows


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Predicted against published tokens per second, each table left out of its fit."""
    pyplot = harness.pyplot()
    if pyplot is None:
        return
    figure, axes = pyplot.subplots(figsize=(7, 6), layout="constrained")
    for table in dict.fromkeys(row["table"] for row in rows):
        of_table = [row for row in rows if row["table"] == table]
        points = [row["published_tps"] for row in of_table], [row["left_out_tps"] for row in of_table]
        axes.plot(
            *points,
            "o" if of_table[0]["fitted"] else "x",
            label=table + ("" if of_table[0]["fitted"] else " (never fitted)"),
        )
    limits = [10, 20000]
    axes.plot(limits, limits, color="gray", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="published tokens/s per device", ylabel="predicted, table left out")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def main() -> int:
    args = harness.parser(__doc__).parse_args()
    constants, rows = predictions(read_runs())
    columns = ("table", "name", "published_tps", "all_tps", "all_error_pct", "left_out_error_pct", "memory_error_pct")
    print(harness.show([{**dict.fromkeys(columns, ""), **row} for row in rows], columns))
    errors = [abs(row["left_out_error_pct"]) for row in rows if row["fitted"]]
    print(f"left out: median {statistics.median(errors):.1f}%, at most {max(errors):.1f}%")
    print(f"fitted: {constants}")
    if constants != FITTED:
        print("titanlite/plan/constants.py has other constants", file=sys.stderr)
    results.save("step_time", rows, args, constants=constants._asdict())
    if args.out is not None:
        draw(rows, args.out.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
